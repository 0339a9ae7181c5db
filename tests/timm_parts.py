"""timm in tests, where it is installed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

HAS_TIMM = find_spec("timm") is not None
NEEDS_TIMM = [
    pytest.mark.timm,
    pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed: `make test-timm` runs this beside it"),
]

if HAS_TIMM:
    try:
        import torchvision
    except RuntimeError:
        # A torchvision for CUDA cannot load its operators beside a torch without, and says so when it gives two of
        # them shapes. timm calls none: it is enough that they have names.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401
