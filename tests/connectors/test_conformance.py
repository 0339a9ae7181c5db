"""Every connector, and the variants of their papers, keep the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from vlmzoo.conformance import check
from vlmzoo.conformance.subject import Subject
from vlmzoo.sweeps.cards import own_connectors

VARIANTS = [
    ("linear", {}),
    ("mlp", {}),
    ("qformer", {"num_queries": 8, "num_layers": 2, "hidden_size": 24, "num_heads": 2}),
    ("qformer", {"num_queries": 8, "num_layers": 2, "hidden_size": 24, "num_heads": 2, "instruction": True}),
    ("perceiver", {"num_latents": 8, "num_layers": 2, "num_heads": 2, "head_dim": 8}),
    ("gated_cross_attention", {"num_latents": 8, "num_resampler_layers": 2, "num_heads": 2, "head_dim": 8}),
    ("gated_cross_attention", {"memory": "patches", "every": 1}),
    ("vip_llava", {}),
    ("minigpt_v2", {"group": 2}),
    ("internvl", {}),
    ("idefics3", {}),
    ("qwen2_vl", {}),
    ("qwen2_vl", {"norm": "rms"}),
    ("mistral3", {}),
    ("average_pool", {"side": 3}),
    ("gemma3", {"factor": 2}),
    ("c_abstractor", {"side": 3, "depth": 1, "hidden_size": 24, "position_side": 5}),
    ("ldp", {}),
    ("ldp_v2", {"side": 3}),
    ("token_packer", {"hidden_size": 24, "num_heads": 2}),
    ("qwen_vl", {"side": 3, "head_dim": 12}),
    ("attention_pooling", {"num_queries": 5, "num_heads": 2}),
    ("idefics2", {"num_latents": 5, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8}),
    ("ovis", {"vocab_size": 40, "factor": 2}),
    ("aria", {"num_queries": 3, "many_patches": 13}),
    ("perception_lm", {}),
    (
        "d_abstractor",
        {
            "side": 3,
            "num_layers": 2,
            "hidden_size": 16,
            "num_heads": 2,
            "num_points": 2,
            "intermediate_size": 16,
            "position_side": 5,
        },
    ),
    ("minigpt4", {"num_queries": 5, "num_layers": 2, "hidden_size": 16, "num_heads": 2}),
    ("matryoshka", {"sides": (4, 2, 1)}),
    ("mqt", {"side": 3, "num_heads": 2}),
    ("prumerge", {"num_neighbours": 3}),
    ("deepstack", {}),
    ("mllama", {}),
    ("anyres", {}),
    ("anyres", {"connector": "internvl", "max_tiles": 1}),
    ("anyres", {"connector": "deepstack"}),
    ("anyres", {"connector": "matryoshka", "options": {"sides": (4, 2, 1)}}),
    ("anyres", {"connector": "prumerge", "options": {"num_neighbours": 3}}),
    (
        "anyres",
        {
            "connector": "qformer",
            "options": {"num_queries": 3, "num_layers": 2, "hidden_size": 24, "num_heads": 2, "instruction": True},
        },
    ),
    ("mllama", {"before": (0, 2)}),
    (
        "idefics",
        {"num_latents": 5, "num_resampler_layers": 2, "num_resampler_heads": 3, "resampler_head_dim": 6, "every": 2},
    ),
    ("idefics", {"resampler": False, "qk_norm": False}),
    ("sva", {"side": 2, "window": 2, "depth": 2, "hidden_size": 24, "num_heads": 2, "num_inside": 2, "every": 2}),
    ("sva", {"side": 3, "depth": 1, "hidden_size": 24, "num_heads": 2, "num_inside": 0}),
]


def test_no_connector_is_left_out() -> None:
    assert {name for name, _ in VARIANTS} == set(own_connectors())


def test_every_connectors_defaults_fit_the_checks_model() -> None:
    for name in own_connectors():
        assert Subject(name).layouts, name


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=lambda value: str(value))
def test_every_check_passes(name: str, options: Mapping[str, Any]) -> None:
    results = list(check(name, options))
    assert results
    assert {result.name: result.message for result in results if not result.passed} == {}
