"""Models of transformers against the same ones with our connector, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.connectors.parts import distance
from tests.interop.cases import parameters
from tests.interop.interleaved import CASES
from vlmzoo.interop import from_hf, load, to_hf

TOLERANCE = 1e-4
NEW = 6
MARKERS = [90, 91, 92, 93]
"""Ids that stand for images or mark their ends: no answer holds them."""


def logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Where a token is real: what stands in the padding is nobody's."""
    with torch.no_grad():
        return model(**inputs).logits[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("name", parameters(CASES, CASES))
def test_the_same_logits_and_tokens(name: str) -> None:
    case = CASES[name]
    theirs, inputs = case.build(), case.inputs()
    ours = from_hf(theirs)
    foreign = [
        type(module).__name__ for module in ours.connector.modules() if "transformers" in type(module).__module__
    ]
    assert not foreign
    expected = logits(theirs, inputs)
    assert expected.std() > 0.1
    assert distance(logits(ours, inputs), expected) <= TOLERANCE
    moved = {**inputs, "pixel_values": inputs["pixel_values"].roll(1, -1)}
    assert distance(logits(ours, moved), expected) > 10 * TOLERANCE, "the images matter"
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": MARKERS}
    wanted = theirs.generate(**inputs, **options)[:, -NEW:]
    assert torch.equal(ours.generate(**inputs, **options)[:, -NEW:], wanted)


@pytest.mark.parametrize("name", parameters(CASES, CASES))
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    theirs, inputs = case.build(), case.inputs([1, 1])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs")
    expected = logits(theirs, inputs)
    assert distance(logits(ours, inputs), expected) <= TOLERANCE
    ours.save_pretrained(tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert type(again) is type(ours)
    assert torch.equal(logits(again, inputs), logits(ours, inputs))


@pytest.mark.parametrize("name", parameters(CASES, [name for name, case in CASES.items() if case.back]))
def test_there_and_back(name: str) -> None:
    case = CASES[name]
    theirs, inputs = case.build(), case.inputs()
    back = to_hf(from_hf(theirs))
    assert type(back) is type(theirs)
    expected, found = theirs.state_dict(), back.state_dict()
    assert set(found) == set(expected)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert torch.equal(logits(back, inputs), logits(theirs, inputs))
