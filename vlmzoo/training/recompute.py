"""Activations that one elementwise operation gives back are computed again in the backward pass, not kept.

A SwiGLU layer keeps its gate, its values, the silu of the gate for their product, and the product for the matrix behind
it: the last two follow from the first two. RMSNorm keeps its input, and what that is divided to. It is the same
operation on the same numbers, so gradients are the same to the bit, whatever the model's code is.

Source: Korthikanti et al., Reducing Activation Recomputation in Large Transformer Models (2022), section 5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

FORMULAS: dict[str, Callable[[Any], Tensor]] = {
    "MulBackward0": lambda node: node._saved_self * node._saved_other,
    "SiluBackward0": lambda node: F.silu(node._saved_self),
    "GeluBackward0": lambda node: F.gelu(node._saved_self, approximate=node._saved_approximate),
}
"""What a node of the graph computed, from what it keeps itself."""


def elementwise_recomputed() -> AbstractContextManager[Any]:
    """Forward passes inside keep less for their backward pass, which may run outside.

    Raises, in the backward pass:
        RuntimeError: a tensor that was kept has been changed in place since.
    """
    return torch.autograd.graph.saved_tensors_hooks(_keep, lambda kept: kept.give_back())


def recomputed(value: Tensor) -> bool:
    """Whether a tensor that the backward pass needs would be computed again."""
    return isinstance(_keep(value), _Computed)


@dataclass(frozen=True)
class _Kept:
    value: Tensor
    version: int

    def give_back(self) -> Tensor:
        if self.value._version != self.version:  # torch itself does not look where there are hooks
            raise RuntimeError(f"a tensor of shape {tuple(self.value.shape)} that backward needs was changed in place")
        return self.value


@dataclass(frozen=True)
class _Computed:
    node: Any  # of the graph; it keeps what it computed from
    view: tuple[Sequence[int], Sequence[int], int] | None  # size, strides and offset, where it is one of the result

    def give_back(self) -> Tensor:
        value = FORMULAS[self.node.name()](self.node)
        return value if self.view is None else value.as_strided(*self.view)


def _keep(value: Tensor) -> _Kept | _Computed:
    base = value if value._base is None else value._base
    node: Any = base.grad_fn
    if node is None or node.name() not in FORMULAS or not all(_lasts(before) for before, _ in node.next_functions):
        return _Kept(value, value._version)
    return _Computed(node, None if base is value else (value.shape, value.stride(), int(value.storage_offset())))


def _lasts(factor: Any) -> bool:
    """Whether a node keeps it, and has it whenever it is asked for.

    One without a gradient is not kept by the other's node. A sharded weight is there when its own turn comes.
    """
    return factor is not None and factor.name() != "torch::autograd::AccumulateGrad"
