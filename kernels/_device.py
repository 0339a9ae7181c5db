"""Where Triton's kernels can run. They run on a CPU too, slowly, under its interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os

import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Read once: Triton decides when a kernel's file is imported."""


def obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a device; None: they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if INTERPRETED:
        return None
    if device.type != "cuda":
        return f"triton needs a CUDA device, not {device.type}, unless TRITON_INTERPRET=1"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"triton's kernels need compute capability 8.0, this device has {major}.{minor}"
