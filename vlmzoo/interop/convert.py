"""transformers' image-text models as ours, and ours as theirs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel

from vlmzoo import build
from vlmzoo.connector import connectors
from vlmzoo.interop import blip, idefics, idefics3, internvl, janus, llava, mistral3, mllama
from vlmzoo.interop.architecture import Architecture, UnsupportedError
from vlmzoo.interop.weights import to_ours, to_theirs
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.registry import unknown

ARCHITECTURES: dict[str, Architecture] = {
    architecture.model: architecture
    for architecture in (
        llava.LLAVA,
        llava.VIP_LLAVA,
        blip.BLIP_2,
        blip.INSTRUCT_BLIP,
        idefics.IDEFICS,
        idefics3.IDEFICS_2,
        idefics3.IDEFICS_3,
        idefics3.SMOLVLM,
        internvl.INTERNVL,
        janus.JANUS,
        mistral3.MISTRAL_3,
        mllama.MLLAMA,
    )
}
"""By the names of transformers' classes."""


class ImportedConfig(VisionLanguageConfig):
    """A configuration that remembers the class whose keywords its model takes."""

    model_type = "vlmzoo_imported"

    def __init__(self, source: str = "LlavaForConditionalGeneration", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source = source


class ImportedModel(VisionLanguageModel):
    """A model of our parts that takes the keywords of the one that it came from."""

    config: ImportedConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = ImportedConfig

    def take_images(self, kwargs: dict[str, Any], pixel_values: Tensor | None, input_ids: Tensor) -> dict[str, Any]:
        kwargs["input_ids"] = input_ids
        if pixel_values is not None:
            kwargs["pixel_values"] = pixel_values
        ARCHITECTURES[self.config.source].translate(kwargs, self)
        del kwargs["input_ids"]
        return super().take_images(kwargs, kwargs.pop("pixel_values", None), input_ids)


def from_hf(model: PreTrainedModel) -> ImportedModel:
    """A model of transformers with our connector in it, and the same answers.

    Weights that both have are shared, not copied.

    Raises:
        ValueError: a class that is not known, or a setting of it that our connector does not have.
    """
    architecture = _architecture(type(model).__name__)
    try:
        values = architecture.config(model.config)
    except UnsupportedError as error:
        raise ValueError(f"{architecture.model}: {error}") from None
    output, input_embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = output is not None and output.weight is input_embeddings.weight
    build.load_connectors()
    config = ImportedConfig(
        **{
            "source": architecture.model,
            "vision_config": model.config.vision_config,
            "image_token_id": getattr(model.config, "image_token_id", None),
            **values,
            "text_config": _with_ties(values.get("text_config", model.config.get_text_config()), tied),
            "connector": architecture.connector,
            "connector_options": connectors.resolve(architecture.connector, values.get("connector_options", {})),
        },
    )
    weights = dict(model.named_parameters()) | dict(_persistent_buffers(model))
    try:
        renamed = to_ours(weights, architecture.rules(model.config))
        imported = _filled(ImportedModel, config, renamed, model.dtype)
    except ValueError as error:
        raise ValueError(f"{architecture.model}: {error}") from None
    imported.generation_config = copy.deepcopy(model.generation_config)
    return imported.train(model.training)


def to_hf(model: VisionLanguageModel) -> PreTrainedModel:
    """A stock model of transformers with the same weights and answers.

    Raises:
        ValueError: no class of transformers has these parts; the message says what each candidate lacks.
    """
    config = model.config
    candidates = [item for item in ARCHITECTURES.values() if item.connector == config.connector and item.back]
    reasons = []
    for architecture in candidates:
        assert architecture.back is not None
        theirs: Any = getattr(transformers, architecture.model)
        try:
            values = {
                "vision_config": config.vision_config.to_dict(),
                "text_config": config.text_config.to_dict(),
                "image_token_id": config.image_token_id,
                "tie_word_embeddings": config.text_config.tie_word_embeddings,
                **architecture.back(config),
            }
            weights = dict(model.named_parameters()) | dict(_persistent_buffers(model))
            their_config = theirs.config_class(**{key: value for key, value in values.items() if value is not None})
            exported = _filled(theirs, their_config, to_theirs(weights, architecture.rules(their_config)), model.dtype)
        except UnsupportedError as error:
            reasons.append(f"{architecture.model}: {error}")
            continue
        exported.generation_config = copy.deepcopy(model.generation_config)
        return exported.train(model.training)
    if not candidates:
        known = sorted({item.connector for item in ARCHITECTURES.values() if item.back})
        reasons = [f"no class of transformers has it; those with one are {', '.join(known)}"]
    raise ValueError(f"connector {config.connector!r} cannot be exported: {'; '.join(reasons)}")


def load(path: str | Path, *, dtype: torch.dtype | None = None) -> VisionLanguageModel:
    """A model from a checkpoint, ours or transformers', by directory or hub id. Weights come from safetensors alone.

    Raises:
        ValueError: nothing there, an architecture that is not known, or weights missing, left over or misshapen.
    """
    source = str(path)
    config = build.read(AutoConfig.from_pretrained, source, "model")
    if isinstance(config, VisionLanguageConfig):
        kind: Any = ImportedModel if isinstance(config, ImportedConfig) else VisionLanguageModel
        model, found = _pretrained(kind, source, dtype)
    else:
        named = list(getattr(config, "architectures", None) or [])
        _architecture(named[0] if named else config.model_type)
        model, found = _pretrained(AutoModelForImageTextToText, source, dtype)
    _refuse_faults(found, f"model {source}: ")
    return model if isinstance(model, VisionLanguageModel) else from_hf(model)


def _architecture(name: str) -> Architecture:
    if name not in ARCHITECTURES:
        raise unknown("model class", name, ARCHITECTURES)
    return ARCHITECTURES[name]


def _pretrained(kind: Any, source: str, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Any]]:
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    with build.quiet_transformers():
        return build.read(kind.from_pretrained, source, "model", dtype=dtype or "auto", **options)


def _filled(kind: Any, config: PreTrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> Any:
    """A model of this class with these weights.

    Raises:
        ValueError: weights are missing, left over or misshapen.
    """
    with build.quiet_transformers():
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict={name: value.detach() for name, value in weights.items()},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    _refuse_faults(found)
    return model


def _refuse_faults(found: dict[str, Any], where: str = "") -> None:
    for kind, said in (
        ("missing_keys", "are missing"),
        ("unexpected_keys", "have no place"),
        ("mismatched_keys", "do not fit its configuration"),
    ):
        if names := sorted(item if isinstance(item, str) else item[0] for item in found[kind]):
            raise ValueError(f"{where}{len(names)} weights {said}, {names[0]} first")


def _with_ties(config: Any, tied: bool) -> Any:
    config = copy.deepcopy(config)
    config.tie_word_embeddings = tied
    return config


def _persistent_buffers(model: PreTrainedModel) -> Sequence[tuple[str, Tensor]]:
    kept = set(model.state_dict())
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


AutoConfig.register("vlmzoo_imported", ImportedConfig)
AutoModelForImageTextToText.register(ImportedConfig, ImportedModel)
