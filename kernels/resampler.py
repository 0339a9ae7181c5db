"""Latents that read the same media in every layer: the media normalised once, and what follows from that.

A layer's affine is folded into its projections of keys and values, so that all layers share one copy of the media, and
media that need no gradient (their encoder is frozen) cost none. Few latents do not even project many media:
scores = (q Wk) mediaᵀ and out = (weights media) Wvᵀ are fewer operations than keys and values would be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmzoo.kernels.attention import autocast_dtype, latent_attention

METHODS = ("auto", "projected", "absorbed")
CHUNK = 4096
"""How many media are read at a time, where it is not all of them. On a CPU matrix products of less are slower."""

Affine = tuple[Tensor, Tensor]
"""Weight and bias: of a projection (heads * dim, media_dim) and (heads * dim,), of a layer norm both (dim,)."""


def normalize(media: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer norm over the last dimension, without an affine; in autocast's type where that is on."""
    normalized = F.layer_norm(media, media.shape[-1:], eps=eps)
    # Once, here: autocast would cast, and keep, a copy for every projection.
    return normalized.to(autocast_dtype(media))


def fold(weight: Tensor, norm: Affine) -> Affine:
    """What a projection (out, in) without bias makes of a layer norm, as a projection of `normalize`'s output."""
    return weight * norm[0], (weight * norm[1]).sum(-1)  # a product of matrices would be autocast's


def resampler_attention(
    q: Tensor,
    media: Tensor,
    key: Affine,
    value: Affine,
    *,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    key_norm: Affine | None = None,
    mask: Tensor | None = None,
    recompute: bool = False,
    method: str = "auto",
) -> Tensor:
    """softmax(q kᵀ / sqrt(dim)) v, (images, queries, heads, dim), of keys and values that are projections of media.

    Deterministic. Its gradient can be differentiated again where nothing is absorbed or made once more.

    Args:
        q: (images, queries, heads, dim)
        media: (images, tokens, media_dim), of q's type
        key, value: weight (heads * dim, media_dim) and bias (heads * dim,)
        k2, v2: (images, keys2, heads, dim), the latents' own keys and values, behind those of the media; None: no such
        key_norm: weight and bias (dim,) of a layer norm of every head's keys
        mask: bool, (images, tokens), True = a real one; keys2 all are
        recompute: keep nothing as long as the media for the backward pass, but the media: there keys and values, or the
            weights of attention, are made once more
        method: projected | absorbed | auto; see `explain_method`

    Raises:
        ValueError: shapes or types that do not go together, an unknown method, or one that cannot do this.
    """
    _check(q, media, key, value, mask)
    if (k2 is None) != (v2 is None):
        raise ValueError("k2 and v2 go together: one of them is missing")
    name, _ = _choose(q, media, key_norm, method)
    images, queries, heads, dim = q.shape
    parameters = (*key, *value, *(key_norm or ()))
    if name == "projected" and not recompute:
        k, v = _project(media, dim, *parameters)
        if mask is not None:
            mask = F.pad(mask, (0, 0 if k2 is None else k2.shape[1]), value=True)[:, None, None]
        return latent_attention(q, k, v, k2=k2, v2=v2, mask=mask)
    device = q.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        # Scores are float32 at least.
        wide = torch.promote_types(q.dtype, torch.float32)
        scaled = q.transpose(1, 2).to(wide) / math.sqrt(dim)
        if name == "projected":
            out, lse = _InChunks.apply(scaled, media, mask, False, *parameters)
        else:
            key, value = ((weight.to(wide), bias.to(wide)) for weight, bias in (key, value))
            rows = scaled @ key[0].unflatten(0, (heads, dim))
            keep = not recompute and torch.is_grad_enabled()
            out, lse = _InChunks.apply(rows.flatten(1, 2)[:, None], media, mask, keep)
            out, lse = (part.reshape(images, heads, queries, -1) for part in (out, lse))
            out = out @ value[0].unflatten(0, (heads, dim)).mT + value[1].unflatten(0, (heads, 1, dim))
            lse = lse + scaled @ key[1].unflatten(0, (heads, dim, 1))
        if k2 is not None and v2 is not None:
            out2, lse2 = latent_attention(q, k2, v2, return_lse=True)
            total = torch.logaddexp(lse, lse2[..., None])
            out = out * (lse - total).exp() + out2.transpose(1, 2) * (lse2[..., None] - total).exp()
        return out.transpose(1, 2).to(q.dtype)


def explain_method(q: Tensor, media: Tensor, *, key_norm: Affine | None = None, method: str = "auto") -> str:
    """What `resampler_attention` would do with these, and why: "NAME: reason"."""
    return ": ".join(_choose(q, media, key_norm, method))


def _choose(q: Tensor, media: Tensor, key_norm: Affine | None, method: str) -> tuple[str, str]:
    if method not in METHODS:
        raise ValueError(f"unknown method of media attention {method!r}; valid: {', '.join(METHODS)}")
    if method == "absorbed" and key_norm is not None:
        raise ValueError("method 'absorbed' cannot normalise keys, which it does not make; use 'projected' or 'auto'")
    if method != "auto":
        return method, "asked for by name"
    if key_norm is not None:
        return "projected", "keys are normalised"
    if q.dtype not in (torch.float32, torch.float64):
        return "projected", f"scores of {q.dtype} matrix products would be rounded"
    queries, dim = q.shape[1], q.shape[3]
    tokens, media_dim = media.shape[1:]
    absorbed = queries * media_dim * (tokens + dim)
    projected = tokens * dim * (media_dim + queries)
    ratio = f"{absorbed / projected:.2f} of the multiplications of keys and values, scores and outputs"
    return ("absorbed" if absorbed < projected else "projected"), f"absorbing them takes {ratio}"


def _check(q: Tensor, media: Tensor, key: Affine, value: Affine, mask: Tensor | None) -> None:
    if q.ndim != 4 or media.ndim != 3 or len(q) != len(media):
        raise ValueError(
            "q must be (images, queries, heads, dim) and media (images, tokens, media_dim), "
            f"got {tuple(q.shape)} and {tuple(media.shape)}"
        )
    if media.dtype != q.dtype:
        raise ValueError(f"media must be {q.dtype} as q is, got {media.dtype}")
    inner = q.shape[2] * q.shape[3]
    for name, (weight, bias) in (("key", key), ("value", value)):
        if weight.shape != (inner, media.shape[2]) or bias.shape != (inner,):
            raise ValueError(
                f"{name} must be a weight ({inner}, {media.shape[2]}) and a bias ({inner}), "
                f"got {tuple(weight.shape)} and {tuple(bias.shape)}"
            )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != media.shape[:2]):
        raise ValueError(f"mask must be bool {tuple(media.shape[:2])}, got {mask.dtype} {tuple(mask.shape)}")


def _project(media: Tensor, dim: int, *parameters: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (images, tokens, heads, dim), by the parameters of `key`, `value` and, if any, `key_norm`."""
    key, key_bias, value, value_bias = (parameter.to(media.dtype) for parameter in parameters[:4])
    k, v = (F.linear(media, *affine).unflatten(-1, (-1, dim)) for affine in ((key, key_bias), (value, value_bias)))
    if parameters[4:]:
        weight, bias = parameters[4:]
        k = F.layer_norm(k, (dim,), weight.to(k.dtype), bias.to(k.dtype)).type_as(v)  # autocast leaves it in float32
    return k, v


def _keys_values(media: Tensor, dim: int, dtype: torch.dtype, parameters: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values (images, heads, tokens, dim); without parameters the media, as those of a single head."""
    if not parameters:
        return media[:, None].to(dtype), media[:, None].to(dtype)
    k, v = _project(media, dim, *parameters)
    return k.transpose(1, 2).to(dtype), v.transpose(1, 2).to(dtype)


class _InChunks(torch.autograd.Function):
    """Attention over `_keys_values` of the media, a chunk at a time: output, and log-sum-exp (…, queries, 1).

    The backward pass makes keys and values again, and the weights of attention too where they were not to be kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        media: Tensor,
        mask: Tensor | None,
        keep: bool,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        limits = torch.finfo(q.dtype)
        highest = q.new_full((*q.shape[:-1], 1), limits.min)  # not -inf: -inf - -inf would be NaN
        total = out = torch.zeros_like(highest)
        kept = []
        for chunk in _chunks(media):
            k, v = _keys_values(media[:, chunk], q.shape[-1], q.dtype, parameters)
            scores = _scores(q, k, mask, chunk)
            before, highest = highest, torch.maximum(highest, scores.amax(-1, keepdim=True))
            weights, shrink = scores.sub_(highest).exp_(), (before - highest).exp()
            total = total * shrink + weights.sum(-1, keepdim=True)
            out = out * shrink + weights @ v
            if keep:
                kept.append((weights, highest))
        total = total.clamp(min=limits.tiny)  # 0 where no token is real
        out, lse = out / total, highest + total.log()
        ctx.num_kept = len(kept)
        kept = [weights.mul_((at_its_time - lse).exp()) for weights, at_its_time in kept]
        ctx.save_for_backward(q, media, mask, out, lse, *kept, *parameters)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_lse: Tensor) -> tuple[Tensor | None, ...]:
        q, media, mask, out, lse, *rest = ctx.saved_tensors
        kept, parameters = rest[: ctx.num_kept], rest[ctx.num_kept :]
        offset = d_lse - (d_out * out).sum(-1, keepdim=True)
        d_q = torch.zeros_like(q)
        d_media = torch.empty_like(media) if ctx.needs_input_grad[1] else None
        d_parameters = [torch.zeros_like(parameter) for parameter in parameters]
        for index, chunk in enumerate(_chunks(media)):
            tokens = media[:, chunk].detach().requires_grad_(d_media is not None)
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            with torch.set_grad_enabled(bool(parameters)):
                k, v = _keys_values(tokens, q.shape[-1], q.dtype, leaves)
            weights = kept[index] if kept else _scores(q, k.detach(), mask, chunk).sub_(lse).exp_()
            d_scores = (d_out @ v.detach().mT).add_(offset).mul_(weights)
            d_q += d_scores @ k.detach()
            if parameters:
                wanted = leaves if d_media is None else [*leaves, tokens]
                gradients = torch.autograd.grad((k, v), wanted, (d_scores.mT @ q, weights.mT @ d_out))
                for so_far, gradient in zip(d_parameters, gradients, strict=False):
                    so_far += gradient
                if d_media is not None:
                    d_media[:, chunk] = gradients[-1]
            elif d_media is not None:
                d_media[:, chunk] = (d_scores.mT @ q + weights.mT @ d_out)[:, 0]
        return d_q, d_media, None, None, *d_parameters


def _chunks(media: Tensor) -> Iterator[slice]:
    return (slice(start, start + CHUNK) for start in range(0, media.shape[1], CHUNK))


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, chunk: slice) -> Tensor:
    scores = q @ k.mT
    return scores if mask is None else scores.masked_fill_(~mask[:, None, None, chunk], -torch.inf)
