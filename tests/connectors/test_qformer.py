"""`qformer` against transformers' BLIP-2 and InstructBLIP, from the encoder's last layer to the LLM's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    OPTConfig,
)

from tests.connectors.parts import TEXT, VISION, copy_weights, create, distance, rescale, visual_input
from vlmzoo.connector import FeatureRequest, Instruction, VisualInput

OPTIONS: dict[str, Any] = {"num_queries": 5, "num_layers": 4, "hidden_size": 16, "num_heads": 2}
RENAMES = [
    (r"^norm\.", "qformer.NORM."),
    ("^memory_norm", "vision_model.post_layernorm"),
    ("^queries", "query_tokens"),
    ("^project", "language_projection"),
    (r"^instruction\.tokens", "qformer.embeddings.word_embeddings"),
    (r"^instruction\.positions", "qformer.embeddings.position_embeddings"),
    (r"^layers", "qformer.encoder.layer"),
    (r"self_attention\.attention\.out\.", "attention.output.dense."),
    (r"self_attention\.attention\.", "attention.attention."),
    (r"self_attention\.norm", "attention.output.LayerNorm"),
    (r"cross_attention\.attention\.out\.", "crossattention.output.dense."),
    (r"cross_attention\.attention\.", "crossattention.attention."),
    (r"cross_attention\.norm", "crossattention.output.LayerNorm"),
    (r"query_transform\.feed_forward\.up", "intermediate_query.dense"),
    (r"query_transform\.feed_forward\.down", "output_query.dense"),
    (r"query_transform\.norm", "output_query.LayerNorm"),
    (r"text_transform\.feed_forward\.up", "intermediate.dense"),
    (r"text_transform\.feed_forward\.down", "output.dense"),
    (r"text_transform\.norm", "output.LayerNorm"),
]
CONFIG: dict[str, Any] = {
    "vision_config": {
        "hidden_size": VISION.hidden_size,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
        "layer_norm_eps": VISION.norm_eps,
    },
    "qformer_config": {
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "encoder_hidden_size": VISION.hidden_size,
        "vocab_size": TEXT.vocab_size,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    "text_config": OPTConfig(
        hidden_size=TEXT.hidden_size,
        word_embed_proj_dim=TEXT.hidden_size,
        num_attention_heads=4,
        num_hidden_layers=1,
        ffn_dim=32,
        vocab_size=60,
    ).to_dict(),
    "num_query_tokens": 5,
}
GENERATOR = torch.Generator().manual_seed(0)
PIXELS = torch.randn(3, 3, 28, 28, generator=GENERATOR)
INSTRUCTION = Instruction(
    torch.randint(0, TEXT.vocab_size, (3, 7), generator=GENERATOR), torch.arange(7) < torch.tensor([[7], [3], [1]])
)


def pair(instruction: bool) -> tuple[Any, Tensor, VisualInput]:
    """Our connector with their weights; their visual tokens; our input: their features before the last norm."""
    theirs: Any
    if instruction:
        theirs = InstructBlipForConditionalGeneration(InstructBlipConfig(**CONFIG)).eval()
        norm = ("NORM", "embeddings.layernorm")
        asks = {"qformer_input_ids": INSTRUCTION.input_ids, "qformer_attention_mask": INSTRUCTION.mask.long()}
    else:
        theirs = Blip2ForConditionalGeneration(Blip2Config(**CONFIG)).eval()
        norm, asks = ("NORM", "layernorm"), {}
    rescale(theirs)
    ours = create("qformer", OPTIONS | {"instruction": instruction}).eval()
    vision = theirs.vision_model
    copy_weights(theirs, ours, [*RENAMES, norm], leave=("language_model.", "vision_model.enc", "vision_model.emb"))
    with torch.no_grad():
        features = vision.encoder(inputs_embeds=vision.embeddings(PIXELS)).last_hidden_state
        want = theirs.get_image_features(PIXELS, **asks).pooler_output
    return ours, want, visual_input(features[:, 1:], [(2, 2)] * 3, cls=features[:, 0], instruction=INSTRUCTION)


def difference(ours: Any, want: Tensor, visual: VisualInput) -> float:
    with torch.no_grad():
        return distance(ours(visual).tokens, want)


@pytest.mark.parametrize("instruction", [False, True], ids=["BLIP-2", "InstructBLIP"])
def test_equals_transformers(instruction: bool) -> None:
    ours, want, visual = pair(instruction)
    assert ours.requires.cls
    assert ours.requires.instruction == instruction
    assert difference(ours, want, visual) <= 1e-4


def tanh_gelu(ours: Any, visual: VisualInput) -> None:
    for layer in ours.layers:
        layer.query_transform.feed_forward.activation = partial(F.gelu, approximate="tanh")


def no_cls(ours: Any, visual: VisualInput) -> None:
    ours.requires = FeatureRequest(cls=False)


def cls_masked(ours: Any, visual: VisualInput) -> None:
    assert visual.maps[0].cls is not None
    visual.maps[0].cls.zero_()


def no_memory_norm(ours: Any, visual: VisualInput) -> None:
    ours.memory_norm = nn.Identity()


def cross_attention_one_layer_late(ours: Any, visual: VisualInput) -> None:
    for even, odd in ((0, 1), (2, 3)):
        ours.layers[odd].cross_attention, ours.layers[even].cross_attention = ours.layers[even].cross_attention, None


def one_layer_less(ours: Any, visual: VisualInput) -> None:
    ours.layers = ours.layers[:-1]


def no_instruction_mask(ours: Any, visual: VisualInput) -> None:
    visual.instruction = Instruction(INSTRUCTION.input_ids, torch.ones_like(INSTRUCTION.mask))


def one_transform_for_both(ours: Any, visual: VisualInput) -> None:
    for layer in ours.layers:
        layer.text_transform = layer.query_transform


def no_positions(ours: Any, visual: VisualInput) -> None:
    nn.init.zeros_(ours.instruction.positions.weight)


FAULTS = [tanh_gelu, no_cls, cls_masked, no_memory_norm, cross_attention_one_layer_late, one_layer_less]
TEXT_FAULTS = [no_instruction_mask, one_transform_for_both, no_positions]


@pytest.mark.parametrize(
    ("instruction", "fault"), [(False, fault) for fault in FAULTS] + [(True, fault) for fault in FAULTS + TEXT_FAULTS]
)
def test_the_comparison_sees(instruction: bool, fault: Callable[[Any, VisualInput], None]) -> None:
    ours, want, visual = pair(instruction)
    fault(ours, visual)
    assert difference(ours, want, visual) > 1e-4


def test_instruction_padding_and_strange_ids_have_no_influence() -> None:
    ours, _, visual = pair(True)
    want = ours(visual).tokens
    lengths = INSTRUCTION.mask.sum(1)
    left = Instruction(
        torch.stack([row.roll(7 - int(n)) for row, n in zip(INSTRUCTION.input_ids, lengths, strict=True)]),
        INSTRUCTION.mask.flip(1),
    )
    visual.instruction = left
    assert distance(ours(visual).tokens, want) <= 1e-5
    visual.instruction = Instruction(
        F.pad(INSTRUCTION.input_ids, (0, 1), value=TEXT.vocab_size + 3), F.pad(INSTRUCTION.mask, (0, 1), value=True)
    )
    assert distance(ours(visual).tokens, want) <= 1e-5


def test_long_instructions_are_cut() -> None:
    ours, _, visual = pair(True)
    ids = torch.randint(0, TEXT.vocab_size, (3, 600), generator=torch.Generator().manual_seed(1))
    visual.instruction = Instruction(ids[:, :512], torch.ones(3, 512, dtype=torch.bool))
    want = ours(visual).tokens
    visual.instruction = Instruction(ids, torch.ones(3, 600, dtype=torch.bool))
    assert distance(ours(visual).tokens, want) <= 1e-5


def test_no_cls_is_asked_of_an_encoder_without() -> None:
    assert not create("qformer", OPTIONS, vision=replace(VISION, has_cls=False)).requires.cls


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"hidden_size": 18, "num_heads": 4}, "hidden_size 18 is no multiple of num_heads 4"),
        ({"cross_attention_every": 0}, "cross_attention_every must be at least 1, got 0"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
    ],
)
def test_refuses(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"connector 'qformer': {says}"):
        create("qformer", OPTIONS | options)
