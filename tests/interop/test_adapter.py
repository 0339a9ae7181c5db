"""Adapters that peft wrote, merged into the LLM of any model that is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlavaForConditionalGeneration

from tests import tiny
from tests.checkpoints import write_llava, write_models
from vlmzoo.interop import load, to_hf


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(write_models(tmp_path_factory.mktemp("adapter")))


def trained(llava: Path, **options: Any) -> Any:
    """The LLM of that model with adapters of peft, and numbers in both halves of each."""
    torch.manual_seed(1)
    language = load(llava).language
    given = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}
    wrapped = get_peft_model(language, LoraConfig(**given))
    for name, value in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1)
    return wrapped.eval()


def test_what_peft_wrote_is_merged(llava: Path, tmp_path: Path) -> None:
    """Into ours, and from there into a stock model of transformers."""
    theirs = trained(llava)
    theirs.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 4, 3]])
    model = load(llava, adapter=tmp_path / "adapter")
    with torch.no_grad():
        expected, plain = theirs(input_ids=ids).logits, load(llava).language(input_ids=ids).logits
        found = model.language(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert (found - plain).abs().max() > 0.01
        stock = to_hf(model)
        assert isinstance(stock, LlavaForConditionalGeneration)
        image = stock.config.image_token_id
        seen = {"input_ids": torch.tensor([[1, 5, *[image] * 9, 7, 8]]), "pixel_values": tiny.pixels(1)}
        torch.testing.assert_close(stock(**seen).logits[..., :20], model(**seen).logits[..., :20], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "adapter_config.json has use_dora True, expected none"),
        ({"use_rslora": True}, "adapter_config.json has use_rslora True, expected none"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight is no update, but a weight that takes another's place"),
    ],
)
def test_what_is_no_plain_update_is_refused(options: dict[str, Any], message: str, llava: Path, tmp_path: Path) -> None:
    trained(llava, **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(llava, adapter=tmp_path)


def test_another_llms_adapter_is_refused(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"adapter .*: expected an adapter of peft, but adapter_config.json is missing"
    ):
        load(llava, adapter=tmp_path)
    trained(llava).save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name.replace("layers.2", "layers.3"): value for name, value in weights.items()}, file)
    with pytest.raises(ValueError, match=r"the update of model\.layers\.3\.\S+ has no weight that it fits"):
        load(llava, adapter=tmp_path)
    settings = tmp_path / "adapter_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "peft_type": "IA3"}))
    with pytest.raises(ValueError, match="has peft_type 'IA3', expected 'LORA'"):
        load(llava, adapter=tmp_path)
