"""Which library multiplies float32 matrices on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def by_onednn() -> Iterator[None]:
    """float32 products by oneDNN inside, where that makes no difference but to their speed: on CPUs with AVX-512.

    PyTorch has MKL do them, which on AMD's leaves half of each register empty. It asks oneDNN only where that may round
    to bfloat16, and oneDNN does so only by AMX: with it nothing is changed here.
    """
    if not torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported():
        yield
        return
    mkldnn: Any = torch.backends.mkldnn  # of CUDA's products it says nothing
    before, mkldnn.matmul.fp32_precision = mkldnn.matmul.fp32_precision, "bf16"
    try:
        yield
    finally:
        mkldnn.matmul.fp32_precision = before
