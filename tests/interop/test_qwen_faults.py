"""Qwen-VL with faults planted in what is particular to it: the comparison with transformers' own catches each."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.connectors.parts import distance
from tests.interop.cases import CASES, IMAGE
from tests.interop.test_parity import TOLERANCE, logits
from vlmzoo import model as vlm
from vlmzoo.interop import from_hf
from vlmzoo.vision import towers
from vlmzoo.vision.blocks import from_blocks


def steps(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Logits (steps, batch, vocab_size) while decoding."""
    options = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": [IMAGE], "output_logits": True}
    return torch.stack(model.generate(**inputs, **options, return_dict_in_generate=True).logits)


def compare(name: str) -> tuple[float, float]:
    """The largest difference of the prompt's logits, and of those while decoding."""
    case = CASES[name]
    theirs, inputs = case.build(), case.inputs()
    ours = from_hf(theirs)
    prompt = distance(logits(ours, inputs), logits(theirs, inputs))
    return prompt, distance(steps(ours, inputs), steps(theirs, inputs))


def arrange(monkeypatch: pytest.MonkeyPatch, by: Any) -> None:
    """All towers give their patches back in this order."""
    for name in ("qwen2_vl_vision", "qwen2_5_vl_vision", "qwen3_vl_vision"):
        fault = dataclasses.replace(towers.TOWERS[name], arrange=towers._from_packed(by))
        monkeypatch.setitem(towers.TOWERS, name, fault)


def blocks_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    arrange(monkeypatch, lambda config, state, grid: state)


def windows_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    arrange(monkeypatch, from_blocks)


def rows_for_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vlm.on_grids
    monkeypatch.setattr(vlm, "on_grids", lambda *args: right(*args)[[0, 2, 1]])


def no_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm, "has_axes", lambda config: False)


def text_counts_on_from_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def decoding(places: Tensor, offsets: Tensor, slot: Tensor, is_image: Tensor) -> Tensor:
        found = right(places, offsets, slot, is_image)
        return found if places.shape[1] > 1 else places.expand(len(slot), -1).expand(3, -1, -1)

    right = vlm.on_grids
    monkeypatch.setattr(vlm, "on_grids", decoding)


def additions_a_layer_late(monkeypatch: pytest.MonkeyPatch) -> None:
    right = vlm.VisionLanguageModel._in_llm

    def late(*args: Any, **kwargs: Any) -> Any:
        call = right(*args, **kwargs)
        return dataclasses.replace(call, additions={layer + 1: value for layer, value in call.additions.items()})

    monkeypatch.setattr(vlm.VisionLanguageModel, "_in_llm", late)


PLANTED = [
    ("qwen2_vl", blocks_as_they_are),
    ("qwen2_5_vl", windows_not_undone),
    ("qwen3_vl", blocks_as_they_are),
    ("qwen3_vl", additions_a_layer_late),
    *[(name, fault) for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl") for fault in (rows_for_columns, no_grids)],
]


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_without_a_fault_all_steps_agree(name: str) -> None:
    assert max(compare(name)) <= TOLERANCE


@pytest.mark.parametrize(("name", "plant"), PLANTED)
def test_a_planted_fault_is_caught(name: str, plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    assert compare(name)[0] > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_steps_that_forget_the_images_grids_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text_counts_on_from_its_place(monkeypatch)
    prompt, decoding = compare(name)
    assert prompt <= TOLERANCE
    assert decoding > 10 * TOLERANCE
