"""What is particular to Qwen-VL: crops for patches, models that were never theirs, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.connectors.parts import distance, rescale
from tests.interop.cases import CASES, GRIDS
from tests.interop.test_parity import TOLERANCE, logits
from tests.tiny import CLIP
from vlmzoo.interop import from_hf, to_hf
from vlmzoo.model import VisionLanguageModel
from vlmzoo.vision.blocks import to_patches

QWENS = {
    "qwen2_vl": {"name": "qwen2_vl", "options": {"norm": "layer"}},
    "qwen2_5_vl": {"name": "qwen2_vl", "options": {"norm": "rms"}},
    "qwen3_vl": {"name": "deepstack", "options": {"layers": [1, -2], "last_layer": -1}},
}


def of_parts(name: str, connector: dict[str, Any], layer: int = -1) -> VisionLanguageModel:
    """A model of a Qwen-VL's encoder and LLM that has never been one of transformers'."""
    config = CASES[name].config
    encoder = {**config["vision_config"], "model_type": f"{name}_vision"}
    encoder["hidden_size" if name == "qwen2_vl" else "out_hidden_size"] = 20  # nobody's: its merger is not there
    llm = {**config["text_config"], "model_type": f"{name}_text"}
    model = VisionLanguageModel.from_parts({"config": encoder, "layer": layer}, connector, {"config": llm}).eval()
    rescale(model)
    return model


@pytest.mark.parametrize("name", QWENS)
def test_a_new_model_goes_out_and_takes_patches(name: str) -> None:
    ours = of_parts(name, QWENS[name])
    theirs: Any = to_hf(ours)
    assert type(theirs).__name__ == CASES[name].model
    crops = torch.randn(2, 6, 40, 24, generator=torch.Generator().manual_seed(3))
    sizes = [(4 * height, 4 * width) for height, width in GRIDS[1:]]
    patches = [
        to_patches(ours.config.vision_config, crop[:, :height, :width])
        for crop, (height, width) in zip(crops, sizes, strict=True)
    ]
    image = ours.config.image_token_id
    ids = torch.tensor([[5, *[image] * 6, 7, *[image] * 15, 8, 9]])
    mask = torch.ones_like(ids)
    native = {"pixel_values": crops, "crop_sizes": torch.tensor(sizes)}
    expected = logits(ours, {"input_ids": ids, "attention_mask": mask, **native})
    found = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.cat(patches),
        "image_grid_thw": torch.tensor([(1, *grid) for grid in GRIDS[1:]]),
        "mm_token_type_ids": (ids == image).int(),
    }
    assert distance(logits(theirs, found)[:, :image], expected) <= TOLERANCE
    again = from_hf(theirs)
    assert distance(logits(again, found)[:, :image], expected) <= TOLERANCE
    assert torch.equal(
        logits(again, {"input_ids": found["input_ids"], "attention_mask": mask, **native}), logits(again, found)
    )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image_grid_thw": None}, "pixel_values are patches, expected image_grid_thw with them"),
        ({"image_grid_thw": torch.tensor([(1, 4, 4)])}, "with 140 patches in all"),
        ({"image_grid_thw": torch.tensor([(2, 14, 10)])}, r"expected grids of images \(1, height, width\)"),
        ({"image_grid_thw": torch.tensor([(1, 7, 20)])}, "filled by blocks of 2 x 2"),
        ({"pixel_values_videos": torch.zeros(4, 96)}, "expected images alone"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changed: dict[str, Any], message: str) -> None:
    case = CASES["qwen2_vl"]
    ours, inputs = from_hf(case.build()), case.inputs([1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match=message):
        ours(**{**inputs, **changed})


def test_other_positions_are_refused() -> None:
    theirs = CASES["qwen2_vl"].build()
    theirs.config.text_config.rope_parameters = {"rope_type": "default", "rope_theta": 100.0}
    with pytest.raises(ValueError, match=r"text_config\.rope_parameters has no mrope_section"):
        from_hf(theirs)


@pytest.mark.parametrize(
    ("name", "connector", "layer", "message"),
    [
        ("qwen2_vl", {"name": "qwen2_vl"}, -2, "the encoder's layer is -2, expected the last"),
        ("qwen2_vl", {"name": "qwen2_vl", "options": {"norm": "rms"}}, -1, "the connector's norm is 'rms'"),
        ("qwen2_vl", {"name": "qwen2_vl", "options": {"factor": 1}}, -1, "the connector's factor is 1, expected 2"),
        ("qwen3_vl", {"name": "deepstack", "options": {"layers": [2, 1], "last_layer": 3}}, -1, "layers of the"),
        ("qwen3_vl", {"name": "deepstack", "options": {"layers": [1], "last_layer": 2}}, -1, "last_layer of the"),
    ],
)
def test_settings_that_theirs_lack_are_refused(name: str, connector: Any, layer: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        to_hf(of_parts(name, connector, layer))


def test_another_encoder_is_refused() -> None:
    llm = {**CASES["qwen2_vl"].config["text_config"], "model_type": "qwen2_vl_text"}
    model = VisionLanguageModel.from_parts(
        {"config": CLIP}, {"name": "qwen2_vl", "options": {"factor": 3}}, {"config": llm}
    )
    with pytest.raises(ValueError, match="the encoder's type is 'clip_vision_model', expected 'qwen2_vl_vision'"):
        to_hf(model)
