"""LLaVA's own checkpoints against transformers' Llava with the same weights."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPVisionModel, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from tests.checkpoints import write_models
from tests.connectors.parts import distance, rescale
from vlmzoo.interop import load

TOLERANCE = 1e-4
Weights = dict[str, torch.Tensor]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """An encoder and an LLM as LLaVA's checkpoints name them."""
    return write_models(tmp_path)


@pytest.fixture
def theirs(parts: Path) -> LlavaForConditionalGeneration:
    vision, language = (
        CLIPVisionModel.from_pretrained(parts / "clip"),
        LlamaForCausalLM.from_pretrained(parts / "llama"),
    )
    config = LlavaConfig(vision_config=vision.config, text_config=language.config, image_token_id=18)
    model = LlavaForConditionalGeneration(config).eval()
    rescale(model)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    return model


def config(parts: Path, **more: Any) -> dict[str, Any]:
    """What LLaVA writes beside its weights: the LLM's configuration and its own keys."""
    own = json.loads((parts / "llama" / "config.json").read_text())
    ours = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_vision_tower": str(parts / "clip"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_hidden_size": 32,
        "image_aspect_ratio": "pad",
        "tune_mm_mlp_adapter": False,
        "tokenizer_padding_side": "right",
    }
    return {**own, **ours, **more}


def projector(theirs: LlavaForConditionalGeneration, prefix: str) -> Weights:
    first, second = theirs.model.multi_modal_projector.linear_1, theirs.model.multi_modal_projector.linear_2
    named = {"0.weight": first.weight, "0.bias": first.bias, "2.weight": second.weight, "2.bias": second.bias}
    return {f"{prefix}mm_projector.{name}": value.detach().clone() for name, value in named.items()}


def language(theirs: LlavaForConditionalGeneration) -> Weights:
    found = {f"model.{name}": value for name, value in theirs.model.language_model.state_dict().items()}
    return {**found, "lm_head.weight": theirs.lm_head.weight.detach()}


def write_llm(theirs: LlavaForConditionalGeneration, parts: Path) -> None:
    llm = LlamaForCausalLM.from_pretrained(parts / "llama")
    llm.load_state_dict(language(theirs))
    llm.save_pretrained(parts / "llama")


def write(folder: Path, values: dict[str, Any], **files: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    for name, weights in files.items():
        torch.save(weights, folder / f"{name}.bin")
    return folder


def difference(ours: Any, theirs: LlavaForConditionalGeneration) -> float:
    pixels = torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(0))
    image = ours.config.image_token_id
    ids = torch.tensor([[1, *[image] * 9, 5, 6], [1, 7, *[image] * 9, 8]])
    their_ids = ids.masked_fill(ids == image, theirs.config.image_token_id)
    with torch.no_grad():
        found = ours(input_ids=ids, pixel_values=pixels).logits
        return distance(found, theirs(input_ids=their_ids, pixel_values=pixels).logits)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_whole_checkpoint(parts: Path, theirs: LlavaForConditionalGeneration, shards: int) -> None:
    tower = {f"model.vision_tower.vision_tower.{name}": torch.zeros(1) for name in ("a", "b")}
    weights = {**language(theirs), **projector(theirs, "model."), **tower}
    folder = write(parts / "llava", config(parts))
    for index in range(shards):
        some = {name: weights[name] for name in list(weights)[index::shards]}
        torch.save(some, folder / f"pytorch_model-{index + 1:05}-of-{shards:05}.bin")
    for file in (parts / "llama").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert difference(load(folder), theirs) <= TOLERANCE


def test_a_projector_alone(parts: Path, theirs: LlavaForConditionalGeneration) -> None:
    write_llm(theirs, parts)
    folder = write(parts / "projector", config(parts), mm_projector=projector(theirs, "model."))
    assert difference(load(folder, base=str(parts / "llama")), theirs) <= TOLERANCE
    with pytest.raises(ValueError, match=r"projector: holds mm_projector\.bin and no LLM: pass .* `base`"):
        load(folder)


def test_lora(parts: Path, theirs: LlavaForConditionalGeneration) -> None:
    write_llm(theirs, parts)
    adapter, generator = {}, torch.Generator().manual_seed(3)
    for layer in range(3):
        attention = theirs.model.language_model.layers[layer].self_attn
        for name in ("q_proj", "v_proj"):
            weight = getattr(attention, name).weight
            down = torch.randn(4, weight.shape[1], generator=generator) / 7
            up = torch.randn(weight.shape[0], 4, generator=generator)
            weight.data += 8 / 4 * up @ down
            place = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            adapter |= {f"{place}.lora_A.weight": down, f"{place}.lora_B.weight": up}
    rest = projector(theirs, "base_model.model.model.")
    folder = write(parts / "lora", config(parts), adapter_model=adapter, non_lora_trainables=rest)
    assert difference(load(folder, base=str(parts / "llama")), theirs) > TOLERANCE, "an adapter without settings"
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    assert difference(load(folder, base=str(parts / "llama")), theirs) <= TOLERANCE
    (folder / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "use_rslora": True}))
    with pytest.raises(ValueError, match="use_rslora True, expected none"):
        load(folder, base=str(parts / "llama"))


def test_what_is_wrong_is_named(parts: Path, theirs: LlavaForConditionalGeneration) -> None:
    good = projector(theirs, "model.")
    base = str(parts / "llama")
    name = "model.mm_projector.0.weight"
    for change, message in (
        ({name: None}, r"1 weights are missing, inner\.layers\.0\.weight first"),
        ({"model.mm_projector.4.bias": torch.ones(2)}, r"1 weights have no place, inner\.layers\.4\.bias first"),
        ({name: torch.ones(2, 2)}, r"1 weights do not fit, inner\.layers\.0\.weight first"),
    ):
        weights = {key: value for key, value in {**good, **change}.items() if value is not None}
        with pytest.raises(ValueError, match=f"bad: {message}$"):
            load(write(parts / "bad", config(parts), mm_projector=weights), base=base)
    for values, message in (
        ({"mm_projector_type": "resampler"}, "mm_projector_type is 'resampler', expected 'linear' or 'mlpNx_gelu'"),
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch', expected 'patch'"),
    ):
        with pytest.raises(ValueError, match=f"bad: {message}$"):
            load(write(parts / "bad", config(parts, **values), mm_projector=good), base=base)
    with pytest.raises(ValueError, match="empty: holds neither weights nor one of"):
        load(write(parts / "empty", config(parts)))


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.write_text, (Path("harm"), "done"))


def test_a_pickle_that_runs_code_is_refused(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write(parts / "harmful", config(parts))
    (folder / "mm_projector.bin").write_bytes(pickle.dumps({"model.mm_projector.0.weight": Harmful()}, protocol=2))
    with pytest.raises(ValueError, match=r"mm_projector\.bin: cannot be read as tensors alone"):
        load(folder, base=str(parts / "llama"))
    assert not Path("harm").exists()
