"""What `load` and `to_hf` refuse: named in one line, nothing half loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BlipConfig, BlipForConditionalGeneration

import vlmzoo
from tests.interop.cases import CASES
from tests.tiny import model
from vlmzoo.interop import from_hf, load, to_hf

Weights = dict[str, torch.Tensor]
PROJECTOR = "multi_modal_projector.linear_1.weight"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    CASES["llava"].build().save_pretrained(tmp_path / "llava")
    return tmp_path / "llava"


def change_weights(folder: Path, change: Callable[[Weights, str], None]) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    (name,) = (name for name in weights if name.endswith(PROJECTOR))
    change(weights, name)
    save_file(weights, file, {"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_load_is_at_the_top(checkpoint: Path) -> None:
    assert type(vlmzoo.load(checkpoint)).__name__ == "ImportedModel"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, name: weights.pop(name), f"1 weights are missing, model.{PROJECTOR} first"),
        (lambda weights, name: weights.update(extra=torch.ones(2)), "1 weights have no place, extra first"),
        (
            lambda weights, name: weights.update({name: torch.ones(3, 3)}),
            f"1 weights do not fit its configuration, model.{PROJECTOR} first",
        ),
    ],
    ids=["missing", "left over", "misshapen"],
)
def test_faulty_weights_are_named(checkpoint: Path, change: Any, message: str) -> None:
    change_weights(checkpoint, change)
    with pytest.raises(ValueError, match=f"^model .*llava: {message}$"):
        load(checkpoint)


@pytest.mark.parametrize("part", ["vision_config", "text_config"])
def test_a_configuration_without_a_part_is_named(checkpoint: Path, part: str) -> None:
    """transformers would take a CLIP-L or a Llama-7B for it."""
    values = json.loads((checkpoint / "config.json").read_text())
    del values[part]
    (checkpoint / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=f"^model .*llava: config.json has no {part}$"):
        load(checkpoint)


def test_weights_are_shared() -> None:
    theirs = CASES["llava"].build()
    ours = from_hf(theirs)
    assert ours.get_input_embeddings().weight.data_ptr() == theirs.get_input_embeddings().weight.data_ptr()


def test_a_pickle_is_not_read(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model .*llava: cannot be loaded \(.*model\.safetensors"):
        load(checkpoint)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory here"):
        load(tmp_path / "nothing")


def test_an_unsupported_class_is_named(tmp_path: Path) -> None:
    config = BlipConfig(
        text_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
        vision_config={"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8},
    )
    theirs = BlipForConditionalGeneration(config)
    with pytest.raises(ValueError, match=r"unknown model class 'BlipForConditionalGeneration'.* Valid: Aria"):
        from_hf(theirs)
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unknown model class 'BlipForConditionalGeneration'"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"projector_hidden_act": "relu"}, "projector_hidden_act is 'relu', expected 'gelu'"),
        ({"vision_feature_select_strategy": "full"}, "clip_vision_model is 'full', expected 'default'"),
        ({"vision_feature_layer": 9}, "encoder layer 9: the tower has hidden states -4 to 3"),
    ],
)
def test_a_setting_that_no_connector_has_is_named(checkpoint: Path, values: dict[str, Any], message: str) -> None:
    change_config(checkpoint, **values)
    with pytest.raises(ValueError, match=f"^LlavaForConditionalGeneration: .*{message}"):
        load(checkpoint)


def test_what_transformers_has_no_class_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"connector 'perceiver' cannot be exported: no class .* those with one are "):
        to_hf(model("perceiver", num_latents=4, num_layers=1, num_heads=2, head_dim=4))
    with pytest.raises(
        ValueError, match=r"connector 'linear' .*PaliGemma.*: the encoder's type is 'clip_vision_model'"
    ):
        to_hf(model("linear"))
    with pytest.raises(ValueError, match="depth of the connector is 3, expected 2"):
        to_hf(model("mlp", depth=3))


def test_a_model_of_ours_becomes_a_stock_llava(tmp_path: Path) -> None:
    ours = model("mlp")
    theirs = to_hf(ours)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    theirs.save_pretrained(tmp_path)
    ids = torch.tensor([[1, *[ours.config.image_token_id] * 9, 5, 6]])
    pixels = torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    with torch.no_grad():
        expected = ours(**inputs).logits
        for found in (theirs(**inputs).logits, load(tmp_path)(**inputs).logits):
            words, image = found[..., : expected.shape[-1]], found[..., ours.config.image_token_id]
            torch.testing.assert_close(words, expected)
            assert found.shape[-1] == ours.config.image_token_id + 1
            assert (image < words.max(-1).values).all(), "the model never answers with <image>"
