"""Attention of few queries over many visual keys."""

from __future__ import annotations

import math
from typing import Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "eager", "sdpa")


class Options(TypedDict, total=False):
    """The keywords of `latent_attention` that don't change what it returns."""

    k2: Tensor | None
    v2: Tensor | None
    kv_lens: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_k: int | None
    mask: Tensor | None
    scale: float | None
    backend: str


@overload
def latent_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[False] = False, **options: Unpack[Options]
) -> Tensor: ...


@overload
def latent_attention(
    q: Tensor, k: Tensor, v: Tensor, *, return_lse: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


def latent_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    kv_lens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v, (batch, queries, heads, dim).

    With `return_lse` also the log-sum-exp of the scores, (batch, heads, queries). A query without any key gives 0
    (log-sum-exp: -inf), and no gradient.

    Args:
        q: (batch, queries, heads, dim)
        k, v: (batch, keys, heads, dim); with `cu_seqlens_k` packed: (total keys, heads, dim)
        k2, v2: (batch, keys2, heads, dim), a second segment of keys behind the first (a resampler's own latents)
        kv_lens: (batch,), how many keys of the first segment are real; the rest is never read
        cu_seqlens_k: (batch + 1,), where each sample's keys begin and end in the packed k and v
        max_seqlen_k: the longest of these segments; None: looked up, which waits for the device
        mask: bool, broadcastable to (batch, heads, queries, keys + keys2), True = attend
        scale: default dim ** -0.5
        backend: eager | sdpa | auto; see `explain_backend`

    Raises:
        ValueError: shapes or types that do not go together, an unknown backend, or one that cannot do this.
    """
    _check(q, k, v, k2, v2, kv_lens, cu_seqlens_k, mask)
    name, _ = _choose(q, return_lse, backend)
    if cu_seqlens_k is not None:
        k, v, kv_lens = _unpack(k, v, cu_seqlens_k, max_seqlen_k)
    if kv_lens is not None:
        real = torch.arange(k.shape[1], device=k.device) < kv_lens[:, None]
        k, v = (tensor.masked_fill(~real[:, :, None, None], 0) for tensor in (k, v))  # 0 * NaN would be NaN
        real = F.pad(real, (0, 0 if k2 is None else k2.shape[1]), value=True)[:, None, None]
        mask = real if mask is None else real & mask
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if k2 is not None and v2 is not None:
        k2, v2 = k2.transpose(1, 2), v2.transpose(1, 2)
    if name == "sdpa":
        return _sdpa(q, k, v, k2, v2, mask, scale).transpose(1, 2)
    out, lse = _eager(q, k, v, k2, v2, mask, scale)
    return (out.transpose(1, 2), lse) if return_lse else out.transpose(1, 2)


def explain_backend(q: Tensor, *, return_lse: bool = False, backend: str = "auto") -> str:
    """What `latent_attention` would run for these queries, and why: "NAME: reason"."""
    return ": ".join(_choose(q, return_lse, backend))


def _choose(q: Tensor, return_lse: bool, backend: str) -> tuple[str, str]:
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; valid: {', '.join(BACKENDS)}")
    if backend == "sdpa" and return_lse:
        raise ValueError("attention backend 'sdpa' does not return the log-sum-exp; use 'eager' or 'auto'")
    if backend != "auto":
        return backend, "asked for by name"
    if return_lse:
        return "eager", "the log-sum-exp is asked for, which sdpa does not return"
    return "sdpa", f"nothing asked for that it cannot do; PyTorch picks its kernel for {q.dtype} on {q.device.type}"


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    mask: Tensor | None,
) -> None:
    _fits("q", q, ("batch", "queries", "heads", "dim"))
    batch, num_queries, heads, dim = q.shape
    _fits("k", k, (batch, "keys", heads, dim) if cu_seqlens_k is None else ("total keys", heads, dim))
    _fits("v", v, (*k.shape[:-1], "dim"))
    if (k2 is None) != (v2 is None):
        raise ValueError("k2 and v2 go together: one of them is missing")
    if k2 is not None and v2 is not None:
        _fits("k2", k2, (batch, "keys", heads, dim))
        _fits("v2", v2, (*k2.shape[:-1], v.shape[-1]))
    if cu_seqlens_k is not None:
        _fits("cu_seqlens_k", cu_seqlens_k, (batch + 1,))
        if kv_lens is not None or mask is not None:
            raise ValueError("cu_seqlens_k says which keys each sample has: it takes neither kv_lens nor a mask")
    if kv_lens is not None:
        _fits("kv_lens", kv_lens, (batch,))
    for name, tensor in (("k", k), ("v", v), ("k2", k2), ("v2", v2)):
        if tensor is not None and tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} as q is, got {tensor.dtype}")
    if mask is not None:
        full = (batch, heads, num_queries, k.shape[1] + (0 if k2 is None else k2.shape[1]))
        sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
        if mask.dtype != torch.bool or len(sizes) > 4 or any(a not in (1, b) for a, b in zip(sizes, full, strict=True)):
            raise ValueError(f"mask must be bool and broadcast to {full}, got {mask.dtype} {tuple(mask.shape)}")


def _fits(name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Refuses a tensor of another shape; axes named by a word may have any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or any(isinstance(b, int) and a != b for a, b in zip(shape, wanted, strict=True)):
        wants, got = (", ".join(map(str, sizes)) for sizes in (wanted, shape))
        raise ValueError(f"{name} must be ({wants}), got ({got})")


def _unpack(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed keys and values as a padded batch, and their lengths."""
    lengths = cu_seqlens_k.diff()
    longest = int(lengths.max()) if max_seqlen_k is None else min(max_seqlen_k, len(k))
    offset = torch.arange(longest, device=k.device)
    index = torch.where(offset < lengths[:, None], cu_seqlens_k[:-1, None] + offset, 0)
    return k[index], v[index], lengths


def _eager(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Heads first, as every backend's."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype)
    scores = q @ k.to(dtype).mT * scale
    if k2 is not None:
        scores = torch.cat([scores, q @ k2.to(dtype).mT * scale], -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()  # -inf - -inf would be NaN
    out = weights[..., : k.shape[2]] @ v.to(dtype)
    if v2 is not None:
        out = out + weights[..., k.shape[2] :] @ v2.to(dtype)
    return out.to(v.dtype), lse


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, k2: Tensor | None, v2: Tensor | None, mask: Tensor | None, scale: float
) -> Tensor:
    if k2 is not None and v2 is not None:
        k, v = torch.cat([k, k2], 2), torch.cat([v, v2], 2)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale)
    # Without a key its softmax is NaN: such a query attends to everything, and its output is dropped.
    has_key = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~has_key, scale=scale)
    return out.masked_fill(~has_key, 0)
