"""Products by oneDNN are as exact as by MKL, and PyTorch's choice comes back."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vlmzoo.training.float32 import by_onednn


@pytest.mark.parametrize("shape", [(1, 64, 64), (100, 512, 1376), (800, 768, 3072), (64, 512, 32000)])
def test_float32_stays_float32(shape: tuple[int, int, int]) -> None:
    rows, width, out = shape
    draw = torch.Generator().manual_seed(0)
    inputs, weight, slope = (torch.randn(size, generator=draw) for size in ((rows, width), (out, width), (rows, out)))
    with by_onednn():
        found = F.linear(inputs, weight), slope @ weight, slope.T @ inputs
    inputs, weight, slope = inputs.double(), weight.double(), slope.double()
    for one, exact in zip(found, (inputs @ weight.T, slope @ weight, slope.T @ inputs), strict=True):
        assert (one - exact).norm() <= 2e-6 * exact.norm()  # bfloat16: 2e-3


def test_what_was_set_comes_back() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with pytest.raises(ZeroDivisionError), by_onednn():
        _ = 1 / 0
    assert torch.backends.mkldnn.matmul.fp32_precision == before
