"""Tiny models of transformers with weights that tell computations apart, and inputs for each."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.connectors.parts import rescale
from tests.timm_parts import NEEDS_TIMM

IMAGE = 90
SIZE, PATCH = 24, 6  # 4 x 4 patches
SIZES = [(24, 24), (12, 24), (24, 12)]
GRIDS = [(4, 4), (4, 6), (10, 6)]
CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
}
SIGLIP = {**CLIP, "model_type": "siglip_vision_model"}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 512,
}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
MISTRAL = {**LLAMA, "model_type": "mistral", "head_dim": 8, "sliding_window": None}


def typed(values: dict[str, Any], kind: str, **more: Any) -> dict[str, Any]:
    return {**values, "model_type": kind, **more}


@dataclass(frozen=True)
class Case:
    """A class of transformers, its configuration, the tokens that images take, and the inputs beside `input_ids`.

    Tokens of every image, of one after the other, or of those in samples of so many images.
    """

    model: str
    config: dict[str, Any]
    tokens: int | Sequence[int] | Callable[[Sequence[int]], Sequence[int]]
    images: Callable[[Sequence[int]], dict[str, Any]]
    back: bool = True
    timm: bool = False
    kinds: Callable[[Tensor], Tensor] | None = None

    def build(self) -> PreTrainedModel:
        kind: Any = getattr(transformers, self.model)
        config = kind.config_class(**self.config, image_token_id=IMAGE)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = kind(config).eval()
        rescale(model)
        model.generation_config.eos_token_id = None
        return model

    def inputs(self, samples: Sequence[int] = (1, 2, 1)) -> dict[str, Any]:
        """A batch padded on the left, of samples with so many images each."""
        generator = torch.Generator().manual_seed(5)
        rows = []
        tokens = self.tokens(samples) if callable(self.tokens) else self.tokens
        counts = itertools.cycle([tokens] if isinstance(tokens, int) else tokens)
        for number, images in enumerate(samples):
            row = [1, *_text(generator, 2 + number)]
            for _ in range(images):
                row += [91, *[IMAGE] * next(counts), 92, *_text(generator, 3)]  # as images begin and end in some
            rows.append(row)
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask, **self.images(samples)}
        if self.kinds is not None:
            inputs["token_type_ids"] = self.kinds(ids)
        if "image_grid_thw" in inputs:
            inputs["mm_token_type_ids"] = (ids == IMAGE).int()
        return inputs


def parameters(cases: dict[str, Case], names: Iterable[str], *more: Sequence[Any]) -> list[Any]:
    """What tests are called with: these names, each with its values; where timm is missing some are skipped."""
    rows = zip(names, *more, strict=True)
    return [pytest.param(*row, marks=NEEDS_TIMM if cases[row[0]].timm else ()) for row in rows]


def _text(generator: torch.Generator, count: int) -> list[int]:
    return torch.randint(3, IMAGE, (count,), generator=generator).tolist()


def pixels(count: int, height: int = SIZE, width: int = SIZE, seed: int = 6) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def plain(samples: Sequence[int]) -> dict[str, Any]:
    """(images, 3, height, width)"""
    return {"pixel_values": pixels(sum(samples))}


def split(samples: Sequence[int], tiles: int = 1) -> dict[str, Any]:
    """(images, tiles, 3, height, width)"""
    return {"pixel_values": pixels(tiles * sum(samples)).unflatten(0, (-1, tiles))}


def sized(samples: Sequence[int], sizes: Sequence[tuple[int, int]] = SIZES) -> dict[str, Any]:
    """The same, padded on the right and below."""
    values, sizes = pixels(sum(samples)), list(itertools.islice(itertools.cycle(sizes), sum(samples)))
    for image, (height, width) in zip(values, sizes, strict=True):
        image[:, height:] = image[:, :, width:] = 0
    return {"pixel_values": values, "image_sizes": torch.tensor(sizes)}


def batched(samples: Sequence[int]) -> dict[str, Any]:
    """(batch, images, 3, height, width), zeros where a sample has fewer images, and a mask without the channels."""
    images = pixels(sum(samples)).split(list(samples))
    values = torch.nn.utils.rnn.pad_sequence(images, batch_first=True)
    return {"pixel_values": values, "pixel_attention_mask": (values != 0).any(2).long()}


def shown(samples: Sequence[int]) -> dict[str, Any]:
    """Images of several sizes, not all of whole patches, and a mask (images, height, width)."""
    inputs = sized(samples, [(24, 24), (11, 24), (24, 13)])
    mask = torch.zeros(sum(samples), SIZE, SIZE, dtype=torch.long)
    for image, (height, width) in zip(mask, inputs.pop("image_sizes"), strict=True):
        image[:height, :width] = 1
    return {**inputs, "pixel_mask": mask}


def masked(samples: Sequence[int]) -> dict[str, Any]:
    """The same as (batch, images, ...)."""
    pixel_values, mask = (values.split(list(samples)) for values in shown(samples).values())
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "pixel_values": pad(pixel_values, batch_first=True),
        "pixel_attention_mask": pad(mask, batch_first=True),
    }


def instructed(samples: Sequence[int]) -> dict[str, Any]:
    count, generator = sum(samples), torch.Generator().manual_seed(8)
    ids = torch.randint(1, 70, (count, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (count, 1), generator=generator)).long()
    return {"pixel_values": pixels(count), "qformer_input_ids": ids * mask, "qformer_attention_mask": mask}


def packed(samples: Sequence[int]) -> dict[str, Any]:
    """Patches of two frames (patches, 3 · 2 · 16) of images of several sizes, in blocks of 2 x 2."""
    grids = list(itertools.islice(itertools.cycle(GRIDS), sum(samples)))
    count = sum(height * width for height, width in grids)
    patches = torch.randn(count, 96, generator=torch.Generator().manual_seed(6))
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}


ORIGINALS = [(24, 40), (100, 20), (19, 150), (40, 41)]
TILES = [2, 3, 3, 4]  # as the pinpoints below are chosen
TILED = [16 + 4 * 7, 16 + 12 * 3, 16 + 2 * 13, 16 + 8 * 9]
SHRUNK = [16 + 3 * 5, 16 + 9 * 2, 16 + 1 * 10, 16 + 4 * 5]  # to one tile's tokens
PINPOINTS = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]


def pinpoints(side: int) -> list[list[int]]:
    return [[rows * side, columns * side] for rows, columns in PINPOINTS]


def tiled(samples: Sequence[int], *, side: int = SIZE, alone: bool = False) -> dict[str, Any]:
    """(images, most crops, 3, side, side), zeros where an image has fewer crops.

    With `alone` images that share a sample have one crop.
    """
    single = [not alone or count == 1 for count in samples for _ in range(count)]
    crops = [1 + count * cut for count, cut in zip(TILES, single, strict=False)]
    images = pixels(sum(crops), side, side).split(crops)
    inputs: dict[str, Any] = {
        "pixel_values": torch.nn.utils.rnn.pad_sequence(list(images), batch_first=True),
        "image_sizes": torch.tensor(ORIGINALS[: len(crops)]),
    }
    return inputs | ({"batch_num_images": torch.tensor(samples)} if alone else {})


def unpadded(samples: Sequence[int]) -> dict[str, Any]:
    """The same without what fills the batch up, (crops, 3, height, width)."""
    inputs = tiled(samples)
    images = zip(inputs["pixel_values"], TILES, strict=False)
    return {**inputs, "pixel_values": torch.cat([image[: 1 + count] for image, count in images])}


def shrunk_alone(samples: Sequence[int]) -> list[int]:
    single = [count == 1 for count in samples for _ in range(count)]
    return [count if cut else 17 for count, cut in zip(SHRUNK, single, strict=False)]


def perception_encoder(architecture: str) -> dict[str, Any]:
    """A configuration like those of PerceptionLM's checkpoints."""
    sizes = {"embed_dim": 24, "depth": 3, "num_heads": 2, "img_size": [SIZE, SIZE], "patch_size": PATCH}
    own = {"global_pool": "", "use_post_transformer_norm": False, "init_values": 0.1, "ref_feat_shape": [4, 4]}
    return {"model_type": "timm_wrapper", "architecture": architecture, "model_args": sizes | own}


OPT: dict[str, Any] = {
    "model_type": "opt",
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "dropout": 0.0,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "encoder_hidden_size": 24,
    "vocab_size": 70,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
BLIP = {key: value for key, value in CLIP.items() if key != "model_type"}

PIXTRAL: dict[str, Any] = {**CLIP, "model_type": "pixtral", "image_size": 48, "head_dim": 12}
OVIS: dict[str, Any] = {
    "vision_config": {
        **{key: value for key, value in CLIP.items() if key != "model_type"},
        "vocab_size": 40,
        "num_visual_indicator_tokens": 3,
        "hidden_stride": 2,
    },
    "text_config": {**LLAMA, "model_type": "qwen2"},
    "visual_indicator_token_ids": [91, 92, 93],
    "hidden_size": 32,
    "vocab_size": 100,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 24,
    "out_hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
}
QWEN_TEXT: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "model_type"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
}
VQ: dict[str, Any] = {
    "embed_dim": 8,
    "num_embeddings": 10,
    "latent_channels": 32,
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "num_patches": 4,
    "projection_dim": 32,
    "image_token_embed_dim": 32,
}

SIDE = 27  # the patches fill 24 of these pixels
ONEVISION: dict[str, Any] = {
    "vision_config": typed(SIGLIP, "siglip_vision_model", image_size=SIDE),
    "text_config": QWEN2,
    "image_grid_pinpoints": pinpoints(SIDE),
    "vision_aspect_ratio": "anyres_max_1",
    "vision_feature_select_strategy": "full",
    "vision_feature_layer": -1,
    "video_token_id": 91,
}
CASES: dict[str, Case] = {
    "llava": Case("LlavaForConditionalGeneration", {"vision_config": CLIP, "text_config": LLAMA}, 16, plain),
    "llava_siglip": Case(
        "LlavaForConditionalGeneration",
        {
            "vision_config": SIGLIP,
            "text_config": QWEN2,
            "vision_feature_select_strategy": "full",
            "vision_feature_layer": -1,
        },
        16,
        plain,
    ),
    "llava_layers": Case(
        "LlavaForConditionalGeneration",
        {"vision_config": CLIP, "text_config": LLAMA, "vision_feature_layer": [-2, 1]},
        16,
        plain,
    ),
    "llava_next": Case(
        "LlavaNextForConditionalGeneration",
        {"vision_config": CLIP, "text_config": LLAMA, "image_grid_pinpoints": pinpoints(SIZE)},
        TILED,
        tiled,
    ),
    "llava_next_layers": Case(
        "LlavaNextForConditionalGeneration",
        {
            "vision_config": CLIP,
            "text_config": LLAMA,
            "image_grid_pinpoints": pinpoints(SIZE),
            "vision_feature_layer": [-2, 1],
        },
        TILED,
        unpadded,
    ),
    "llava_onevision": Case("LlavaOnevisionForConditionalGeneration", ONEVISION, SHRUNK, partial(tiled, side=SIDE)),
    "llava_onevision_alone": Case(
        "LlavaOnevisionForConditionalGeneration",
        ONEVISION,
        shrunk_alone,
        partial(tiled, side=SIDE, alone=True),
    ),
    "vip_llava": Case(
        "VipLlavaForConditionalGeneration",
        {"vision_config": CLIP, "text_config": LLAMA, "vision_feature_layers": [-2, -3, 1]},
        16,
        plain,
    ),
    "blip_2": Case(
        "Blip2ForConditionalGeneration",
        {"vision_config": BLIP, "qformer_config": QFORMER, "text_config": OPT, "num_query_tokens": 5},
        5,
        plain,
    ),
    "instruct_blip": Case(
        "InstructBlipForConditionalGeneration",
        {"vision_config": BLIP, "qformer_config": QFORMER, "text_config": LLAMA, "num_query_tokens": 5},
        5,
        instructed,
    ),
    "idefics2": Case(
        "Idefics2ForConditionalGeneration",
        {
            "vision_config": typed(CLIP, "idefics2_vision"),
            "text_config": MISTRAL,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 5,
                "resampler_depth": 2,
                "resampler_n_heads": 4,
                "resampler_head_dim": 6,
                "num_key_value_heads": 2,
            },
        },
        5,
        masked,
    ),
    "idefics3": Case(
        "Idefics3ForConditionalGeneration",
        {"vision_config": typed(CLIP, "idefics3_vision"), "text_config": LLAMA, "scale_factor": 2},
        4,
        batched,
    ),
    "smolvlm": Case(
        "SmolVLMForConditionalGeneration",
        {"vision_config": typed(CLIP, "smolvlm_vision"), "text_config": LLAMA, "scale_factor": 4},
        1,
        batched,
    ),
    "janus": Case(
        "JanusForConditionalGeneration",
        {
            "vision_config": typed(
                {**CLIP, "hidden_act": "gelu"}, "janus_vision_model", projection_dim=32, depth=2, mlp_ratio=2.0
            ),
            "text_config": LLAMA,
            "vq_config": VQ,
        },
        16,
        plain,
        back=False,
    ),
    "mistral3": Case(
        "Mistral3ForConditionalGeneration",
        {"vision_config": PIXTRAL, "text_config": MISTRAL, "spatial_merge_size": 2, "vision_feature_layer": -1},
        [4, 2, 2],
        sized,
    ),
    "llava_pixtral": Case(
        "LlavaForConditionalGeneration",
        {
            "vision_config": PIXTRAL,
            "text_config": MISTRAL,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
        },
        [16, 8, 8],
        sized,
    ),
    "aria": Case(
        "AriaForConditionalGeneration",
        {
            "vision_config": typed(CLIP, "idefics3_vision"),
            "text_config": typed(LLAMA, "aria_text", moe_num_experts=3, moe_topk=2, moe_num_shared_experts=1),
            "projector_patch_to_query_dict": {16: 3, 64: 6},
        },
        3,
        shown,
    ),
    "paligemma": Case(
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {**SIGLIP, "projection_dim": 32},
            "text_config": typed(LLAMA, "gemma", head_dim=8),
            "projection_dim": 32,
            "hidden_size": 32,
        },
        16,
        plain,
        kinds=lambda ids: torch.zeros_like(ids),
    ),
    "paligemma_2": Case(
        "PaliGemmaForConditionalGeneration",
        {
            "vision_config": {**SIGLIP, "projection_dim": 32},
            "text_config": typed(LLAMA, "gemma2", head_dim=8, sliding_window=11, query_pre_attn_scalar=8),
            "projection_dim": 32,
            "hidden_size": 32,
        },
        16,
        plain,
        kinds=lambda ids: torch.zeros_like(ids),
    ),
    "gemma3": Case(
        "Gemma3ForConditionalGeneration",
        {
            "vision_config": SIGLIP,
            "text_config": typed(LLAMA, "gemma3_text", head_dim=8, sliding_window=11, query_pre_attn_scalar=8),
            "mm_tokens_per_image": 4,
        },
        4,
        plain,
        kinds=lambda ids: (ids == IMAGE).long(),
    ),
    "ovis2": Case("Ovis2ForConditionalGeneration", {**OVIS, "tie_word_embeddings": False}, 4, plain, back=False),
    "ovis2_tied": Case("Ovis2ForConditionalGeneration", {**OVIS, "tie_word_embeddings": True}, 4, plain, back=False),
    "perception_lm": Case(
        "PerceptionLMForConditionalGeneration",
        {
            "vision_config": perception_encoder("vit_pe_core_large_patch14_336"),
            "text_config": LLAMA,
            "projector_pooling_ratio": 2,
        },
        2 * 4,
        partial(split, tiles=2),
        timm=True,
    ),
    "perception_lm_without_cls": Case(
        "PerceptionLMForConditionalGeneration",
        {
            "vision_config": perception_encoder("vit_pe_core_gigantic_patch14_448"),
            "text_config": LLAMA,
            "vision_use_cls_token": False,
        },
        16,
        split,
        timm=True,
    ),
    "internvl": Case(
        "InternVLForConditionalGeneration",
        {
            "vision_config": typed(
                CLIP, "internvl_vision", image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH], use_mean_pooling=False
            ),
            "text_config": QWEN2,
            "downsample_ratio": 0.5,
        },
        4,
        plain,
    ),
    "qwen2_vl": Case(
        "Qwen2VLForConditionalGeneration",
        {
            "vision_config": {
                "depth": 3,
                "embed_dim": 24,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 4,
            },
            "text_config": QWEN_TEXT,
        },
        [4, 6, 15],
        packed,
    ),
    "qwen2_5_vl": Case(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "vision_config": {**QWEN_VISION, "window_size": 16, "fullatt_block_indexes": [1]},
            "text_config": {**QWEN_TEXT, "tie_word_embeddings": True},
            "tie_word_embeddings": True,
        },
        [4, 6, 15],
        packed,
    ),
    "qwen3_vl": Case(
        "Qwen3VLForConditionalGeneration",
        {
            "vision_config": {**QWEN_VISION, "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1]},
            "text_config": {**QWEN_TEXT, "head_dim": 8},
        },
        [4, 6, 15],
        packed,
    ),
}
