"""One of several processes that share a run: `torchrun tests/training/together.py RUN.yaml OUT`.

The first one writes OUT/seen.json: how the weights of each stage were really held, and by how many processes.
KILLED_AT=2.7 kills it in the second stage before the run's eighth step; FULL_AT=1.3 fills the disk of the process of
rank 1 when it writes its fourth checkpoint.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from vlmzoo.config import RunConfig, load
from vlmzoo.sweeps.trial import run_trial
from vlmzoo.training import checkpoint
from vlmzoo.training import run as loop
from vlmzoo.training.engines import Engine


def held(engine: Engine) -> dict[str, Any]:
    parameters = list(engine.model.parameters())
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return {
        "processes": distributed.get_world_size(),
        "engine": type(engine).__name__,
        "module": type(engine.module).__name__,
        "trained": len(trained),
        "dtensors": sum(type(parameter).__name__ == "DTensor" for parameter in trained),
        "zero3": sum(hasattr(parameter, "ds_tensor") and parameter.numel() == 0 for parameter in trained),
        "ddp": isinstance(engine.module, nn.parallel.DistributedDataParallel),
        "optimizer": type(engine.optimizer).__name__,
        "vision": any(name.startswith("vision.") for name, _ in engine.model.named_parameters()),
    }


def main(config: str, out: str) -> None:
    seen: list[dict[str, Any]] = []
    make, take = loop.make_engine, loop.take_step

    def make_engine(*arguments: Any) -> Engine:
        engine = make(*arguments)
        seen.append(held(engine))
        return engine

    def take_step(*arguments: Any) -> Any:
        if str(len(seen)) + "." + str(len(taken)) == os.environ.get("KILLED_AT") and distributed.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        if not taken:
            print("takes its first step", flush=True)
        taken.append(None)
        return take(*arguments)

    save = checkpoint.save

    def save_on_full_disk(*arguments: Any) -> None:
        rank, _, number = os.environ.get("FULL_AT", "").partition(".")
        if rank == str(distributed.get_rank()) and number == str(len(saved)):
            checkpoint.save_file = torch.save = full  # DeepSpeed writes by itself
        saved.append(None)
        save(*arguments)

    def full(*arguments: Any, **named: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saved: list[None] = []
    taken: list[None] = []
    loop.make_engine, loop.take_step, checkpoint.save = make_engine, take_step, save_on_full_disk
    run_trial(load(RunConfig, Path(config)), Path(out), Path(out, "cache"))
    if os.environ["RANK"] == "0":
        Path(out, "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(*sys.argv[1:])
