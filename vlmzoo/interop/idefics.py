"""Idefics, the first."""

from __future__ import annotations

from typing import Any

from transformers import CLIPVisionConfig

from vlmzoo.interop.architecture import Architecture, expect
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
from vlmzoo.interop.weights import Rule, same, stacked
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.vision.towers import image_side

VISION = (
    "image_size",
    "intermediate_size",
    "patch_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
    "initializer_range",
    "initializer_factor",
)
"""What CLIP's tower and theirs, the same one, are configured by, beside its width."""
QK_NORM = [("cross_attn.q_layer_norm", "attention.query_norm"), ("cross_attn.k_layer_norm", "attention.key_norm")]
RESAMPLER = [
    ("0.context_layer_norm", "media_norm"),
    ("0.latents_layer_norm", "latent_norm"),
    ("0.q_proj", "attention.query"),
    ("0.k_proj", "attention.key"),
    ("0.v_proj", "attention.value"),
    ("0.output_proj", "attention.out"),
    ("0.q_layer_norm", "attention.query_norm"),
    ("0.k_layer_norm", "attention.key_norm"),
    ("1.ln", "feed_forward_norm"),
    ("1.fc", "feed_forward.up"),
    ("1.c_proj", "feed_forward.down"),
]


def _published(vocab_size: int) -> int:
    """The image token's id in published vocabularies, which add `<fake_token_around_image>` to Llama's, then it."""
    return vocab_size + 1


def _image_token_id(config: Any) -> int:
    """Of a configuration of theirs, which need not say it."""
    return getattr(config, "image_token_id", _published(config.vocab_size))


def _config(config: Any) -> dict[str, Any]:
    expect(config.alpha_type, "float", "alpha_type")
    expect(config.num_hidden_layers % config.cross_layer_interval, 0, "num_hidden_layers % cross_layer_interval")
    vocab_size, image = config.vocab_size + config.additional_vocab_size, _image_token_id(config)
    has_row(image, vocab_size)
    vision, perceiver = config.vision_config, config.perceiver_config
    return {
        "vision_config": CLIPVisionConfig(
            hidden_size=vision.embed_dim, **{name: getattr(vision, name) for name in VISION}
        ),
        "text_config": plain_llama(config, vocab_size=vocab_size, additional_vocab_size=config.additional_vocab_size),
        "image_token_id": image,
        "vision_layer": -1,
        "connector_options": {
            "every": config.cross_layer_interval,
            "qk_norm": config.qk_layer_norms,
            "resampler": config.use_resampler,
            "num_latents": perceiver.resampler_n_latents,
            "num_resampler_layers": perceiver.resampler_depth,
            "num_resampler_heads": perceiver.resampler_n_heads,
            "resampler_head_dim": perceiver.resampler_head_dim,
            "resampler_qk_norm": perceiver.qk_layer_norms_perceiver,
        },
    }


def _rules(config: Any) -> list[Rule]:
    embedding, head = {"model.embed_tokens.weight": config.vocab_size}, {"lm_head.weight": config.vocab_size}
    if additional := config.additional_vocab_size:
        embedding["model.embed_tokens.additional_embedding.weight"] = additional
        head["lm_head.additional_fc.weight"] = additional
    resampler, every = "model.perceiver_resampler", config.cross_layer_interval
    blocks = {
        f"model.gated_cross_attn_layers.{index}": f"connector.blocks.{index * every}"
        for index in range(config.num_hidden_layers // every)
    }
    return [
        same("model.vision_model.**", "vision.model.**"),
        same("model.layers.**", "language.model.layers.**"),
        same("model.norm.**", "language.model.norm.**"),
        marked_embedding(embedding, _image_token_id(config), rows=config.vocab_size + additional),
        stacked(head, "language.lm_head.weight"),
        *(same(f"{a}.{theirs}.**", f"{b}.{ours}.**") for a, b in blocks.items() for theirs, ours in BLOCK + QK_NORM),
        *(same(f"{a}.alpha_cross_attn", f"{b}.attention_gate") for a, b in blocks.items()),
        *(same(f"{a}.alpha_dense", f"{b}.feed_forward_gate") for a, b in blocks.items()),
        same(f"{resampler}.latents", "connector.resampler.latents"),
        same(f"{resampler}.layer_norm.**", "connector.resampler.norm.**"),
        *(
            same(f"{resampler}.blocks.*.{theirs}.**", f"connector.resampler.layers.*.{ours}.**")
            for theirs, ours in RESAMPLER
        ),
    ]


def _images(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    """Images (batch, images, 3, height, width) one behind the other, where their mask (batch, length, images) is ours.

    Raises:
        ValueError: the mask is another, or images have another size than the tower's.
    """
    pixels, mask = inputs.pop("pixel_values", None), inputs.pop("image_attention_mask", None)
    if pixels is None:
        return
    config = model.config
    side = image_side(config.vision_config)
    if tuple(pixels.shape[-2:]) != (side, side):  # their interpolation is not CLIP's
        raise ValueError(
            f"pixel_values are of {pixels.shape[-2]} x {pixels.shape[-1]} pixels, expected {side} x {side}"
        )
    ids, image, most = inputs["input_ids"], config.image_token_id, pixels.shape[1]
    if mask is not None:
        check_seen(mask, last_image(ids, image, most), "image_attention_mask")
    real = real_images(ids, image, most)
    if real.any():
        inputs["pixel_values"] = pixels[real]


def _back(config: VisionLanguageConfig) -> dict[str, Any]:
    text, vision, options = config.text_config, config.vision_config, config.connector_options
    expect(vision.model_type, "clip_vision_model", "the encoder's type")
    expect(config.vision_layer, -1, "the encoder's layer")
    expect(text.num_key_value_heads, text.num_attention_heads, "the LLM's num_key_value_heads")
    expect(text.num_hidden_layers % options["every"], 0, "the LLM's num_hidden_layers modulo the connector's every")
    has_row(config.image_token_id, text.vocab_size)
    additional = getattr(text, "additional_vocab_size", 0)
    vocab_size = text.vocab_size - additional
    llama = {key: value for key, value in of_llama(config).items() if key != "num_key_value_heads"}
    return {
        **llama,
        "text_config": None,
        "vision_config": {"embed_dim": vision.hidden_size, **{name: getattr(vision, name) for name in VISION}},
        "vocab_size": vocab_size,
        "image_token_id": None if config.image_token_id == _published(vocab_size) else config.image_token_id,
        "additional_vocab_size": additional,
        "cross_layer_interval": options["every"],
        "qk_layer_norms": options["qk_norm"],
        "use_resampler": options["resampler"],
        "perceiver_config": {
            "use_resampler": options["resampler"],
            "resampler_n_latents": options["num_latents"],
            "resampler_depth": options["num_resampler_layers"],
            "resampler_n_heads": options["num_resampler_heads"],
            "resampler_head_dim": options["resampler_head_dim"],
            "qk_layer_norms_perceiver": options["resampler_qk_norm"],
        },
    }


IDEFICS = Architecture(
    "IdeficsForVisionText2Text", "idefics", _config, _rules, _images, _back, needs=("vision_config",)
)
