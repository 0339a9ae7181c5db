"""Models of transformers with cross-attention inside the LLM, beside the other cases."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.models.idefics.processing_idefics import (
    image_attention_mask_for_packed_input_ids,
    incremental_to_binary_attention_mask,
)
from transformers.models.mllama.image_processing_pil_mllama import get_all_supported_aspect_ratios
from transformers.models.mllama.processing_mllama import (
    convert_sparse_cross_attention_mask_to_dense,
    get_cross_attention_token_mask,
)

from tests.interop import cases
from tests.interop.cases import CLIP, IMAGE, LLAMA, Case, pixels

PAD, EOS, MAX_TILES = 0, 2, 4


@dataclass(frozen=True)
class Interleaved(Case):
    """A case with one token an image.

    images_of: the inputs beside `input_ids`, from these and the number of images of each sample.
    text_first: whether text stands before a sample's first image.
    """

    images_of: Callable[[Tensor, Sequence[int]], dict[str, Any]] = lambda ids, samples: {}
    text_first: bool = True

    def build(self) -> PreTrainedModel:
        model = super().build()
        if self.model == "MllamaForConditionalGeneration":
            rows = model.get_input_embeddings().weight.data
            rows[IMAGE + 1 :] = 0  # those that no token has: ours keeps none, and gives zeros back
        return model

    def inputs(self, samples: Sequence[int] = (1, 2, 1)) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)

        def text(count: int) -> list[int]:
            return torch.randint(3, 80, (count,), generator=generator).tolist()

        rows = []
        for number, images in enumerate(samples):
            row = [1, *text(2 + number)] if self.text_first or not images else []
            for _ in range(images):
                row += [IMAGE, *text(3 + number)]
            rows.append(row)
        length = max(map(len, rows))
        ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
        return {"input_ids": ids, "attention_mask": mask, **self.images_of(ids, samples)}


def idefics_images(ids: Tensor, samples: Sequence[int]) -> dict[str, Any]:
    """Images (batch, images, 3, height, width), and the processor's own mask of those that tokens see."""
    most = max(1, *samples)
    values = pixels(sum(samples)).split(list(samples))
    padded = pad_sequence([*values, torch.zeros(most, 3, *pixels(1).shape[2:])], batch_first=True)[:-1]
    tokenizer: Any = SimpleNamespace(convert_tokens_to_ids=lambda token: IMAGE, eos_token_id=EOS)
    last, _ = image_attention_mask_for_packed_input_ids(ids, tokenizer, "pt")
    return {
        "pixel_values": padded,
        "image_attention_mask": incremental_to_binary_attention_mask(last, "pt", num_classes=most),
    }


def mllama_images(ids: Tensor, samples: Sequence[int]) -> dict[str, Any]:
    """Tiles (batch, images, tiles, 3, height, width) of several aspect ratios, and the processor's own masks."""
    count, most = sum(samples), max(1, *samples)
    tilings = list(itertools.islice(itertools.cycle([(1, 2), (2, 2), (3, 1), (1, 1)]), count))
    tiles = [rows * columns for rows, columns in tilings]
    values = pixels(count * MAX_TILES).unflatten(0, (count, MAX_TILES))
    supported = get_all_supported_aspect_ratios(MAX_TILES)
    inputs = {
        "pixel_values": torch.zeros(len(samples), most, *values.shape[1:]),
        "aspect_ratio_ids": torch.zeros(len(samples), most, dtype=torch.long),
        "aspect_ratio_mask": torch.zeros(len(samples), most, MAX_TILES, dtype=torch.long),
    }
    inputs["aspect_ratio_mask"][:, :, 0] = 1  # also where there is no image
    places = [(sample, image) for sample, images in enumerate(samples) for image in range(images)]
    for place, image, tiling, number in zip(places, values, tilings, tiles, strict=True):
        inputs["pixel_values"][place][:number] = image[:number]
        inputs["aspect_ratio_ids"][place] = supported.index(tiling) + 1
        inputs["aspect_ratio_mask"][place][:number] = 1
    spans = [get_cross_attention_token_mask(row, IMAGE) for row in ids.tolist()]
    of_sample = [[tiles[places.index((s, i))] for i in range(images)] for s, images in enumerate(samples)]
    dense = convert_sparse_cross_attention_mask_to_dense(spans, of_sample, MAX_TILES, ids.shape[1])
    return {**inputs, "cross_attention_mask": torch.from_numpy(dense)}


IDEFICS: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key not in ("model_type", "num_key_value_heads")},
    "vocab_size": 88,
    "additional_vocab_size": 12,  # the image's token among them
    "num_hidden_layers": 4,
    "cross_layer_interval": 2,
    "alpha_initializer": "ones",
    "vision_config": {
        **{key: value for key, value in CLIP.items() if key not in ("model_type", "hidden_size")},
        "embed_dim": CLIP["hidden_size"],
    },
}
RESAMPLER: dict[str, Any] = {
    "resampler_n_latents": 5,
    "resampler_depth": 2,
    "resampler_n_heads": 3,
    "resampler_head_dim": 6,
    "qk_layer_norms_perceiver": True,
}

MLLAMA: dict[str, Any] = {
    "vision_config": {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "image_size": 24,
        "patch_size": 6,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 72,
    },
    "text_config": {
        **{key: value for key, value in LLAMA.items() if key != "model_type"},
        "vocab_size": IMAGE,  # the image's token is the first outside, as in the published vocabulary
        "num_hidden_layers": 7,
        "cross_attention_layers": [1, 4, 6],  # the last behind all others
    },
}

INTERLEAVED: dict[str, Interleaved] = {
    "idefics": Interleaved("IdeficsForVisionText2Text", IDEFICS, 1, cases.plain, images_of=idefics_images),
    "idefics_resampler": Interleaved(
        "IdeficsForVisionText2Text",
        {**IDEFICS, "use_resampler": True, "perceiver_config": RESAMPLER, "qk_layer_norms": True},
        1,
        cases.plain,
        images_of=idefics_images,
    ),
    "mllama": Interleaved(
        "MllamaForConditionalGeneration", MLLAMA, 1, cases.plain, images_of=mllama_images, text_first=False
    ),
}
CASES: dict[str, Case] = {**cases.CASES, **INTERLEAVED}
