"""The pages that commands make are those that are committed."""

from __future__ import annotations

import re
from pathlib import Path

from tests.interop.interleaved import CASES
from tests.interop.parity import num_faults
from vlmzoo.sweeps.cards import cards

DOCS = Path(__file__).parents[1] / "docs"


def test_the_cards_are_of_these_connectors() -> None:
    page, pictures = cards()
    assert (DOCS / "connectors.md").read_text() == page, "run `make docs`"
    assert {file.name: file.read_text() for file in (DOCS / "connectors").glob("*.svg")} == pictures


def test_every_imported_class_is_in_the_parity_table() -> None:
    rows = re.findall(r"^\| (\w+) \|.* (\d+) of (\d+) \|$", (DOCS / "parity.md").read_text(), flags=re.MULTILINE)
    planted = [str(num_faults(name)) for name in CASES]
    assert rows == [(case.model, *[count] * 2) for case, count in zip(CASES.values(), planted, strict=True)]
