"""Features are the tower's own hidden states: layer, CLS, size; bit-equal however they are batched."""

import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import convert_image_to_patches
from transformers.vision_utils import get_vision_window_index

from tests.tiny import CLIP, LLAMA, SIGLIP, pixels
from vlmzoo import build
from vlmzoo.config import EncoderConfig
from vlmzoo.connector import NORMED, FeatureRequest, ImageLayout, VisionSpec
from vlmzoo.model import VisionLanguageModel
from vlmzoo.vision.encoder import VisionEncoder
from vlmzoo.vision.towers import spec

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
OTHERS = {
    "dinov2": {**SMALL, "model_type": "dinov2", "image_size": 24, "patch_size": 8, "mlp_ratio": 2},
    "registers": {
        **SMALL,
        "model_type": "dinov2_with_registers",
        "image_size": 24,
        "patch_size": 8,
        "mlp_ratio": 2,
        "num_register_tokens": 4,
    },
    "internvit": {
        **SMALL,
        "model_type": "internvl_vision",
        "image_size": [24, 24],
        "patch_size": [8, 8],
        "intermediate_size": 48,
    },
    "siglip2": {
        **SMALL,
        "model_type": "siglip2_vision_model",
        "num_patches": 9,
        "patch_size": 8,
        "intermediate_size": 48,
    },
}
for name, kind in {
    "aimv2": "aimv2_vision_model",
    "blip2": "blip_2_vision_model",
    "instructblip": "instructblip_vision_model",
    "janus": "janus_vision_model",
    "idefics2": "idefics2_vision",
    "idefics3": "idefics3_vision",
    "smolvlm": "smolvlm_vision",
    "pixtral": "pixtral",
}.items():
    OTHERS[name] = {**SMALL, "model_type": kind, "image_size": 24, "patch_size": 8, "intermediate_size": 48}
MLLAMA = {
    "model_type": "mllama_vision_model",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "attention_heads": 2,
    "intermediate_size": 24,
    "intermediate_layers_indices": [0],
    "vision_output_dim": 32,
    "image_size": 24,
    "patch_size": 8,
}
OTHERS["pixtral"] |= {"head_dim": 16, "image_size": 48}
QWEN = {
    "qwen2_vl": {"model_type": "qwen2_vl_vision", "embed_dim": 32, "hidden_size": 48, "mlp_ratio": 2},
    "qwen2_5_vl": {"model_type": "qwen2_5_vl_vision", "hidden_size": 32, "out_hidden_size": 48, "window_size": 16}
    | {"fullatt_block_indexes": [1], "intermediate_size": 48},
    "qwen3_vl": {"model_type": "qwen3_vl_vision", "hidden_size": 32, "out_hidden_size": 48, "intermediate_size": 48}
    | {"num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]},
}
QWEN = {name: {**values, "depth": 3, "num_heads": 2, "patch_size": 4} for name, values in QWEN.items()}
MIXED = ["siglip2", "idefics2", "idefics3", "smolvlm", "pixtral", *QWEN]
PREFIX = {"dinov2": 1, "registers": 5, "internvit": 1, "blip2": 1, "instructblip": 1}


def encoder(config, **kwargs):
    return VisionEncoder(build.vision(EncoderConfig(config=config)), **kwargs).eval()


@pytest.mark.parametrize(("config", "first"), [(CLIP, 1), (SIGLIP, 0)], ids=["clip", "siglip"])
@pytest.mark.parametrize("layer", [-2, -1, 0, 2])
def test_features_are_hidden_states(config, first, layer):
    part = encoder(config, layer=layer)
    (found,) = part.encode(pixels(3), FeatureRequest(cls=bool(first)))
    expected = part.model(pixel_values=pixels(3), output_hidden_states=True).hidden_states[layer]
    torch.testing.assert_close(found.values, expected[:, first:])
    assert found.values.shape == (3, 9, 32), "CLS is dropped only where there is one"
    assert found.grids == ((3, 3),) * 3
    assert not found.values.requires_grad or any(p.requires_grad for p in part.parameters())
    if first:
        torch.testing.assert_close(found.cls, expected[:, 0])


@pytest.mark.parametrize("name", OTHERS)
def test_other_towers_give_their_own_hidden_states(name):
    part, first = encoder(OTHERS[name]), PREFIX.get(name, 0)
    assert part.image_size == (48 if name == "pixtral" else 24)
    found, last = part.encode(pixels(3), FeatureRequest((-2, NORMED), cls=bool(first)))
    if name == "siglip2":
        patches = torch.stack([torch.from_numpy(convert_image_to_patches(image.numpy(), 8)) for image in pixels(3)])
        shapes = torch.tensor([[3, 3]] * 3)
        inputs = {"pixel_values": patches, "pixel_attention_mask": torch.ones(3, 9), "spatial_shapes": shapes}
    else:
        inputs = {"pixel_values": pixels(3)}
    output = part.model(**inputs, output_hidden_states=True)
    for mine, theirs in ((found, output.hidden_states[-2]), (last, output.last_hidden_state)):
        theirs = theirs.view(3, -1, 32)  # Pixtral gives all crops in one row
        torch.testing.assert_close(mine.values, theirs[:, first:])
        assert mine.values.shape == (3, 9, 32)
        if first:
            torch.testing.assert_close(mine.cls, theirs[:, 0])
    (alone,) = part.encode(pixels(3)[1:2], FeatureRequest())
    assert torch.equal(alone.values, found.values[1:2])
    if name != "aimv2":  # its positions are for one size
        (wide,) = part.encode(torch.randn(2, 3, 24, 40), FeatureRequest())
        assert wide.grids[0] == (3, 5)
        assert wide.values.shape[1] == 15


@pytest.mark.parametrize("name", MIXED)
def test_padded_crops_are_encoded_as_if_alone(name):
    part = encoder({**OTHERS, **QWEN}[name], layer=NORMED)
    patch = part.spec.patch_size
    sizes = [(24, 16), (16, 24), (24, 24), (8, 16)]
    crops = pixels(4)
    for crop, (height, width) in zip(crops, sizes, strict=True):
        crop[:, height:] = crop[:, :, width:] = torch.nan if name == "pixtral" else 7.0
    (together,) = part.encode(crops, FeatureRequest(), sizes)
    assert together.grids == tuple((height // patch, width // patch) for height, width in sizes)
    assert together.mask.sum(1).tolist() == [height * width // patch**2 for height, width in sizes]
    for row, (height, width) in enumerate(sizes):
        (alone,) = part.encode(crops[row : row + 1, :, :height, :width], FeatureRequest())
        real = together.values[row, : together.mask[row].sum()]
        torch.testing.assert_close(real, alone.values[0], atol=1e-5, rtol=1e-5)


def packed(part, crops, model):
    """What a tower of Qwen-VL gives for crops, the number of each patch in its crop row by row, how many a crop has.

    Patches are cut by transformers' own processor, and so is an image of their numbers.
    """
    processor, config = Qwen2VLImageProcessorPil(), model.config
    patches, places, grids = [], [], []
    for crop in crops:
        height, width = (side // 4 for side in crop.shape[1:])
        places_of_pixels = torch.arange(height * width).view(1, height, width).repeat_interleave(4, 1)
        for image, found in ((crop, patches), (places_of_pixels.repeat_interleave(4, 2).float(), places)):
            cut = processor.patchify(image.numpy(), 4, 2, 2)[0]
            found.append(torch.from_numpy(cut.copy()))
        grids.append((1, height, width))
    order = torch.cat(places)[:, 0].long()
    if config.model_type == "qwen2_5_vl_vision":
        index, _ = get_vision_window_index(torch.tensor(grids), 2, config.window_size, 4)
        order = order.view(-1, 4)[index].flatten()
    output = model(torch.cat(patches), grid_thw=torch.tensor(grids), output_hidden_states=True)
    return output, order, [height * width for _, height, width in grids]


@pytest.mark.parametrize("name", QWEN)
def test_towers_of_qwen_give_their_own_hidden_states(name):
    part = encoder(QWEN[name])
    assert part.image_size == (20 if name == "qwen3_vl" else 128)
    assert part.spec == VisionSpec(32, 3, 2, 1e-6, 4, has_cls=False)
    assert not any("merger" in key for key in part.state_dict())
    whole = type(part.model)(part.model.config).eval()
    assert whole.load_state_dict(part.model.state_dict(), strict=False).unexpected_keys == []
    crops = [torch.randn(3, *size) for size in ((24, 40), (16, 24), (40, 40))]
    padded = torch.zeros(3, 3, 40, 40)
    for place, crop in zip(padded, crops, strict=True):
        place[:, : crop.shape[1], : crop.shape[2]] = crop
    maps = part.encode(padded, FeatureRequest((1, -1, NORMED)), [(24, 40), (16, 24), (40, 40)])
    output, order, counts = packed(part, crops, whole)
    for found, state in zip(maps, (output.hidden_states[1], *[output.last_hidden_state] * 2), strict=True):
        assert found.grids == ((6, 10), (4, 6), (10, 10))
        for row, (given, places) in enumerate(zip(state.split(counts), order.split(counts), strict=True)):
            torch.testing.assert_close(found.values[row, places], given, atol=1e-5, rtol=1e-5)
    doubled = padded.repeat_interleave(2, 1)  # the two frames of a patch
    (twice,) = part.encode(doubled, FeatureRequest((1,)), [(24, 40), (16, 24), (40, 40)])
    assert torch.equal(twice.values, maps[0].values)


def test_a_crop_that_blocks_do_not_fill_is_refused():
    with pytest.raises(ValueError, match="crop of 24 x 20 pixels: a qwen2_vl_vision encodes blocks of 8 x 8 pixels"):
        encoder(QWEN["qwen2_vl"]).encode(torch.randn(1, 3, 24, 20), FeatureRequest())


def open_gates(part):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in part.parameters():
            if parameter.ndim < 2:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return part


def test_tiles_of_an_image_are_encoded_together():
    part = open_gates(encoder(MLLAMA, layer=NORMED))
    assert part.spec.hidden_size == 32
    tilings = [(1, 2), (2, 2), (3, 1), (1, 1), (2, 1)]
    tiles = pixels(20).unflatten(0, (5, 4))
    (found,) = part.encode(tiles.flatten(0, 1), FeatureRequest(cls=True), tilings=tilings)
    ids = torch.tensor([[[2, 6, 7, 1, 5][image]] for image in range(5)])[
        ..., 0
    ]  # among supported_aspect_ratios, from 1
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0]])[:, None]
    output = part.model(pixel_values=tiles[:, None], aspect_ratio_ids=ids, aspect_ratio_mask=mask)
    expected = output.last_hidden_state.flatten(0, 2)
    torch.testing.assert_close(found.values, expected[:, 1:])
    torch.testing.assert_close(found.cls, expected[:, 0])
    assert found.grids == ((3, 3),) * 20
    (turned,) = part.encode(tiles[:1].flatten(0, 1), FeatureRequest(), tilings=[(2, 1)])
    assert not torch.allclose(turned.values, found.values[:4])
    (some,) = part.encode(tiles[2:4].flatten(0, 1), FeatureRequest(), tilings=tilings[2:4])
    assert torch.equal(some.values, found.values[8:16])


def test_a_crop_without_a_tiling_is_an_image_of_one_tile():
    part = open_gates(encoder(MLLAMA, layer=NORMED))
    (found,) = part.encode(pixels(3), FeatureRequest(cls=True))
    tiles = torch.zeros(3, 4, 3, 24, 24)
    tiles[:, 0] = pixels(3)
    (expected,) = part.encode(tiles.flatten(0, 1), FeatureRequest(cls=True), tilings=[(1, 1)] * 3)
    assert torch.equal(found.values, expected.values[::4])
    assert torch.equal(found.cls, expected.cls[::4])
    assert found.grids == ((3, 3),) * 3


@pytest.mark.parametrize(
    ("crops", "tilings", "message"),
    [
        (torch.zeros(7, 3, 24, 24), [(1, 1), (1, 2)], "2 tilings were passed for 7 crops; expected 4 each"),
        (torch.zeros(4, 3, 24, 24), [(3, 2)], r"expected rows and columns of crops among .*, got \[\(3, 2\)\]"),
        (torch.zeros(4, 3, 32, 32), [(1, 1)], r"expected crops of 24 x 24 pixels, got \(32, 32\)"),
    ],
)
def test_tilings_that_do_not_fit_are_refused(crops, tilings, message):
    with pytest.raises(ValueError, match=message):
        encoder(MLLAMA, layer=NORMED).encode(crops, FeatureRequest(), tilings=tilings)


def test_a_tower_that_gives_no_single_layers_says_so():
    with pytest.raises(ValueError, match="encoder layer -2: a mllama_vision_model gives its last_hidden_state alone"):
        encoder(MLLAMA)


def test_a_tower_of_one_size_refuses_others():
    with pytest.raises(ValueError, match="clip_vision_model encodes crops of one size; expected all of 24 x 24 pixels"):
        encoder(CLIP).encode(pixels(2), FeatureRequest(), [(24, 24), (24, 16)])


@pytest.mark.parametrize("name", ["dinov2", "registers", "internvit"])
def test_other_towers_say_what_cls_attends_to(name):
    part = encoder(OTHERS[name])
    part.model.set_attn_implementation("eager")
    (found,) = part.encode(pixels(2), FeatureRequest(cls_attention=True))
    attentions = part.model(pixel_values=pixels(2), output_attentions=True).attentions
    torch.testing.assert_close(found.cls_attention, attentions[1][:, :, 0, PREFIX.get(name, 0) :])


def test_a_model_whose_connector_asks_for_attention_gets_it():
    model = VisionLanguageModel.from_parts({"config": CLIP}, "prumerge", {"config": LLAMA})
    ids = torch.full((1, model.num_tokens(ImageLayout(((3, 3),)))), model.config.image_token_id)
    context = model.encode_images(ids, pixels(1))
    assert context.filled.any()


def test_several_layers_and_cls_attention():
    part = encoder(CLIP)
    part.model.set_attn_implementation("eager")
    low, high = part.encode(pixels(2), FeatureRequest(layers=(1, -1), cls_attention=True))
    states = part.model(pixel_values=pixels(2), output_hidden_states=True, output_attentions=True)
    torch.testing.assert_close(low.values, states.hidden_states[1][:, 1:])
    torch.testing.assert_close(high.values, states.hidden_states[-1][:, 1:])
    torch.testing.assert_close(low.cls_attention, states.attentions[0][:, :, 0, 1:])
    torch.testing.assert_close(high.cls_attention, states.attentions[2][:, :, 0, 1:])


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
@pytest.mark.parametrize("size", [(24, 40), (48, 48), (16, 24)])
def test_any_image_size(config, size):
    part = encoder(config)
    (found,) = part.encode(torch.randn(2, 3, *size), FeatureRequest())
    assert found.grids[0] == (size[0] // 8, size[1] // 8)
    assert found.values.shape[1] == size[0] * size[1] // 64


@pytest.mark.parametrize("config", [CLIP, SIGLIP], ids=["clip", "siglip"])
def test_features_do_not_depend_on_the_batch(config):
    part = encoder(config)
    images = pixels(37)
    (whole,) = part.encode(images, FeatureRequest())
    for start, count in [(0, 1), (5, 16), (3, 30), (36, 1)]:
        (some,) = part.encode(images[start : start + count], FeatureRequest())
        assert torch.equal(some.values, whole.values[start : start + count])


@pytest.mark.parametrize(("chunk_size", "calls"), [(16, [16, 16, 16]), (5, [5] * 8), (None, [37])])
def test_the_tower_always_sees_as_many_images(chunk_size, calls):
    """Sizes at which a machine's arithmetic depends on the batch are larger than these; so this is what is held."""
    part = encoder(CLIP)
    part.chunk_size = chunk_size
    seen = []
    part.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    (found,) = part.encode(pixels(37), FeatureRequest())
    assert seen == calls
    assert len(found.values) == 37


def test_cls_of_a_tower_without_one_is_refused():
    with pytest.raises(ValueError, match="siglip_vision_model, which has none"):
        encoder(SIGLIP).encode(pixels(1), FeatureRequest(cls=True))


@pytest.mark.parametrize(
    ("kwargs", "message"), [({"layer": 4}, "hidden states -4 to 3"), ({"image_size": 4}, "8 pixels")]
)
def test_what_the_tower_lacks_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        encoder(CLIP, **kwargs)


def test_an_unknown_tower_is_refused():
    with pytest.raises(ValueError, match="unknown encoder type 'vit'"):
        VisionEncoder(AutoModel.from_config(__import__("transformers").ViTConfig(hidden_size=32, num_hidden_layers=1)))


def test_the_tower_of_a_whole_clip_is_loaded(tmp_path):
    vision = CLIPVisionConfig(**{key: value for key, value in CLIP.items() if key != "model_type"})
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )
    whole = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
    whole.save_pretrained(tmp_path)
    part = VisionEncoder(build.vision(EncoderConfig(name=str(tmp_path)))).eval()
    (found,) = part.encode(pixels(2), FeatureRequest())
    states = whole.vision_model(pixel_values=pixels(2), output_hidden_states=True).hidden_states
    torch.testing.assert_close(found.values, states[-2][:, 1:])


def test_timm_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    config = AutoConfig.for_model("timm_wrapper", architecture="vit_that_nothing_else_asks_for")
    with pytest.raises(ValueError, match=r"a timm_wrapper needs timm, pip install 'vlmzoo\[timm\]'"):
        spec(config)
