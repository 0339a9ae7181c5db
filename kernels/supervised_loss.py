"""Cross-entropy of supervised positions, from hidden states: logits exist a chunk of rows at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2**28
"""Of a chunk's logits in float32. Fewer rows a chunk would read the weight more often than they multiply by it."""


def supervised_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    num_items: int | Tensor | None = None,
    rows: Tensor | None = None,
    ignore_index: int = -100,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Cross-entropy summed over supervised positions, over `num_items` where given; a scalar, at least float32.

    It equals, for an LLM whose logits are `F.linear(hidden, weight, bias)` and no more (no cap, no scale),
    `F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), reduction="sum", ignore_index=ignore_index)`.
    Other positions are never multiplied by the weight. Gradients come from the forward, where a chunk's logits are at
    hand: those of a frozen weight or bias, and all of them without grad, cost nothing. That of the weight is summed in
    float32 over chunks. Under autocast it multiplies in autocast's type. It can be differentiated once only.

    Args:
        hidden: (..., dim), aligned with labels: the caller shifts
        weight: (vocab, dim), `lm_head.weight`
        labels: (...), of the vocabulary or `ignore_index`. Without any that is supervised the loss is 0.
        bias: (vocab,)
        num_items: what the sum is divided by, one step's number of targets
        rows: (n,), where the supervised positions are among the flattened ones; None: looked up, which waits for the
            device. Those that `labels` ignores count nothing, so there may be more, to keep n the same.
        chunk_bytes: the most that a chunk's logits take in float32, though a chunk has a row at least

    Raises:
        ValueError: shapes or types that do not go together; on a CPU also labels outside of the vocabulary.
        RuntimeError: a backward with create_graph.
    """
    _check(hidden, weight, labels, bias)
    labels, padded = labels.flatten(), rows is not None
    if rows is None:
        rows = (labels != ignore_index).nonzero().squeeze(1)
    labels = labels[rows]
    if labels.device.type == "cpu":
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= len(weight)))]
        if len(wrong):
            raise ValueError(f"labels must be {ignore_index} or from 0 to {len(weight) - 1}, got {int(wrong[0])}")
    hidden, supervised = hidden.flatten(0, -2).index_select(0, rows), labels != ignore_index
    if padded:
        hidden, labels = hidden.masked_fill(~supervised[:, None], 0), labels.masked_fill(~supervised, 0)
    chunk = max(1, chunk_bytes // (4 * max(1, len(weight))))
    total = _sum(hidden, weight, bias, labels, supervised, chunk)  # pyright: ignore[reportCallIssue]
    return total if num_items is None else total / num_items


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None) -> None:
    if hidden.ndim < 2 or labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden (..., dim) and labels (...) must go together, got {tuple(hidden.shape)} and {tuple(labels.shape)}"
        )
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must be (vocab, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels must be torch.int64, got {labels.dtype}")
    if not torch.is_autocast_enabled(hidden.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.dtype != hidden.dtype:
                raise ValueError(f"{name} must be {hidden.dtype} as hidden is, got {tensor.dtype}")


@torch.compiler.disable  # unrolled by the number of chunks, it would be compiled anew for other numbers of targets
def _sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, supervised: Tensor, chunk: int) -> Tensor:
    return _Sum.apply(hidden, weight, bias, labels, supervised, chunk, torch.is_grad_enabled())


class _Sum(torch.autograd.Function):
    """Over rows (n, dim), with labels (n,) of the vocabulary and which of them count (n,), `chunk` at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        supervised: Tensor,
        chunk: int,
        with_grad: bool,  # in here it is always off
    ) -> Tensor:
        device = hidden.device.type
        dtype = hidden.dtype
        if torch.is_autocast_enabled(device) and dtype != torch.float64:
            dtype = torch.get_autocast_dtype(device)
        exact = torch.promote_types(dtype, torch.float32)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(tensor, dtype=kind) if with_grad and needed and tensor is not None else None
            for tensor, kind, needed in zip(
                (hidden, weight, bias), (dtype, exact, exact), ctx.needs_input_grad, strict=False
            )
        )
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        matrix, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        losses = hidden.new_empty(len(hidden), dtype=exact)
        with torch.autocast(device, enabled=False):
            for start in range(0, len(hidden), chunk):
                part = slice(start, start + chunk)
                rows, target = hidden[part].to(dtype), labels[part, None]
                logs = F.linear(rows, matrix, offset).log_softmax(-1, dtype=exact)
                found = logs.gather(1, target)
                losses[part] = -found[:, 0]
                if of_hidden is of_weight is of_bias is None:
                    continue
                logs.exp_().scatter_(1, target, found.expm1())  # now the slope of the loss in the logits
                slope = logs.to(dtype)
                if of_hidden is not None:
                    torch.mm(slope, matrix, out=of_hidden[part])
                if of_weight is not None and dtype == exact:
                    torch.addmm(of_weight, slope.T, rows, out=of_weight)
                elif of_weight is not None:
                    of_weight += slope.T @ rows
                if of_bias is not None:
                    of_bias += supervised[part].to(exact) @ logs
        return losses.masked_fill_(~supervised, 0).sum()

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph; torch's once_differentiable would give constants
            raise RuntimeError("supervised_loss can be differentiated once, not with create_graph=True")
        gradients = (
            None if found is None else torch.mul(found, slope, out=torch.empty_like(found, dtype=dtype))
            for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None
