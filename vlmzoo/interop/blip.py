"""BLIP-2 and InstructBLIP, with LLMs that are decoders alone."""

from __future__ import annotations

from typing import Any

from vlmzoo.interop.architecture import Architecture, expect
from vlmzoo.interop.weights import Rule, copied, same, without_first
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel

ATTENTION = [
    ("attention.output.dense", "self_attention.attention.out"),
    *((f"attention.attention.{name}", f"self_attention.attention.{name}") for name in ("query", "key", "value")),
    ("attention.output.LayerNorm", "self_attention.norm"),
    ("crossattention.output.dense", "cross_attention.attention.out"),
    *((f"crossattention.attention.{name}", f"cross_attention.attention.{name}") for name in ("query", "key", "value")),
    ("crossattention.output.LayerNorm", "cross_attention.norm"),
    ("intermediate_query.dense", "query_transform.feed_forward.up"),
    ("output_query.dense", "query_transform.feed_forward.down"),
    ("output_query.LayerNorm", "query_transform.norm"),
    ("intermediate.dense", "text_transform.feed_forward.up"),
    ("output.dense", "text_transform.feed_forward.down"),
    ("output.LayerNorm", "text_transform.norm"),
]


def _config(config: Any, instruction: bool) -> dict[str, Any]:
    expect(config.use_decoder_only_language_model, True, "use_decoder_only_language_model")
    qformer = config.qformer_config
    expect(qformer.hidden_act, "gelu", "qformer_config.hidden_act")
    expect(qformer.layer_norm_eps, 1e-12, "qformer_config.layer_norm_eps")
    options = {
        "num_queries": config.num_query_tokens,
        "num_layers": qformer.num_hidden_layers,
        "hidden_size": qformer.hidden_size,
        "num_heads": qformer.num_attention_heads,
        "ffn_multiplier": qformer.intermediate_size / qformer.hidden_size,
        "cross_attention_every": qformer.cross_attention_frequency,
        "instruction": instruction,
        "dropout": qformer.hidden_dropout_prob,
    }
    if instruction:
        expect(qformer.max_position_embeddings, 512, "qformer_config.max_position_embeddings")
        options["instruction_vocab_size"] = qformer.vocab_size
    return {"connector_options": options, "vision_layer": -1}


def _rules(norm: str) -> list[Rule]:
    return [
        same("vision_model.**", "vision.model.**"),
        copied("vision_model.post_layernorm.**", "connector.memory_norm.**"),
        same("language_model.**", "language.**"),
        same("language_projection.**", "connector.project.**"),
        without_first("query_tokens", "connector.queries"),
        same(f"qformer.{norm}.**", "connector.norm.**"),
        *(same(f"qformer.encoder.layer.*.{theirs}.**", f"connector.layers.*.{ours}.**") for theirs, ours in ATTENTION),
    ]


def _instruct_rules(config: Any) -> list[Rule]:
    return [
        *_rules("embeddings.layernorm"),
        same("qformer.embeddings.word_embeddings.weight", "connector.instruction.tokens.weight"),
        same("qformer.embeddings.position_embeddings.weight", "connector.instruction.positions.weight"),
    ]


def _instruction(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    ids, mask = inputs.pop("qformer_input_ids", None), inputs.pop("qformer_attention_mask", None)
    if ids is not None:
        inputs["instruction_ids"] = ids
        inputs["instruction_mask"] = ids.new_ones(ids.shape) if mask is None else mask


def _back(kind: str, instruction: bool) -> Any:
    def back(config: VisionLanguageConfig) -> dict[str, Any]:
        options = config.connector_options
        expect(config.vision_config.model_type, kind, "the encoder's type")
        expect(config.vision_layer, -1, "the encoder's layer")
        expect(options["instruction"], instruction, "the connector's instruction")
        qformer = {
            "hidden_size": options["hidden_size"],
            "num_hidden_layers": options["num_layers"],
            "num_attention_heads": options["num_heads"],
            "intermediate_size": int(options["ffn_multiplier"] * options["hidden_size"]),
            "cross_attention_frequency": options["cross_attention_every"],
            "hidden_dropout_prob": options["dropout"],
            "encoder_hidden_size": config.vision_config.hidden_size,
        }
        if instruction:
            qformer["vocab_size"] = options["instruction_vocab_size"] or config.text_config.vocab_size
        return {"qformer_config": qformer, "num_query_tokens": options["num_queries"]}

    return back


BLIP_2 = Architecture(
    "Blip2ForConditionalGeneration",
    "qformer",
    lambda config: _config(config, instruction=False),
    lambda config: _rules("layernorm"),
    back=_back("blip_2_vision_model", instruction=False),
)
INSTRUCT_BLIP = Architecture(
    "InstructBlipForConditionalGeneration",
    "qformer",
    lambda config: _config(config, instruction=True),
    _instruct_rules,
    _instruction,
    _back("instructblip_vision_model", instruction=True),
)
