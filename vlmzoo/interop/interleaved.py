"""What transformers' models with cross-attention inside the LLM share: placeholders, masks, and a Llama underneath."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from vlmzoo.interop.architecture import UnsupportedError, expect
from vlmzoo.interop.weights import Rule, Tensors
from vlmzoo.model import VisionLanguageConfig

LLAMA = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "rope_parameters",
)
"""What a Llama and decoders made of its layers are configured by."""

BLOCK = [
    ("input_layernorm", "attention_norm"),
    ("cross_attn.q_proj", "attention.query"),
    ("cross_attn.k_proj", "attention.key"),
    ("cross_attn.v_proj", "attention.value"),
    ("cross_attn.o_proj", "attention.out"),
    ("post_attention_layernorm", "feed_forward_norm"),
    ("mlp.gate_proj", "feed_forward.gate"),
    ("mlp.up_proj", "feed_forward.up"),
    ("mlp.down_proj", "feed_forward.down"),
]
"""What a cross-attention layer of theirs and a block of ours call their parts."""


def plain_llama(config: Any, **changed: Any) -> LlamaConfig:
    """The Llama that a decoder is without its cross-attention."""
    expect(config.hidden_act, "silu", "hidden_act")
    expect(config.dropout, 0, "dropout")
    return LlamaConfig(**{name: getattr(config, name) for name in LLAMA if hasattr(config, name)} | changed)


def of_llama(config: VisionLanguageConfig) -> dict[str, Any]:
    """What such a decoder is configured by, of our LLM; raises `UnsupportedError` where that is not a plain Llama."""
    text = config.text_config
    expect(text.model_type, "llama", "the LLM's type")
    expect(text.hidden_act, "silu", "the LLM's hidden_act")
    expect(text.attention_bias or text.mlp_bias, False, "the LLM's bias")
    expect(text.head_dim, text.hidden_size // text.num_attention_heads, "the LLM's head_dim")
    expect(text.tie_word_embeddings, False, "tie_word_embeddings")
    return {name: getattr(text, name) for name in LLAMA}


def marked_embedding(theirs: Mapping[str, int], image_token_id: int, rows: int) -> Rule:
    """Embeddings of which one is the image token's, which in ours is the connector's marker.

    Args:
        theirs: the matrices, one below the other, and how many rows each has.
        rows: how many of these our LLM has; behind them theirs holds nothing but the image token's.
    """

    def to_ours(tensors: Tensors) -> Tensors:
        whole = torch.cat(tensors)
        return whole[:rows], whole[image_token_id].clone()

    def to_theirs(tensors: Tensors) -> Tensors:
        matrix, marker = tensors
        whole = matrix.new_zeros(sum(theirs.values()), matrix.shape[1])
        whole[:rows], whole[image_token_id] = matrix, marker
        return whole.split(list(theirs.values()))

    return Rule(tuple(theirs), ("language.model.embed_tokens.weight", "connector.marker"), to_ours, to_theirs)


def has_row(image_token_id: int, rows: int) -> None:
    """Raises `UnsupportedError` where the image's token has no row in their embedding."""
    if not 0 <= image_token_id < rows:
        raise UnsupportedError(f"image_token_id is {image_token_id}, expected one from 0 to {rows - 1}")


def real_images(input_ids: Tensor, image_token_id: int, most: int) -> Tensor:
    """(batch, most), True where a sample has an image: what else is passed fills the batch up.

    Raises:
        ValueError: a sample has more placeholders than that.
    """
    counts = (input_ids == image_token_id).sum(1, keepdim=True)
    if (counts > most).any():
        raise ValueError(f"a sample has {int(counts.max())} image tokens, but pixel_values hold {most} images a sample")
    return torch.arange(most, device=counts.device) < counts


def last_image(input_ids: Tensor, image_token_id: int, most: int) -> Tensor:
    """(batch, length, most), True for the last image at or before each token, which is what our layers see."""
    last = (input_ids == image_token_id).cumsum(1) - 1
    return last[..., None] == torch.arange(most, device=last.device)


def check_seen(mask: Tensor, expected: Tensor, name: str) -> None:
    """Refuses a mask of what tokens see, (batch, length, ...), that is another than our layers'.

    Raises:
        ValueError: it is.
    """
    if mask.shape != expected.shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}, expected {tuple(expected.shape)}")
    if other := (mask.bool() != expected).flatten(2).any(-1).nonzero().tolist():
        sample, token = other[0]
        raise ValueError(
            f"{name} lets token {token} of sample {sample} see something else than the last image at or before it, "
            "which is all that our layers can show it"
        )
