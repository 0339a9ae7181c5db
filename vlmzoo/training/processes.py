"""The processes that share a run: who they are, what each of them takes, and what they agree on."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

from vlmzoo.config import RunConfig

T = TypeVar("T")

PATIENCE = timedelta(hours=12)  # one process evaluates, or fills a cache, while the others wait
STARTERS = {"SLURM_STEP_NUM_TASKS": "srun", "OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpirun"}
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Processes:
    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def first(self) -> bool:
        """Whether this process writes what there is one of."""
        return self.rank == 0

    def micro_batches(self, step: Sequence[T], size: int | None) -> list[list[T]]:
        """What this process takes of a step, part by part; `size` is of one process, None: all at once.

        All processes take as many parts, and all of a step's n-th parts are neighbours in it.
        """
        share = (size or max(1, len(step) // self.world)) * self.world
        parts = []
        for start in range(0, len(step), share):
            part = step[start : start + share]
            own = len(part) // self.world
            parts.append(list(part[self.rank * own : (self.rank + 1) * own]))
        return parts

    def total(self, *values: float) -> list[float]:
        """Each value summed over all processes, in double precision."""
        if self.world == 1:
            return list(values)
        summed = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(summed)
        return summed.tolist()

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            distributed.barrier()


def check(run: RunConfig, processes: Processes) -> None:
    """Raises a ValueError where these processes cannot share this run."""
    world = processes.world
    if world == 1 and run.parallel != "ddp":
        raise ValueError(f"parallel {run.parallel!r}: expected several processes, started by torchrun; this is one")
    for name, stage in run.stages.items():
        if stage.steps == 0 or stage.epochs == 0:
            continue
        if stage.batch_size % world:
            raise ValueError(f"stages.{name}.batch_size: {stage.batch_size} does not divide among {world} processes")
        if run.parallel == "zero3" and world > 1 and "vision" in stage.lr:
            raise ValueError(
                f"stages.{name}.lr.vision: zero3 gathers the encoder's weights for each chunk of images, of which "
                f"processes have different numbers; expected parallel: fsdp2"
            )
        if run.parallel == "zero3" and world > 1 and stage.data.image_mode == "native":
            raise ValueError(
                f"stages.{name}.data.image_mode: zero3 gathers the connector's weights for each size of image, "
                f"of which processes have different numbers; expected square or pad, or parallel: fsdp2"
            )


def start(environment: Mapping[str, str] = os.environ) -> Processes:
    """This process among those that torchrun or `accelerate launch` started; one alone needs nothing.

    Raises:
        ValueError: several processes were started, but none was told of the others: each would train by itself.
    """
    world = int(environment.get("WORLD_SIZE", "1"))
    if world == 1:
        for name, starter in STARTERS.items():
            if int(environment.get(name) or "1") > 1 and "WORLD_SIZE" not in environment:
                raise ValueError(
                    f"{starter} started {environment[name]} processes that know nothing of one another, and each would "
                    f"train alone; expected one a node, which starts torchrun (docs/scale.md)"
                )
        if torch.cuda.is_available():
            return Processes(device=torch.device("cuda", torch.cuda.current_device()))
        return Processes()
    if missing := [name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in environment]:
        raise ValueError(f"WORLD_SIZE is {world}, but {missing[0]} is not set; expected a start by torchrun")
    rank, local = int(environment["RANK"]), int(environment["LOCAL_RANK"])
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a killed starter leaves nobody behind who writes
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ValueError(f"process {local} of this node has no GPU: it has {torch.cuda.device_count()}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if (found := distributed.get_world_size()) != world:
        raise ValueError(f"{found} processes found one another, WORLD_SIZE says {world}")
    return Processes(rank, world, device)
