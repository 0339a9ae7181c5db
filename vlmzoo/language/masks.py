"""Attention masks of LLMs whose prompts are not read from left to right alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.masking_utils import create_masks_for_generate
from transformers.models.gemma3.modeling_gemma3 import create_masks_for_vision_model


def block_masks(
    config: PreTrainedConfig,
    embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: Any,
    position_ids: Tensor | None,
    blocks: Tensor,
) -> Any:
    """What a decoder takes as its mask, where tokens of a block see one another and all before it.

    Args:
        config: the decoder's.
        blocks: (batch, length), the block of each token, -1: none.

    Source: Gemma Team, Gemma 3 Technical Report (2025), section 2.2; Beyer et al., PaliGemma (2024), section 3.2.
    """
    make = create_masks_for_vision_model if config.model_type == "gemma3_text" else create_masks_for_generate
    return make(
        config=config,
        inputs_embeds=embeds,
        attention_mask=attention_mask,
        past_key_values=past_key_values,
        position_ids=position_ids,
        block_sequence_ids=blocks,
    )


def prefix_blocks(input_ids: Tensor, labels: Tensor | None, ignored: int) -> Tensor:
    """All before the first target is one block: (batch, length)."""
    if labels is None:
        return torch.zeros_like(input_ids)
    return torch.where((labels != ignored).cumsum(1) == 0, 0, -1)
