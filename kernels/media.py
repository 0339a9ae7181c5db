"""Triton kernels of media attention: text that reads one of several images.

A token attends to the keys of one image, and those that attend to the same one stand together, so that a tile of
queries has few images to read and an image few tiles of queries to be read by: the work is that of one image a token,
not of all.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# Inside a kernel the language is Triton's, whose types no checker knows.

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from vlmzoo.kernels._triton import accumulator, dense, dot, load_rows, precision, store_rows

LOG2_E = tl.constexpr(1 / math.log(2))
LN_2 = tl.constexpr(math.log(2))


@triton.jit
def _scores(
    q, keys, image, read, columns, num_keys, mask, mask_row,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of base 2, -inf where a token does not read the image, or the image has no such key."""
    scores = dot(q, tl.trans(keys), PRECISION) * (SCALE * LOG2_E)
    keep = columns < num_keys
    if HAS_MASK:
        keep = keep & (tl.load(mask + columns.to(tl.int64) * mask_row, mask=keep, other=0) != 0)
    return tl.where((image == read)[:, None] & keep[None, :], scores, -float("inf"))


@triton.jit
def _images(image_of_token, tokens, asked, num_images):
    """The image of each token, -1: none, and the first and the last of them."""
    image = tl.load(image_of_token + tokens, mask=asked, other=-1).to(tl.int32)
    image = tl.where(image < num_images, image, -1)
    return image, tl.min(tl.where(image >= 0, image, num_images)), tl.max(image)


@triton.jit
def forward_kernel(
    q, k, v, image_of_token, mask, out, lse,
    q_batch, q_row, q_head, k_batch, k_image, k_row, k_head, v_batch, v_image, v_row, v_head,
    mask_batch, mask_image, mask_row, out_batch, out_row, out_head, heads, num_tokens, num_images, num_keys,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp of one tile of tokens."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = tokens < num_tokens
    image, first, last = _images(image_of_token + row * num_tokens, tokens, asked, num_images)
    block = load_rows(q + row * q_batch + head * q_head, tokens, q_row, asked, HEAD_DIM, BLOCK_D)
    ACC: tl.constexpr = lse.dtype.element_ty
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    peak = tl.full([BLOCK_M], -float("inf"), ACC)
    total = tl.zeros([BLOCK_M], ACC)
    k += row * k_batch + head * k_head
    v += row * v_batch + head * v_head
    mask += row * mask_batch
    tiles = tl.cdiv(num_keys, BLOCK_N)
    for tile in range(first * tiles, (last + 1) * tiles):
        read = (tile // tiles).to(tl.int64)
        columns = (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        there = columns < num_keys
        keys = load_rows(k + read * k_image, columns, k_row, there, HEAD_DIM, BLOCK_D)
        scores = _scores(
            block, keys, image, read, columns, num_keys, mask + read * mask_image, mask_row, SCALE, HAS_MASK, PRECISION
        )
        highest = tl.maximum(peak, tl.max(scores, 1))
        shift = tl.where(highest == -float("inf"), 0.0, highest)  # -inf - -inf would be NaN
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(peak - shift)
        values = load_rows(v + read * v_image, columns, v_row, there, HEAD_DIM, BLOCK_D)
        total = total * fade + tl.sum(weights, 1)
        acc = acc * fade[:, None] + dot(weights.to(values.dtype), values, PRECISION)
        peak = highest
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    store_rows(out + row * out_batch + head * out_head, tokens, out_row, acc, asked, HEAD_DIM, BLOCK_D)
    sums = tl.where(total == 0, -float("inf"), (peak + tl.log2(total)) * LN_2)
    tl.store(lse + pair * num_tokens + tokens, sums, mask=asked)


@triton.jit
def _slopes(
    block, keys, values, d_out, read_out, sums, image, read, columns, num_keys, mask, mask_row,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights once more, and the gradient of the scores."""
    scores = _scores(block, keys, image, read, columns, num_keys, mask, mask_row, SCALE, HAS_MASK, PRECISION)
    weights = tl.exp2(scores - tl.where(sums == -float("inf"), 0.0, sums * LOG2_E)[:, None])
    delta = tl.sum(read_out.to(sums.dtype) * d_out.to(sums.dtype), 1)
    return weights, weights * (dot(d_out, tl.trans(values), PRECISION) - delta[:, None]) * SCALE


@triton.jit
def backward_q_kernel(
    q, k, v, image_of_token, mask, out, lse, slope, dq,
    q_batch, q_row, q_head, k_batch, k_image, k_row, k_head, v_batch, v_image, v_row, v_head,
    mask_batch, mask_image, mask_row, out_batch, out_row, out_head, slope_batch, slope_row, slope_head,
    heads, num_tokens, num_images, num_keys,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of tokens, laid out as the output."""
    pair = tl.program_id(0).to(tl.int64)
    row, head = pair // heads, pair % heads
    tokens = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    asked = tokens < num_tokens
    image, first, last = _images(image_of_token + row * num_tokens, tokens, asked, num_images)
    block = load_rows(q + row * q_batch + head * q_head, tokens, q_row, asked, HEAD_DIM, BLOCK_D)
    at = row * out_batch + head * out_head
    read_out = load_rows(out + at, tokens, out_row, asked, HEAD_DIM, BLOCK_D)
    d_out = load_rows(slope + row * slope_batch + head * slope_head, tokens, slope_row, asked, HEAD_DIM, BLOCK_D)
    sums = tl.load(lse + pair * num_tokens + tokens, mask=asked, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_D], sums.dtype)
    k += row * k_batch + head * k_head
    v += row * v_batch + head * v_head
    mask += row * mask_batch
    tiles = tl.cdiv(num_keys, BLOCK_N)
    for tile in range(first * tiles, (last + 1) * tiles):
        read = (tile // tiles).to(tl.int64)
        columns = (tile % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        there = columns < num_keys
        keys = load_rows(k + read * k_image, columns, k_row, there, HEAD_DIM, BLOCK_D)
        values = load_rows(v + read * v_image, columns, v_row, there, HEAD_DIM, BLOCK_D)
        _, d_scores = _slopes(
            block, keys, values, d_out, read_out, sums, image, read, columns, num_keys, mask + read * mask_image,
            mask_row, SCALE, HAS_MASK, PRECISION,
        )  # fmt: skip
        acc += dot(d_scores.to(keys.dtype), keys, PRECISION)
    store_rows(dq + at, tokens, out_row, acc, asked, HEAD_DIM, BLOCK_D)


@triton.jit
def backward_kv_kernel(
    q, k, v, image_of_token, mask, out, lse, slope, span, dk, dv,
    q_batch, q_row, q_head, k_batch, k_image, k_row, k_head, v_batch, v_image, v_row, v_head,
    mask_batch, mask_image, mask_row, out_batch, out_row, out_head, slope_batch, slope_row, slope_head,
    dk_image, dk_row, dk_head, heads, num_tokens, num_images, num_keys,
    SCALE: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of an image's keys, from the tokens between which `span` says that it is read."""
    picture, head = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row, read = picture // num_images, picture % num_images
    columns = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    there = columns < num_keys
    keys = load_rows(k + row * k_batch + read * k_image + head * k_head, columns, k_row, there, HEAD_DIM, BLOCK_D)
    values = load_rows(v + row * v_batch + read * v_image + head * v_head, columns, v_row, there, HEAD_DIM, BLOCK_D)
    ACC: tl.constexpr = lse.dtype.element_ty
    d_keys = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    d_values = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    mask += row * mask_batch + read * mask_image
    first, stop = tl.load(span + picture * 2), tl.load(span + picture * 2 + 1)
    for begin in range(first, stop, BLOCK_M):
        tokens = begin + tl.arange(0, BLOCK_M)
        asked = tokens < stop
        image = tl.load(image_of_token + row * num_tokens + tokens, mask=asked, other=-1).to(tl.int32)
        block = load_rows(q + row * q_batch + head * q_head, tokens, q_row, asked, HEAD_DIM, BLOCK_D)
        read_out = load_rows(out + row * out_batch + head * out_head, tokens, out_row, asked, HEAD_DIM, BLOCK_D)
        d_out = load_rows(slope + row * slope_batch + head * slope_head, tokens, slope_row, asked, HEAD_DIM, BLOCK_D)
        sums = tl.load(lse + (row * heads + head) * num_tokens + tokens, mask=asked, other=0.0)
        weights, d_scores = _slopes(
            block, keys, values, d_out, read_out, sums, image, read, columns, num_keys, mask, mask_row,
            SCALE, HAS_MASK, PRECISION,
        )  # fmt: skip
        d_values += dot(tl.trans(weights.to(d_out.dtype)), d_out, PRECISION)
        d_keys += dot(tl.trans(d_scores.to(block.dtype)), block, PRECISION)
    at = picture * dk_image + head * dk_head
    store_rows(dk + at, columns, dk_row, d_keys, there, HEAD_DIM, BLOCK_D)
    store_rows(dv + at, columns, dk_row, d_values, there, HEAD_DIM, BLOCK_D)


def forward_options(itemsize: int) -> dict[str, int]:
    """Tile sizes, warps and loads in flight of the forward, which compile without spills."""
    if itemsize > 2:
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


def backward_options(itemsize: int) -> dict[str, int]:
    """The same of both backward kernels."""
    if itemsize > 2:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 1}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 1}


def _common(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, scale: float
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """Strides of these, and the constants of all kernels."""
    strides = (
        *q.stride()[:3],
        *k.stride()[:4],
        *v.stride()[:4],
        *((0, 0, 0) if mask is None else mask.stride()),
        *out.stride()[:3],
    )
    return strides, {
        "SCALE": scale,
        "HAS_MASK": mask is not None,
        "PRECISION": precision(),
        "HEAD_DIM": q.shape[-1],
        "BLOCK_D": max(16, triton.next_power_of_2(q.shape[-1])),
    }


@torch.library.custom_op(
    "vlmzoo::media_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor image_of_token, Tensor? mask, float scale) -> (Tensor, Tensor)",
)
def media_attention(
    q: Tensor, k: Tensor, v: Tensor, image_of_token: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (batch, length, heads, dim) and log-sum-exp (batch, heads, length) of the attention in
    `vlmzoo.kernels.attention.media_attention`, which checks what is passed. The second has no gradient."""
    q, k, v = (dense(tensor) for tensor in (q, k, v))
    image_of_token = image_of_token.contiguous()
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(batch, heads, length, dtype=accumulator(q), device=q.device)
    strides, constants = _common(q, k, v, mask, out, scale)
    options = forward_options(q.itemsize)
    with torch.cuda.device_of(q):
        forward_kernel[batch * heads, triton.cdiv(length, options["BLOCK_M"])](
            q, k, v, image_of_token, q if mask is None else mask, out, lse, *strides, heads, length, *k.shape[1:3],
            **constants, **options,
        )  # fmt: skip
    return out, lse


@media_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, image_of_token: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = q.shape
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    return out, q.new_empty(batch, heads, length, dtype=accumulator(q))


@torch.library.custom_op(
    "vlmzoo::media_attention_backward",
    mutates_args=(),
    schema="(Tensor slope, Tensor q, Tensor k, Tensor v, Tensor image_of_token, Tensor? mask, float scale, Tensor out, "
    "Tensor lse) -> (Tensor, Tensor, Tensor)",
)
def media_attention_backward(
    slope: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_of_token: Tensor,
    mask: Tensor | None,
    scale: float,
    out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. Two kernels: each sum is then made by one program, in one order."""
    slope, q, k, v = (dense(tensor) for tensor in (slope, q, k, v))
    image_of_token = image_of_token.contiguous()
    batch, length, heads, _ = q.shape
    num_images, num_keys = k.shape[1:3]
    strides, constants = _common(q, k, v, mask, out, scale)
    options = backward_options(q.itemsize)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (k, v))
    inputs = q, k, v, image_of_token, q if mask is None else mask, out, lse, slope
    sizes = heads, length, num_images, num_keys
    with torch.cuda.device_of(q):
        backward_q_kernel[batch * heads, triton.cdiv(length, options["BLOCK_M"])](
            *inputs, dq, *strides, *slope.stride()[:3], *sizes, **constants, **options
        )
        tokens = torch.arange(length, device=q.device)
        reads = image_of_token[:, None] == torch.arange(num_images, device=q.device)[:, None]
        first = tokens.where(reads, length).amin(-1) if length else reads.new_zeros(reads.shape[:2])
        span = torch.stack([first, (tokens + 1).where(reads, 0).amax(-1)], -1).to(torch.int32)
        backward_kv_kernel[batch * num_images, heads, triton.cdiv(num_keys, options["BLOCK_N"])](
            *inputs, span, dk, dv, *strides, *slope.stride()[:3], *dk.stride()[1:4], *sizes, **constants, **options
        )
    return dq, dk, dv


@media_attention_backward.register_fake
def _(
    slope: Tensor, q: Tensor, k: Tensor, v: Tensor, image_of_token: Tensor, mask: Tensor | None, scale: float,
    out: Tensor, lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v))
    return dq, dk, dv


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.scale = inputs[-1]
    ctx.save_for_backward(*inputs[:-1], *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, slope: Tensor, slope_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    *inputs, out, lse = ctx.saved_tensors
    return *media_attention_backward(slope, *inputs, ctx.scale, out, lse), None, None, None


media_attention.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.vlmzoo.media_attention)
def _(q: Any, k: Any, *_: Any, **__: Any) -> int:
    batch, length, heads, dim = q
    return 4 * batch * heads * length * k[2] * dim  # one image a token


@register_flop_formula(torch.ops.vlmzoo.media_attention_backward)
def _(slope: Any, q: Any, k: Any, *_: Any, **__: Any) -> int:
    batch, length, heads, dim = q
    return 14 * batch * heads * length * k[2] * dim  # scores and their slopes are made twice
