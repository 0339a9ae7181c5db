"""`latent_attention` and `media_attention` against the float64 oracle: outputs, gradients, planted faults."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels import oracle
from tests.kernels.cases import BATCH, DIM, HEADS, TOLERANCE, check, error, packed, tensors, text_and_images
from vlmzoo.kernels import attention, chunked
from vlmzoo.kernels.attention import explain_backend, latent_attention, media_attention

BACKENDS = ("eager", "chunked", "sdpa", "sdpa-math")


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
    want, want_lse = oracle.attention(**inputs)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, want_lse, rtol=0, atol=1e-12)
    none = tensors(5, 9, kv_lens=torch.tensor([9, 0, 1]))
    assert torch.equal(latent_attention(**none, return_lse=True)[1][1], torch.full((HEADS, 5), -torch.inf).double())


def test_auto_goes_through_long_keys_in_pieces() -> None:
    def chosen(num_keys: int, num_latents: int = 0, **more: Any) -> str:
        return explain_backend(**tensors(5, num_keys, num_latents, torch.float32, **more))

    assert chosen(64).startswith("sdpa: nothing to leave out")
    assert chosen(64, 4).startswith("sdpa: ")
    assert chosen(4096).startswith("sdpa: ")
    assert chosen(4096, 4).startswith("sdpa: ")
    assert chosen(8188, 4).startswith("chunked: at least 8192 keys with a second segment")
    assert chosen(1023, kv_lens=torch.tensor([1, 2, 3])).startswith("sdpa: ")
    assert chosen(1024, kv_lens=torch.tensor([1, 2, 3])).startswith("chunked: at least 1024 keys with lengths")
    assert chosen(64, return_lse=True).startswith("chunked: the log-sum-exp is asked for")
    assert chosen(64, backend="eager").startswith("eager: asked for by name\n")
    assert explain_backend(**text_and_images(9, 3, 100)).startswith("chunked: at least 256 keys with images")
    assert explain_backend(**text_and_images(9, 3, 85)).startswith("sdpa: ")
    lines = chosen(64).splitlines()
    assert [line.split(":")[0] for line in lines] == ["sdpa", *(name for name in attention.BACKENDS if name != "sdpa")]
    assert any(line.startswith("triton: triton needs a CUDA device, not cpu") for line in lines)


def test_auto_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it would choose there: of a device nothing but its type is asked."""
    monkeypatch.setattr(attention._device, "obstacle", lambda device: None)
    monkeypatch.setattr(attention.Call, "on_gpu", True)

    def chosen(num_queries: int, num_keys: int, num_latents: int = 0) -> str:
        return explain_backend(**tensors(num_queries, num_keys, num_latents, torch.float32)).splitlines()[0]

    assert chosen(64, 100, 4) == "triton: with a second segment other kernels would copy or mask out keys"
    assert chosen(64, 2048) == "triton: few queries over at least 2048 keys"
    assert chosen(64, 2047).startswith("sdpa: ")
    assert chosen(257, 2048).startswith("sdpa: ")
    assert explain_backend(**text_and_images(300, 2, 5, torch.float32)).startswith("triton: with images")


@pytest.mark.parametrize("num_keys", [1023, 1024])
def test_auto_is_right_on_both_sides_of_its_rule(num_keys: int) -> None:
    check(tensors(9, num_keys, 5, kv_lens=torch.tensor([num_keys, 0, 64])), "auto")
    check(text_and_images(20, 3, num_keys), "auto")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "flash"}, "unknown attention backend 'flash'; valid: auto, eager, chunked, sdpa, sdpa-flash"),
        ({"backend": "sdpa", "return_lse": True}, "'sdpa' cannot do this: it does not return the log-sum-exp"),
        ({"backend": "triton"}, "'triton' cannot do this: triton needs a CUDA device, not cpu"),
        ({"backend": "sdpa-cudnn"}, "'sdpa-cudnn' cannot do this: it needs a CUDA device, not cpu"),
        ({"k2": torch.zeros(3, 1, 2, 16, device="meta"), "v2": torch.zeros(3, 1, 2, 16)}, "k2 must be on cpu .* meta"),
        ({"kv_lens": torch.tensor([1, 6, 2])}, "kv_lens must be from 0 to 5, got 6"),
        ({"kv_lens": torch.tensor([1, -1, 2])}, "kv_lens must be from 0 to 5, got -1"),
        ({"kv_lens": torch.tensor([1.0, 1, 2])}, "kv_lens must be integers, got torch.float32"),
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


@pytest.mark.parametrize(
    ("cu_seqlens", "more", "says"),
    [
        ([0, 5, 3, 9], {}, "lengths between cu_seqlens_k must be from 0 to 9, got -2"),
        ([0, 5, 7, 10], {}, "cu_seqlens_k must be from 0 to 9, got 10"),
        ([0, 5, 7, 9], {"max_seqlen_k": 4}, "lengths between cu_seqlens_k must be from 0 to 4, got 5"),
        ([0, 5, 7, 9], {"kv_lens": torch.tensor([1, 2, 3])}, "takes neither kv_lens nor a mask"),
    ],
)
def test_refuses_wrong_segments(cu_seqlens: list[int], more: dict[str, Any], says: str) -> None:
    inputs = packed([3, 3, 3]) | {"cu_seqlens_k": torch.tensor(cu_seqlens)}
    with pytest.raises(ValueError, match=says):
        latent_attention(**inputs, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_text_reads_its_image(backend: str, dtype: torch.dtype) -> None:
    check(text_and_images(23, 4, 7, dtype), backend, dtype)
    check(text_and_images(5, 1, 33, dtype, masked=False), backend, dtype)


def test_gate_and_residual_go_around_the_projection() -> None:
    inputs = text_and_images(9, 2, 5)
    project, gate = torch.randn(24, HEADS * DIM).double(), torch.tensor([0.3]).double()
    residual = torch.randn(BATCH, 9, 24).double()
    plain = media_attention(**inputs)
    want = residual + torch.tanh(gate) * (plain.flatten(2) @ project.T)
    torch.testing.assert_close(media_attention(**inputs, project=project, gate=gate, residual=residual), want)
    torch.testing.assert_close(media_attention(**inputs, project=project), plain.flatten(2) @ project.T)
    blind = inputs | {"image_of_token": torch.full((BATCH, 9), -1)}
    assert torch.equal(media_attention(**blind, project=project, gate=gate, residual=residual), residual)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"k": torch.zeros(3, 2, 5, 1, 16)}, r"k must be \(3, images, keys, 2, 16\), got \(3, 2, 5, 1, 16\)"),
        ({"image_of_token": torch.zeros(3, 8, dtype=torch.long)}, r"image_of_token must be \(3, 9\), got \(3, 8\)"),
        ({"image_of_token": torch.full((3, 9), 2)}, "image_of_token must be from -1 to 1, got 2"),
        ({"mask": torch.ones(3, 2, 4, dtype=torch.bool)}, r"mask must be \(3, 2, 5\), got \(3, 2, 4\)"),
        ({"mask": torch.ones(3, 2, 5)}, "mask must be bool, got torch.float32"),
        ({"gate": torch.zeros(1)}, "gate and residual go together"),
        ({"project": torch.zeros(4, 31)}, r"project must be \(width, 32\), got \(4, 31\)"),
        ({"gate": torch.zeros(1), "residual": torch.zeros(3, 9, 2, 15)}, r"residual must be \(3, 9, 2, 16\)"),
    ],
)
def test_media_attention_refuses_in_one_line(change: dict[str, Any], says: str) -> None:
    inputs = text_and_images(9, 2, 5, torch.float32)
    with pytest.raises(ValueError, match=says) as refusal:
        media_attention(**{**inputs, **change})
    assert "\n" not in str(refusal.value)


def test_flex_forward_equals_the_oracle_and_says_that_it_has_no_backward_here() -> None:
    inputs = tensors(9, 33, 5, torch.float32, kv_lens=torch.tensor([33, 0, 7]))
    with pytest.raises(ValueError, match="'flex' cannot do this: it has no backward on cpu"):
        latent_attention(**inputs, backend="flex")
    for case in (inputs, tensors(9, 33, dtype=torch.float32), text_and_images(9, 3, 5, torch.float32)):
        check({name: value.detach() for name, value in case.items()}, "flex", torch.float32)


@pytest.mark.parametrize("backend", ["eager", "chunked"])
def test_log_sum_exp_has_a_gradient(backend: str) -> None:
    inputs = tensors(5, 9, 2, kv_lens=torch.tensor([9, 4, 0]))
    tensors_ = [value for value in inputs.values() if value.is_floating_point()]
    slope = torch.randn(BATCH, HEADS, 5, dtype=torch.float64)
    gradients = []
    for out, lse in (oracle.attention(**inputs), latent_attention(**inputs, return_lse=True, backend=backend)):
        gradients.append(torch.autograd.grad(out.square().sum() + (lse * slope).sum(), tensors_))
    for want, got in zip(*gradients, strict=True):
        assert error(got, want) <= 1e-12


def test_autocast_casts_as_for_pytorchs_own() -> None:
    inputs = tensors(5, 300, 2, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert {latent_attention(**inputs, backend=name).dtype for name in BACKENDS} == {torch.bfloat16}
        assert media_attention(**text_and_images(9, 3, 300, torch.float32)).dtype == torch.bfloat16


def test_what_is_counted_is_what_is_multiplied() -> None:
    inputs = tensors(5, 300, 4, torch.float32)
    with FlopCounterMode(display=False) as counter:
        latent_attention(**inputs, backend="chunked").sum().backward()
    products = 2 * BATCH * HEADS * 5 * 304 * DIM
    assert counter.get_total_flops() == (2 + 5) * products
    with FlopCounterMode(display=False) as counter:
        media_attention(**text_and_images(9, 3, 300, torch.float32), backend="chunked").sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * BATCH * HEADS * 9 * 300 * DIM


def test_nothing_of_queries_times_keys_is_kept_or_copied() -> None:
    """Of long keys, two segments and lengths: beside the gradients, nothing as large as the keys is allocated."""
    inputs = tensors(64, 4096, 8, torch.float32, kv_lens=torch.tensor([4096, 4000, 0]))
    size = inputs["k"].nbytes
    with torch.profiler.profile(profile_memory=True) as profile, torch.no_grad():
        latent_attention(**inputs)
    largest = max(event.self_cpu_memory_usage for event in profile.events() or [])
    assert largest < size / 8, f"{largest} of keys of {size} bytes; scores would be {BATCH * HEADS * 64 * 4096 * 4}"


FAULTS = {
    "without the mask": lambda honest: lambda q, k, v, mask, scale: honest(q, k, v, None, scale),
    "another scale": lambda honest: lambda q, k, v, mask, scale: honest(q, k, v, mask, scale * 1.001),
    "without the latents": lambda honest: (
        lambda q, k, v, mask, scale: honest(q, k[:, :-2], v[:, :-2], None if mask is None else mask[..., :-2], scale)
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_comparison_sees_planted_faults(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(5, 9, 2, kv_lens=torch.tensor([9, 4, 1]))
    check(inputs, "eager")
    monkeypatch.setattr(attention.reference, "attention", FAULTS[fault](attention.reference.attention))
    with pytest.raises(AssertionError):
        check(inputs, "eager")


@pytest.mark.parametrize("fault", ["last key", "merge", "mask"])
def test_the_comparison_sees_faults_of_chunks(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(BATCH, 1, 1, 11, generator=torch.Generator().manual_seed(0)) < 0.6
    inputs = tensors(5, 9, 2, kv_lens=torch.tensor([9, 4, 1]), mask=mask)
    check(inputs, "chunked")
    honest = chunked._blocks

    def blocks(*arguments: Any) -> Any:
        for index, pieces in honest(*arguments):
            if fault == "last key":
                yield index, [(n, (rows, slice(0, 3)), None) for n, (rows, _), _ in pieces]
            elif fault == "merge":
                yield index, pieces[:1]
            else:
                yield index, [(n, where, None) for n, where, _ in pieces]

    monkeypatch.setattr(chunked, "_blocks", blocks)
    with pytest.raises(AssertionError):
        check(inputs, "chunked")


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole(backend: str) -> None:
    inputs = tensors(5, 9, 2, torch.float32, kv_lens=torch.tensor([9, 4, 0]))
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, backend=backend), latent_attention(**inputs, backend=backend))
    inputs = text_and_images(9, 3, 5, torch.float32)
    compiled = torch.compile(media_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, backend=backend), media_attention(**inputs, backend=backend))


@pytest.mark.parametrize("backend", ["auto", "eager", "sdpa"])
def test_runs_on_meta(backend: str) -> None:
    inputs = tensors(5, 9, 2, torch.float32, kv_lens=torch.tensor([9, 4, 0]))
    meta = {name: value.to("meta") for name, value in inputs.items()}
    assert latent_attention(**meta, backend=backend).shape == inputs["q"].shape


def test_the_operator_passes_pytorchs_checks() -> None:
    mask = torch.rand(BATCH, 1, 1, 11) < 0.6
    for inputs, images in (
        (tensors(5, 9, 2, mask=mask), (None, 0)),
        (tensors(5, 9, kv_lens=torch.tensor([9, 0, 4])), (None, 0)),
        (packed([3, 0, 4]), (None, 0)),
        (tensors(5, 9), (torch.zeros(BATCH, 5, dtype=torch.long), 1)),
    ):
        names = ("q", "k", "v", "k2", "v2", "kv_lens", "cu_seqlens_k", "mask")
        arguments = (*(inputs.get(name) for name in names), *images, 0.3, True)
        torch.library.opcheck(chunked.chunked_attention, arguments)
        out, lse = (tensor.detach() for tensor in chunked.chunked_attention(*arguments))
        slopes = torch.randn_like(out), torch.randn_like(lse)
        rest = (value.detach() if torch.is_tensor(value) else value for value in arguments)
        torch.library.opcheck(chunked.chunked_attention_backward, (*slopes, out, lse, *rest))
