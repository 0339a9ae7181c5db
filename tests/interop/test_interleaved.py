"""The rules of models with cross-attention inside the LLM: what tokens see, where layers stand, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

from tests.connectors.parts import distance
from tests.interop.cases import IMAGE
from tests.interop.interleaved import INTERLEAVED
from tests.interop.test_parity import TOLERANCE, logits
from vlmzoo.connector import LayerContext
from vlmzoo.connectors import gated_cross_attention
from vlmzoo.interop import from_hf, to_hf

NO_IMAGE_IN_ONE = (1, 0, 2)


@cache
def original(name: str) -> Any:
    return INTERLEAVED[name].build()


@pytest.mark.parametrize("samples", [NO_IMAGE_IN_ONE, (0, 0)])
@pytest.mark.parametrize("name", ["idefics", "idefics_resampler"])
def test_samples_without_images(name: str, samples: tuple[int, ...]) -> None:
    theirs, inputs = original(name), INTERLEAVED[name].inputs(samples)
    ours = from_hf(theirs)
    assert distance(logits(ours, inputs), logits(theirs, inputs)) <= TOLERANCE
    options = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(**inputs, **options), theirs.generate(**inputs, **options))


def blind_tokens_see(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = gated_cross_attention.media_mask

    def everything(context: LayerContext) -> torch.Tensor:
        mask = honest(context)
        return mask | ~mask.any(-1, keepdim=True)

    patch.setattr(gated_cross_attention, "media_mask", everything)


def image_before(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = gated_cross_attention.media_mask

    def before(context: LayerContext) -> torch.Tensor:
        image = (context.image_of_token - 1).clamp(-1)
        return honest(LayerContext(context.memory, context.memory_mask, image))

    patch.setattr(gated_cross_attention, "media_mask", before)


def one_layer_later(ours: Any, patch: pytest.MonkeyPatch) -> None:
    ours.in_llm_layers = {place + 1: layers for place, layers in ours.in_llm_layers.items()}


def attention_gate_open(ours: Any, patch: pytest.MonkeyPatch) -> None:
    for block in ours.connector.blocks.values():
        block.attention_gate = nn.Parameter(torch.tensor([20.0]))  # tanh is 1; theirs is shared


def feed_forward_gate_open(ours: Any, patch: pytest.MonkeyPatch) -> None:
    for block in ours.connector.blocks.values():
        block.feed_forward_gate = nn.Parameter(torch.tensor([20.0]))


def another_marker(ours: Any, patch: pytest.MonkeyPatch) -> None:
    nn.init.zeros_(ours.connector.marker)


def layer_before_the_last(ours: Any, patch: pytest.MonkeyPatch) -> None:
    ours.vision.layer = -2


def first_image_alone(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = gated_cross_attention.media_mask

    def first(context: LayerContext) -> torch.Tensor:
        image = context.image_of_token.clamp(max=0)
        return honest(LayerContext(context.memory, context.memory_mask, image))

    patch.setattr(gated_cross_attention, "media_mask", first)


def cls_unseen(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = ours.connector.forward

    def blind(visual: Any) -> Any:
        found = honest(visual)
        found.memory_mask = found.memory_mask.clone()
        found.memory_mask[:, 0] = False
        return found

    patch.setattr(ours.connector, "forward", blind)


FAULTS = [
    blind_tokens_see,
    image_before,
    first_image_alone,
    one_layer_later,
    attention_gate_open,
    feed_forward_gate_open,
    another_marker,
    layer_before_the_last,
    cls_unseen,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_comparison_sees(fault: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, inputs = original("idefics"), INTERLEAVED["idefics"].inputs()
    ours = from_hf(theirs)
    with torch.no_grad():
        fault(ours, monkeypatch)
    assert distance(logits(ours, inputs), logits(theirs, inputs)) > 10 * TOLERANCE


def test_a_trained_marker_is_exported_as_the_images_embedding() -> None:
    theirs, inputs = original("idefics"), INTERLEAVED["idefics"].inputs()
    ours = from_hf(theirs)
    with torch.no_grad():
        ours.connector.marker.add_(1)
    back = to_hf(ours)
    assert distance(logits(ours, inputs), logits(theirs, inputs)) > 10 * TOLERANCE
    assert distance(logits(back, inputs), logits(ours, inputs)) <= TOLERANCE


def sees_all(inputs: dict[str, Any]) -> None:
    inputs["image_attention_mask"][1, -1] = 1


def sees_nothing(inputs: dict[str, Any]) -> None:
    inputs["image_attention_mask"][0, -1] = 0


def too_few_images(inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = inputs["pixel_values"][:, :1]
    del inputs["image_attention_mask"]


def too_large(inputs: dict[str, Any]) -> None:
    inputs["pixel_values"] = torch.zeros(3, 2, 3, 48, 48)


def mask_too_short(inputs: dict[str, Any]) -> None:
    inputs["image_attention_mask"] = inputs["image_attention_mask"][:, 1:]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            sees_all,
            "image_attention_mask lets token 13 of sample 1 see something else than the last image at or before",
        ),
        (sees_nothing, "image_attention_mask lets token 13 of sample 0 see"),
        (too_few_images, "a sample has 2 image tokens, but pixel_values hold 1 images a sample"),
        (too_large, "pixel_values are of 48 x 48 pixels, expected 24 x 24"),
        (mask_too_short, r"image_attention_mask has shape \(3, \d+, 2\), expected \(3, \d+, 2\)"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_our_layers_cannot_show_is_refused(change: Callable[[dict[str, Any]], None], says: str) -> None:
    inputs = INTERLEAVED["idefics"].inputs()
    change(inputs)
    with pytest.raises(ValueError, match=says) as error:
        from_hf(original("idefics"))(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("alpha_type", "vector", "IdeficsForVisionText2Text: alpha_type is 'vector', expected 'float'"),
        ("dropout", 0.1, "dropout is 0.1, expected 0"),
        ("image_token_id", 100, "image_token_id 100 within a vocabulary of 100"),
        ("cross_layer_interval", 3, "num_hidden_layers % cross_layer_interval is 1, expected 0"),
    ],
)
def test_a_setting_that_our_connector_lacks_is_refused(setting: str, value: Any, says: str) -> None:
    theirs = INTERLEAVED["idefics"].build()
    setattr(theirs.config, setting, value)
    with pytest.raises(ValueError, match=says):
        from_hf(theirs)


def test_the_image_token_is_where_published_vocabularies_have_it() -> None:
    theirs = INTERLEAVED["idefics"].build()
    del theirs.config.image_token_id
    assert from_hf(theirs).config.image_token_id == 89
    assert IMAGE == 90, "which these tests say outright"
