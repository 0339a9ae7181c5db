"""Positions on the grids of images, against transformers' own, in prompts and in the steps that continue them."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.cases import CASES, IMAGE
from tests.tiny import CLIP, pixels
from vlmzoo.connector import ImageLayout
from vlmzoo.interop import from_hf
from vlmzoo.language.positions import grid_offsets, on_grids
from vlmzoo.model import VisionLanguageModel

QWENS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
LLM: dict[str, Any] = {**CASES["qwen2_vl"].config["text_config"], "model_type": "qwen2_vl_text"}


def layout(seed: int) -> dict[str, Tensor]:
    """A batch of texts with images at random places, of random sizes, padded on a random side or not at all."""
    draw = random.Random(seed)
    rows, grids = [], []
    for _ in range(draw.randint(1, 4)):
        row = [draw.randint(3, 80) for _ in range(draw.randint(0, 3))]
        for _ in range(draw.randint(0 if grids else 1, 3)):
            height, width = draw.randint(1, 5), draw.randint(1, 5)
            grids.append((1, 2 * height, 2 * width))
            row += [IMAGE] * height * width + [draw.randint(3, 80) for _ in range(draw.randint(1, 4))]
        rows.append(row or [5])
    length, left = max(map(len, rows)), draw.random() < 0.5
    if draw.random() < 0.3:
        rows, grids = rows[:1], grids[: _images(rows[0])]
        length = len(rows[0])
    ids = torch.full((len(rows), length), 0)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows):
        place = slice(length - len(tokens), None) if left else slice(0, len(tokens))
        ids[row, place], mask[row, place] = torch.tensor(tokens), 1
    count = sum(height * width for _, height, width in grids)
    patches = torch.randn(count, 96, generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor(grids),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }


def _images(row: list[int]) -> int:
    """How many runs of image tokens a row has."""
    return sum(token == IMAGE and before != IMAGE for before, token in zip([0, *row], row, strict=False))


def seen_by(decoder: Any) -> list[Tensor]:
    """The position ids (3, batch, length) of each call that the decoder will get."""
    found: list[Tensor] = []

    def record(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = kwargs["position_ids"]
        found.append(given[-3:] if given.dim() == 3 else given.expand(3, -1, -1))

    decoder.register_forward_pre_hook(record, with_kwargs=True)
    return found


@pytest.mark.parametrize("name", QWENS)
def test_positions_are_those_of_transformers(name: str) -> None:
    theirs = CASES[name].build()
    ours = from_hf(theirs)
    found = seen_by(ours.get_decoder())
    for seed in range(40):
        inputs = layout(seed)
        real = inputs["attention_mask"].bool()
        without = {key: value for key, value in inputs.items() if key != "pixel_values"}
        expected, _ = theirs.model.get_rope_index(**without)
        with torch.no_grad():
            ours(**inputs)
        assert torch.equal(found.pop()[:, real], expected[:, real]), f"layout {seed}"
        if real.all():
            with torch.no_grad():
                ours(**{key: value for key, value in inputs.items() if key != "attention_mask"})
            assert torch.equal(found.pop(), expected), f"layout {seed} without a mask"


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
@pytest.mark.parametrize("name", QWENS)
def test_steps_go_on_from_there(name: str, options: dict[str, Any]) -> None:
    theirs = CASES[name].build()
    ours, inputs = from_hf(theirs), CASES[name].inputs()
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4, "suppress_tokens": [IMAGE], **options}
    calls = []
    for model in (theirs, ours):
        found = seen_by(model.get_decoder() if model is ours else model.model.language_model)
        torch.manual_seed(0)
        tokens = model.generate(**inputs, **options)
        calls.append((found, tokens))
    (expected, wanted), (found, tokens) = calls
    assert torch.equal(tokens, wanted)
    assert len(found) == len(expected) == 4
    mask = inputs["attention_mask"].repeat_interleave(len(tokens) // 3 if "num_beams" not in options else 3, 0).bool()
    assert torch.equal(found[0][:, mask], expected[0][:, mask])
    for step, wanted_step in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(step, wanted_step)


def test_text_alone_counts_on() -> None:
    ours = from_hf(CASES["qwen2_vl"].build())
    found = seen_by(ours.get_decoder())
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 4]])
    ours(ids, attention_mask=(ids != 0).long())
    assert found[0].tolist() == [[[0, 0, 0, 1], [0, 1, 2, 3]]] * 3


def of_parts(connector: Any) -> VisionLanguageModel:
    return VisionLanguageModel.from_parts({"config": CLIP}, connector, {"config": LLM}).eval()


def test_several_crops_of_an_image_stand_one_behind_the_other() -> None:
    model = of_parts("mlp")
    found = seen_by(model.get_decoder())
    slots = [model.config.image_token_id] * model.num_tokens(ImageLayout(((3, 3), (3, 3))))
    model(torch.tensor([[5, *slots, 6]]), pixel_values=pixels(2), num_crops=torch.tensor([2]))
    (time, rows, columns), crop = found[0][:, 0].tolist(), [0, 1, 2]
    assert time == [0, *[1] * 9, *[4] * 9, 7]
    assert rows == [0, *[1 + row for row in crop for _ in crop], *[4 + row for row in crop for _ in crop], 7]
    assert columns == [0, *[1 + column for column in crop] * 3, *[4 + column for column in crop] * 3, 7]


def test_tokens_without_a_grid_count_as_text_and_hidden_ones_not_at_all() -> None:
    model = of_parts({"name": "perceiver", "options": {"num_latents": 3, "num_layers": 1, "num_heads": 2}})
    found = seen_by(model.get_decoder())
    ids = torch.tensor([[5, *[model.config.image_token_id] * 3, 6]])
    model(ids, pixel_values=pixels(1))
    assert found.pop()[:, 0].tolist() == [[0, 1, 2, 3, 4]] * 3
    visual = model.encode_images(ids, pixels(1))
    visual.filled[0, 2] = False
    model(ids, visual=visual)
    assert found.pop()[:, 0].tolist() == [[0, 1, 2, 2, 3]] * 3


def test_offsets_of_a_grid() -> None:
    offsets = grid_offsets([[(2, 3)], []])
    assert offsets.shape == (2, 6, 4)
    places, slot = torch.arange(9)[None], torch.tensor([[-1, 0, 1, 2, 3, 4, 5, 5, 5]])
    is_image = torch.tensor([[False, *[True] * 6, False, False]])
    found = on_grids(places, offsets[:1], slot, is_image)[:, 0].tolist()
    assert found == [[0, *[1] * 6, 4, 5], [0, 1, 1, 1, 2, 2, 2, 4, 5], [0, 1, 2, 3, 1, 2, 3, 4, 5]]
