"""Where the records of a JSON list or of JSON lines begin, found without parsing them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlmzoo.data.storage import Place, opened, read_range

CHUNK = 1 << 18  # bytes: what stays in a core's cache
QUOTE, COMMA, BACKSLASH, NEWLINE = b'",\\\n'
OPENING, CLOSING = ord("[") & 15, ord("]") & 15  # of `{` and `}` too


def json_list(file: Place) -> tuple[np.ndarray, int]:
    """The bounds of a list's elements, (elements + 1,), and the byte behind the list; -1: the file ends within it.

    Element i and the comma or bracket behind it are the bytes from bound i to bound i + 1. What stands between bounds
    has yet to be parsed: commas inside no text, list or object of an element are all that is looked for. The file
    begins with the list.
    """
    bounds: list[np.ndarray] = []
    depth, inside, escaped = 0, False, False  # of the byte that comes next
    for start, chunk in _chunks(file):
        places, kinds, escaped = _special(chunk, escaped)
        quotes = kinds == QUOTE
        within = (np.cumsum(quotes) + inside) % 2 == 1
        inside = bool(within[-1]) if len(within) else inside
        outside = ~within & ~quotes
        places, kinds = places[outside], kinds[outside]
        depths = depth + np.cumsum(((kinds & 15) == OPENING).astype(np.int64) - ((kinds & 15) == CLOSING))
        depth = int(depths[-1]) if len(depths) else depth
        ended = np.flatnonzero(depths <= 0)[:1]
        end = int(ended[0]) + 1 if len(ended) else len(places)
        if not bounds and end:
            bounds.append(places[:1] + start + 1)
        commas = (depths[:end] == 1) & (kinds[:end] == COMMA)
        bounds.append(places[:end][commas] + start + 1)
        if len(ended):
            closed = start + int(places[end - 1]) + 1
            return np.concatenate([*bounds, np.array([closed])]), closed
    return np.concatenate(bounds or [np.zeros(0, np.int64)]), -1


def json_lines(file: Place) -> np.ndarray:
    """The bounds of lines that are not empty, (lines + 1,); empty ones belong to the line before them."""
    begins, end = [np.zeros(1, np.int64)], 0
    for start, chunk in _chunks(file):
        begins.append(np.flatnonzero(chunk == NEWLINE).astype(np.int64) + start + 1)
        end = start + len(chunk)
    bounds = np.concatenate(begins)
    bounds = bounds[bounds < end]
    lengths = np.diff(np.append(bounds, end))
    short = lengths == 1
    if len(short) and short[-1]:  # the last line may end with the file
        short[-1] = read_range(file, int(bounds[-1]), 1) == b"\n"
    for line in np.flatnonzero(lengths == 2):
        short[line] = read_range(file, int(bounds[line]), 2) == b"\r\n"
    return np.append(bounds[~short], end)


def _chunks(file: Place) -> Iterator[tuple[int, np.ndarray]]:
    """Bytes of the file, chunk by chunk, and where each begins."""
    start = 0
    with opened(file) as stream:
        while data := stream.read(CHUNK):
            yield start, np.frombuffer(data, np.uint8)
            start += len(data)


def _special(chunk: np.ndarray, escaped: bool) -> tuple[np.ndarray, np.ndarray, bool]:
    """Quotes that no backslash stands for, brackets, braces and commas: where, which, and is the next byte escaped."""
    special = (chunk == QUOTE) | (chunk == COMMA) | (chunk & 0xD9 == 0x59)  # the last: []{} and Y_y\x7f
    if escaped:
        special[0] = False
    slashes = np.flatnonzero(chunk == BACKSLASH)
    if escaped and len(slashes) and slashes[0] == 0:
        slashes = slashes[1:]
    escaped = False
    if len(slashes):
        begins = np.concatenate([[True], np.diff(slashes) != 1])
        first = slashes[begins][np.cumsum(begins) - 1]  # of the run that a backslash is in
        after = slashes[(slashes - first) % 2 == 0] + 1  # every other one of a run escapes what comes next
        escaped = bool(after[-1] == len(chunk))
        special[after[:-1] if escaped else after] = False
    places = np.flatnonzero(special)
    kinds = chunk[places]
    real = (kinds != ord("Y")) & (kinds != ord("_")) & (kinds != ord("y")) & (kinds != 0x7F)
    return places[real].astype(np.int64), kinds[real], escaped
