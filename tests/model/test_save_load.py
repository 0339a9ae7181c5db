"""A saved model comes back the same, by transformers' own doors, whatever lay in memory before."""

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import PreTrainedModel

from tests.tiny import CLIP, LLAMA, QWEN, SIGLIP, model, pixels
from vlmzoo import VisionLanguageModel
from vlmzoo.connector import ImageLayout


def logits(vlm):
    row = [1, *[vlm.config.image_token_id] * vlm.num_tokens(ImageLayout(((3, 3),))), 5, 6]
    return vlm(torch.tensor([row]), pixel_values=pixels(1)).logits


@pytest.mark.parametrize("connector", ["linear", "mlp"])
@pytest.mark.parametrize("llm", [LLAMA, QWEN], ids=["llama", "qwen-tied"])
@pytest.mark.parametrize("encoder", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_round_trip(tmp_path, monkeypatch, connector, llm, encoder):
    vlm = model(connector, llm, encoder)
    vlm.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin"))
    # what is not in the file comes back as empty memory: fill that with poison to see who leans on it
    empty_like = torch.empty_like

    def poisoned(*args, **kwargs):
        made = empty_like(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() and made.device.type != "meta" else made

    monkeypatch.setattr(torch, "empty_like", poisoned)
    for loaded in (VisionLanguageModel, AutoModelForImageTextToText):
        again = loaded.from_pretrained(tmp_path).eval()
        assert type(again) is VisionLanguageModel
        before, after = vlm.state_dict(), again.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert torch.equal(logits(vlm), logits(again))
        if llm["model_type"] == "qwen3":
            assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_config_holds_every_option(tmp_path):
    model("mlp").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["connector"] == "mlp"
    assert config["connector_options"] == {"depth": 2, "layers": []}
    assert config["text_config"]["model_type"] == "llama"
    assert config["vision_config"]["model_type"] == "clip_vision_model"


def test_assembling_changes_no_weight():
    whole = model("linear")
    again = VisionLanguageModel.from_parts(whole.vision.model, whole.connector, whole.language)
    assert isinstance(whole.language, PreTrainedModel)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_connector_keeps_its_own_initialisation():
    """The constructor's, under the run's seed: transformers' general one would overwrite it."""
    one, same, other = (
        VisionLanguageModel.from_parts({"config": CLIP}, "mlp", {"config": LLAMA}, seed=seed) for seed in (1, 1, 2)
    )
    for key, value in one.connector.state_dict().items():
        assert torch.equal(value, same.connector.state_dict()[key])
    assert any(not torch.equal(v, other.connector.state_dict()[k]) for k, v in one.connector.state_dict().items())
    assert one.connector.state_dict()["inner.layers.0.weight"].std() > 0.05  # torch's uniform, not normal(0.02)
