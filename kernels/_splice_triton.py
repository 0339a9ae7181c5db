"""The kernels of `splice_rows`. Only this file of the two needs Triton.

Tiles are tokens, or slots, by features. Offsets of rows are 64-bit: batch * length * dim can pass 2^31. Sizes that
change from batch to batch are not specialized: each way in which 16 divides them would be compiled anew.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 4096
"""Elements a program moves: with 4 warps 32 a thread, four loads of 128 bits in flight in 16-bit types."""


@triton.jit
def cast(values, dtype: tl.constexpr):
    if values.dtype == dtype:
        return values
    return values.to(tl.float32).to(dtype)  # there is no direct way between the 16-bit types


@triton.jit
def exact(values):
    """For sums."""
    if values.dtype == tl.float64:
        return values
    return values.to(tl.float32)


@triton.jit(do_not_specialize=["count", "length", "slots"])
def splice_forward(
    embeds, rows, index, out, count, length, slots, dim,
    embeds_batch, embeds_row, rows_batch, rows_row,
    tile_rows: tl.constexpr, tile_cols: tl.constexpr,
):  # fmt: skip
    """Each token's row from where its index says."""
    token = tl.program_id(0) * tile_rows + tl.arange(0, tile_rows)
    col = tl.program_id(1) * tile_cols + tl.arange(0, tile_cols)[None, :]
    real = token < count
    slot = tl.load(index + token, mask=real, other=-1).to(tl.int64)
    batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
    from_embeds = (real & (slot < 0))[:, None] & (col < dim)
    from_rows = (real & (slot >= 0) & (slot < slots))[:, None] & (col < dim)
    text = tl.load(embeds + (batch * embeds_batch + place * embeds_row)[:, None] + col, mask=from_embeds)
    image = tl.load(rows + (batch * rows_batch + slot * rows_row)[:, None] + col, mask=from_rows, other=float("nan"))
    values = tl.where((slot < 0)[:, None], text, cast(image, out.dtype.element_ty))
    tl.store(out + token.to(tl.int64)[:, None] * dim + col, values, mask=real[:, None] & (col < dim))


@triton.jit(do_not_specialize=["count", "length", "slots", "slots_in_all"])
def splice_ends(index, ends, count, length, slots, slots_in_all, block: tl.constexpr):
    """The first and the last token that take each slot: `ends` holds length - 1 - first, then last; -1: none."""
    token = tl.program_id(0) * block + tl.arange(0, block)
    slot = tl.load(index + token, mask=token < count, other=-1)
    taken = (slot >= 0) & (slot < slots)
    place = token % length
    target = ends + (token // length) * slots + slot
    tl.atomic_max(target, length - 1 - place, mask=taken, sem="relaxed")
    tl.atomic_max(target + slots_in_all, place, mask=taken, sem="relaxed")


@triton.jit(do_not_specialize=["count", "length", "slots", "slots_in_all", "token_tiles"])
def splice_backward(
    gradient, index, ends, of_embeds, of_rows, count, length, slots, slots_in_all, dim, token_tiles,
    gradient_batch, gradient_row,
    tile_rows: tl.constexpr, tile_cols: tl.constexpr,
):  # fmt: skip
    """The first `token_tiles` programs write the gradient of embeds, the others that of rows."""
    program = tl.program_id(0)
    col = tl.program_id(1) * tile_cols + tl.arange(0, tile_cols)[None, :]
    if program < token_tiles:
        token = program * tile_rows + tl.arange(0, tile_rows)
        real = token < count
        slot = tl.load(index + token, mask=real, other=0)
        batch, place = (token // length).to(tl.int64), (token % length).to(tl.int64)
        source = gradient + (batch * gradient_batch + place * gradient_row)[:, None] + col
        values = tl.load(source, mask=(real & (slot < 0))[:, None] & (col < dim), other=0.0)
        tl.store(of_embeds + token.to(tl.int64)[:, None] * dim + col, values, mask=real[:, None] & (col < dim))
    else:
        row = (program - token_tiles) * tile_rows + tl.arange(0, tile_rows)  # slots, counted through the batch
        real = row < slots_in_all
        batch = (row // slots).to(tl.int64)
        first = length - 1 - tl.load(ends + row, mask=real, other=-1)
        last = tl.load(ends + slots_in_all + row, mask=real, other=-1)
        lines = gradient + (batch * gradient_batch)[:, None] + col
        line = (first.to(tl.int64) * gradient_row)[:, None]
        total = exact(tl.load(lines + line, mask=(last >= 0)[:, None] & (col < dim), other=0.0))
        longest = tl.max(tl.where(last >= 0, last - first, 0), 0)
        # More tokens than one take a slot: in their order, so the bits repeat.
        for step in range(1, longest + 1):  # pyright: ignore[reportOperatorIssue, reportArgumentType]
            other = first + step
            taken = tl.load(index + batch * length + other, mask=other <= last, other=-1)
            more = (other <= last) & (taken == row % slots)
            line = (other.to(tl.int64) * gradient_row)[:, None]
            total += exact(tl.load(lines + line, mask=more[:, None] & (col < dim), other=0.0))
        target = of_rows + row.to(tl.int64)[:, None] * dim + col
        tl.store(target, cast(total, of_rows.dtype.element_ty), mask=real[:, None] & (col < dim))


def forward(embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    embeds, rows, index = _dense_rows(embeds), _dense_rows(rows), index.contiguous()
    out = torch.empty(embeds.shape, dtype=embeds.dtype, device=embeds.device)
    if out.numel():
        batch, length, dim = out.shape
        shape = tile(dim)
        grid = (triton.cdiv(batch * length, shape["tile_rows"]), triton.cdiv(dim, shape["tile_cols"]))
        with torch.cuda.device_of(out):
            splice_forward[grid](
                embeds, rows, index, out, batch * length, length, rows.shape[1], dim,
                embeds.stride(0), embeds.stride(1), rows.stride(0), rows.stride(1), **shape,
            )  # fmt: skip
    return out


def backward(gradient: Tensor, index: Tensor, of_embeds: Tensor, of_rows: Tensor) -> None:
    """Writes the gradients of embeds and rows; an empty one is skipped."""
    gradient, index = _dense_rows(gradient), index.contiguous()
    batch, length, dim = gradient.shape
    slots = of_rows.shape[1]
    if not gradient.numel():
        of_rows.zero_()
        return
    shape = tile(dim)
    token_tiles = triton.cdiv(batch * length, shape["tile_rows"]) if of_embeds.numel() else 0
    slot_tiles = triton.cdiv(batch * slots, shape["tile_rows"])
    if token_tiles + slot_tiles == 0:
        return
    ends = torch.full((2, batch, slots), -1, dtype=torch.int32, device=gradient.device)
    with torch.cuda.device_of(gradient):
        if slot_tiles:
            block: Any = 256
            splice_ends[(triton.cdiv(batch * length, block),)](
                index, ends, batch * length, length, slots, batch * slots, block=block
            )
        splice_backward[(token_tiles + slot_tiles, triton.cdiv(dim, shape["tile_cols"]))](
            gradient, index, ends, of_embeds, of_rows, batch * length, length, slots, batch * slots, dim, token_tiles,
            gradient.stride(0), gradient.stride(1), **shape,
        )  # fmt: skip


def tile(dim: int) -> dict[str, Any]:
    """Rows and columns of a tile for rows of `dim` elements: columns that divide it, where they are not too few."""
    cols = min(triton.next_power_of_2(dim), max(dim & -dim, 128), 1024)
    return {"tile_rows": TILE // cols, "tile_cols": cols}


def _dense_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
