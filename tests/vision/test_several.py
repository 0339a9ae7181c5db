"""Several encoders as one: what each gives for the image at its own size, side by side on the first one's grid."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPImageProcessorPil, SiglipImageProcessorPil

from tests.checkpoints import run_values, write_data, write_models
from tests.tiny import CLIP, SIGLIP, pixels
from vlmzoo import build
from vlmzoo.config import EncoderConfig, RunConfig, parse
from vlmzoo.connector import NORMED, FeatureRequest
from vlmzoo.sweeps.checkpoint import evaluate_checkpoint
from vlmzoo.sweeps.trial import run_trial
from vlmzoo.vision.encoder import VisionEncoder
from vlmzoo.vision.several import SeveralTowers

LARGER = {**SIGLIP, "image_size": 40, "num_hidden_layers": 4, "hidden_size": 20}
PROCESSORS = [CLIPImageProcessorPil(), SiglipImageProcessorPil()]


def towers(*configs):
    return [build.vision(EncoderConfig(config=config), seed=seed) for seed, config in enumerate(configs)]


def joined(*configs, processors=PROCESSORS):
    parts = towers(*configs)
    return VisionEncoder(SeveralTowers.of(copy.deepcopy(parts), processors)).eval(), parts


def renormalised(images, first, second):
    """As the second processor would have normalised them."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (first.image_mean, first.image_std))
    plain = images * std + mean
    mean, std = (torch.tensor(value)[:, None, None] for value in (second.image_mean, second.image_std))
    return (plain - mean) / std


@pytest.mark.parametrize("layer", [-2, -1, NORMED])
def test_features_stand_side_by_side(layer):
    part, (clip, siglip) = joined(CLIP, SIGLIP)
    (found,) = part.encode(pixels(3), FeatureRequest((layer,)))
    (first,) = VisionEncoder(clip).eval().encode(pixels(3), FeatureRequest((layer,)))
    (second,) = VisionEncoder(siglip).eval().encode(renormalised(pixels(3), *PROCESSORS), FeatureRequest((layer,)))
    torch.testing.assert_close(found.values[..., :32], first.values)
    torch.testing.assert_close(found.values[..., 32:], second.values)
    assert found.grids == ((3, 3),) * 3
    assert part.spec.hidden_size == 64
    assert part.spec.widths == (32, 32)
    assert not part.spec.has_cls


def test_another_size_and_grid():
    part, (_, larger) = joined(CLIP, LARGER, processors=PROCESSORS[:1] * 2)
    (found,) = part.encode(pixels(2), FeatureRequest((-2,)))
    resized = F.interpolate(pixels(2), (40, 40), mode="bicubic", antialias=True)
    (second,) = VisionEncoder(larger).eval().encode(resized, FeatureRequest((-2,)))
    assert second.grids[0] == (5, 5)
    expected = F.interpolate(second.values.mT.unflatten(2, (5, 5)), (3, 3), mode="bilinear", antialias=True)
    torch.testing.assert_close(found.values[..., 32:], expected.flatten(2).mT)
    assert part.spec.num_layers == 3, "layers that both have, counted from the last"
    (counted,) = part.encode(pixels(2), FeatureRequest((2,)))
    assert torch.equal(counted.values, found.values)


def test_cls_of_those_that_all_have_one():
    part, (first, second) = joined(CLIP, CLIP, processors=PROCESSORS[:1] * 2)
    assert part.spec.has_cls
    (found,) = part.encode(pixels(2), FeatureRequest(cls=True))
    expected = [VisionEncoder(one).eval().encode(pixels(2), FeatureRequest(cls=True))[0].cls for one in (first, second)]
    torch.testing.assert_close(found.cls, torch.cat(expected, -1))
    with pytest.raises(ValueError, match="several encoders have no CLS attention in common"):
        part.encode(pixels(2), FeatureRequest(cls_attention=True))


def test_one_that_encodes_whole_images_is_refused():
    from tests.vision.test_encoder import MLLAMA

    with pytest.raises(ValueError, match="a mllama_vision_model cannot stand beside others"):
        joined(CLIP, MLLAMA)


def test_a_run_with_two_encoders_by_name(tmp_path: Path) -> None:
    folder = write_models(tmp_path)
    write_data(folder)
    values = run_values(folder, "linear", "clip", "llama")
    values["encoder"] = f"{folder / 'clip'}+{folder / 'siglip'}"
    values["stages"]["finetune"]["lr"]["vision"] = 1e-3
    result = run_trial(parse(RunConfig, values), tmp_path / "out", tmp_path / "features")
    assert result["trainable_parameters"] == 64 * 48 + 48
    assert evaluate_checkpoint(tmp_path / "out", ["colors"]) == result["evaluation"]
    values["connector"] = {"name": "sva", "options": {"side": 3, "depth": 1, "hidden_size": 16, "num_heads": 2}}
    assert run_trial(parse(RunConfig, values), tmp_path / "sva")["visual_tokens"] == 9
    values["encoder"] = f"{folder / 'clip'}+{folder / 'nothing'}"
    with pytest.raises(ValueError, match=r"no directory .*nothing"):
        run_trial(parse(RunConfig, values), tmp_path / "other")
