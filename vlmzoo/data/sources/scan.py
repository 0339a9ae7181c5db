"""Where the records of a JSON list or of JSON lines begin, found without parsing them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vlmzoo.data.storage import Place, opened, read_range, readers

CHUNK = 1 << 20  # bytes, a multiple of WORD: near a core's cache, and so much work that threads seldom wait
PART = 1 << 27  # bytes of a list that are looked through in one go
BETWEEN = re.compile(rb'\}\s*,\s*\{\s*"')  # two objects, and hardly ever a text
WORD = 64  # bytes, each of which is a bit of an integer
QUOTE, COMMA, BACKSLASH, NEWLINE = b'",\\\n'
STEPS = np.zeros(256, np.int8)  # into a list or object, and out of it
STEPS[list(b"[{")], STEPS[list(b"]}")] = 1, -1
ONE, TOP, ODD = (np.uint64(value) for value in (1, WORD - 1, 0xAAAAAAAAAAAAAAAA))
SHIFTS = [np.uint64(1 << power) for power in range(6)]


State = tuple[np.uint64, np.uint64]
"""Whether the byte that comes next is in a text, and whether a backslash stands before it that is not escaped."""

OUTSIDE: State = (np.uint64(0), np.uint64(0))


def json_list(file: Place) -> tuple[np.ndarray, int]:
    """The bounds of a list's elements, (elements + 1,), and the byte behind the list; -1: the file ends within it.

    Element i and the comma or bracket behind it are the bytes from bound i to bound i + 1. What stands between bounds
    has yet to be parsed: commas inside no text, list or object of an element are all that is looked for. A file that
    does not begin with a list has no bounds.

    Parts of a large file are looked through side by side, each as if it began outside texts. One that does not, as the
    part before it tells, is looked through again.

    Source: Langdale and Lemire, Parsing Gigabytes of JSON per Second (2019), section 3.1.
    """
    cuts = _cuts(file)
    bounds, depth, state = [np.array(cuts[:1], np.int64)], 0, OUTSIDE  # depth: within the list, of the byte that comes
    with ThreadPoolExecutor(readers(file)) as pool:
        pairs = list(itertools.pairwise(cuts))
        for (start, stop), part in zip(pairs, pool.map(lambda pair: _part(file, *pair), pairs), strict=True):
            if state != OUTSIDE:
                part = _part(file, start, stop, state)
            if depth <= len(part.falls):  # within the part it is 0
                edges = np.concatenate([[start], part.falls, [stop]])[depth : depth + 2]
                bounds.append(part.commas[slice(*np.searchsorted(part.commas, edges))] + 1)
            if depth < len(part.falls):
                closed = int(part.falls[depth]) + 1
                return np.concatenate([*bounds, np.array([closed])]), closed
            depth, state = depth + part.depth, part.state
    return np.concatenate(bounds), -1


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


def _cuts(file: Place) -> list[int]:
    """Where the parts of a list begin, the first one behind the bracket, and where the file ends; []: no list."""
    with opened(file) as stream:
        size = stream.seek(0, 2)
        stream.seek(0)
        head = stream.read(CHUNK)
        if not head.lstrip().startswith(b"["):
            return []
        cuts = {head.index(b"[") + 1, size}
        for place in range(PART, size, PART):
            stream.seek(place)
            if found := BETWEEN.search(stream.read(CHUNK)):
                cuts.add(place + found.start() + 1)
    return sorted(cuts)


@dataclass
class _Part:
    """What a part of a list tells; depths are counted from where it begins."""

    commas: np.ndarray  # those at the lowest depth so far
    falls: np.ndarray  # where the depth is -1 first, where -2, …
    depth: int  # at the end
    state: State  # behind it


def _part(file: Place, start: int, stop: int, state: State = OUTSIDE) -> _Part:
    commas, falls = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    depth = lowest = 0
    for at, places, kinds, behind in _outside_texts(file, start, stop, state):
        state = behind
        if not len(places):
            continue
        depths = depth + np.cumsum(STEPS.take(kinds), dtype=np.int64)
        if depths.min() < lowest:  # once in a while
            lows = np.minimum(np.minimum.accumulate(depths), lowest)
            falls.append(places[np.diff(lows, prepend=lowest) < 0] + at)
        else:
            lows = np.array([lowest])
        commas.append(places[(depths == lows) & (kinds == COMMA)] + at)
        depth, lowest = int(depths[-1]), int(lows[-1])
    return _Part(np.concatenate(commas), np.concatenate(falls), depth, state)


def _chunks(file: Place, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Bytes of the file, chunk by chunk, and where each begins."""
    with opened(file) as stream:
        stream.seek(start)
        while data := stream.read(CHUNK if stop is None else min(CHUNK, stop - start)):
            yield start, np.frombuffer(data, np.uint8)
            start += len(data)


def _outside_texts(
    file: Place, start: int, stop: int, state: State
) -> Iterator[tuple[int, np.ndarray, np.ndarray, State]]:
    """Brackets, braces and commas of a part that no text holds, chunk by chunk.

    Yields where the chunk begins, where in it they are, which they are, and the state behind it. Letters that look like
    them, `Y`, `_`, `y` and delete, are among them; outside texts valid JSON has none.
    """
    mask, other, masked = np.empty(CHUNK, bool), np.empty(CHUNK, bool), np.empty(CHUNK, np.uint8)
    inside, escaped = state
    for at, chunk in _chunks(file, start, stop):
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
        yield at, places, chunk.take(places), (inside, escaped)


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
