"""Triton's latent attention under its interpreter, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels import oracle
from tests.kernels.cases import BATCH, HEADS, TOLERANCE, Altered, check, error, packed, tensors
from vlmzoo.kernels import latent
from vlmzoo.kernels.attention import explain_backend, latent_attention

WHOLE = pytest.mark.kernels
LENGTHS = torch.tensor([129, 0, 64])


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("num_queries", "dim"), [(1, 16), (37, 64), (65, 80)])
def test_equals_the_oracle(dtype: torch.dtype, num_queries: int, dim: int) -> None:
    check(tensors(num_queries, 63, dtype=dtype, dim=dim), "triton", dtype)
    check(tensors(num_queries, 129, 5, dtype=dtype, dim=dim, kv_lens=LENGTHS), "triton", dtype)


@WHOLE
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("num_queries", [1, 3, 16, 37, 64, 65, 128, 200, 256])
def test_equals_the_oracle_at_every_size(dtype: torch.dtype, num_queries: int, dim: int) -> None:
    check(tensors(num_queries, 130, 5, dtype=dtype, dim=dim, batch=1, kv_lens=torch.tensor([129])), "triton", dtype)


@pytest.mark.parametrize("num_keys", [1, 31, 33, 64, 65])
def test_block_edges(num_keys: int) -> None:
    check(tensors(5, num_keys), "triton")
    check(tensors(5, num_keys, 33), "triton")


@WHOLE
@pytest.mark.parametrize("num_keys", [2, 16, 32, 63, 127, 128, 129, 255, 257])
@pytest.mark.parametrize("num_latents", [0, 1, 64])
def test_more_block_edges(num_keys: int, num_latents: int) -> None:
    check(tensors(5, num_keys, num_latents), "triton")


@pytest.fixture
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 keys, so that few keys make many chunks."""
    for name in ("forward_blocks", "backward_blocks"):
        honest = getattr(latent, name)
        monkeypatch.setattr(latent, name, lambda *sizes, honest=honest: replace(honest(*sizes), chunk=64))


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("num_keys", [64, 65, 300])
def test_chunks_are_merged(num_keys: int) -> None:
    check(tensors(37, num_keys), "triton")
    check(tensors(5, num_keys, 7, kv_lens=torch.tensor([num_keys, 0, 63])), "triton")
    check(tensors(70, num_keys, 3, torch.bfloat16, dim=64), "triton", torch.bfloat16)


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("lengths", [[7, 0, 130], [1, 1, 1], [0, 0, 0], [64, 65, 3]], ids=str)
def test_packed_segments(lengths: list[int]) -> None:
    inputs = packed(lengths)
    check(inputs, "triton")
    bounded = latent_attention(**inputs, max_seqlen_k=200, backend="triton")
    assert torch.equal(bounded, latent_attention(**inputs, backend="triton"))


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("sizes", [(1, 1, 1), (BATCH, 1, 1)], ids=str)
def test_masks_of_keys(sizes: tuple[int, ...]) -> None:
    mask = torch.rand((*sizes, 104), generator=torch.Generator().manual_seed(3)) < 0.4
    check(tensors(9, 100, 4, mask=mask, kv_lens=torch.tensor([75, 100, 0])), "triton")
    mask[0] = False
    check(tensors(9, 100, 4, mask=mask), "triton")


def test_other_masks_are_refused() -> None:
    mask = torch.ones(9, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match="'triton' cannot do this: its mask is one of keys alone"):
        latent_attention(**tensors(9, 20, mask=mask), backend="triton")
    with pytest.raises(ValueError, match="its heads have at most 128 dimensions, not 136"):
        latent_attention(**tensors(9, 20, dim=136), backend="triton")
    assert explain_backend(**tensors(9, 20), backend="triton").startswith("triton: asked for by name\n")


@pytest.mark.usefixtures("_short_chunks")
def test_what_lies_beyond_the_lengths_is_never_read() -> None:
    inputs = tensors(4, 100)
    lengths = torch.tensor([100, 3, 0])
    want = latent_attention(**inputs, kv_lens=lengths, backend="triton")
    with torch.no_grad():
        for name in ("k", "v"):
            inputs[name][1, 3:] = inputs[name][2] = torch.nan
    out = latent_attention(**inputs, kv_lens=lengths, backend="triton")
    assert torch.equal(want, out)
    gradients = torch.autograd.grad(out.square().sum(), [inputs[name] for name in "qkv"])
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not any(gradient[1, 3:].any() or gradient[2].any() for gradient in gradients[1:])


def test_strides_do_not_matter() -> None:
    wide = torch.randn(BATCH, 11, 3, HEADS, 16, dtype=torch.float64)
    q, k, v = (wide[:, :, part] for part in range(3))
    plain = latent_attention(q.contiguous(), k.contiguous(), v.contiguous(), backend="triton")
    assert torch.equal(latent_attention(q, k, v, backend="triton"), plain)
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)  # its last dimension is not contiguous
    assert turned.stride(-1) != 1
    assert torch.equal(latent_attention(q, turned, v, backend="triton"), plain)
    inputs = [tensor.clone().requires_grad_() for tensor in (q, k, v)]
    out = latent_attention(*inputs, backend="triton")
    slope = torch.ones(()).double().expand(out.shape)  # every stride 0
    got = torch.autograd.grad(out, inputs, slope, retain_graph=True)
    for a, b in zip(got, torch.autograd.grad(out, inputs, slope.contiguous()), strict=True):
        assert torch.equal(a, b)


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Strides below 2^31, offsets beyond, in a file that is all hole but for a few pages."""
    storage = torch.from_file(str(tmp_path / "far"), shared=True, size=2**32 + 4096, dtype=torch.float16)
    (tmp_path / "far").unlink()
    far = storage.as_strided((3, 5, 1, 16), (2**30, 2**29 + 16, 16, 1)).copy_(torch.randn(3, 5, 1, 16))
    near = far.clone()
    results = []
    for k in (near, far):
        leaves = [tensor.detach().requires_grad_() for tensor in (near[:, :2].clone(), k, k)]
        out = latent_attention(*leaves, backend="triton")
        results.append([out, *torch.autograd.grad(out.float().sin().sum(), leaves)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.usefixtures("_short_chunks")
def test_a_sample_does_not_depend_on_its_batch() -> None:
    lengths = torch.tensor([130, 0, 64])
    inputs = tensors(5, 200, 7, torch.float32, kv_lens=lengths)
    together = latent_attention(**inputs, backend="triton")
    for row, length in enumerate(lengths.tolist()):
        alone = {name: inputs[name][row : row + 1] for name in ("q", "k2", "v2")}
        alone |= {name: inputs[name][row : row + 1, : max(length, 1)] for name in ("k", "v")}
        got = latent_attention(**alone, kv_lens=lengths[row : row + 1], backend="triton")
        assert torch.equal(got[0], together[row])


@pytest.mark.usefixtures("_short_chunks")
def test_log_sum_exp_and_its_gradient() -> None:
    inputs = tensors(5, 100, 2, kv_lens=torch.tensor([100, 4, 70]), scale=0.7)
    parts = [value for value in inputs.values() if torch.is_tensor(value) and value.is_floating_point()]
    slope = torch.randn(BATCH, HEADS, 5, dtype=torch.float64)
    found = []
    for out, lse in (oracle.attention(**inputs), latent_attention(**inputs, return_lse=True, backend="triton")):
        found.append([lse, *torch.autograd.grad(out.square().sum() + (lse * slope).sum(), parts)])
    for want, got in zip(*found, strict=True):
        assert error(got.detach(), want.detach()) <= 1e-12
    none = tensors(5, 9, kv_lens=torch.tensor([9, 0, 1]))
    lse = latent_attention(**none, return_lse=True, backend="triton")[1]
    assert torch.equal(lse[1], torch.full((HEADS, 5), -torch.inf).double())


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errs_no_more_than_plain_operations(dtype: torch.dtype) -> None:
    inputs = tensors(37, 300, 5, dtype, dim=64)
    exact = {name: value.detach().double() for name, value in inputs.items()}
    want = oracle.attention(**exact)[0]
    q, k, v = (
        torch.cat([inputs[name], inputs[f"{name}2"]], 1) if name != "q" else inputs[name] for name in ("q", "k", "v")
    )
    plain = torch.einsum("bqhd,bkhd->bhqk", q, k).mul(1 / 8).softmax(-1)
    plain = torch.einsum("bhqk,bkhd->bqhd", plain, v)
    assert error(latent_attention(**inputs, backend="triton").detach(), want) <= 2 * error(plain.detach(), want)


def test_the_operators_pass_pytorchs_checks() -> None:
    mask = torch.rand(BATCH, 11) < 0.6
    for inputs in (tensors(5, 9, 2), tensors(5, 9, kv_lens=torch.tensor([9, 0, 4])), packed([3, 0, 4])):
        names = ("q", "k", "v", "k2", "v2", "kv_lens", "cu_seqlens_k")
        counts = mask if "k2" in inputs and "cu_seqlens_k" not in inputs else None
        arguments = (*(inputs.get(name) for name in names), 4, counts, 0.3, True)
        torch.library.opcheck(latent.latent_attention, arguments)
        out, lse = (tensor.detach() for tensor in latent.latent_attention(*arguments))
        rest = [value.detach() if torch.is_tensor(value) else value for value in arguments[:-1]]
        slopes = torch.randn_like(out), torch.randn_like(lse)
        torch.library.opcheck(latent.latent_attention_backward, (*slopes, *rest, out, lse))


def test_gradients_are_slopes() -> None:
    inputs = tensors(2, 3, 2, batch=1, heads=1)
    assert torch.autograd.gradcheck(
        lambda q, k, v, k2, v2: latent_attention(q, k, v, k2=k2, v2=v2, return_lse=True, backend="triton"),
        tuple(inputs.values()),
        fast_mode=True,
    )


def test_compiles_whole_and_is_counted() -> None:
    inputs = tensors(5, 9, 2, torch.float32, kv_lens=torch.tensor([9, 4, 0]), backend="triton")
    compiled = torch.compile(latent_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), latent_attention(**inputs))
    with FlopCounterMode(display=False) as counter:
        latent_attention(**inputs).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * BATCH * HEADS * 5 * 11 * 16


@pytest.mark.usefixtures("_short_chunks")
@pytest.mark.parametrize(
    ("kernel", "fault"),
    [
        ("forward_kernel", {"SCALE": 0.25025}),
        ("forward_kernel", {"HAS_MASK": False}),
        ("forward_kernel", {"HAS_LENS": False}),
        ("forward_kernel", {"CHUNK": 32}),
        ("combine_kernel", {"CHUNK": 128}),
        ("backward_kernel", {"SCALE": 0.25025}),
        ("backward_kernel", {"HAS_MASK": False}),
        ("backward_kernel", {"HAS_LENS": False}),
        ("backward_kernel", {"MORE": True}),
        ("add_kernel", {"CHUNK": 128}),
    ],
    ids=str,
)
def test_the_comparison_sees_planted_faults(
    kernel: str, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = torch.rand(BATCH, 1, 1, 105, generator=torch.Generator().manual_seed(3)) < 0.5
    inputs = tensors(5, 100, 5, mask=mask, kv_lens=torch.tensor([100, 70, 0]))
    check(inputs, "triton")
    monkeypatch.setattr(latent, kernel, Altered(getattr(latent, kernel), **fault))
    with pytest.raises(AssertionError):
        check(inputs, "triton")


def test_a_second_tile_of_queries_adds_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tensors(70, 20, 5)
    check(inputs, "triton")
    monkeypatch.setattr(latent, "backward_kernel", Altered(latent.backward_kernel, MORE=False))
    with pytest.raises(AssertionError):
        check(inputs, "triton")
