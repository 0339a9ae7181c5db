"""The lists of a large JSON object, an item at a time: COCO's files hold gigabytes once they are Python objects."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

CHUNK = 1 << 20  # characters
BEHIND = frozenset(",]}: \t\r\n")  # what may follow a value

_DECODER = json.JSONDecoder()


class MembersError(ValueError):
    """A file that is not one JSON object; the message names the file and the place."""


def members(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, item) for every item of the object's lists, in the order of the file; other values come whole.

    Raises:
        MembersError: the file cannot be read, is no JSON object, or ends too early.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _Reader(path, file).members()
    except (OSError, UnicodeDecodeError) as error:
        raise MembersError(f"{path}: cannot be read ({error})") from None
    except RecursionError:
        raise MembersError(f"{path}: not valid JSON: nested too deeply") from None


class _Reader:
    def __init__(self, path: Path, file: TextIO) -> None:
        self.path, self.file = path, file
        self.text, self.at, self.before, self.whole = "", 0, 0, False

    def members(self) -> Iterator[tuple[str, Any]]:
        self.take("{", "an object")
        if self.peek() == "}":
            return
        while True:
            key = self.value()
            self.take(":", "':'")
            if self.peek() == "[":
                self.at += 1
                for item in self.items():
                    yield key, item
            else:
                yield key, self.value()
            if self.take(",}", "',' or '}'") == "}":
                if self.peek():
                    raise self.broken("more behind the object's end")
                return

    def items(self) -> Iterator[Any]:
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.value()
            if self.take(",]", "',' or ']'") == "]":
                return

    def peek(self) -> str:
        """The next character that is no space; none at the file's end."""
        while True:
            while self.at < len(self.text):
                if not self.text[self.at].isspace():
                    return self.text[self.at]
                self.at += 1
            if not self.more():
                return ""

    def take(self, wanted: str, expected: str) -> str:
        found = self.peek()
        if not found or found not in wanted:
            raise self.broken(f"expected {expected}")
        self.at += 1
        return found

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                found, end = _DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self.more():
                    raise self.broken(error.msg) from None
            else:
                if self.text[end : end + 1] in BEHIND or not self.more():  # a number may go on in the next chunk
                    self.at = end
                    return found

    def more(self) -> bool:
        """Reads on, twice as far as what is still unread, so that a long value is tried few times."""
        if self.whole:
            return False
        rest = self.text[self.at :]
        read = self.file.read(max(CHUNK, len(rest)))
        self.before += self.at
        self.text, self.at, self.whole = rest + read, 0, not read
        return bool(read)

    def broken(self, why: str) -> MembersError:
        place = self.before + self.at
        return MembersError(f"{self.path}: not valid JSON behind character {place}: {why}")
