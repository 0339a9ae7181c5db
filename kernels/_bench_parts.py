"""What the benchmarks compare on either kind of device: several ways to the same outputs and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmzoo.kernels.attention import latent_attention, media_attention
from vlmzoo.kernels.resampler import resampler_attention
from vlmzoo.kernels.splice import splice_rows
from vlmzoo.kernels.supervised_loss import supervised_loss

Way = Callable[[], tuple[Tensor, ...]]
"""The output and the gradients."""


@dataclass
class Part:
    """Ways to the same; the first is what the others are held to."""

    name: str
    shape: str
    ways: dict[str, Way]

    def check(self, tolerance: float) -> None:
        """Raises:
        ArithmeticError: a way gives something else.
        """
        want = None
        for name, run in self.ways.items():
            found = [tensor.float() for tensor in run()]
            want = want or found
            error = max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in zip(found, want, strict=True))
            if not error <= tolerance:
                where = f"{self.name}, {self.shape}"
                raise ArithmeticError(f"{where}: {name} is off by {error:.2g}, at most {tolerance} is expected")


def _way(run: Callable[[], Tensor], inputs: Sequence[Tensor], slope: Tensor) -> Way:
    def both() -> tuple[Tensor, ...]:
        out = run()
        return out.detach().reshape(-1), *torch.autograd.grad(out, inputs, slope)

    return both


def _draw(device: torch.device, dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.randn(sizes, device=device).to(dtype).requires_grad_()


def segments(
    device: torch.device, dtype: torch.dtype, batch: int, queries: int, keys: int, latents: int, lengths: bool
) -> Part:
    """Keys of a resampler: those of the media, of different lengths or not, and those of its latents; 8 heads x 64."""
    q, k, v, k2, v2 = (_draw(device, dtype, batch, n, 8, 64) for n in (queries, keys, keys, latents, latents))
    lens = None
    if lengths:
        picked = torch.randint(keys // 4, keys + 1, (batch,), generator=torch.Generator().manual_seed(keys))
        lens = picked.to(torch.int32).to(device)

    def run(backend: str) -> Way:
        arguments = {"k2": k2, "v2": v2, "kv_lens": lens, "backend": backend}
        return _way(lambda: latent_attention(q, k, v, **arguments), (q, k, v, k2, v2), torch.ones_like(q))

    shape = f"B{batch} Lq{queries} Lkv{keys} + {latents}" + (", lengths" if lengths else "")
    return Part("segments", shape, {"sdpa": run("sdpa"), "vlmzoo": run("auto")})


def media(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    length: int,
    images: int,
    keys: int,
    backends: Sequence[str],
) -> Part:
    """Text whose tokens read their last image, 16 heads x 64."""
    q = _draw(device, dtype, batch, length, 16, 64)
    k, v = (_draw(device, dtype, batch, images, keys, 16, 64) for _ in range(2))
    image = (torch.arange(length, device=device) * images // length).expand(batch, length)

    def run(backend: str) -> Way:
        return _way(lambda: media_attention(q, k, v, image, backend=backend), (q, k, v), torch.ones_like(q))

    return Part("media", f"B{batch} L{length}, {images} images x {keys}", {name: run(name) for name in backends})


def splice(
    device: torch.device,
    dtype: torch.dtype,
    batch: int,
    length: int,
    slots: int,
    dim: int,
    backends: Sequence[str],
) -> Part:
    """Rows of one image into a text."""
    embeds, rows = (_draw(device, dtype, batch, size, dim) for size in (length, slots))
    index = torch.full((batch, length), -1, device=device)
    start = (length - slots) // 2
    index[:, start : start + slots] = torch.arange(slots, device=device)
    slope = torch.randn_like(embeds)

    def run(backend: str) -> Way:
        return _way(lambda: splice_rows(embeds, rows, index, backend=backend), (embeds, rows), slope)

    def scatter() -> Tensor:
        return embeds.masked_scatter((index >= 0)[..., None], rows)

    ways = {"masked_scatter": _way(scatter, (embeds, rows), slope)} | {name: run(name) for name in backends}
    return Part("splice", f"B{batch} L{length} rows {slots} dim {dim}", ways)


def loss(
    device: torch.device, dtype: torch.dtype, batch: int, length: int, dim: int, vocab: int, *, trained: bool
) -> Part:
    """A quarter of the positions supervised."""
    hidden = _draw(device, dtype, batch, length, dim)
    weight = (torch.randn(vocab, dim, device=device) / math.sqrt(dim)).to(dtype).requires_grad_(trained)
    labels = torch.randint(vocab, (batch, length), device=device)
    labels[:, : length * 3 // 4] = -100

    def full() -> Tensor:
        logits = F.linear(hidden, weight).float().flatten(0, 1)
        return F.cross_entropy(logits, labels.flatten(), reduction="sum")

    def ours() -> Tensor:
        return supervised_loss(hidden, weight, labels)

    inputs, slope = (hidden, weight) if trained else (hidden,), torch.ones((), device=device)
    head = "trained" if trained else "frozen"
    shape = f"rows {batch * length}, a quarter supervised, dim {dim}, vocab {vocab}, {head} head"
    return Part("loss", shape, {"full logits": _way(full, inputs, slope), "supervised rows": _way(ours, inputs, slope)})


def projections(device: torch.device, queries: int, tokens: int, media_dim: int, heads: int, dim: int) -> Part:
    """One layer of a resampler over frozen media, in float32: with keys and values of them, and without."""
    media = torch.randn(1, tokens, media_dim, device=device)
    q = _draw(device, torch.float32, 1, queries, heads, dim)
    weights = [_draw(device, torch.float32, heads * dim, media_dim) for _ in range(2)]
    with torch.no_grad():
        for weight in weights:
            weight /= math.sqrt(media_dim)
    bias = torch.zeros(heads * dim, device=device)

    def run(method: str) -> Way:
        def out() -> Tensor:
            key, value = ((weight, bias) for weight in weights)
            return resampler_attention(q, media, key, value, method=method)

        return _way(out, (q, *weights), torch.ones_like(q))

    shape = f"Lq{queries} tokens {tokens}, {heads} x {dim} of {media_dim}"
    return Part("projections", shape, {"projected": run("projected"), "absorbed": run("absorbed")})
