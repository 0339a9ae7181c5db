"""The rules of models with cross-attention inside the LLM: what tokens see, where layers stand, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.connectors.parts import distance, rescale
from tests.interop.cases import CLIP, IMAGE, LLAMA
from tests.interop.interleaved import INTERLEAVED, MLLAMA
from tests.interop.test_parity import TOLERANCE, logits
from vlmzoo.connector import NORMED, LayerContext
from vlmzoo.connectors.gated_cross_attention import GatedCrossAttentionBlock
from vlmzoo.connectors.mllama import MllamaBlock
from vlmzoo.interop import from_hf, to_hf
from vlmzoo.model import VisionLanguageModel

NO_IMAGE_IN_ONE = (1, 0, 2)
TEXT_FIRST = {name: dataclasses.replace(case, text_first=True) for name, case in INTERLEAVED.items()}


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


def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One sample of a batch for Mllama, without the padding of its text and images."""
    text = inputs["attention_mask"][row].bool()
    images = int((inputs["input_ids"][row] == IMAGE).sum())
    sample = {name: inputs[name][row : row + 1] for name in inputs}
    ids = {name: sample[name][:, text] for name in ("input_ids", "attention_mask")}
    if not images:
        return ids
    tiles = {name: sample[name][:, :images] for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    return {**ids, **tiles, "cross_attention_mask": sample["cross_attention_mask"][:, text, :images]}


@pytest.mark.parametrize("samples", [(1, 2, 1), (2, 0, 1), (1,)])
def test_tokens_before_the_first_image_of_mllama(samples: tuple[int, ...]) -> None:
    """Theirs lets them read the images that fill the batch up: ours gives what theirs gives a sample alone."""
    theirs, inputs = original("mllama"), TEXT_FIRST["mllama"].inputs(samples)
    ours = from_hf(theirs)
    options = {"max_new_tokens": 4, "do_sample": False}
    found = logits(ours, inputs).split(inputs["attention_mask"].sum(1).tolist())
    answers = ours.generate(**inputs, **options)[:, -4:]
    for row in range(len(samples)):
        sample = alone(inputs, row)
        assert distance(found[row], logits(theirs, sample)) <= TOLERANCE
        assert torch.equal(answers[row], theirs.generate(**sample, **options)[0, -4:])


def shifted(change: Callable[[Tensor], Tensor], patch: pytest.MonkeyPatch) -> None:
    """Tokens read another image, in either kind of block."""
    for block in (GatedCrossAttentionBlock, MllamaBlock):
        honest = block._run

        def other(self: Any, hidden: Tensor, context: LayerContext, honest: Any = honest) -> Tensor:
            image = change(context.image_of_token)
            return honest(self, hidden, dataclasses.replace(context, image_of_token=image))

        patch.setattr(block, "_run", other)


def blind_tokens_see(ours: Any, patch: pytest.MonkeyPatch) -> None:
    shifted(lambda image: image.clamp(min=0), patch)


def image_before(ours: Any, patch: pytest.MonkeyPatch) -> None:
    shifted(lambda image: (image - 1).clamp(-1), patch)


def first_image_alone(ours: Any, patch: pytest.MonkeyPatch) -> None:
    shifted(lambda image: image.clamp(max=0), patch)


def one_layer_later(ours: Any, patch: pytest.MonkeyPatch) -> None:
    last = ours.text_spec.num_layers
    ours.in_llm_layers = {min(place + 1, last): layers for place, layers in ours.in_llm_layers.items()}


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


def cls_unseen(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = ours.connector.forward

    def blind(visual: Any) -> Any:
        found = honest(visual)
        found.memory_mask = found.memory_mask.clone()
        found.memory_mask[:, 0] = False
        return found

    patch.setattr(ours.connector, "forward", blind)


def reads_nothing(ours: Any, patch: pytest.MonkeyPatch) -> None:
    for block in ours.connector.blocks.values():
        block.reads_all = False


def empty_tiles_seen(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = ours.connector.forward

    def all_seen(visual: Any) -> Any:
        found = honest(visual)
        found.memory_mask = torch.ones_like(found.memory_mask)
        return found

    patch.setattr(ours.connector, "forward", all_seen)


def rows_as_columns(ours: Any, patch: pytest.MonkeyPatch) -> None:
    honest = ours.vision.tower.inputs

    def turned(config: Any, pixels: Tensor, tilings: Any) -> Any:
        return honest(config, pixels, [tiling[::-1] for tiling in tilings])

    patch.setattr(ours.vision, "tower", dataclasses.replace(ours.vision.tower, inputs=turned))


SHARED = [
    blind_tokens_see,
    image_before,
    first_image_alone,
    one_layer_later,
    attention_gate_open,
    feed_forward_gate_open,
    another_marker,
    cls_unseen,
]
FAULTS = [
    *(("idefics", fault) for fault in [*SHARED, layer_before_the_last]),
    *(("mllama", fault) for fault in [*SHARED, reads_nothing, empty_tiles_seen, rows_as_columns]),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_the_comparison_sees(
    name: str, fault: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, inputs = original(name), TEXT_FIRST[name].inputs((2,))
    expected, ours = logits(theirs, inputs), from_hf(theirs)
    assert distance(logits(ours, inputs), expected) <= TOLERANCE
    with torch.no_grad():
        fault(ours, monkeypatch)
    assert distance(logits(ours, inputs), expected) > 10 * TOLERANCE


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


def images_seen_together(inputs: dict[str, Any]) -> None:
    """As Mllama's processor has it for images that follow one another."""
    inputs["cross_attention_mask"][1, -3:] = inputs["aspect_ratio_mask"][1]


def without_a_mask(inputs: dict[str, Any]) -> None:
    del inputs["cross_attention_mask"]


def too_few_tiles(inputs: dict[str, Any]) -> None:
    inputs["aspect_ratio_mask"][0, 0, 1] = 0


def all_see_all(inputs: dict[str, Any]) -> None:
    inputs["cross_attention_mask"] = torch.ones_like(inputs["cross_attention_mask"])


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("idefics", sees_all, "image_attention_mask lets token 13 of sample 1 see something else than the last image"),
        ("idefics", sees_nothing, "image_attention_mask lets token 13 of sample 0 see"),
        ("idefics", too_few_images, "a sample has 2 image tokens, but pixel_values hold 1 images a sample"),
        ("idefics", too_large, "pixel_values are of 48 x 48 pixels, expected 24 x 24"),
        ("idefics", mask_too_short, r"image_attention_mask has shape \(3, \d+, 2\), expected \(3, \d+, 2\)"),
        ("mllama", images_seen_together, r"cross_attention_mask lets token \d+ of sample 1 see something else"),
        ("mllama", all_see_all, "cross_attention_mask lets token 0 of sample 0 see something else"),
        ("mllama", without_a_mask, "without aspect_ratio_ids or aspect_ratio_mask or cross_attention_mask"),
        ("mllama", too_few_tiles, "aspect_ratio_mask shows other tiles than aspect_ratio_ids say"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_our_layers_cannot_show_is_refused(name: str, change: Callable[[dict[str, Any]], None], says: str) -> None:
    inputs = INTERLEAVED[name].inputs()
    change(inputs)
    with pytest.raises(ValueError, match=says) as error:
        from_hf(original(name))(**inputs)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("alpha_type", "vector", "IdeficsForVisionText2Text: alpha_type is 'vector', expected 'float'"),
        ("dropout", 0.1, "dropout is 0.1, expected 0"),
        ("image_token_id", 100, "image_token_id is 100, expected one from 0 to 99"),
        ("cross_layer_interval", 3, "num_hidden_layers % cross_layer_interval is 1, expected 0"),
    ],
)
def test_a_setting_that_our_connector_lacks_is_refused(setting: str, value: Any, says: str) -> None:
    theirs = INTERLEAVED["idefics"].build()
    setattr(theirs.config, setting, value)
    with pytest.raises(ValueError, match=says):
        from_hf(theirs)


def test_text_alone_skips_mllamas_layers() -> None:
    theirs = original("mllama")
    inputs = alone(INTERLEAVED["mllama"].inputs((1, 0)), 1)
    assert distance(logits(from_hf(theirs), inputs), logits(theirs, inputs)) <= TOLERANCE


@pytest.mark.parametrize(
    ("part", "setting", "value", "says"),
    [
        ("text_config", "cross_attention_layers", [1, 2], r"\[1, 2\], expected single ones among 7 layers"),
        ("text_config", "cross_attention_layers", [7], r"\[7\], expected single ones among 7 layers"),
        ("text_config", "hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
        ("vision_config", "vision_output_dim", 96, "vision_output_dim is 96, expected 72"),
    ],
)
def test_a_setting_of_mllama_that_our_connector_lacks_is_refused(
    part: str, setting: str, value: Any, says: str
) -> None:
    theirs = INTERLEAVED["mllama"].build()
    setattr(getattr(theirs.config, part), setting, value)
    with pytest.raises(ValueError, match=f"MllamaForConditionalGeneration: .*{says}"):
        from_hf(theirs)


def test_mllamas_layers_stand_before_those_that_follow_them() -> None:
    assert list(from_hf(original("mllama")).in_llm_layers) == [1, 3, 4]


def own(connector: dict[str, Any], encoder: dict[str, Any], image_token_id: int | None = None) -> VisionLanguageModel:
    """A model that was not imported."""
    layer, heads = (NORMED, 2) if connector["name"] == "mllama" else (-1, 4)
    llm = {"config": {**LLAMA, "num_key_value_heads": heads}}
    vision = {"config": encoder, "layer": layer}
    model = VisionLanguageModel.from_parts(vision, connector, llm, image_token_id=image_token_id).eval()
    rescale(model)
    return model


def test_models_of_our_own_are_exported() -> None:
    options = {"every": 2, "num_kv_heads": 2, "layers": [NORMED], "without_image": "everything"}
    tower = {"model_type": "mllama_vision_model", **MLLAMA["vision_config"]}
    ours = own({"name": "mllama", "options": options}, tower, IMAGE)
    inputs = TEXT_FIRST["mllama"].inputs((1,))
    names = ("input_ids", "attention_mask")
    tiles = {"pixel_values": inputs["pixel_values"][0, 0], "num_crops": torch.tensor([4])}
    found = logits(ours, {name: inputs[name] for name in names} | tiles | {"tilings": torch.tensor([[1, 2]])})
    assert distance(found, logits(to_hf(ours), inputs)) <= TOLERANCE
    options = {"every": 1, "num_latents": 3, "num_resampler_layers": 1, "num_resampler_heads": 2}
    ours = own({"name": "idefics", "options": options}, CLIP, IMAGE)
    inputs = INTERLEAVED["idefics"].inputs((1,))
    found = logits(ours, {name: inputs[name] for name in names} | {"pixel_values": inputs["pixel_values"][0]})
    assert distance(found, logits(to_hf(ours), inputs)) <= TOLERANCE


@pytest.mark.parametrize(
    ("connector", "encoder", "says"),
    [
        ({"name": "idefics", "options": {"every": 1}}, CLIP, "image_token_id is 100, expected one from 0 to 99"),
        ({"name": "idefics", "options": {"every": 2}}, CLIP, "modulo the connector's every is 1, expected 0"),
        ({"name": "mllama", "options": {"every": 1}}, CLIP, "the encoder's type is 'clip_vision_model'"),
    ],
)
def test_what_theirs_lacks_is_not_exported(connector: dict[str, Any], encoder: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        to_hf(own(connector, encoder))


def test_the_image_token_is_where_published_vocabularies_have_it() -> None:
    theirs = INTERLEAVED["idefics"].build()
    del theirs.config.image_token_id
    ours = from_hf(theirs)
    assert ours.config.image_token_id == 89
    assert not hasattr(to_hf(ours).config, "image_token_id")
    assert IMAGE == 90, "which these tests say outright"
