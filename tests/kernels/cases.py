"""Inputs of attention, and how near to the float64 oracle a backend has to come."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import oracle
from vlmzoo.kernels.attention import latent_attention, media_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BATCH, HEADS, DIM = 3, 2, 16


def draw(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(sum(sum(shape) for shape in shapes.values()))
    values = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: value.to(dtype).requires_grad_() for name, value in values.items()}


def tensors(
    num_queries: int,
    num_keys: int,
    num_latents: int = 0,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = BATCH,
    heads: int = HEADS,
    dim: int = DIM,
    **more: Any,
) -> dict[str, Any]:
    lengths = {"q": num_queries, "k": num_keys, "v": num_keys}
    if num_latents:
        lengths |= {"k2": num_latents, "v2": num_latents}
    return draw({name: (batch, length, heads, dim) for name, length in lengths.items()}, dtype) | more


def packed(
    lengths: list[int], num_queries: int = 5, dtype: torch.dtype = torch.float64, **sizes: Any
) -> dict[str, Any]:
    inputs = tensors(num_queries, sum(lengths), 4, dtype, batch=len(lengths), **sizes)
    for name in ("k", "v"):
        inputs[name] = inputs[name][0].detach().requires_grad_()
    inputs["cu_seqlens_k"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    return inputs


def text_and_images(
    length: int,
    num_images: int,
    num_keys: int,
    dtype: torch.dtype = torch.float64,
    *,
    batch: int = BATCH,
    heads: int = HEADS,
    dim: int = DIM,
    masked: bool = True,
) -> dict[str, Any]:
    """Text whose tokens read their last image; in the last sample in no order; with `masked` one image is empty."""
    media = (batch, num_images, num_keys, heads, dim)
    inputs = draw({"q": (batch, length, heads, dim), "k": media, "v": media}, dtype)
    generator = torch.Generator().manual_seed(length)
    images = torch.randint(-1, num_images, (batch, length), generator=generator)
    inputs["image_of_token"] = torch.cat([images[:-1].sort(1).values, images[-1:]])
    if masked:
        inputs["mask"] = torch.rand(media[:3], generator=generator) < 0.6
        inputs["mask"][0, 0] = False
    return inputs


def error(got: Tensor, want: Tensor) -> float:
    """Relative, but to no less than 0.1: a gradient may be exactly 0."""
    return float((got.double() - want).norm() / want.norm().clamp(min=0.1))


class Altered:
    """A Triton kernel with some of its constants changed: a planted fault."""

    def __init__(self, kernel: Any, **constants: Any) -> None:
        self.kernel, self.constants = kernel, constants

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments, **constants: self.kernel[grid](*arguments, **{**constants, **self.constants})


def placed(inputs: dict[str, Any], device: str) -> dict[str, Any]:
    """The same on a device."""
    return {
        name: value.detach().to(device).requires_grad_(value.requires_grad) if torch.is_tensor(value) else value
        for name, value in inputs.items()
    }


def check(inputs: dict[str, Any], backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu") -> None:
    """Output and gradients are the oracle's, to the tolerance of the type, and lengths' and masks' too."""
    names = [name for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()]
    exact = {name: inputs[name].detach().double().requires_grad_() for name in names}
    ours = placed(inputs, device)
    if "image_of_token" in inputs:
        want, got = oracle.media_attention(**{**inputs, **exact}), media_attention(**ours, backend=backend)
    else:
        want, got = oracle.attention(**{**inputs, **exact})[0], latent_attention(**ours, backend=backend)
    assert got.dtype == dtype
    assert got.isfinite().all()
    assert error(got.detach().cpu(), want.detach()) <= TOLERANCE[dtype]
    if not got.requires_grad:
        return
    slope = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = torch.autograd.grad(want, list(exact.values()), slope)
    found = torch.autograd.grad(got, [ours[name] for name in names], slope.to(device, dtype))
    for name, gradient, exactly in zip(names, found, wanted, strict=True):
        assert gradient.isfinite().all(), name
        assert error(gradient.cpu(), exactly) <= 2 * TOLERANCE[dtype], name
