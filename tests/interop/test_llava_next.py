"""What of LLaVA-NeXT and LLaVA-OneVision is refused, and which of the two a model of ours becomes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.interop.cases import CASES, CLIP, LLAMA
from vlmzoo.interop import from_hf, to_hf
from vlmzoo.model import VisionLanguageModel


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llava_next", {"image_grid_pinpoints": [[24, 50]]}, r"\[\[24, 50\]\], expected multiples of 24"),
        ("llava_next", {"vision_feature_select_strategy": "full"}, "'full', expected 'default'"),
        ("llava_next", {"multimodal_projector_bias": False}, "False, expected True"),
        ("llava_onevision", {"vision_aspect_ratio": "square"}, "'square', expected 'anyres_max_' and a number"),
    ],
)
def test_settings_are_refused(name: str, changes: dict[str, Any], message: str) -> None:
    case = CASES[name]
    with pytest.raises(ValueError, match=message):
        from_hf(replace(case, config={**case.config, **changes}).build())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, "LlavaNextForConditionalGeneration"),
        ({"max_tiles": 4}, "LlavaOnevisionForConditionalGeneration"),
        ({"connector": "linear"}, "connector within the connector is 'linear', expected 'mlp'"),
        ({"options": {"depth": 3}}, "depth of the connector within the connector is 3, expected 2"),
        ({"tile_size": 32}, "tile_size of the connector is 32, expected 24"),
    ],
)
def test_the_options_decide_what_a_model_becomes(options: dict[str, Any], found: str) -> None:
    connector = {"name": "anyres", "options": options}
    ours = VisionLanguageModel.from_parts({"config": CLIP}, connector, {"config": LLAMA})
    if "expected" in found:
        with pytest.raises(ValueError, match=found):
            to_hf(ours)
    else:
        theirs: Any = to_hf(ours)
        assert type(theirs).__name__ == found
        assert theirs.config.image_grid_pinpoints == [[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]]
