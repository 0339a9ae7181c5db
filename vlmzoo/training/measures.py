"""What a step is measured by: gradient norms by part, seconds spent on data, rates, memory, and what share of the
device's speed the step makes use of."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

PROBE_SECONDS = 0.1  # of matrix products, once a process
PROBE_SIZE = {"cpu": 768, "cuda": 8192}


class Stopwatch:
    """Adds up the seconds spent inside."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.seconds += time.perf_counter() - self._began


def part_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Part -> the norm of its gradients, still on its device; a part that has none is left out."""
    gradients = {
        group["part"]: [parameter.grad for parameter in group["params"] if parameter.grad is not None]
        for group in optimizer.param_groups
    }
    return {part: nn.utils.get_total_norm(found) for part, found in gradients.items() if found}


def fetched(norms: Sequence[Any]) -> list[float]:
    """Norms as numbers, all at once: each fetch waits for a GPU. Those of sharded gradients are put together first."""
    whole = [norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]
    return torch.stack(whole).tolist()


def rates(line: Mapping[str, Any], first: Mapping[str, Any], peak: float) -> dict[str, float]:
    """What a line of metrics.jsonl comes to per second, data included.

    A step's FLOPs are those that were counted in its stage's first step, by the tokens that the LLM reads in each. They
    are what PyTorch ran: with `gradient_checkpointing` the second forward pass is among them, with a cache the encoder
    is not.

    Args:
        first: the line of the stage's first step; where it is of before all tokens were counted, no FLOPs are known.
        peak: the FLOP/s of all processes together, that `mfu` is a share of.
    """
    seconds = line["seconds"]
    found = {
        "tokens_per_second": line["all_tokens"] / seconds,
        "targets_per_second": line["tokens"] / seconds,
        "samples_per_second": line["samples"] / seconds,
    }
    if "all_tokens" in first:
        flops = first["flops"] * line["all_tokens"] / first["all_tokens"]
        found |= {"flops_per_second": flops / seconds, "mfu": flops / seconds / peak}
    return found


@lru_cache
def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few large square matrix products here and now, in a tenth of a second.

    It is what this process can reach on this device, with its threads and its neighbours, not what the maker says.
    """
    kind = torch.device(device).type
    size = PROBE_SIZE.get(kind, PROBE_SIZE["cuda"])
    # Neither random, which would move the run's generators, nor constant, on which GPUs draw less power and run faster.
    matrix = torch.arange(size * size, device=device).sin().to(dtype).view(size, size)
    began, fastest = time.perf_counter(), float("inf")
    torch.mm(matrix, matrix)  # warms up
    while fastest == float("inf") or time.perf_counter() - began < PROBE_SECONDS:
        _finish(kind)
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        _finish(kind)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * size**3 / fastest


def _finish(kind: str) -> None:
    if kind == "cuda":
        torch.cuda.synchronize()


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
