"""Cross-entropy that holds one tensor like the logits beside them at a time, where PyTorch's holds three."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """`F.cross_entropy(logits.float(), labels, reduction="sum")`; of no rows 0.

    Args:
        logits: (rows, vocab), kept for the backward pass.
        labels: (rows,), of the vocabulary.
    """
    return _CrossEntropy.apply(logits, labels)  # pyright: ignore[reportReturnType]


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        ctx.save_for_backward(logits, labels)
        logs = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        return -logs.gather(1, labels[:, None]).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        logits, labels = ctx.saved_tensors
        share = logits.softmax(-1, dtype=slope.dtype)
        gradient = share * slope if torch.is_grad_enabled() else share.mul_(slope)  # the former with create_graph
        gradient.scatter_add_(1, labels[:, None], -slope.expand(len(labels), 1))
        return gradient.to(logits.dtype), None
