"""timm's vision transformers as encoders, against timm itself."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import TimmWrapperConfig

from tests.connectors.parts import distance, rescale
from tests.timm_parts import NEEDS_TIMM
from vlmzoo import build
from vlmzoo.config import EncoderConfig
from vlmzoo.connector import NORMED, FeatureRequest
from vlmzoo.data.images import to_pixel_values
from vlmzoo.vision.encoder import VisionEncoder
from vlmzoo.vision.towers import spec

pytestmark = NEEDS_TIMM
SIZES = {"img_size": 24, "patch_size": 6, "embed_dim": 24, "depth": 3, "num_heads": 2}
MODELS = {  # and how many hidden states stand before the patches
    "vit_base_patch16_224": 1,
    "vit_base_patch16_siglip_224": 0,
    "vit_base_patch14_reg4_dinov2": 5,
    "eva02_base_patch14_224": 1,
    "vit_pe_core_large_patch14_336": 1,
}


def tower(architecture: str, **more: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build.new_tower(TimmWrapperConfig(architecture=architecture, model_args={**SIZES, **more})).eval()
    rescale(model)
    return model


@pytest.mark.parametrize("architecture", MODELS)
def test_hidden_states_are_those_of_timm(architecture: str) -> None:
    model, prefix = tower(architecture), MODELS[architecture]
    encoder = VisionEncoder(model)
    pixels = torch.randn(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        last, states = model.timm_model.forward_intermediates(pixels, output_fmt="NLC", return_prefix_tokens=True)
        found = encoder.encode(pixels, FeatureRequest((-2, -1, NORMED), cls=prefix > 0))
    for features, state in zip(found, states[-2:], strict=False):
        patches, before = state if prefix else (state, None)
        assert distance(features.values, patches) < 1e-5
        if before is not None:
            assert features.cls is not None
            assert distance(features.cls, before[:, 0]) < 1e-5
    assert distance(found[2].values, last[:, prefix:]) < 1e-5
    assert found[0].grids == ((4, 4),) * 3
    assert distance(found[0].values, found[1].values) > 0.1


def test_threads_do_not_see_one_another() -> None:
    encoder = VisionEncoder(tower("vit_base_patch16_224"))
    images = [torch.randn(1, 3, 24, 24, generator=torch.Generator().manual_seed(seed)) for seed in range(40)]

    def features(pixels: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return encoder.encode(pixels, FeatureRequest((-2,)))[0].values

    expected = [features(pixels) for pixels in images]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(features, images), expected))


def test_what_connectors_may_know_is_read_from_the_architecture() -> None:
    found = spec(TimmWrapperConfig(architecture="vit_pe_lang_large_patch14_448"))
    assert (found.hidden_size, found.num_layers, found.num_heads, found.patch_size) == (1024, 23, 16, 14)
    assert found.has_cls
    assert not spec(TimmWrapperConfig(architecture="vit_pe_lang_gigantic_patch14_448")).has_cls


def test_read_as_timm_publishes_it(tmp_path: Path) -> None:
    import timm
    from timm.data import create_transform, resolve_data_config

    theirs = timm.create_model("vit_base_patch16_siglip_224", num_classes=0, **SIZES)
    published = {
        "architecture": "vit_base_patch16_siglip_224",
        "num_classes": 0,
        "model_args": SIZES,
        "pretrained_cfg": {**theirs.pretrained_cfg, "crop_pct": 1.0},
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    ours = build.vision(EncoderConfig(name=str(tmp_path)))
    found = ours.get_submodule("timm_model").state_dict()
    assert all(torch.equal(found[name], value) for name, value in theirs.state_dict().items())

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    expected = create_transform(**resolve_data_config(published["pretrained_cfg"]), is_training=False)(image)
    pixels = to_pixel_values(image, build.image_processor(EncoderConfig(name=str(tmp_path))), "square", 224)
    assert distance(pixels, expected) < 1e-5


@pytest.mark.parametrize(
    ("architecture", "says"), [("resnet18", "not a vision transformer"), ("vit_of_mine", "cannot build 'vit_of_mine'")]
)
def test_what_is_no_vision_transformer_is_refused(architecture: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        spec(TimmWrapperConfig(architecture=architecture))


def test_other_sizes_and_attention_are_refused() -> None:
    encoder = VisionEncoder(tower("vit_base_patch16_224"))
    with pytest.raises(ValueError, match="expected crops of 24 x 24 pixels"):
        encoder.encode(torch.zeros(1, 3, 30, 30), FeatureRequest((-2,)))
    with pytest.raises(ValueError, match="how much its CLS attended"):
        encoder.encode(torch.zeros(1, 3, 24, 24), FeatureRequest((-2,), cls_attention=True))
