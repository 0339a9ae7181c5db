"""Triton kernels of latent attention: few queries over many keys.

Keys are split into chunks of a fixed length, whatever the batch, so that a sample's result does not depend on what it
is batched with; partial results are reduced in order, so that two runs agree bit for bit. The backward holds all
queries and the slope of their outputs on the chip while it walks over the keys: K and V are read once, dK and dV
written once.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# Inside a kernel the language is Triton's, whose types no checker knows.

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlmzoo.kernels._triton import accumulator, dense, dot, load_rows, precision, store_rows

LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))


@dataclass(frozen=True)
class Blocks:
    """How one kernel walks: queries and keys of a tile, keys of a chunk, warps, and loads in flight."""

    queries: int
    keys: int
    warps: int
    stages: int
    chunk: int = 1024


@cache
def _table(card: str) -> dict[str, list[int]]:
    path = Path(__file__).with_name("tuned.json")
    return json.loads(path.read_text()).get(card, {}) if path.exists() else {}


def tuned(direction: str, q: Tensor) -> Blocks | None:
    """What `make gpu` found to be fastest on this card, if it has run there: `tuned.json`."""
    if not q.is_cuda or q.itemsize > 2 or q.shape[1] > 128:
        return None
    key = f"{direction} {64 if q.shape[1] <= 64 else 128} {64 if q.shape[-1] <= 64 else 128}"
    found = _table(torch.cuda.get_device_name(q.device)).get(key)
    return None if found is None else Blocks(*found)


def forward_blocks(num_queries: int, dim: int, itemsize: int) -> Blocks:
    if itemsize > 2:
        return Blocks(64, 32, 4, 2)
    if num_queries <= 64:
        return Blocks(64, 128 if dim <= 64 else 64, 4, 3)
    return Blocks(128, 128 if dim <= 64 else 64, 8, 3)


def backward_blocks(num_queries: int, dim: int, itemsize: int, hopper: bool, plain: bool) -> Blocks:
    """All queries of one launch stand in one tile. These are the largest that compile without spills.

    Args:
        plain: neither a mask nor a gradient of the log-sum-exp
    """
    if itemsize > 2:
        return Blocks(32, 32, 8, 1)
    if not hopper and dim > 64:
        return Blocks(64, 64, 8, 2)
    if num_queries <= 64:
        return Blocks(64, 128 if dim <= 64 else 64, 8, 2) if hopper else Blocks(64, 32, 4, 2)
    if not hopper:
        return Blocks(128, 32, 8, 2)
    return Blocks(256 if plain and dim <= 64 and num_queries > 128 else 128, 64, 8, 2)


@triton.jit
def _span(row, lens, cu_seqlens, num_keys, HAS_LENS: tl.constexpr, PACKED: tl.constexpr):
    """Where a sample's keys begin, and how many it has."""
    if PACKED:
        start = tl.load(cu_seqlens + row).to(tl.int64)
        return start, (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    if HAS_LENS:
        return tl.zeros([], tl.int64), tl.minimum(tl.load(lens + row).to(tl.int32), num_keys)
    return tl.zeros([], tl.int64), num_keys + tl.zeros([], tl.int32)


@triton.jit
def _scores(
    q, keys, columns, stop, mask, stride_mask, SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr
):
    """Of base 2, -inf where a key does not count."""
    scores = dot(q, tl.trans(keys), PRECISION) * (SCALE * LOG2_E)
    keep = columns < stop
    if HAS_MASK:
        keep = keep & (tl.load(mask + columns.to(tl.int64) * stride_mask, mask=keep, other=0) != 0)
    return tl.where(keep[None, :], scores, -float("inf"))


@triton.jit
def _attend(
    acc, peak, total, q, k, v, stride_k, stride_v, mask, stride_mask, first, stop,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The running softmax after the keys from `first` to `stop`."""
    for begin in range(first, stop, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        keys = load_rows(k, columns, stride_k, columns < stop, HEAD_DIM, BLOCK_D)
        scores = _scores(q, keys, columns, stop, mask, stride_mask, SCALE, HAS_MASK, PRECISION)
        highest = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(highest == -float("inf"), 0.0, highest)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(peak - shift)
        values = load_rows(v, columns, stride_v, columns < stop, HEAD_DIM, BLOCK_D)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        peak = highest
    return acc, peak, total


@triton.jit
def forward_kernel(
    q, k, v, k2, v2, lens, cu_seqlens, mask, out, lse,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    k2_batch, k2_row, k2_head, v2_batch, v2_row, v2_head, mask_batch, mask_row,
    out_batch, out_row, out_head, out_split, lse_split,
    heads, num_queries, num_keys, num_keys2,
    SCALE: tl.constexpr, HAS_LENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one chunk of keys; the first also reads the second segment."""
    row, head = (tl.program_id(0) // heads).to(tl.int64), (tl.program_id(0) % heads).to(tl.int64)
    split = tl.program_id(1)
    start, length = _span(row, lens, cu_seqlens, num_keys, HAS_LENS, PACKED)
    first = split * CHUNK
    if split == 0 or first < length:
        queries = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
        asked = queries < num_queries
        block = load_rows(q + row * q_batch + head * q_head, queries, q_row, asked, HEAD_DIM, BLOCK_D)
        ACC: tl.constexpr = lse.dtype.element_ty
        acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        peak = tl.full([BLOCK_M], -float("inf"), ACC)
        total = tl.zeros([BLOCK_M], ACC)
        mask += row * mask_batch
        k += row * k_batch + head * k_head + start * k_row
        v += row * v_batch + head * v_head + start * v_row
        k2 += row * k2_batch + head * k2_head
        v2 += row * v2_batch + head * v2_head
        for segment in range(0, 2):  # one loop: written out twice, their registers would not fit
            if segment == 0:
                keys, values, keys_row, values_row, counted = k2, v2, k2_row, v2_row, mask + num_keys * mask_row
                begin, end = 0, tl.where(split == 0, num_keys2, 0)
            else:
                keys, values, keys_row, values_row, counted = k, v, k_row, v_row, mask
                begin, end = first, tl.minimum(first + CHUNK, length)
            acc, peak, total = _attend(
                acc, peak, total, block, keys, values, keys_row, values_row, counted, mask_row, begin, end,
                SCALE, HAS_MASK, PRECISION, BLOCK_N, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
        acc = acc / tl.where(total == 0, 1.0, total)[:, None]
        out += split.to(tl.int64) * out_split + row * out_batch + head * out_head
        store_rows(out, queries, out_row, acc, asked, HEAD_DIM, BLOCK_D)
        sums = tl.where(total == 0, -float("inf"), (peak + tl.log2(total)) * LN_2)
        lse += split.to(tl.int64) * lse_split + tl.program_id(0).to(tl.int64) * num_queries
        tl.store(lse + queries, sums, mask=asked)


@triton.jit
def _num_splits(row, lens, cu_seqlens, num_keys, HAS_LENS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr):
    """Chunks in which a sample has keys; the first counts always."""
    _, length = _span(row, lens, cu_seqlens, num_keys, HAS_LENS, PACKED)
    return tl.maximum(tl.cdiv(length, CHUNK), 1)


@triton.jit
def combine_kernel(
    parts, part_lse, out, lse, lens, cu_seqlens, heads, num_queries, num_keys, out_batch, out_row, out_head,
    HAS_LENS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The chunks' outputs weighed by their log-sum-exps, in order. Parts are (splits, batch, heads, queries, dim)."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = queries < num_queries
    pairs = tl.num_programs(0).to(tl.int64)
    ACC: tl.constexpr = lse.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    peak = tl.full([BLOCK_M], -float("inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    for split in range(0, _num_splits(row, lens, cu_seqlens, num_keys, HAS_LENS, PACKED, CHUNK)):
        at = (split * pairs + pair) * num_queries
        sums = tl.load(part_lse + at + queries, mask=asked, other=-float("inf"))
        part = load_rows(parts + at * HEAD_DIM, queries, HEAD_DIM, asked, HEAD_DIM, BLOCK_D)
        highest = tl.maximum(peak, sums)
        shift = tl.where(highest == -float("inf"), 0.0, highest)
        fade, weight = tl.exp(peak - shift), tl.exp(sums - shift)
        acc = acc * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        peak = highest
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    store_rows(out + row * out_batch + head * out_head, queries, out_row, acc, asked, HEAD_DIM, BLOCK_D)
    sums = tl.where(total == 0, -float("inf"), peak + tl.log(total))
    tl.store(lse + pair * num_queries + queries, sums, mask=asked)


@triton.jit
def _descend(
    dq, q, slope, sums, delta, k, v, dk, dv, stride_k, stride_v, stride_d, mask, stride_mask, first, stop,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of the keys from `first` to `stop`, and dQ with their share in it."""
    for begin in range(first, stop, BLOCK_N):
        columns = begin + tl.arange(0, BLOCK_N)
        there = columns < stop
        keys = load_rows(k, columns, stride_k, there, HEAD_DIM, BLOCK_D)
        values = load_rows(v, columns, stride_v, there, HEAD_DIM, BLOCK_D)
        scores = _scores(q, keys, columns, stop, mask, stride_mask, SCALE, HAS_MASK, PRECISION)
        weights = tl.exp2(scores - sums[:, None])
        d_values = dot(tl.trans(weights.to(slope.dtype)), slope, PRECISION)
        d_scores = weights * (dot(slope, tl.trans(values), PRECISION) - delta[:, None]) * SCALE
        d_scores = d_scores.to(q.dtype)
        d_keys = dot(tl.trans(d_scores), q, PRECISION)
        if MORE:
            d_keys += load_rows(dk, columns, stride_d, there, HEAD_DIM, BLOCK_D)
            d_values += load_rows(dv, columns, stride_d, there, HEAD_DIM, BLOCK_D)
        store_rows(dk, columns, stride_d, d_keys, there, HEAD_DIM, BLOCK_D)
        store_rows(dv, columns, stride_d, d_values, there, HEAD_DIM, BLOCK_D)
        dq += dot(d_scores, keys, PRECISION)
    return dq


@triton.jit
def backward_kernel(
    q, k, v, k2, v2, lens, cu_seqlens, mask, out, lse, slope, slope_lse, dq, dk, dv, dk2, dv2,
    q_batch, q_row, q_head, k_batch, k_row, k_head, v_batch, v_row, v_head,
    k2_batch, k2_row, k2_head, v2_batch, v2_row, v2_head, mask_batch, mask_row,
    out_batch, out_row, out_head, slope_batch, slope_row, slope_head, lse_pair, slope_lse_pair,
    dk_batch, dk_row, dk_head, dk2_batch, dk2_row, dk2_head,
    heads, num_queries, num_keys, num_keys2,
    SCALE: tl.constexpr, HAS_LENS: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SLOPE_LSE: tl.constexpr, MORE: tl.constexpr, PRECISION: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of one chunk of keys, and its share in dQ, (splits, batch, heads, queries, dim)."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    split = tl.program_id(1)
    start, length = _span(row, lens, cu_seqlens, num_keys, HAS_LENS, PACKED)
    first = split * CHUNK
    stop = tl.minimum(first + CHUNK, length)
    dk += row * dk_batch + head * dk_head + start * dk_row
    dv += row * dk_batch + head * dk_head + start * dk_row
    if split == 0 or first < length:
        queries = tl.arange(0, BLOCK_M)
        asked = queries < num_queries
        block = load_rows(q + row * q_batch + head * q_head, queries, q_row, asked, HEAD_DIM, BLOCK_D)
        d_out = load_rows(slope + row * slope_batch + head * slope_head, queries, slope_row, asked, HEAD_DIM, BLOCK_D)
        read = load_rows(out + row * out_batch + head * out_head, queries, out_row, asked, HEAD_DIM, BLOCK_D)
        ACC: tl.constexpr = lse.dtype.element_ty
        delta = tl.sum(read.to(ACC) * d_out.to(ACC), 1)
        if HAS_SLOPE_LSE:
            delta -= tl.load(slope_lse + pair * slope_lse_pair + queries, mask=asked, other=0.0)
        sums = tl.load(lse + pair * lse_pair + queries, mask=asked, other=0.0)
        sums = tl.where(sums == -float("inf"), 0.0, sums) * LOG2_E  # its scores are -inf, and their powers 0
        d_queries = tl.zeros([BLOCK_M, BLOCK_D], ACC)
        mask += row * mask_batch
        k += row * k_batch + head * k_head + start * k_row
        v += row * v_batch + head * v_head + start * v_row
        k2 += row * k2_batch + head * k2_head
        v2 += row * v2_batch + head * v2_head
        dk2 += row * dk2_batch + head * dk2_head
        dv2 += row * dk2_batch + head * dk2_head
        for segment in range(0, 2):  # one loop: written out twice, their registers would not fit
            if segment == 0:
                keys, values, keys_row, values_row, counted = k2, v2, k2_row, v2_row, mask + num_keys * mask_row
                d_keys, d_values, d_row = dk2, dv2, dk2_row
                begin, end = 0, tl.where(split == 0, num_keys2, 0)
            else:
                keys, values, keys_row, values_row, counted = k, v, k_row, v_row, mask
                d_keys, d_values, d_row = dk, dv, dk_row
                begin, end = first, stop
            d_queries = _descend(
                d_queries, block, d_out, sums, delta, keys, values, d_keys, d_values, keys_row, values_row, d_row,
                counted, mask_row, begin, end, SCALE, HAS_MASK, MORE, PRECISION, BLOCK_N, HEAD_DIM, BLOCK_D,
            )  # fmt: skip
        dq += (split * tl.num_programs(0).to(tl.int64) + pair) * num_queries * HEAD_DIM
        store_rows(dq, queries, HEAD_DIM, d_queries, asked, HEAD_DIM, BLOCK_D)
    if HAS_LENS and not MORE:
        for begin in range(tl.maximum(first, length), tl.minimum(first + CHUNK, num_keys), BLOCK_N):
            columns = begin + tl.arange(0, BLOCK_N)
            there = columns < tl.minimum(first + CHUNK, num_keys)
            nothing = tl.zeros([BLOCK_N, BLOCK_D], dk.dtype.element_ty)
            store_rows(dk, columns, dk_row, nothing, there, HEAD_DIM, BLOCK_D)
            store_rows(dv, columns, dk_row, nothing, there, HEAD_DIM, BLOCK_D)


@triton.jit
def add_kernel(
    parts, dq, lens, cu_seqlens, heads, num_queries, num_keys, dq_batch, dq_row, dq_head,
    HAS_LENS: tl.constexpr, PACKED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The chunks' shares in dQ added up, in order."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    queries = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = queries < num_queries
    pairs = tl.num_programs(0).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_D], parts.dtype.element_ty)
    for split in range(0, _num_splits(row, lens, cu_seqlens, num_keys, HAS_LENS, PACKED, CHUNK)):
        at = parts + (split * pairs + pair) * num_queries * HEAD_DIM
        acc += load_rows(at, queries, HEAD_DIM, asked, HEAD_DIM, BLOCK_D)
    store_rows(dq + row * dq_batch + head * dq_head, queries, dq_row, acc, asked, HEAD_DIM, BLOCK_D)


def _strides(tensor: Tensor | None) -> tuple[int, int, int]:
    """Of batch, row and head; packed rows have no batch."""
    if tensor is None:
        return 0, 0, 0
    return (0, *tensor.stride()[:2]) if tensor.ndim == 3 else tensor.stride()[:3]  # pyright: ignore[reportReturnType]


def _launch(
    q: Tensor,
    k: Tensor,
    k2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int,
    mask: Tensor | None,
    scale: float,
    blocks: Blocks,
) -> tuple[int, dict[str, object], dict[str, object], tuple[object, ...]]:
    """The number of splits, what all kernels take by keyword, what those that compute scores take besides, sizes."""
    dim = q.shape[-1]
    longest = max_seqlen_k if cu_seqlens_k is not None else k.shape[1]
    every = {
        "HAS_LENS": kv_lens is not None,
        "PACKED": cu_seqlens_k is not None,
        "CHUNK": blocks.chunk,
        "HEAD_DIM": dim,
        "BLOCK_D": max(16, triton.next_power_of_2(dim)),
    }
    scoring = every | {
        "SCALE": scale,
        "HAS_MASK": mask is not None,
        "PRECISION": precision(),
        "BLOCK_N": blocks.keys,
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
    }
    sizes = (q.shape[2], q.shape[1], longest, 0 if k2 is None else k2.shape[1])
    return max(1, triton.cdiv(longest, blocks.chunk)), every, scoring, sizes


@torch.library.custom_op(
    "vlmzoo::latent_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? k2, Tensor? v2, Tensor? kv_lens, Tensor? cu_seqlens_k, "
    "int max_seqlen_k, Tensor? mask, float scale, bool with_lse) -> (Tensor, Tensor)",
)
def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int,
    mask: Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, heads, dim) and log-sum-exp (batch, heads, queries) of
    `vlmzoo.kernels.attention.latent_attention`, which checks what is passed.

    Args:
        mask: (batch, keys + keys2), of keys alone
        with_lse: whether the log-sum-exp has a gradient
    """
    q, k, v = (dense(tensor) for tensor in (q, k, v))
    k2, v2 = (None if tensor is None else dense(tensor) for tensor in (k2, v2))
    batch, num_queries, heads, dim = q.shape
    blocks = tuned("forward", q) or forward_blocks(num_queries, dim, q.itemsize)
    splits, every, scoring, sizes = _launch(q, k, k2, kv_lens, cu_seqlens_k, max_seqlen_k, mask, scale, blocks)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, num_queries, dtype=accumulator(q), device=q.device)
    parts, sums = out, lse
    where = (*_strides(out), 0, 0)
    if splits > 1:
        parts = torch.empty(splits, batch, heads, num_queries, dim, dtype=lse.dtype, device=q.device)
        sums = torch.empty(splits, *lse.shape, dtype=lse.dtype, device=q.device)
        where = (heads * num_queries * dim, dim, num_queries * dim, parts.stride(0), sums.stride(0))
    tiles = triton.cdiv(num_queries, blocks.queries)
    with torch.cuda.device_of(q):
        forward_kernel[batch * heads, splits, tiles](
            q, k, v, q if k2 is None else k2, q if v2 is None else v2, kv_lens, cu_seqlens_k,
            q if mask is None else mask, parts, sums,
            *_strides(q), *_strides(k), *_strides(v), *_strides(k2), *_strides(v2),
            *((0, 0) if mask is None else mask.stride()), *where, *sizes, BLOCK_M=blocks.queries, **scoring,
        )  # fmt: skip
        if splits > 1:
            combine_kernel[batch * heads, tiles](
                parts, sums, out, lse, kv_lens, cu_seqlens_k, *sizes[:3], *_strides(out),
                BLOCK_M=blocks.queries, **every,
            )  # fmt: skip
    return out, lse


@latent_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None, kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_k: int, mask: Tensor | None, scale: float, with_lse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, num_queries, heads, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        batch, heads, num_queries, dtype=accumulator(q)
    )


@torch.library.custom_op(
    "vlmzoo::latent_attention_backward",
    mutates_args=(),
    schema="(Tensor slope, Tensor? slope_lse, Tensor q, Tensor k, Tensor v, Tensor? k2, Tensor? v2, Tensor? kv_lens, "
    "Tensor? cu_seqlens_k, int max_seqlen_k, Tensor? mask, float scale, Tensor out, Tensor lse) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def latent_attention_backward(
    slope: Tensor,
    slope_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, k2 and v2 (the last two empty where there is none), from those of the output and, where
    that was asked for, of the log-sum-exp."""
    slope, q, k, v = (dense(tensor) for tensor in (slope, q, k, v))
    k2, v2 = (None if tensor is None else dense(tensor) for tensor in (k2, v2))
    batch, num_queries, heads, dim = q.shape
    hopper = not q.is_cuda or torch.cuda.get_device_capability(q.device)[0] >= 9
    plain = mask is None and slope_lse is None
    blocks = (tuned("backward", q) if plain else None) or backward_blocks(num_queries, dim, q.itemsize, hopper, plain)
    splits, every, scoring, sizes = _launch(q, k, k2, kv_lens, cu_seqlens_k, max_seqlen_k, mask, scale, blocks)
    new = torch.empty if cu_seqlens_k is None else torch.zeros  # segments need not cover what is packed
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (new(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    dk2, dv2 = (q.new_empty(0 if k2 is None else k2.shape) for _ in range(2))
    if slope_lse is not None:
        slope_lse = slope_lse.contiguous()
    with torch.cuda.device_of(q):
        for first in range(0, num_queries, blocks.queries):
            rows = slice(first, min(first + blocks.queries, num_queries))
            count = rows.stop - rows.start
            parts = torch.empty(splits, batch, heads, count, dim, dtype=lse.dtype, device=q.device)
            backward_kernel[batch * heads, splits](
                q[:, rows], k, v, q if k2 is None else k2, q if v2 is None else v2, kv_lens, cu_seqlens_k,
                q if mask is None else mask, out[:, rows], lse[..., rows], slope[:, rows],
                lse if slope_lse is None else slope_lse[..., rows], parts, dk, dv, dk2, dv2,
                *_strides(q), *_strides(k), *_strides(v), *_strides(k2), *_strides(v2),
                *((0, 0) if mask is None else mask.stride()), *_strides(out), *_strides(slope),
                num_queries, num_queries, *_strides(dk), *_strides(None if k2 is None else dk2),
                heads, count, *sizes[2:],
                HAS_SLOPE_LSE=slope_lse is not None, MORE=first > 0, BLOCK_M=blocks.queries, **scoring,
            )  # fmt: skip
            add_kernel[batch * heads, 1](
                parts, dq[:, rows], kv_lens, cu_seqlens_k, heads, count, sizes[2], *_strides(dq),
                BLOCK_M=blocks.queries, **every,
            )  # fmt: skip
    return dq, dk, dv, dk2, dv2


@latent_attention_backward.register_fake
def _(
    slope: Tensor, slope_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None,
    kv_lens: Tensor | None, cu_seqlens_k: Tensor | None, max_seqlen_k: int, mask: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    dk2, dv2 = (q.new_empty(0 if k2 is None else k2.shape) for _ in range(2))
    return dq, dk, dv, dk2, dv2


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, k2, v2, kv_lens, cu_seqlens_k, ctx.max_seqlen_k, mask, ctx.scale, ctx.with_lse = inputs
    ctx.save_for_backward(q, k, v, k2, v2, kv_lens, cu_seqlens_k, mask, *output)


def _backward(ctx: Any, slope: Tensor, slope_lse: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, k2, v2, kv_lens, cu_seqlens_k, mask, out, lse = ctx.saved_tensors
    dq, dk, dv, dk2, dv2 = latent_attention_backward(
        slope, slope_lse if ctx.with_lse else None, q, k, v, k2, v2, kv_lens, cu_seqlens_k, ctx.max_seqlen_k, mask,
        ctx.scale, out, lse,
    )  # fmt: skip
    return dq, dk, dv, *((None, None) if k2 is None else (dk2, dv2)), *[None] * 6


latent_attention.register_autograd(_backward, setup_context=_keep)


def _scores_flops(q: tuple[int, ...], k: tuple[int, ...], k2: tuple[int, ...] | None, max_seqlen_k: int) -> int:
    """Of one product of queries and keys, all of them real."""
    batch, num_queries, heads, dim = q
    keys = (k[1] if len(k) == 4 else max_seqlen_k) + (k2[1] if k2 else 0)
    return 2 * batch * heads * num_queries * keys * dim


@register_flop_formula(torch.ops.vlmzoo.latent_attention)
def _(q: Any, k: Any, v: Any, k2: Any, v2: Any, lens: Any, cu: Any, max_seqlen_k: int, *_: Any, **__: Any) -> int:
    return 2 * _scores_flops(q, k, k2, max_seqlen_k)


@register_flop_formula(torch.ops.vlmzoo.latent_attention_backward)
def _(slope: Any, slope_lse: Any, q: Any, k: Any, v: Any, k2: Any, v2: Any, lens: Any, cu: Any, max_seqlen_k: int,
      *_: Any, **__: Any) -> int:  # fmt: skip
    return 5 * _scores_flops(q, k, k2, max_seqlen_k)
