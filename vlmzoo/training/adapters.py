"""Low-rank adapters in the LLM, by peft: put beside its frozen weights, written down, merged into them.

The LLM's modules keep their paths. A layer that is adapted holds its own weights as `base_layer` meanwhile.

Source: Hu et al., LoRA (2021), section 4.1; Dettmers et al., QLoRA (2023), section 3, for `quantize`.
"""

from __future__ import annotations

import importlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from vlmzoo.config import LoRAConfig, RunConfig, StageConfig
from vlmzoo.files import whole_folder
from vlmzoo.registry import matching

NAME = "default"  # peft's own for a model's only adapter
LAYER = ".lora_"
BASE = ".base_layer"


def held(stages: Iterable[StageConfig]) -> LoRAConfig | None:
    """The adapters that stand in the LLM behind these stages; None: there are none, or they are merged into it."""
    return next(reversed(_loras(stages)), None)


def merged(stages: Iterable[StageConfig]) -> bool:
    """Whether adapters have been merged into the LLM's own weights by the last of these stages."""
    return any(before is not None and after != before for before, after in pairwise(_loras(stages)))


def moves_base(stages: Sequence[StageConfig]) -> bool:
    """Whether the LLM's own weights differ from its source's in the last of these stages."""
    return None in _loras(stages) or merged(stages)


def _loras(stages: Iterable[StageConfig]) -> list[LoRAConfig | None]:
    """How each stage trains the LLM, of those that do."""
    return [stage.lora for stage in stages if "language" in stage.lr and stage.steps != 0 and stage.epochs != 0]


def linear_layers(language: PreTrainedModel) -> list[str]:
    """The names of all linear layers of an LLM but its head."""
    head = language.get_output_embeddings()
    return [name for name, layer in language.named_modules() if isinstance(layer, nn.Linear) and layer is not head]


def targets(language: PreTrainedModel, lora: LoRAConfig) -> list[str]:
    """The names of the layers to adapt. A pattern is one of whole names, or of their last parts as `q_proj` is.

    Raises:
        ValueError: a pattern that matches no linear layer, with the nearest name.
    """
    layers = linear_layers(language)
    if isinstance(lora.targets, str):
        return layers
    last = {name: name.rpartition(".")[2] for name in layers}
    found: set[str] = set()
    for pattern in lora.targets:
        found |= set(matching("lora.targets:", pattern, {*layers, *last.values()}))
    return [name for name in layers if name in found or last[name] in found]


def enter(language: PreTrainedModel, stage: StageConfig, earlier: Sequence[StageConfig], seed: int) -> None:
    """Puts the LLM into the form that a stage trains: with the adapters that it has already, merged, or with new ones.

    Args:
        earlier: the stages before it.
        seed: of new adapters' initialisation.

    Raises:
        ValueError: what `targets` raises.
    """
    if "language" not in stage.lr or stage.lora == held(earlier):
        return
    if held(earlier) is not None:
        merge(language, torch.float32 if stage.lora is None else language.dtype)
    if stage.lora is not None:
        _add(language, stage.lora, seed)


def _peft() -> Any:
    """peft, and with it bitsandbytes where that is installed, which reports at every call what nobody can change."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("peft")


def _add(language: PreTrainedModel, lora: LoRAConfig, seed: int) -> None:
    peft = _peft()
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets(language, lora),
        task_type="CAUSAL_LM",
    )
    model: Any = language
    if lora.quantize is not None:
        _quantize(language, lora.quantize)
        model.is_loaded_in_4bit, model.is_loaded_in_8bit = lora.quantize == "nf4", lora.quantize == "int8"  # peft asks
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, language, NAME)


def _quantize(language: PreTrainedModel, kind: str) -> None:
    """Holds the weights of all linear layers but the head in 4 or 8 bits, each layer's in its turn."""
    bnb: Any = importlib.import_module("bitsandbytes")  # of an extra, which type checkers need not find
    for name in linear_layers(language):
        plain: Any = language.get_submodule(name)
        shape: dict[str, Any] = {"bias": plain.bias is not None, "device": "meta"}
        if kind == "nf4":
            layer = bnb.nn.Linear4bit(
                plain.in_features, plain.out_features, quant_type="nf4", compute_dtype=plain.weight.dtype, **shape
            )
            layer.weight = bnb.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4", module=layer)
            layer.support_avx512bf16_for_cpu = False  # it would pack the weights for good in a forward in eval mode
        else:
            layer = bnb.nn.Linear8bitLt(
                plain.in_features, plain.out_features, has_fp16_weights=False, threshold=6.0, **shape
            )
            weight = plain.weight.data.cpu()  # what comes from elsewhere it would leave as it is
            layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
        layer.bias = plain.bias
        language.set_submodule(name, layer.to(plain.weight.device))  # where it is quantized


def merge(language: PreTrainedModel, dtype: torch.dtype) -> None:
    """Adds the adapters to the weights that they stand beside, in float32, and takes them out.

    Quantized weights become those that they stood for: the adapters are added to the weights they were trained with.

    Args:
        dtype: of the weights that result.
    """
    from peft.utils.integrations import dequantize_module_weight

    for name in linear_layers(language):
        if LAYER in name:
            continue
        base: Any = language.get_submodule(name)
        name = name.removesuffix(BASE)
        layer: Any = language.get_submodule(name)
        if layer is base and base.weight.is_floating_point():
            continue
        with torch.no_grad():
            weight = dequantize_module_weight(base).float()
            if layer is not base:
                weight = weight + layer.get_delta_weight(NAME)
        plain: Any = nn.Linear(base.in_features, base.out_features, bias=False, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight.to(dtype), requires_grad=False), base.bias
        language.set_submodule(name, plain)
    model: Any = language
    del model.peft_config
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        model.__dict__.pop(flag, None)


def flop_formulas() -> dict[Any, Callable[..., int]]:
    """What a FLOP counter must know of bitsandbytes' products, where it is in use; their gradients it sees."""
    if "bitsandbytes" not in sys.modules:
        return {}
    ops = torch.ops.bitsandbytes
    return {
        ops.gemm_4bit: lambda x, packed, shape, *_, **__: 2 * math.prod(x) * shape[0],
        ops.int8_linear_matmul: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0],
    }


def finish(language: PreTrainedModel, run: RunConfig, folder: Path) -> None:
    """Ends a run: the adapters in the LLM are written as peft reads them, and merged.

    They are not written where the LLM's own weights moved too: beside its source they would mean something else.
    """
    stages = list(run.stages.values())
    if held(stages) is None:
        return
    if not moves_base(stages):
        with whole_folder(folder) as place:
            save(language, run.llm.name, place)
    merge(language, language.dtype)


def save(language: PreTrainedModel, source: str | None, place: Path) -> None:
    """The adapters in peft's own format, for the LLM that `source` names."""
    model: Any = language
    weights = _peft().get_peft_model_state_dict(model, adapter_name=NAME, save_embedding_layers=False)
    save_file(
        {f"base_model.model.{name}": value.detach().cpu().contiguous() for name, value in weights.items()},
        place / "adapter_model.safetensors",
        {"format": "pt"},
    )
    config = model.peft_config[NAME]
    config.base_model_name_or_path, config.inference_mode = source, True
    config.target_modules = sorted(config.target_modules)  # a set has another order in every process
    config.save_pretrained(place)
