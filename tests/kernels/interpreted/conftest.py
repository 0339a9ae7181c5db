"""Triton's kernels on a CPU. Triton reads TRITON_INTERPRET when a kernel's file is imported, so that these tests have a
process of their own: `make test-interpreted`, a part of `make test`."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Whatever is allocated and not written reads as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
