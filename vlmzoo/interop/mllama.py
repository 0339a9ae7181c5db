"""Mllama: Llama 3.2 Vision."""

from __future__ import annotations

from typing import Any

import torch

from vlmzoo.connector import NORMED
from vlmzoo.interop.architecture import Architecture, UnsupportedError, expect
from vlmzoo.interop.interleaved import (
    BLOCK,
    check_seen,
    has_row,
    last_image,
    marked_embedding,
    of_llama,
    plain_llama,
    real_images,
)
from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel

QK_NORM = [("cross_attn.q_norm", "attention.query_norm"), ("cross_attn.k_norm", "attention.key_norm")]
EXTRA_TOKENS = 8  # rows of their embedding behind the vocabulary: the image token's, and some that no token has


def _places(text: Any) -> dict[int, int]:
    """Which of the plain layers each cross-attention layer stands before, by its index among all layers."""
    cross = sorted(set(text.cross_attention_layers))
    places = {layer: layer - number for number, layer in enumerate(cross)}
    if len(set(places.values())) < len(places) or not set(cross) <= set(range(text.num_hidden_layers)):
        raise UnsupportedError(
            f"cross_attention_layers are {cross}, expected single ones among {text.num_hidden_layers} layers"
        )
    return places


def _config(config: Any) -> dict[str, Any]:
    text, vision = config.text_config, config.vision_config
    width = vision.hidden_size * (1 + len(vision.intermediate_layers_indices))
    expect(vision.vision_output_dim, width, "vision_config.vision_output_dim")
    has_row(config.image_token_id, text.vocab_size + EXTRA_TOKENS)
    places = _places(text)
    return {
        "text_config": plain_llama(text, num_hidden_layers=text.num_hidden_layers - len(places)),
        "vision_layer": NORMED,
        "connector_options": {
            "before": list(places.values()),
            "num_kv_heads": text.num_key_value_heads,
            "layers": [NORMED],
            "without_image": "everything",
        },
    }


def _rules(config: Any) -> list[Rule]:
    text, llm = config.text_config, "model.language_model"
    places = _places(text)
    plain = [layer for layer in range(text.num_hidden_layers) if layer not in places]
    blocks = {f"{llm}.layers.{layer}": f"connector.blocks.{place}" for layer, place in places.items()}
    embedding = {f"{llm}.embed_tokens.weight": text.vocab_size + EXTRA_TOKENS}
    return [
        same("model.vision_model.**", "vision.model.**"),
        same("model.multi_modal_projector.**", "connector.project.**"),
        marked_embedding(embedding, config.image_token_id, rows=text.vocab_size),
        *(same(f"{llm}.layers.{a}.**", f"language.model.layers.{b}.**") for b, a in enumerate(plain)),
        same(f"{llm}.norm.**", "language.model.norm.**"),
        same("lm_head.**", "language.lm_head.**"),
        *(same(f"{a}.{theirs}.**", f"{b}.{ours}.**") for a, b in blocks.items() for theirs, ours in BLOCK + QK_NORM),
        *(same(f"{a}.cross_attn_attn_gate", f"{b}.attention_gate") for a, b in blocks.items()),
        *(same(f"{a}.cross_attn_mlp_gate", f"{b}.feed_forward_gate") for a, b in blocks.items()),
    ]


def _tiles(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Tiles (batch, images, tiles, 3, height, width) one behind the other, where the masks are those of our layers.

    Raises:
        ValueError: they are others, or one of them is missing.
    """
    names = ("aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask")
    pixels, (ids, shown, seen) = inputs.pop("pixel_values", None), (inputs.pop(name, None) for name in names)
    if pixels is None:
        return
    if ids is None or shown is None or seen is None:
        raise ValueError(f"pixel_values were passed without {' or '.join(names)}, which Mllama reads")
    config = model.config
    text, image, (most, tiles) = inputs["input_ids"], config.image_token_id, pixels.shape[1:3]
    real = real_images(text, image, most)
    tilings = torch.tensor([(0, 0), *config.vision_config.supported_aspect_ratios], device=ids.device)[ids]
    filled = torch.arange(tiles, device=ids.device) < tilings.prod(-1, keepdim=True)
    if not torch.equal(shown.bool()[real], filled[real]):
        raise ValueError("aspect_ratio_mask shows other tiles than aspect_ratio_ids say")
    check_seen(seen, last_image(text, image, most)[..., None] & filled[:, None], "cross_attention_mask")
    if real.any():
        inputs["pixel_values"] = pixels[real].flatten(0, 1)
        inputs["num_crops"] = torch.full((int(real.sum()),), tiles)
        inputs["tilings"] = tilings[real]


def _back(config: VisionLanguageConfig) -> dict[str, Any]:
    text, options = config.text_config, config.connector_options
    expect(config.vision_config.model_type, "mllama_vision_model", "the encoder's type")
    expect(list(options["layers"]), [NORMED], "the connector's layers")
    expect(options["without_image"], "everything", "the connector's without_image")
    has_row(config.image_token_id, text.vocab_size + EXTRA_TOKENS)
    count = text.num_hidden_layers
    places = sorted(options["before"]) or range(options["every"] - 1, count, options["every"])
    kv_heads = options["num_kv_heads"] or max(1, text.num_attention_heads // 4)
    expect(kv_heads, text.num_key_value_heads, "the connector's num_kv_heads")
    return {
        "text_config": {
            **of_llama(config),
            "num_hidden_layers": count + len(places),
            "cross_attention_layers": [place + number for number, place in enumerate(places)],
        }
    }


MLLAMA = Architecture("MllamaForConditionalGeneration", "mllama", _config, _rules, _tiles, _back)
