"""What a training step spends outside the model: data, logging, seeding, freeing; of the first trial of a study.

python experiments/benchmarks/step_overhead.py [STUDY.yaml] [STEPS]

Inside the model are its forward pass, the backward pass, clipping and the optimizer; all else of the loop is outside.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vlmzoo.config import SweepConfig, load
from vlmzoo.sweeps.plan import resolve
from vlmzoo.sweeps.trial import new_model
from vlmzoo.training import log
from vlmzoo.training.run import train

WARM_UP = 4  # steps left out: the first one counts FLOPs, and memory is not yet as it stays


class ModelClock:
    """Counts the seconds that this process spends inside the model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.seconds = 0.0
        model.forward = self._timed(model.forward)
        torch.Tensor.backward = self._timed(torch.Tensor.backward)
        torch.nn.utils.clip_grad_norm_ = self._timed(torch.nn.utils.clip_grad_norm_)
        torch.optim.AdamW.step = self._timed(torch.optim.AdamW.step)
        torch.optim.AdamW.zero_grad = self._timed(torch.optim.AdamW.zero_grad)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds += time.perf_counter() - began
            return result

        return call


def after_each_step(mark: Callable[[dict[str, Any]], None]) -> None:
    """Has `mark` called with what the training loop writes down of a step, as the last thing of that step."""
    write = log.Log.write

    def marked(self: log.Log, line: dict[str, Any]) -> None:
        write(self, line)
        mark(line)

    log.Log.write = marked


def main(study: str = "experiments/connectors.yaml", steps: str = "100") -> None:
    torch.set_num_threads(1)  # as in a sweep of as many workers as cores
    run = next(run for run in resolve(load(SweepConfig, Path(study))).trials() if run.sees == "image")
    stages = {name: replace(stage, steps=int(steps)) for name, stage in run.stages.items()}
    run = replace(run, stages=stages, checkpoint_every=10**9)
    model, processor = new_model(run)
    clock, marks = ModelClock(model), []
    after_each_step(lambda line: marks.append((line["stage"], time.perf_counter(), clock.seconds)))
    with tempfile.TemporaryDirectory() as folder:
        train(model, processor, run, Path(folder), Path(folder, "cache"))
    print(f"{run.connector.name}, {run.encoder.name}, {run.llm.name}")
    for name in stages:
        times = [(at, spent) for stage, at, spent in marks if stage == name][WARM_UP:-1]  # a checkpoint ends the stage
        (begin, before), (end, after) = times[0], times[-1]
        whole, model_part, count = end - begin, after - before, len(times) - 1
        print(f"{name}: {1e3 * whole / count:.1f} ms a step, {100 * (1 - model_part / whole):.2f} % outside the model")


if __name__ == "__main__":
    main(*sys.argv[1:])
