"""The Triton kernels on a real device. `make gpu` runs these before it measures."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.kernels.cases import check, error, packed, placed, tensors, text_and_images
from vlmzoo.kernels.attention import explain_backend, latent_attention, media_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TYPES = [torch.float16, torch.bfloat16, torch.float32]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Any:
    """Whatever is allocated and not written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("num_queries", [1, 37, 64, 65, 128, 200, 256])
def test_latent_attention(dtype: torch.dtype, dim: int, num_queries: int) -> None:
    lengths = torch.tensor([2500, 0, 1025])
    check(tensors(num_queries, 2500, 5, dtype, dim=dim, kv_lens=lengths), "triton", dtype, "cuda")
    check(tensors(num_queries, 130, dtype=dtype, dim=dim), "triton", dtype, "cuda")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_packed_and_masked(dtype: torch.dtype) -> None:
    check(packed([70, 0, 1300], 64, dtype, dim=64), "triton", dtype, "cuda")
    mask = torch.rand(3, 1, 1, 1205, generator=torch.Generator().manual_seed(0)) < 0.5
    check(tensors(64, 1200, 5, dtype, dim=64, mask=mask), "triton", dtype, "cuda")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
def test_media_attention(dtype: torch.dtype, dim: int) -> None:
    check(text_and_images(300, 5, 64, dtype, dim=dim), "triton", dtype, "cuda")
    check(text_and_images(70, 2, 300, dtype, dim=dim, masked=False), "triton", dtype, "cuda")


@pytest.mark.parametrize("backend", ["sdpa", "sdpa-efficient", "flex"])
def test_other_backends(backend: str) -> None:
    check(
        tensors(64, 300, 5, torch.float16, dim=64, kv_lens=torch.tensor([300, 1, 64])), backend, torch.float16, "cuda"
    )


def test_twenty_backward_runs_are_the_same_to_the_bit() -> None:
    latent = placed(tensors(64, 20_000, 64, torch.bfloat16, dim=64, kv_lens=torch.tensor([20_000, 7, 9_000])), "cuda")
    text = placed(text_and_images(700, 5, 64, torch.bfloat16, dim=64), "cuda")
    for inputs, attend in ((latent, latent_attention), (text, media_attention)):
        leaves = [value for value in inputs.values() if value.requires_grad]
        out = attend(**inputs, backend="triton")
        slope = torch.randn_like(out)
        first = torch.autograd.grad(out, leaves, slope, retain_graph=True)
        for _ in range(19):
            again = torch.autograd.grad(out, leaves, slope, retain_graph=True)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_offsets_of_more_than_32_bits() -> None:
    """The last of eight samples, 2**31 elements behind the first, is what it is alone."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    torch.use_deterministic_algorithms(False)  # filling 16 GiB with NaN
    q = torch.randn(8, 64, 16, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.randn(8, 262_144 + 8, 16, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for tensor in (k, v):
        tensor.requires_grad_()
    out = latent_attention(q, k, v, backend="triton")
    slope = torch.randn_like(out)
    found = torch.autograd.grad(out, (q, k, v), slope)
    alone = [tensor[-1:].detach().clone().requires_grad_() for tensor in (q, k, v)]
    last = latent_attention(*alone, backend="triton")
    assert torch.equal(out[-1:], last)
    for got, want in zip(found, torch.autograd.grad(last, alone, slope[-1:]), strict=True):
        assert torch.equal(got[-1:], want)


def test_compiles_by_inductor() -> None:
    inputs = placed(tensors(64, 700, 5, torch.bfloat16, dim=64, kv_lens=torch.tensor([700, 0, 65])), "cuda")
    assert explain_backend(**inputs).startswith("triton: ")
    compiled = torch.compile(lambda **given: latent_attention(**given, backend="triton") * 2, fullgraph=True)
    want = latent_attention(**inputs, backend="triton") * 2
    assert error(compiled(**inputs).detach().cpu(), want.detach().cpu().double()) <= 1e-6


def test_lengths_out_of_range_end_in_an_assertion_of_the_device() -> None:
    """In a process of its own: after it a device is of no more use."""
    import subprocess
    import sys

    program = """
import torch
from vlmzoo.kernels.attention import latent_attention
q, k = torch.randn(1, 4, 1, 64, device="cuda"), torch.randn(1, 9, 1, 64, device="cuda")
latent_attention(q, k, k, kv_lens=torch.tensor([10], device="cuda"))
torch.cuda.synchronize()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode != 0
    assert "assert" in ended.stderr.lower()
