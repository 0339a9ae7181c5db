"""Attention on a CPU, one segment of keys after the other through PyTorch's flash kernel, merged by log-sum-exp.

That kernel walks over the keys in chunks, so nothing of the size queries x keys is ever held. Segments are slices: no
copy is made of them, nothing is masked out that can be left out, and two segments are not put behind one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

ATEN = torch.ops.aten
Index = tuple[slice, slice]  # samples, positions
Piece = tuple[int, Index, Tensor | None]  # which segment, which of its keys, which of these count
ALL = slice(None)


def _rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    return mask if mask is None or len(mask) == 1 else mask[rows]


def _blocks(
    q: Tensor,
    k: Tensor,
    k2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask: Tensor | None,
    image_of_token: Tensor | None,
    num_images: int,
) -> Iterator[tuple[Index, list[Piece]]]:
    """Queries, and the pieces of the keys that they attend to."""
    if image_of_token is not None:
        num_keys = k.shape[1] // max(1, num_images)
        for row, images in enumerate(image_of_token.tolist()):
            stop = 0
            for image, run in groupby(images):
                start, stop = stop, stop + len(list(run))
                if image >= 0:
                    rows, keys = slice(row, row + 1), slice(image * num_keys, (image + 1) * num_keys)
                    part = _rows(mask, rows)
                    yield (rows, slice(start, stop)), [(0, (rows, keys), None if part is None else part[..., keys])]
        return
    first, second = (mask, None) if mask is None or k2 is None else mask.split([k.shape[1], k2.shape[1]], -1)
    if cu_seqlens_k is not None:
        bounds = cu_seqlens_k.tolist()
        segments = [(slice(i, i + 1), (slice(0, 1), slice(bounds[i], bounds[i + 1]))) for i in range(len(q))]
    elif kv_lens is not None:
        segments, stop = [], 0
        for length, run in groupby(kv_lens.tolist()):
            start, stop = stop, stop + len(list(run))
            segments.append((slice(start, stop), (slice(start, stop), slice(0, length))))
    else:
        segments = [(ALL, (ALL, ALL))]
    for rows, index in segments:
        part = _rows(first, rows)
        pieces = [(0, index, None if part is None else part[..., index[1]])]
        if k2 is not None:
            pieces.append((1, (rows, ALL), _rows(second, rows)))
        yield (rows, ALL), pieces


def _bias(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """What is added to the scores."""
    return None if mask is None else torch.zeros_like(mask, dtype=like.dtype).masked_fill_(~mask, -torch.inf)


def _heads_first(tensor: Tensor, index: Index) -> Tensor:
    return tensor[index].transpose(1, 2)


def _segments(k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None) -> list[tuple[Tensor, Tensor]]:
    """Of keys and values; packed ones as those of one sample."""
    segments = [(k, v) if k.ndim == 4 else (k[None], v[None])]
    return segments if k2 is None or v2 is None else [*segments, (k2, v2)]


SCHEMA = (
    "Tensor q, Tensor k, Tensor v, Tensor? k2, Tensor? v2, Tensor? kv_lens, Tensor? cu_seqlens_k, Tensor? mask, "
    "Tensor? image_of_token, int num_images, float scale, bool with_lse"
)


@torch.library.custom_op("vlmzoo::chunked_attention", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor)")
def chunked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask: Tensor | None,
    image_of_token: Tensor | None,
    num_images: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, heads, dim) and log-sum-exp (batch, heads, queries) of the functions in
    `vlmzoo.kernels.attention`, which check what is passed.

    Args:
        k, v: with `image_of_token` (batch, images * keys, heads, dim)
        mask: (batch or 1, heads or 1, queries or 1, keys + keys2)
        with_lse: whether the log-sum-exp has a gradient
    """
    batch, num_queries, heads, _ = q.shape
    segments = _segments(k, v, k2, v2)
    out = q.new_empty(0)
    lse = q.new_full((batch, heads, num_queries), -torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for (rows, positions), pieces in _blocks(q, k, k2, kv_lens, cu_seqlens_k, mask, image_of_token, num_images):
        queries = _heads_first(q, (rows, positions))
        outs, sums = [], []
        for segment, index, part in pieces:
            keys, values = (_heads_first(tensor, index) for tensor in segments[segment])
            if not (keys.shape[2] and queries.shape[2]):
                continue
            read, total = ATEN._scaled_dot_product_flash_attention_for_cpu(
                queries, keys, values, attn_mask=_bias(part, q), scale=scale
            )
            if part is not None:
                nothing = ~part.any(-1)
                read, total = read.masked_fill(nothing[..., None], 0), total.masked_fill(nothing, -torch.inf)
            outs.append(read.transpose(1, 2))
            sums.append(total)
        if not outs:
            continue
        read, total = outs[0], sums[0]
        if len(outs) > 1:
            total = torch.stack(sums).logsumexp(0)
            weights = (torch.stack(sums) - _finite(total)).exp().transpose(2, 3)[..., None]
            read = torch.stack([part * weight for part, weight in zip(outs, weights, strict=True)]).sum(0).to(q.dtype)
        lse[rows, :, positions] = total
        if read.shape[:2] == q.shape[:2]:
            out = read.contiguous()
        else:
            out = out if out.numel() else q.new_zeros(batch, num_queries, heads, v.shape[-1])
            out[rows, positions] = read
    return out if out.numel() else q.new_zeros(batch, num_queries, heads, v.shape[-1]), lse


def _finite(lse: Tensor) -> Tensor:
    """0 where nothing is attended to: -inf - -inf would be NaN."""
    return lse.masked_fill(lse == -torch.inf, 0)


@chunked_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, num_queries, heads = q.shape[:3]
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(batch, num_queries, heads, v.shape[-1]), lse


@torch.library.custom_op(
    "vlmzoo::chunked_attention_backward",
    mutates_args=(),
    schema=f"(Tensor slope, Tensor slope_lse, Tensor out, Tensor lse, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def chunked_attention_backward(
    slope: Tensor,
    slope_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask: Tensor | None,
    image_of_token: Tensor | None,
    num_images: int,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, k2 and v2 (the last two empty where there is none).

    The kernel takes the log-sum-exp over all pieces, so that what it makes of one piece is that piece's share.
    """
    segments = _segments(k, v, k2, v2)
    dq, d_segments = _Gradient(q), [(_Gradient(a), _Gradient(b)) for a, b in segments]
    for (rows, positions), pieces in _blocks(q, k, k2, kv_lens, cu_seqlens_k, mask, image_of_token, num_images):
        queries, read, d_out = (_heads_first(tensor, (rows, positions)) for tensor in (q, out, slope))
        sums = _finite(lse[rows, :, positions])
        for segment, index, part in pieces:
            keys, values = (_heads_first(tensor, index) for tensor in segments[segment])
            if not (keys.shape[2] and queries.shape[2]):
                continue
            descend = partial(
                ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
                dropout_p=0.0, is_causal=False, attn_mask=_bias(part, q), scale=scale,
            )  # fmt: skip
            d_queries, d_keys, d_values = descend(d_out, queries, keys, values, read, sums)
            if with_lse:  # its gradient by the scores is their weights: what values of 1 would give
                flat = (slope_lse[rows, :, positions] / values.shape[-1]).to(q.dtype)[..., None].expand_as(read)
                more = descend(flat, queries, keys, torch.ones_like(values), torch.zeros_like(read), sums)
                d_queries, d_keys = d_queries + more[0], d_keys + more[1]
            dq.add((rows, positions), d_queries)
            d_segments[segment][0].add(index, d_keys)
            d_segments[segment][1].add(index, d_values)
    (dk, dv), *second = [(a.total(), b.total()) for a, b in d_segments]
    dk2, dv2 = second[0] if second else (q.new_empty(0), q.new_empty(0))
    return dq.total(), dk.view_as(k), dv.view_as(v), dk2, dv2


class _Gradient:
    """A sum over slices; the first that covers everything is taken as it is."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.sum: Tensor | None = None

    def add(self, index: Index, value: Tensor) -> None:
        value = value.transpose(1, 2)
        if self.sum is None and value.shape == self.like.shape:
            self.sum = value.contiguous()
        else:
            self.sum = self.total()
            self.sum[index] += value

    def total(self) -> Tensor:
        if self.sum is not None:
            return self.sum
        return torch.zeros_like(self.like, memory_format=torch.contiguous_format)


@chunked_attention_backward.register_fake
def _(
    slope: Tensor, slope_lse: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None,
    v2: Tensor | None, *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        torch.empty_like(q, memory_format=torch.contiguous_format),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        q.new_empty(0 if k2 is None else k2.shape),
        q.new_empty(0 if v2 is None else v2.shape),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.num_images, ctx.scale, ctx.with_lse = inputs
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx: Any, slope: Tensor, slope_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    dq, dk, dv, dk2, dv2 = chunked_attention_backward(
        slope, slope_lse, out, lse, *tensors, ctx.num_images, ctx.scale, ctx.with_lse
    )
    return dq, dk, dv, *((None, None) if tensors[3] is None else (dk2, dv2)), *[None] * 7


chunked_attention.register_autograd(_backward, setup_context=_keep)


def _score_flops(q: Any, k: Any, k2: Any, image_of_token: Any, num_images: int) -> int:
    """Of one product of queries and keys; with lengths, of all keys of the first segment."""
    batch, num_queries, heads, dim = q
    keys = k[1] // num_images if image_of_token else (k[1] if len(k) == 4 else k[0]) + (k2[1] if k2 else 0)
    return 2 * (batch if len(k) == 4 else 1) * heads * num_queries * keys * dim


@register_flop_formula(torch.ops.vlmzoo.chunked_attention)
def _(q: Any, k: Any, v: Any, k2: Any, v2: Any, lens: Any, cu: Any, mask: Any, image: Any, num_images: int, *_: Any,
      **__: Any) -> int:  # fmt: skip
    return 2 * _score_flops(q, k, k2, image, num_images)


@register_flop_formula(torch.ops.vlmzoo.chunked_attention_backward)
def _(slope: Any, slope_lse: Any, out: Any, lse: Any, q: Any, k: Any, v: Any, k2: Any, v2: Any, lens: Any, cu: Any,
      mask: Any, image: Any, num_images: int, *_: Any, **__: Any) -> int:  # fmt: skip
    return 5 * _score_flops(q, k, k2, image, num_images)
