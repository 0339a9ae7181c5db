"""The study of all prefix connectors: nobody is left out, and all of a group get as many tokens."""

from __future__ import annotations

from pathlib import Path

import torch

from vlmzoo import build
from vlmzoo.config import EncoderConfig, LLMConfig, SweepConfig, load
from vlmzoo.connector import Connector, ImageLayout
from vlmzoo.sweeps.cards import own_connectors
from vlmzoo.vision.encoder import VisionEncoder

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
GRID = (6, 6)
OTHER_BUDGETS = {"minigpt_v2": 12, "prumerge": 10}  # see the study's first lines


def parts() -> list[tuple[str, Connector]]:
    """Every connector of the study between the world's encoder and LLM, without weights."""
    study = load(SweepConfig, EXPERIMENTS / "zoo.yaml")
    vision = VisionEncoder(build.vision(EncoderConfig(name="world:clip"))).spec
    text = build.text_spec(build.language(LLMConfig(name="world:llama")).config)
    with torch.device("meta"):
        return [
            (
                part.name,
                build.connector(part.name, build.connector_options(part), vision=vision, text=text),
            )
            for part in study.connectors
        ]


def test_equal_budgets() -> None:
    found = [(name, part.num_tokens(ImageLayout((GRID,)))) for name, part in parts()]
    whole = [name for name, tokens in found if tokens == 36]
    assert {"linear", "mlp"} <= set(whole)
    for name, tokens in found:
        assert tokens in (9, 36, OTHER_BUDGETS.get(name)), name


def test_all_prefix_connectors_take_part() -> None:
    taking = {name for name, _ in parts()}
    inside_the_llm = {"gated_cross_attention", "idefics", "mllama", "sva"}
    assert set(own_connectors()) - taking == {"anyres", *inside_the_llm}, "anyres wraps one of the others"
