"""Attention of few queries over many visual keys, and of text over its last image."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmzoo.kernels import _device, fused, reference
from vlmzoo.kernels.chunked import chunked_attention

LONG_ON_CPU = {"lengths": 1024, "packed keys": 1024, "images": 256, "a second segment": 8192, "a mask": 8192}
"""How many keys of a sample make it no slower, on a CPU, to go through them in pieces than to mask and copy them."""
LONG_ON_GPU = 2048
"""Below so many keys a dense kernel's launch costs more than its work. Counted, not measured yet."""
FEW = 256
"""Queries up to which Triton's backward reads the keys once or twice; more are SDPA's case, which multiplies faster."""
MAX_TRITON_DIM = 128


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


@dataclass(frozen=True)
class Call:
    """What is asked for, checked. With `image_of_token` k and v are (batch, images, keys, heads, dim)."""

    q: Tensor
    k: Tensor
    v: Tensor
    k2: Tensor | None
    v2: Tensor | None
    kv_lens: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_k: int | None
    mask: Tensor | None
    scale: float
    image_of_token: Tensor | None
    return_lse: bool

    @property
    def on_gpu(self) -> bool:
        return self.q.is_cuda

    @property
    def num_keys(self) -> int:
        """Of a sample; packed ones of all samples."""
        if self.image_of_token is not None:
            return self.k.shape[1] * self.k.shape[2]
        return self.k.shape[0 if self.cu_seqlens_k is not None else 1] + (0 if self.k2 is None else self.k2.shape[1])


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
    (log-sum-exp: -inf), and no gradient. Under autocast all is cast as for `scaled_dot_product_attention`.

    Args:
        q: (batch, queries, heads, dim)
        k, v: (batch, keys, heads, dim); with `cu_seqlens_k` packed: (total keys, heads, dim)
        k2, v2: (batch, keys2, heads, dim), a second segment of keys behind the first (a resampler's own latents)
        kv_lens: (batch,), how many keys of the first segment are real; the rest is never read
        cu_seqlens_k: (batch + 1,), where each sample's keys begin and end in the packed k and v
        max_seqlen_k: the longest of these segments; None: looked up, which waits for the device
        mask: bool, broadcastable to (batch, heads, queries, keys + keys2), True = attend
        scale: default dim ** -0.5
        backend: "auto" or a name in `BACKENDS`; see `explain_backend`

    Raises:
        ValueError: shapes, types or devices that do not go together, lengths out of range (on a GPU these end in a
            device-side assertion, so as not to wait for it), an unknown backend, or one that cannot do this.
    """
    call = _latent(q, k, v, k2, v2, kv_lens, cu_seqlens_k, max_seqlen_k, mask, scale, return_lse)
    name, _ = _choose(call, backend)
    out, lse = BACKENDS[name].run(call)
    return (out, lse) if return_lse and lse is not None else out


def media_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    image_of_token: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float | None = None,
    project: Tensor | None = None,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """What each text token reads in one image: residual + tanh(gate) · project(attention over that image's keys).

    A token that reads no image, or one whose keys all are masked, reads 0.

    Source: Alayrac et al., Flamingo (2022), sections 3.1.2 (the gate) and 3.1.3 (each token sees its last image only).

    Args:
        q: (batch, length, heads, dim)
        k, v: (batch, images, keys, heads, dim)
        image_of_token: (batch, length), which of its sample's images a token reads, -1: none. Fastest where tokens of
            one image stand together.
        mask: bool (batch, images, keys), True = a real key
        scale: default dim ** -0.5
        project: (width, heads * dim), the output projection's weight; None: the attention itself is returned
        gate: () or (1,), before its tanh
        residual: (batch, length, width), what is added to; goes with `gate`
        backend: "auto" or a name in `BACKENDS`; see `explain_backend`

    Returns:
        (batch, length, width), without `project` (batch, length, heads, dim).

    Raises:
        ValueError: as `latent_attention`.
    """
    call = _media(q, k, v, image_of_token, mask, scale)
    if (gate is None) != (residual is None):
        raise ValueError("gate and residual go together: one of them is missing")
    if project is not None:
        _fits("project", project, ("width", q.shape[2] * q.shape[3]))
    if residual is not None:
        shape = tuple(q.shape) if project is None else (*q.shape[:2], len(project))
        _fits("residual", residual, shape)
    name, _ = _choose(call, backend)
    out, _ = BACKENDS[name].run(call)
    if project is not None:
        out = F.linear(out.flatten(2), project)
    return out if gate is None or residual is None else residual + gate.tanh() * out


def explain_backend(q: Tensor, k: Tensor, v: Tensor, *, backend: str = "auto", **arguments: Any) -> str:
    """What `latent_attention`, or with `image_of_token` `media_attention`, would run, and why not another.

    Takes what they take. The first line is "NAME: reason"; one line for every other backend follows.
    """
    if "image_of_token" in arguments:
        rest = {name: value for name, value in arguments.items() if name not in ("project", "gate", "residual")}
        call = _media(q, k, v, **{"mask": None, "scale": None, **rest})
    else:
        optional = ("k2", "v2", "kv_lens", "cu_seqlens_k", "max_seqlen_k", "mask", "scale")
        call = _latent(q, k, v, **{**dict.fromkeys(optional), "return_lse": False, **arguments})
    name, reason = _choose(call, backend)
    others = (f"{other}: {room.obstacle(call) or 'could do it'}" for other, room in BACKENDS.items() if other != name)
    return "\n".join([f"{name}: {reason}", *others])


def _choose(call: Call, backend: str) -> tuple[str, str]:
    if backend != "auto":
        if backend not in BACKENDS:
            raise ValueError(f"unknown attention backend {backend!r}; valid: auto, {', '.join(BACKENDS)}")
        if obstacle := BACKENDS[backend].obstacle(call):
            raise ValueError(f"attention backend {backend!r} cannot do this: {obstacle}")
        return backend, "asked for by name"
    extras = {
        "lengths": call.kv_lens,
        "packed keys": call.cu_seqlens_k,
        "images": call.image_of_token,
        "a second segment": call.k2,
        "a mask": call.mask,
    }
    asked = next((name for name, value in extras.items() if value is not None), None)
    few = call.q.shape[1] <= FEW or call.image_of_token is not None
    if call.on_gpu and few and not BACKENDS["triton"].obstacle(call):
        if asked or call.return_lse:
            return "triton", f"with {asked or 'the log-sum-exp'} other kernels would copy or mask out keys"
        if call.num_keys >= LONG_ON_GPU:
            return "triton", f"few queries over at least {LONG_ON_GPU} keys"
    if not BACKENDS["chunked"].obstacle(call):
        if call.return_lse:
            return "chunked", "the log-sum-exp is asked for, which sdpa does not return"
        if asked and call.num_keys >= LONG_ON_CPU[asked]:
            return "chunked", f"at least {LONG_ON_CPU[asked]} keys with {asked}, which sdpa would copy or mask out"
    if call.return_lse:
        return "eager", "the log-sum-exp is asked for, which sdpa does not return"
    return "sdpa", f"nothing to leave out; PyTorch picks its kernel for {call.q.dtype} on {call.q.device.type}"


@dataclass(frozen=True)
class Backend:
    """One way to run a call."""

    obstacle: Callable[[Call], str | None]
    """Why it cannot; None: it can."""
    run: Callable[[Call], tuple[Tensor, Tensor | None]]
    """Output, and where it is asked for the log-sum-exp."""


def _run_eager(call: Call) -> tuple[Tensor, Tensor | None]:
    return reference.attention(*_padded(call), call.scale)


def _run_fused(attend: Callable[..., Tensor]) -> Callable[[Call], tuple[Tensor, None]]:
    return lambda call: (attend(*_padded(call), call.scale), None)


def _run_chunked(call: Call) -> tuple[Tensor, Tensor]:
    k, v, mask, num_images = call.k, call.v, call.mask, 0
    if call.image_of_token is not None:
        num_images = k.shape[1]
        k, v = k.flatten(1, 2), v.flatten(1, 2)
        mask = None if mask is None else mask.flatten(1)[:, None, None]
    return chunked_attention(
        call.q, k, v, call.k2, call.v2, call.kv_lens, call.cu_seqlens_k, mask, call.image_of_token, num_images,
        call.scale, call.return_lse,
    )  # fmt: skip


def _run_triton(call: Call) -> tuple[Tensor, Tensor]:
    if call.image_of_token is not None:
        from vlmzoo.kernels.media import media_attention as media

        return media(call.q, call.k, call.v, call.image_of_token, call.mask, call.scale)
    from vlmzoo.kernels.latent import latent_attention as latent

    longest, mask = 0, call.mask
    if call.cu_seqlens_k is not None:
        longest = int(call.cu_seqlens_k.diff().max()) if call.max_seqlen_k is None else call.max_seqlen_k
    if mask is not None:
        mask = mask[:, 0, 0].expand(len(call.q), -1)
    return latent(
        call.q, call.k, call.v, call.k2, call.v2, call.kv_lens, call.cu_seqlens_k, longest, mask, call.scale,
        call.return_lse,
    )  # fmt: skip


def _no_lse(call: Call) -> str | None:
    return "it does not return the log-sum-exp" if call.return_lse else None


def _flex_obstacle(call: Call) -> str | None:
    if not call.on_gpu and any(tensor.requires_grad for tensor in (call.q, call.k, call.v)):
        return f"it has no backward on {call.q.device.type}"
    return _no_lse(call)


def _xformers_obstacle(call: Call) -> str | None:
    if not fused.has_xformers():
        return "xformers is not installed"
    return _no_lse(call) if call.on_gpu else f"it needs a CUDA device, not {call.q.device.type}"


def _pinned_obstacle(name: str) -> Callable[[Call], str | None]:
    def obstacle(call: Call) -> str | None:
        if not call.on_gpu and name in ("sdpa-efficient", "sdpa-cudnn"):
            return f"it needs a CUDA device, not {call.q.device.type}"
        masks = (call.mask, call.kv_lens, call.cu_seqlens_k, call.image_of_token)
        if call.on_gpu and name == "sdpa-flash" and any(mask is not None for mask in masks):
            return "it takes neither a mask nor lengths"
        return _no_lse(call)

    return obstacle


def _same_dims(call: Call) -> str | None:
    if call.v.shape[-1] != call.q.shape[-1]:
        return f"values must be as wide as queries, {call.q.shape[-1]}, not {call.v.shape[-1]}"
    return None


def _chunked_obstacle(call: Call) -> str | None:
    return _same_dims(call) if call.q.device.type == "cpu" else f"it is for a CPU, not {call.q.device.type}"


def _triton_obstacle(call: Call) -> str | None:
    if obstacle := _device.obstacle(call.q.device):
        return obstacle
    if call.q.shape[-1] > MAX_TRITON_DIM:
        return f"its heads have at most {MAX_TRITON_DIM} dimensions, not {call.q.shape[-1]}"
    if call.q.dtype == torch.float64 and call.on_gpu:
        return "it has no float64 on a GPU"
    if call.mask is not None and call.image_of_token is None and call.mask.shape[1:3] != (1, 1):
        return "its mask is one of keys alone, the same for all heads and queries"
    return _same_dims(call)


BACKENDS: dict[str, Backend] = {
    "eager": Backend(lambda call: None, _run_eager),
    "chunked": Backend(_chunked_obstacle, _run_chunked),
    "sdpa": Backend(_no_lse, _run_fused(fused.sdpa)),
    **{
        name: Backend(_pinned_obstacle(name), _run_fused(partial(fused.sdpa, pinned=kernel)))
        for name, kernel in fused.SDPA.items()
    },
    "flex": Backend(_flex_obstacle, _run_fused(fused.flex)),
    "xformers": Backend(_xformers_obstacle, _run_fused(fused.xformers)),
    "triton": Backend(_triton_obstacle, _run_triton),
}


def _padded(call: Call) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, all keys and values of a sample in one row, and which of them count."""
    k, v, mask, kv_lens = call.k, call.v, call.mask, call.kv_lens
    if call.image_of_token is not None:
        images = torch.arange(k.shape[1], device=k.device)
        reads = call.image_of_token[:, :, None, None] == images[:, None]
        counts = reads.expand(*reads.shape[:3], k.shape[2]) if mask is None else reads & mask[:, None]
        return call.q, k.flatten(1, 2), v.flatten(1, 2), counts.flatten(2)[:, None]
    if call.cu_seqlens_k is not None:
        k, v, kv_lens = _unpack(k, v, call.cu_seqlens_k, call.max_seqlen_k)
    if kv_lens is not None:
        real = torch.arange(k.shape[1], device=k.device) < kv_lens[:, None]
        k, v = (tensor.masked_fill(~real[:, :, None, None], 0) for tensor in (k, v))  # 0 * NaN would be NaN
        real = F.pad(real, (0, 0 if call.k2 is None else call.k2.shape[1]), value=True)[:, None, None]
        mask = real if mask is None else real & mask
    if call.k2 is not None and call.v2 is not None:
        k, v = torch.cat([k, call.k2], 1), torch.cat([v, call.v2], 1)
    return call.q, k, v, mask


def _unpack(k: Tensor, v: Tensor, cu_seqlens_k: Tensor, max_seqlen_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Packed keys and values as a padded batch, and their lengths."""
    lengths = cu_seqlens_k.diff()
    longest = int(lengths.max()) if max_seqlen_k is None else min(max_seqlen_k, len(k))
    offset = torch.arange(longest, device=k.device)
    index = torch.where(offset < lengths[:, None], cu_seqlens_k[:-1, None] + offset, 0)
    return k[index], v[index], lengths


def _latent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k2: Tensor | None,
    v2: Tensor | None,
    kv_lens: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    mask: Tensor | None,
    scale: float | None,
    return_lse: bool,
) -> Call:
    _fits("q", q, ("batch", "queries", "heads", "dim"))
    batch, num_queries, heads, dim = q.shape
    _fits("k", k, (batch, "keys", heads, dim) if cu_seqlens_k is None else ("total keys", heads, dim))
    _fits("v", v, (*k.shape[:-1], "dim"))
    if (k2 is None) != (v2 is None):
        raise ValueError("k2 and v2 go together: one of them is missing")
    if k2 is not None and v2 is not None:
        _fits("k2", k2, (batch, "keys", heads, dim))
        _fits("v2", v2, (*k2.shape[:-1], v.shape[-1]))
    _alike(q, k=k, v=v, k2=k2, v2=v2)
    _on(q, kv_lens=kv_lens, cu_seqlens_k=cu_seqlens_k, mask=mask)
    if cu_seqlens_k is not None:
        _fits("cu_seqlens_k", cu_seqlens_k, (batch + 1,))
        if kv_lens is not None or mask is not None:
            raise ValueError("cu_seqlens_k says which keys each sample has: it takes neither kv_lens nor a mask")
        _within("cu_seqlens_k", cu_seqlens_k, 0, len(k))
        longest = len(k) if max_seqlen_k is None else max_seqlen_k
        _within("lengths between cu_seqlens_k", cu_seqlens_k.diff(), 0, longest)
    if kv_lens is not None:
        _fits("kv_lens", kv_lens, (batch,))
        _within("kv_lens", kv_lens, 0, k.shape[1])
    if mask is not None:
        full = (batch, heads, num_queries, k.shape[1] + (0 if k2 is None else k2.shape[1]))
        mask = _mask(mask, full)
    q, k, v = (tensor.to(autocast_dtype(tensor)) for tensor in (q, k, v))
    if k2 is not None and v2 is not None:
        k2, v2 = k2.to(q.dtype), v2.to(q.dtype)
    scale = 1 / math.sqrt(dim) if scale is None else scale
    return Call(q, k, v, k2, v2, kv_lens, cu_seqlens_k, max_seqlen_k, mask, scale, None, return_lse)


def _media(q: Tensor, k: Tensor, v: Tensor, image_of_token: Tensor, mask: Tensor | None, scale: float | None) -> Call:
    _fits("q", q, ("batch", "length", "heads", "dim"))
    batch, length, heads, dim = q.shape
    _fits("k", k, (batch, "images", "keys", heads, dim))
    _fits("v", v, (*k.shape[:-1], "dim"))
    _fits("image_of_token", image_of_token, (batch, length))
    _alike(q, k=k, v=v)
    _on(q, image_of_token=image_of_token, mask=mask)
    _within("image_of_token", image_of_token, -1, k.shape[1] - 1)
    if mask is not None:
        _fits("mask", mask, tuple(k.shape[:3]))
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}")
    q, k, v = (tensor.to(autocast_dtype(tensor)) for tensor in (q, k, v))
    scale = 1 / math.sqrt(dim) if scale is None else scale
    return Call(q, k, v, None, None, None, None, None, mask, scale, image_of_token, False)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The type in which autocast, where it is on, has a tensor multiplied; else its own."""
    device = tensor.device.type
    casts = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if casts and tensor.dtype != torch.float64 else tensor.dtype


def _alike(q: Tensor, **others: Tensor | None) -> None:
    _on(q, **others)
    for name, tensor in others.items():
        if tensor is not None and tensor.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} as q is, got {tensor.dtype}")


def _on(q: Tensor, **others: Tensor | None) -> None:
    for name, tensor in others.items():
        if tensor is not None and tensor.device != q.device:
            raise ValueError(f"{name} must be on {q.device} as q is, got {tensor.device}")


def _within(name: str, values: Tensor, low: int, high: int) -> None:
    """Refuses integers outside a range; on a GPU that is left to the device, which would have to be waited for."""
    if values.is_floating_point() or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {values.dtype}")
    if values.device.type == "meta" or torch.compiler.is_compiling() or not values.numel():
        return
    if values.is_cuda:
        inside = ((values >= low) & (values <= high)).all()
        torch.ops.aten._assert_async.msg(inside, f"{name} must be from {low} to {high}")
        return
    for found in (int(values.min()), int(values.max())):
        if not low <= found <= high:
            raise ValueError(f"{name} must be from {low} to {high}, got {found}")


def _mask(mask: Tensor, full: tuple[int, ...]) -> Tensor:
    """With four dimensions."""
    sizes = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if mask.dtype != torch.bool or len(sizes) > 4 or any(a not in (1, b) for a, b in zip(sizes, full, strict=True)):
        raise ValueError(f"mask must be bool and broadcast to {full}, got {mask.dtype} {tuple(mask.shape)}")
    return mask.view(sizes).expand(*sizes[:3], full[3])


def _fits(name: str, tensor: Tensor, wanted: tuple[int | str, ...]) -> None:
    """Refuses a tensor of another shape; axes named by a word may have any size."""
    shape = tuple(tensor.shape)
    if len(shape) != len(wanted) or any(isinstance(b, int) and a != b for a, b in zip(shape, wanted, strict=True)):
        wants, got = (", ".join(map(str, sizes)) for sizes in (wanted, shape))
        raise ValueError(f"{name} must be ({wants}), got ({got})")
