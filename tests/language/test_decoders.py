"""Causal LMs around the decoders of Qwen-VL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.interop.cases import CASES
from vlmzoo import build
from vlmzoo.config import LLMConfig
from vlmzoo.interop import from_hf

IDS = torch.tensor([[1, 5, 6, 7, 8]])


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_it_is_theirs_saved_and_loaded(name: str, tmp_path: Path) -> None:
    theirs = CASES[name].build()
    ours: Any = from_hf(theirs).language
    with torch.no_grad():
        expected = theirs(IDS).logits
        assert torch.equal(ours(IDS).logits, expected)
        for kept, places in ((2, [3, 4]), (torch.tensor([1, 3]), [1, 3])):
            torch.testing.assert_close(ours(IDS, logits_to_keep=kept).logits, expected[:, places])
        loss = torch.nn.functional.cross_entropy(expected[0, :-1], IDS[0, 1:])
        torch.testing.assert_close(ours(IDS, labels=IDS).loss, loss)
    ours.save_pretrained(tmp_path)
    loaded = build.language(LLMConfig(name=str(tmp_path))).eval()
    assert type(loaded) is type(ours)
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == (name == "qwen2_5_vl")
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, expected)
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(loaded.generate(IDS, **options), theirs.generate(IDS, **options))


def test_checkpointing_gives_the_same_gradients() -> None:
    values = {**CASES["qwen2_vl"].config["text_config"], "model_type": "qwen2_vl_text"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).train()
    found = []
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        found.append([parameter.grad.clone() for parameter in model.parameters()])
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(again, plain)
