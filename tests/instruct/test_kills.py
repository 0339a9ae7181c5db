"""Killed by SIGKILL again and again, the same command ends with the same file, and asks nothing twice.

What may be asked again is what was in flight: sent, and not yet in the journal when the kill came. That is at most
`--concurrency` requests a kill. An answer that is in the journal is never asked for again.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from threading import RLock
from types import FrameType

import pytest
from tqdm import tqdm

from tests.instruct import coco
from tests.instruct.server import Reply, completion, serving, turns
from vlmzoo.cli import main

KILLS = 12
IMAGES = 120
FEW = 40  # counting calls is slow
CONCURRENCY = 4


def forked(arguments: list[str], before: Callable[[], None] = lambda: None) -> int:
    """The id of a process that does what the command does."""
    if child := os.fork():
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        tqdm.set_lock(RLock())  # its own is shared with forks: one that is killed holding it would stop all others
        before()
        os._exit(main(arguments))
    except BaseException:
        os._exit(99)


def ended(child: int) -> bool:
    """Whether the process ended by itself; it was killed otherwise."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return False
    assert os.WEXITSTATUS(status) == 0
    return True


def journalled(out: Path) -> set[int]:
    """The images of whole lines."""
    file = out.with_suffix(".journal.jsonl")
    text = file.read_text() if file.exists() else ""
    return {json.loads(line)["image"] for line in text[: text.rfind("\n") + 1].splitlines()}


def image_of(text: str) -> int:
    found = re.search(r"\((\d+)\)", text)
    assert found
    return 10 + int(found[1])


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.instruct), pytest.param(2, marks=pytest.mark.instruct)]
)
def test_a_server_is_asked_once_but_for_what_was_in_flight(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    folder, out, whole = coco.write(tmp_path / "coco", IMAGES), tmp_path / "a.json", tmp_path / "whole.json"
    victim, kill_at, behind = 0, -1, False

    def reply(index: int, text: str) -> Reply:
        if index == kill_at and not behind:
            os.kill(victim, signal.SIGKILL)
        return completion(turns(image_of(text)))

    def after(index: int) -> None:
        if index == kill_at and behind:
            os.kill(victim, signal.SIGKILL)

    with serving(reply, delay=0.001) as server:
        server.after = after
        options = f"--proportions 1:0:0 --teacher openai --model m --base-url {server.url} --concurrency {CONCURRENCY}"
        options = options.split()
        assert main(["synthesize", str(folder), "--out", str(whole), *options]) == 0  # forks find all imported
        assert sorted(map(image_of, server.asked)) == [10 + n for n in range(IMAGES)]
        server.asked.clear()

        kills, previous, total = 0, set(), 0
        while True:
            known = journalled(out)
            server.asked.clear()
            left = IMAGES - len(known)
            kill_at = draw.randrange(max(1, 2 * left // (KILLS - kills + 1))) if kills < KILLS else -1
            behind = draw.random() < 0.5
            victim = forked(["synthesize", str(folder), "--out", str(out), *options])
            by_itself = ended(victim)
            asked = [image_of(text) for text in server.asked]
            total += len(asked)
            assert len(set(asked)) == len(asked)
            assert not known & set(asked), "asked although it was written down"
            in_flight = set(previous) - known
            assert len(in_flight) <= CONCURRENCY
            if by_itself:
                break
            kills += 1
            previous = asked
    assert kills == KILLS
    assert IMAGES <= total <= IMAGES + KILLS * CONCURRENCY
    assert len(out.with_suffix(".journal.jsonl").read_text().splitlines()) == IMAGES
    assert out.read_bytes() == whole.read_bytes()
    assert len(json.loads(out.read_text())) == IMAGES


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.instruct)])
def test_the_rules_give_the_same_bytes_wherever_they_are_killed(seed: int, tmp_path: Path) -> None:
    draw = random.Random(seed)
    folder, out, whole = coco.write(tmp_path / "coco", FEW), tmp_path / "a.json", tmp_path / "whole.json"
    counted = tmp_path / "calls"

    def killed_at(call: int) -> Callable[[], None]:
        seen = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal seen
            seen += 1
            if seen == call:
                os.kill(os.getpid(), signal.SIGKILL)

        return lambda: sys.setprofile(count)

    def counting() -> None:
        seen = 0

        def count(frame: FrameType, event: str, argument: object) -> None:
            nonlocal seen
            seen += 1
            if frame.f_code.co_name == "whole_file" or seen % 50_000 == 0:
                counted.write_text(str(seen))

        sys.setprofile(count)

    command = ["synthesize", str(folder), "--seed", str(seed), "--out"]
    assert main([*command, str(whole)]) == 0  # forks find all imported
    assert ended(forked([*command, str(tmp_path / "again.json")], counting))
    most = int(counted.read_text())
    states = []
    for _ in range(KILLS):
        if ended(forked([*command, str(out)], killed_at(draw.randrange(1, most)))):
            out.unlink()  # it was quicker than the first time: what was asked is in the journal
        states.append(len(journalled(out)))
        assert not out.exists() or out.read_bytes() == whole.read_bytes()
    assert states == sorted(states)
    assert ended(forked([*command, str(out)]))
    for ending in (".json", ".rejected.jsonl"):
        assert out.with_suffix(ending).read_bytes() == whole.with_suffix(ending).read_bytes()
    lines = out.with_suffix(".journal.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == FEW


def test_ctrl_c_leaves_a_journal_from_which_the_same_command_goes_on(tmp_path: Path) -> None:
    folder, out = coco.write(tmp_path / "coco", FEW), tmp_path / "a.json"
    child = 0

    def reply(index: int, text: str) -> Reply:
        if index == 9:
            os.kill(child, signal.SIGINT)
        return completion(turns(image_of(text)))

    with serving(reply, delay=0.001) as server:
        options = f"--proportions 1:0:0 --teacher openai --model m --base-url {server.url} --concurrency 3"
        command = ["synthesize", str(folder), "--out", str(out), *options.split()]
        child = forked(command, lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None)
        _, status = os.waitpid(child, 0)
        assert os.WEXITSTATUS(status) == 130
        known = journalled(out)
        assert 0 < len(known) < FEW
        assert not out.exists()
        server.asked.clear()
        assert main(command) == 0
        assert {image_of(text) for text in server.asked} == {10 + n for n in range(FEW)} - known
