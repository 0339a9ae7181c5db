"""Triton's media attention under its interpreter, against the float64 oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import BATCH, HEADS, TOLERANCE, Altered, check, text_and_images
from vlmzoo.kernels import media
from vlmzoo.kernels.attention import media_attention

WHOLE = pytest.mark.kernels


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_equals_the_oracle(dtype: torch.dtype) -> None:
    check(text_and_images(70, 3, 37, dtype), "triton", dtype)
    check(text_and_images(5, 1, 64, dtype, dim=80, masked=False), "triton", dtype)


@WHOLE
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize(("length", "num_images", "num_keys"), [(1, 1, 1), (129, 5, 64), (200, 2, 130)])
def test_equals_the_oracle_at_every_size(
    dtype: torch.dtype, dim: int, length: int, num_images: int, num_keys: int
) -> None:
    check(text_and_images(length, num_images, num_keys, dtype, dim=dim, batch=2), "triton", dtype)


def test_images_that_nobody_reads_get_no_gradient() -> None:
    inputs = text_and_images(40, 4, 9, masked=False) | {"image_of_token": torch.full((BATCH, 40), 2)}
    check(inputs, "triton")
    out = media_attention(**inputs, backend="triton")
    dk, dv = torch.autograd.grad(out.square().sum(), (inputs["k"], inputs["v"]))
    assert dk[:, 2].any()
    assert not dk[:, [0, 1, 3]].any()
    assert not dv[:, [0, 1, 3]].any()
    inputs["image_of_token"] = torch.full((BATCH, 40), -1)
    assert not media_attention(**inputs, backend="triton").any()


def test_strides_do_not_matter() -> None:
    wide = torch.randn(2, 3, 9, 2, HEADS, 16, dtype=torch.float64)
    k, v = wide[:, :, :, 0], wide[:, :, :, 1]
    q = torch.randn(2, HEADS, 12, 16, dtype=torch.float64).transpose(1, 2)
    images = torch.arange(3).repeat_interleave(4).expand(2, 12)
    mask = (torch.rand(2, 9, 3) < 0.5).transpose(1, 2)
    plain = media_attention(
        q.contiguous(), k.contiguous(), v.contiguous(), images.contiguous(), mask=mask.contiguous(), backend="triton"
    )
    assert torch.equal(media_attention(q, k, v, images, mask=mask, backend="triton"), plain)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Strides below 2^31, offsets beyond, in a file that is all hole but for a few pages."""
    storage = torch.from_file(str(tmp_path / "far"), shared=True, size=2**32 + 4096, dtype=torch.float16)
    (tmp_path / "far").unlink()
    far = storage.as_strided((2, 3, 5, 1, 16), (2**30, 2**30 + 64, 2**27 + 16, 16, 1)).copy_(
        torch.randn(2, 3, 5, 1, 16)
    )
    near = far.clone()
    images = torch.tensor([[0, 1, 2], [-1, 2, 2]])
    results = []
    for k in (near, far):
        leaves = [tensor.detach().requires_grad_() for tensor in (near[:, 0, :3].clone(), k, k)]
        out = media_attention(*leaves, images, backend="triton")
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_the_operators_pass_pytorchs_checks() -> None:
    for masked in (False, True):
        inputs = text_and_images(9, 2, 5, masked=masked)
        arguments = (*(inputs[name] for name in ("q", "k", "v", "image_of_token")), inputs.get("mask"), 0.3)
        torch.library.opcheck(media.media_attention, arguments)
        rest = [value.detach() if torch.is_tensor(value) else value for value in arguments]
        out, lse = (tensor.detach() for tensor in media.media_attention(*arguments))
        torch.library.opcheck(media.media_attention_backward, (torch.randn_like(out), *rest, out, lse))


def test_gradients_are_slopes() -> None:
    inputs = text_and_images(4, 2, 3, batch=1, heads=1)
    fixed = {name: inputs.pop(name) for name in ("image_of_token", "mask")}
    assert torch.autograd.gradcheck(
        lambda q, k, v: media_attention(q, k, v, **fixed, backend="triton"), tuple(inputs.values()), fast_mode=True
    )


def test_compiles_whole_and_is_counted() -> None:
    inputs = text_and_images(9, 3, 5, torch.float32)
    compiled = torch.compile(media_attention, fullgraph=True, backend="aot_eager")
    want = media_attention(**inputs, backend="triton")
    torch.testing.assert_close(compiled(**inputs, backend="triton"), want)
    with FlopCounterMode(display=False) as counter:
        media_attention(**inputs, backend="triton").sum().backward()
    assert counter.get_total_flops() == (2 + 7) * 2 * BATCH * HEADS * 9 * 5 * 16


@pytest.mark.parametrize("kernel", ["forward_kernel", "backward_q_kernel", "backward_kv_kernel"])
@pytest.mark.parametrize("fault", [{"SCALE": 0.25025}, {"HAS_MASK": False}, {"HEAD_DIM": 15}], ids=str)
def test_the_comparison_sees_planted_faults(
    kernel: str, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = text_and_images(20, 3, 9)
    check(inputs, "triton")
    monkeypatch.setattr(media, kernel, Altered(getattr(media, kernel), **fault))
    with pytest.raises(AssertionError):
        check(inputs, "triton")


def test_tokens_of_other_images_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that took a tile's tokens to read one image alone would be caught."""
    inputs = text_and_images(20, 3, 9)
    blurred = inputs["image_of_token"].clone()
    blurred[0, 10:] = blurred[0, 10]
    honest = media.media_attention

    def blur(q: Any, k: Any, v: Any, images: Any, mask: Any, scale: float) -> Any:
        return honest(q, k, v, blurred, mask, scale)

    monkeypatch.setattr(media, "media_attention", blur)
    with pytest.raises(AssertionError):
        check(inputs, "triton")
