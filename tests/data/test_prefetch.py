"""Work done ahead: the same results in the same order, errors in their place, and nothing left behind."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from vlmzoo.data.prefetch import prefetched
from vlmzoo.data.records import RecordError


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("depth", [0, 1, 2, 7, 100])
def test_results_come_in_order(depth: int, workers: int) -> None:
    assert list(prefetched(range(20), lambda number: number**2, depth, workers=workers)) == [n**2 for n in range(20)]
    assert list(prefetched([], str, depth, workers=workers)) == []
    assert threads() == []


def test_later_work_that_is_done_first_waits_its_turn() -> None:
    later = threading.Event()

    def make(number: int) -> int:
        if number == 0:
            assert later.wait(60)
        if number == 1:
            later.set()
        return number

    assert list(prefetched(range(4), make, 2, workers=2)) == [0, 1, 2, 3]


def test_it_is_done_ahead_but_not_too_far() -> None:
    """While the caller holds result n, results up to n + depth are made, of work that its own thread took."""
    taken, made = [], [threading.Event() for _ in range(10)]

    def work() -> Iterator[int]:
        for number in range(10):
            taken.append((number, threading.current_thread()))
            yield number

    with closing(prefetched(work(), lambda number: made[number].set(), 3)) as results:
        next(results)
        assert all(event.wait(60) for event in made[:4])
        assert [number for number, _ in taken] == [0, 1, 2, 3]
        next(results)
        assert made[4].wait(60)
        assert [number for number, _ in taken] == [0, 1, 2, 3, 4]
    assert {thread for _, thread in taken} == {threading.current_thread()}


@pytest.mark.parametrize("depth", [0, 1, 4])
def test_an_error_comes_as_it_is_in_its_place(depth: int) -> None:
    error = RecordError("data.json[5]: no such image")

    def make(number: int) -> int:
        if number == 5:
            raise error
        return number

    results = prefetched(range(10), make, depth)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(RecordError) as raised:
        next(results)
    assert raised.value is error
    assert threads() == []


def test_an_error_of_the_work_itself_comes_through() -> None:
    def work() -> Iterator[int]:
        yield 1
        raise RecordError("no more")

    with pytest.raises(RecordError, match="no more"):
        list(prefetched(work(), str, 2))
    assert threads() == []


@pytest.mark.parametrize("leave", ["close", "forget", "interrupt"])
def test_who_leaves_early_leaves_no_thread(leave: str) -> None:
    begun = []
    items = prefetched(range(10**9), begun.append, 2)
    next(items)
    if leave == "close":
        items.close()
    elif leave == "forget":
        del items
        gc.collect()
    else:
        with pytest.raises(KeyboardInterrupt), closing(items):
            raise KeyboardInterrupt
    assert threads() == []
    assert len(begun) <= 3


PROGRAM = """
import signal, sys, threading
from vlmzoo.data.prefetch import prefetched
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
for number in prefetched(iter(int, 1), lambda number: number, 2):
    print("working", flush=True)
    threading.Event().wait()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_the_process(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"working\n"
        os.kill(process.pid, number)
        assert process.wait(60) == -number
