"""timm's vision transformers as encoders."""

from __future__ import annotations

import importlib
import json
import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.timm_wrapper.modeling_timm_wrapper import TimmWrapperModel

_HOOKED = threading.Lock()
"""Held while hooks are on a tower: another thread's forward would enter its states too."""


class TimmTower(TimmWrapperModel):
    """transformers' wrapper of a timm model, with hidden states of the shape that its other vision models give."""

    def forward(
        self,
        pixel_values: Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> BaseModelOutput:
        """Of pixels (crops, 3, height, width) the last hidden state (crops, prefix + patches, dim) behind the norm.

        Raises:
            ValueError: attention is asked for, which timm does not give.
        """
        if output_attentions:
            raise ValueError("a timm_wrapper does not say how much its CLS attended; name another encoder for this")
        blocks: Any = self.timm_model.blocks
        states: list[Tensor] = []

        def enter(block: nn.Module, args: tuple[Any, ...]) -> None:
            states.append(args[0])

        def leave(block: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            states.append(output)

        with _HOOKED:
            hooks = [block.register_forward_pre_hook(enter) for block in blocks]
            hooks.append(blocks[-1].register_forward_hook(leave))
            try:
                last = self.timm_model.forward_features(pixel_values)
            finally:
                for hook in hooks:
                    hook.remove()
        return BaseModelOutput(last_hidden_state=last, hidden_states=tuple(states) if output_hidden_states else None)


def known(config: PreTrainedConfig) -> PreTrainedConfig:
    """What a timm configuration leaves to the architecture that it names, under the names that CLIP has.

    Raises:
        ValueError: timm is not there, it has no such architecture, or one without patches and blocks.
    """
    given = json.dumps(config.model_args or {}, sort_keys=True)
    return _known(config.architecture, given)


@cache
def _known(architecture: str, given: str) -> PreTrainedConfig:
    try:
        timm: Any = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # torchvision beside a torch that it was not built for
        raise ValueError(f"encoder: a timm_wrapper needs timm, pip install 'vlmzoo[timm]' ({error})") from error
    try:
        model: Any = timm.create_model(architecture, num_classes=0, device=torch.device("meta"), **json.loads(given))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"encoder: timm cannot build {architecture!r} with {given} ({error})") from error
    try:
        block = model.blocks[0]
        found = {
            "hidden_size": model.embed_dim,
            "num_hidden_layers": len(model.blocks),
            "num_attention_heads": block.attn.num_heads,
            "layer_norm_eps": block.norm1.eps,
            "patch_size": model.patch_embed.patch_size,
            "image_size": model.patch_embed.img_size,
            "num_prefix_tokens": model.num_prefix_tokens,
        }
    except (AttributeError, TypeError) as error:
        raise ValueError(f"encoder: timm's {architecture!r} is not a vision transformer ({error})") from error
    return PreTrainedConfig(**found)
