"""Rows put in place of embeddings, by an index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmzoo.kernels._device import obstacle

BACKENDS = ("auto", "torch", "triton")


def splice_rows(embeds: Tensor, rows: Tensor, index: Tensor, *, backend: str = "auto") -> Tensor:
    """`embeds` (batch, length, dim) with `rows[b, index[b, t]]` in place of `embeds[b, t]` where the index is not < 0.

    Never waits for the device. A row that several tokens take gets the sum of their gradients, the same bits at every
    call by Triton; one that none takes gets 0.

    Args:
        embeds: (batch, length, dim)
        rows: (batch, slots, dim), cast to the type of embeds
        index: (batch, length), int32 or int64, < 0: the token keeps its embedding. From `slots` on torch refuses it,
            as far as the device can; Triton writes NaN.
        backend: torch (gather and where) | triton (one pass each way) | auto: Triton on a GPU that can, else torch

    Raises:
        ValueError: shapes or types that do not go together, an unknown backend, or one that cannot run here.
    """
    _check(embeds, rows, index)
    if backend not in BACKENDS:
        raise ValueError(f"unknown splice backend {backend!r}; valid: {', '.join(BACKENDS)}")
    if backend == "triton" and (why := obstacle(embeds.device)) is not None:
        raise ValueError(f"splice backend 'triton' cannot run here: {why}")
    if backend == "triton" or (backend == "auto" and embeds.is_cuda and obstacle(embeds.device) is None):
        return _splice(embeds, rows, index)
    if rows.shape[1] == 0:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))  # gather wants a row to point at
    taken = rows.gather(1, index.clamp(min=0).long()[..., None].expand(-1, -1, rows.shape[-1])).to(embeds.dtype)
    return torch.where((index >= 0)[..., None], taken, embeds)


def _check(embeds: Tensor, rows: Tensor, index: Tensor) -> None:
    if embeds.ndim != 3:
        raise ValueError(f"embeds must be (batch, length, dim), got {tuple(embeds.shape)}")
    batch, length, dim = embeds.shape
    if rows.ndim != 3 or rows.shape[0] != batch or rows.shape[2] != dim:
        raise ValueError(f"rows must be ({batch}, slots, {dim}), got {tuple(rows.shape)}")
    if index.shape != (batch, length) or index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"index must be int32 or int64 ({batch}, {length}), got {index.dtype} {tuple(index.shape)}")
    if not (embeds.is_floating_point() and rows.is_floating_point()):
        raise ValueError(f"embeds and rows must be floating point, got {embeds.dtype} and {rows.dtype}")


@torch.library.custom_op("vlmzoo::splice_rows", mutates_args=())
def _splice(embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    from vlmzoo.kernels import _splice_triton

    return _splice_triton.forward(embeds, rows, index)


@_splice.register_fake
def _(embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return embeds.new_empty(embeds.shape)


@torch.library.custom_op("vlmzoo::splice_rows_backward", mutates_args=())
def _splice_backward(
    gradient: Tensor, index: Tensor, slots: int, rows_dtype: torch.dtype, for_embeds: bool, for_rows: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of embeds and rows; one that is not asked for is empty."""
    from vlmzoo.kernels import _splice_triton

    outputs = _gradients(gradient, slots, rows_dtype, for_embeds, for_rows)
    _splice_triton.backward(gradient, index, *outputs)
    return outputs


@_splice_backward.register_fake
def _(gradient: Tensor, index: Tensor, slots: int, rows_dtype: torch.dtype, for_embeds: bool, for_rows: bool):
    return _gradients(gradient, slots, rows_dtype, for_embeds, for_rows)


def _gradients(
    gradient: Tensor, slots: int, rows_dtype: torch.dtype, for_embeds: bool, for_rows: bool
) -> tuple[Tensor, Tensor]:
    batch, length, dim = gradient.shape
    of_embeds = gradient.new_empty(batch, length if for_embeds else 0, dim)
    return of_embeds, gradient.new_empty(batch, slots if for_rows else 0, dim, dtype=rows_dtype)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    _, rows, index = inputs
    ctx.save_for_backward(index)
    ctx.slots, ctx.rows_dtype = rows.shape[1], rows.dtype


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    (index,) = ctx.saved_tensors
    for_embeds, for_rows, _ = ctx.needs_input_grad
    of_embeds, of_rows = torch.ops.vlmzoo.splice_rows_backward(
        gradient, index, ctx.slots, ctx.rows_dtype, for_embeds, for_rows
    )
    return of_embeds if for_embeds else None, of_rows if for_rows else None, None


_splice.register_autograd(_backward, setup_context=_keep)
