"""The values of a JSON list or of JSON lines, one at a time, as they stand in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK = 1 << 20  # characters read at once


def values(file: Path) -> Iterator[Any]:
    """The values of a JSON list, or of JSON lines, one after the other: never more than one in memory.

    Raises:
        ValueError: the file is neither.
    """
    with file.open(encoding="utf-8") as opened:
        if file.suffix == ".jsonl":
            yield from (json.loads(line) for line in opened if line.strip())
            return
        decoder, text, block = json.JSONDecoder(), opened.read(BLOCK), BLOCK
        while text.isspace():
            text = opened.read(BLOCK)
        place = len(text) - len(text.lstrip()) + 1  # behind the bracket
        while True:
            rest = text[place:].lstrip(" \t\r\n,")
            try:
                if rest.startswith("]"):
                    return
                value, end = decoder.raw_decode(rest)
                if rest[end : end + 1] not in (*" \t\r\n,]",):  # a number may go on
                    raise ValueError("cut")
            except ValueError:
                more = opened.read(block)
                if not more:
                    raise ValueError(f"{file}: ends in the middle of a record") from None
                text, place, block = rest + more, 0, 2 * block  # one that is longer than a block is not tried in vain
                continue
            yield value
            text, place, block = rest, end, BLOCK
