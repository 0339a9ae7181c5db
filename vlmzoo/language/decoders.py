"""Causal LMs for the decoders that transformers has inside image-text models alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLTextConfig,
    Qwen2VLTextConfig,
    Qwen3VLTextConfig,
)
from transformers.modeling_outputs import CausalLMOutputWithPast


class DecoderWithHead(PreTrainedModel, GenerationMixin):
    """A decoder of transformers and a head over its vocabulary, under the names that its other causal LMs have."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.model = AutoModel.from_config(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (batch, length, vocab_size), or those of the places to keep.

        Args:
            position_ids: (batch, length), or (3, batch, length): time, row and column.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss: torch.FloatTensor | None = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
        )


class Qwen2VLForCausalLM(DecoderWithHead):
    config_class = Qwen2VLTextConfig


class Qwen2_5_VLForCausalLM(DecoderWithHead):  # noqa: N801
    config_class = Qwen2_5_VLTextConfig


class Qwen3VLForCausalLM(DecoderWithHead):
    config_class = Qwen3VLTextConfig


for kind in (Qwen2VLForCausalLM, Qwen2_5_VLForCausalLM, Qwen3VLForCausalLM):
    # without `exist_ok` transformers says nothing and registers nothing, the configurations being its own
    AutoModelForCausalLM.register(kind.config_class, kind, exist_ok=True)
