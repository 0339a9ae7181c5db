"""`latent_attention` against the float64 oracle: outputs, gradients, odd sizes, and planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmzoo.kernels import attention, reference
from vlmzoo.kernels.attention import explain_backend, latent_attention

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BACKENDS = ("eager", "sdpa")
BATCH, HEADS, DIM = 3, 2, 16


def tensors(
    num_queries: int, num_keys: int, num_latents: int = 0, dtype: torch.dtype = torch.float64, **more: Any
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_queries * 1009 + num_keys)
    sizes = {"q": num_queries, "k": num_keys, "v": num_keys}
    if num_latents:
        sizes |= {"k2": num_latents, "v2": num_latents}
    draw = {
        name: torch.randn(BATCH, n, HEADS, DIM, generator=generator, dtype=torch.float64) for name, n in sizes.items()
    }
    return {name: value.to(dtype).requires_grad_() for name, value in draw.items()} | more


def packed(lengths: list[int], num_queries: int = 5, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    inputs = tensors(num_queries, sum(lengths), 4, dtype)
    for name in ("k", "v"):
        inputs[name] = inputs[name][0].detach().requires_grad_()
    inputs["cu_seqlens_k"] = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
    return inputs


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-30))


def check(inputs: dict[str, Any], backend: str, dtype: torch.dtype = torch.float64) -> None:
    """Output and gradients are the oracle's, to the tolerance of the type."""
    parts = {name: value for name, value in inputs.items() if torch.is_tensor(value) and value.is_floating_point()}
    exact = {name: value.detach().double().requires_grad_() for name, value in parts.items()}
    want, _ = reference.attention(**{**inputs, **exact})
    got = latent_attention(**inputs, backend=backend)
    assert got.dtype == dtype
    assert error(got.detach(), want.detach()) <= TOLERANCE[dtype]
    slope = torch.randn(want.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    wanted = torch.autograd.grad(want, list(exact.values()), slope)
    for name, gradient, exactly in zip(
        parts, torch.autograd.grad(got, list(parts.values()), slope.to(dtype)), wanted, strict=True
    ):
        assert error(gradient, exactly) <= 2 * TOLERANCE[dtype], name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("num_queries", [1, 3, 37, 64, 65])
def test_equals_the_oracle(backend: str, dtype: torch.dtype, num_queries: int) -> None:
    check(tensors(num_queries, 63, dtype=dtype), backend, dtype)
    check(tensors(num_queries, 129, 5, dtype=dtype, kv_lens=torch.tensor([129, 0, 64])), backend, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(BATCH, 1, 1, 21), (BATCH, 1, 9, 21), (9, 21), (1, HEADS, 9, 1)], ids=str)
def test_masks_broadcast(backend: str, shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.4
    check(tensors(9, 17, 4, mask=mask, kv_lens=torch.tensor([5, 17, 0])), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("lengths", [[7, 0, 30], [1, 1, 1], [0, 0, 0], [64, 65, 3]], ids=str)
def test_packed_segments(backend: str, lengths: list[int]) -> None:
    inputs = packed(lengths)
    check(inputs, backend)
    bounded = latent_attention(**inputs, max_seqlen_k=80, backend=backend)
    torch.testing.assert_close(bounded, latent_attention(**inputs, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_give_zero_and_no_gradient(backend: str) -> None:
    inputs = tensors(6, 8)
    mask = torch.ones(BATCH, 1, 6, 8, dtype=torch.bool)
    mask[0], mask[1, :, 2] = False, False
    out = latent_attention(**inputs, mask=mask, backend=backend)
    gradients = torch.autograd.grad(out.square().sum() + out.sum(), list(inputs.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not out[0].any()
    assert not out[1, 2].any()
    assert out[1, 3].any()
    assert not any(gradient[0].any() for gradient in gradients)
    assert not gradients[0][1, 2].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_the_lengths_is_never_read(backend: str) -> None:
    inputs = tensors(4, 10)
    lengths = torch.tensor([10, 3, 0])
    want = latent_attention(**inputs, kv_lens=lengths, backend=backend)
    with torch.no_grad():
        for name in ("k", "v"):
            inputs[name][1, 3:] = inputs[name][2] = torch.nan
    assert torch.equal(want, latent_attention(**inputs, kv_lens=lengths, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    wide = torch.randn(BATCH, 11, 3, HEADS, DIM, dtype=torch.float64)
    q, k, v = (wide[:, :, part] for part in range(3))
    plain = latent_attention(q.contiguous(), k.contiguous(), v.contiguous(), backend=backend)
    torch.testing.assert_close(latent_attention(q, k, v, backend=backend), plain, rtol=0, atol=1e-12)
    out = latent_attention(q.requires_grad_(), k, v, backend=backend)
    (gradient,) = torch.autograd.grad(out, q, torch.ones(()).double().expand(out.shape))  # every stride 0
    assert gradient.isfinite().all()


def test_log_sum_exp_and_scale() -> None:
    inputs = tensors(5, 9, 2, kv_lens=torch.tensor([9, 4, 1]), scale=0.7)
    out, lse = latent_attention(**inputs, return_lse=True)
    want, want_lse = reference.attention(**inputs)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
    none = tensors(5, 9, kv_lens=torch.tensor([9, 0, 1]))
    assert torch.equal(latent_attention(**none, return_lse=True)[1][1], torch.full((HEADS, 5), -torch.inf).double())


def test_auto_takes_sdpa_unless_it_cannot() -> None:
    q = torch.zeros(1, 1, 1, 8)
    assert explain_backend(q).startswith("sdpa: ")
    assert explain_backend(q, return_lse=True).startswith("eager: the log-sum-exp")
    assert explain_backend(q, backend="eager") == "eager: asked for by name"
    for ask in (explain_backend(q, backend="eager"), explain_backend(q)):
        assert ask.split(":")[0] in attention.BACKENDS


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "flash"}, "unknown attention backend 'flash'; valid: auto, eager, sdpa"),
        ({"backend": "sdpa", "return_lse": True}, "'sdpa' does not return the log-sum-exp"),
        ({"q": torch.zeros(3, 2, 5)}, r"q must be \(batch, queries, heads, dim\), got \(3, 2, 5\)"),
        ({"k": torch.zeros(3, 5, 4, 16)}, r"k must be \(3, keys, 2, 16\), got \(3, 5, 4, 16\)"),
        ({"v": torch.zeros(3, 6, 2, 16)}, r"v must be \(3, 5, 2, dim\), got \(3, 6, 2, 16\)"),
        ({"k2": torch.zeros(3, 1, 2, 16)}, "k2 and v2 go together"),
        ({"k": torch.zeros(3, 5, 2, 16).half()}, "k must be torch.float32 as q is, got torch.float16"),
        ({"kv_lens": torch.tensor([1])}, r"kv_lens must be \(3\), got \(1\)"),
        ({"cu_seqlens_k": torch.tensor([0, 1, 2, 3])}, r"k must be \(total keys, 2, 16\)"),
        ({"mask": torch.ones(3, 1, 4, 6, dtype=torch.bool)}, r"mask must be bool and broadcast to \(3, 2, 4, 5\)"),
        ({"mask": torch.ones(4, 5)}, "mask must be bool .* got torch.float32"),
    ],
)
def test_refuses_in_one_line(change: dict[str, Any], says: str) -> None:
    inputs: dict[str, Any] = {
        "q": torch.zeros(3, 4, 2, 16),
        "k": torch.zeros(3, 5, 2, 16),
        "v": torch.zeros(3, 5, 2, 16),
    }
    with pytest.raises(ValueError, match=says) as refusal:
        latent_attention(**{**inputs, **change})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_comparison_sees_planted_faults(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"_{backend}"
    honest = getattr(attention, name)

    def without_mask(q, k, v, k2, v2, mask, scale):
        return honest(q, k, v, k2, v2, None, scale)

    def other_scale(q, k, v, k2, v2, mask, scale):
        return honest(q, k, v, k2, v2, mask, scale * 1.001)

    def without_latents(q, k, v, k2, v2, mask, scale):
        return honest(q, k, v, None, None, mask[..., : k.shape[2]], scale)

    inputs = tensors(5, 9, 2, kv_lens=torch.tensor([9, 4, 1]))
    check(inputs, backend)
    for fault in (without_mask, other_scale, without_latents):
        monkeypatch.setattr(attention, name, fault)
        with pytest.raises(AssertionError):
            check(inputs, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_and_runs_on_meta(backend: str) -> None:
    inputs = tensors(5, 9, 2, torch.float32, kv_lens=torch.tensor([9, 4, 0]))
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, backend=backend), latent_attention(**inputs, backend=backend))
    meta = {name: value.to("meta") for name, value in inputs.items()}
    out = latent_attention(**meta, backend=backend)
    assert out.shape == inputs["q"].shape
