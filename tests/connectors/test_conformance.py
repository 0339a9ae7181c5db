"""The five connectors, and the variants of their papers, keep the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vlmzoo.conformance import check

VARIANTS = [
    ("linear", {}),
    ("mlp", {}),
    ("qformer", {"num_queries": 8, "num_layers": 2, "hidden_size": 24, "num_heads": 2}),
    ("qformer", {"num_queries": 8, "num_layers": 2, "hidden_size": 24, "num_heads": 2, "instruction": True}),
    ("perceiver", {"num_latents": 8, "num_layers": 2, "num_heads": 2, "head_dim": 8}),
    ("gated_cross_attention", {"num_latents": 8, "num_resampler_layers": 2, "num_heads": 2, "head_dim": 8}),
    ("gated_cross_attention", {"memory": "patches", "every": 1}),
]


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
def test_every_check_passes(name: str, options: Mapping[str, Any]) -> None:
    results = list(check(name, options))
    assert results
    assert {result.name: result.message for result in results if not result.passed} == {}
