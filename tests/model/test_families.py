"""Every family of LLMs trains, generates and is saved with a connector before it, inside it, and both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import CLIP, LLAMA, pixels
from vlmzoo.connector import ImageLayout
from vlmzoo.model import VisionLanguageModel

ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 2, 2]}}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 12},
    "phi": {},
    "phi3": {},
    "gemma": {"head_dim": 12},
    "gemma2": {"head_dim": 12, "sliding_window": 8},
    "gemma3_text": {"head_dim": 12, "sliding_window": 8},
    "smollm3": {},
    "qwen2_vl_text": ROTARY,
    "qwen2_5_vl_text": {**ROTARY, "tie_word_embeddings": True},
    "qwen3_vl_text": {**ROTARY, "head_dim": 12},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48, "max_position_embeddings": 128},
}
CONNECTORS: dict[str, Any] = {
    "before": "mlp",
    "inside": {
        "name": "gated_cross_attention",
        "options": {"memory": "patches", "every": 1, "num_heads": 2, "head_dim": 8},
    },
    "both": {"name": "deepstack", "options": {"layers": [1, 2], "factor": 1}},
}


def open_gates(model: VisionLanguageModel) -> None:
    with torch.no_grad():
        for parameter in model.connector.parameters():
            if not parameter.any():
                parameter.normal_(std=0.5)


@pytest.mark.parametrize("connector", CONNECTORS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_trains_generates_and_is_saved(family: str, connector: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    llm = {"config": {**LLAMA, **FAMILIES[family], "model_type": family}}
    model = VisionLanguageModel.from_parts({"config": CLIP}, CONNECTORS[connector], llm)
    open_gates(model)
    token = model.config.image_token_id
    slots = [token] * model.num_tokens(ImageLayout(((3, 3),)))
    ids = torch.tensor([[5, *slots, 7, 8, 9], [4, 6, *slots, 8, 9]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels(2)}

    model.train()(**inputs, labels=ids.masked_fill(ids == token, -100)).loss.backward()
    without = [name for name, value in model.connector.named_parameters() if value.grad is None or not value.grad.any()]
    assert without == []

    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    found = model.generate(**inputs, **options)
    assert torch.equal(found[:, ids.shape[1]], logits[:, -1].argmax(-1))
    assert torch.equal(found, model.generate(**inputs, **options, use_cache=False))
    other = model.generate(
        **{**inputs, "pixel_values": 3 * pixels(2)}, **options, output_logits=True, return_dict_in_generate=True
    )
    assert not torch.allclose(other.logits[0], logits[:, -1])

    model.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, logits)
