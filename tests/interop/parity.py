"""docs/parity.md: every imported class against the original, measured.

python -m tests.interop.parity docs
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests import timm_parts  # noqa: F401 - before transformers
from tests.connectors.parts import distance
from tests.interop import test_interleaved as interleaved
from tests.interop.interleaved import CASES
from tests.interop.test_faults import FAULTS
from tests.interop.test_parity import MARKERS, NEW, TOLERANCE, logits
from vlmzoo.files import write_whole
from vlmzoo.interop import from_hf, to_hf

HEAD = f"""# Parity with transformers

Made by `make docs`. Each class with a tiny configuration and weights rescaled until a wrong operation shows (by default
they are so small that it does not), against the model that `vlmzoo.interop.from_hf` makes of it, with our connector
inside: the largest difference of any logit in float32 over a batch of three samples of different lengths, padded on
the left, one of them with two images; whether {NEW} greedily decoded tokens are the same; whether `to_hf` gives the
original back bit for bit. `tests/interop` holds all to at most {TOLERANCE:g}, and plants the faults of the last
column, each of which must exceed it.

| class | encoder, LLM | connector | max \\|Δ logit\\| | same tokens | back | faults caught |
|---|---|---|--:|---|---|--:|
"""


@dataclass(frozen=True)
class Parity:
    """What was found of one case."""

    name: str
    model: str
    connector: str
    parts: str
    difference: float
    same_tokens: bool
    back: bool | None  # None: not offered
    caught: int
    planted: int


def num_faults(name: str) -> int:
    """How many are planted in a case."""
    return len(FAULTS.get(name, [])) + sum(other == name for other, _ in interleaved.FAULTS)


def measure(name: str) -> Parity:
    """One case against the original, and with each of its faults."""
    case = CASES[name]
    theirs, inputs = case.build(), case.inputs()
    ours = from_hf(theirs)
    expected = logits(theirs, inputs)
    options = {"max_new_tokens": NEW, "do_sample": False, "suppress_tokens": MARKERS}
    tokens = [model.generate(**inputs, **options)[:, -NEW:] for model in (ours, theirs)]
    back = None
    if case.back:
        found = to_hf(ours).state_dict()
        back = all(torch.equal(found[key], value) for key, value in theirs.state_dict().items())
    caught = 0
    for fault in FAULTS.get(name, []):
        faulty, given = from_hf(case.build()), dict(inputs)
        fault(faulty, given)
        caught += distance(logits(faulty, given), expected) > TOLERANCE
    for other, fault in interleaved.FAULTS:
        if other == name:
            faulty, given = from_hf(case.build()), interleaved.TEXT_FIRST[name].inputs((2,))
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                fault(faulty, patch)
                caught += distance(logits(faulty, given), logits(theirs, given)) > TOLERANCE
    return Parity(
        name=name,
        model=case.model,
        connector=ours.config.connector,
        parts=f"{theirs.config.vision_config.model_type}, {theirs.config.get_text_config().model_type}",
        difference=distance(logits(ours, inputs), expected),
        same_tokens=torch.equal(*tokens),
        back=back,
        caught=caught,
        planted=num_faults(name),
    )


def page(found: list[Parity]) -> str:
    """The table, and what it adds up to."""
    says = {True: "yes", False: "no", None: "–"}
    rows = [
        f"| {row.model} | {row.parts} | {row.connector} | {row.difference:.1e} | {says[row.same_tokens]} | "
        f"{says[row.back]} | {row.caught} of {row.planted} |"
        for row in found
    ]
    classes = {row.model for row in found if row.difference <= TOLERANCE and row.same_tokens}
    total = f"{sum(row.caught for row in found)} of {sum(row.planted for row in found)} planted faults caught"
    return HEAD + "\n".join(rows) + f"\n\n{len(classes)} classes at most {TOLERANCE:g} apart; {total}.\n"


if __name__ == "__main__":
    write_whole(Path(sys.argv[1]) / "parity.md", page([measure(name) for name in CASES]))
