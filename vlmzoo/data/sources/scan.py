"""Where the records of a JSON list or of JSON lines begin, found without parsing them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from vlmzoo.data.storage import Place, opened, read_range

CHUNK = 1 << 18  # bytes, a multiple of WORD: what stays in a core's cache
WORD = 64  # bytes, each of which is a bit of an integer
QUOTE, COMMA, BACKSLASH, NEWLINE = b'",\\\n'
OPENING, CLOSING = ord("[") & 15, ord("]") & 15  # of `{` and `}` too
ONE, TOP, ODD = (np.uint64(value) for value in (1, WORD - 1, 0xAAAAAAAAAAAAAAAA))
SHIFTS = [np.uint64(1 << power) for power in range(6)]


def json_list(file: Place) -> tuple[np.ndarray, int]:
    """The bounds of a list's elements, (elements + 1,), and the byte behind the list; -1: the file ends within it.

    Element i and the comma or bracket behind it are the bytes from bound i to bound i + 1. What stands between bounds
    has yet to be parsed: commas inside no text, list or object of an element are all that is looked for. The file
    begins with the list.

    Source: Langdale and Lemire, Parsing Gigabytes of JSON per Second (2019), section 3.1.
    """
    bounds: list[np.ndarray] = []
    depth = 0  # of the byte that comes next
    for start, places, kinds in _outside_texts(file):
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


def _outside_texts(file: Place) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Where each chunk of the file begins, and its brackets, braces and commas that no text holds: where, and which.

    Letters that look like them, `Y`, `_`, `y` and delete, are among them; outside texts valid JSON has none.
    """
    mask, other, masked = np.empty(CHUNK, bool), np.empty(CHUNK, bool), np.empty(CHUNK, np.uint8)
    inside = escaped = np.uint64(0)  # whether the byte that comes next is
    for start, chunk in _chunks(file):
        if rest := -len(chunk) % WORD:  # the last one, or a read that gave less than it was asked for
            chunk = np.append(chunk, np.zeros(rest, np.uint8))
        size = len(chunk)
        quotes = _bits(np.equal(chunk, QUOTE, out=mask[:size]))
        slashes = _bits(np.equal(chunk, BACKSLASH, out=mask[:size]))
        if escaped or slashes.any():
            behind, escaped = _escaped(slashes, escaped)
            if rest:
                escaped = (behind[-1] >> np.uint64(WORD - rest)) & ONE
            quotes &= ~behind
        texts, inside = _inside(quotes, inside)
        np.equal(np.bitwise_and(chunk, 0xD9, out=masked[:size]), 0x59, out=other[:size])
        found = _bits(np.logical_or(np.equal(chunk, COMMA, out=mask[:size]), other[:size], out=mask[:size])) & ~texts
        eights = found.view(np.uint8)  # bits of eight bytes; few have any
        some = np.flatnonzero(eights != 0)
        bits = np.flatnonzero(np.unpackbits(eights.take(some), bitorder="little"))
        places = some.take(bits >> 3) * 8 + (bits & 7)
        yield start, places, chunk.take(places)


def _bits(mask: np.ndarray) -> np.ndarray:
    """(bytes,) -> (words,): the first byte is the lowest bit of the first word."""
    return np.packbits(mask, bitorder="little").view(np.uint64)


def _escaped(slashes: np.ndarray, first: np.uint64) -> tuple[np.ndarray, np.uint64]:
    """Which bytes are escaped by a backslash before them, that is not escaped itself; and is the one behind them all.

    Args:
        first: whether the first byte is.
    """
    carried = np.zeros_like(slashes)
    while True:  # until what words tell those behind them is what was taken for granted: twice, but for long runs
        escaping = slashes & ~carried
        series = (((escaping << ONE) | ODD) - escaping) ^ ODD
        ends = (series & slashes) >> TOP
        told = np.append(first, ends[:-1])
        if (told == carried).all():
            return series ^ (slashes | carried), ends[-1]
        carried = told


def _inside(quotes: np.ndarray, first: np.uint64) -> tuple[np.ndarray, np.uint64]:
    """Which bytes stand behind an odd number of quotes, their own included; and does the one behind them all.

    Args:
        first: whether the byte before the first one does.
    """
    odd = quotes
    for shift in SHIFTS:
        odd = odd ^ (odd << shift)
    flips = np.bitwise_xor.accumulate(np.append(first, odd[:-1] >> TOP))
    odd = odd ^ -flips  # 0 or all ones
    return odd, odd[-1] >> TOP
