"""A teacher that misbehaves: asked again, rejected with a reason, or the end with the journal whole."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.instruct import coco
from tests.instruct.server import CLOSE, CUT_OFF, HANG, Reply, Server, completion, error, serving, turns
from vlmzoo.instruct.annotations import read_coco
from vlmzoo.instruct.ask import Clock, Limits, StoppedError, ask_all
from vlmzoo.instruct.journal import Entry, Journal, JournalError, key_of
from vlmzoo.instruct.prompts import read_prompts
from vlmzoo.instruct.teachers import OpenAI, Request

GOOD = completion(turns(0))


class Told(Clock):
    """Time that passes only in sleeps, and what was slept."""

    def __init__(self) -> None:
        self.time, self.slept = 0.0, []
        self.now = lambda: self.time  # type: ignore[assignment]

    async def sleep(self, seconds: float) -> None:  # type: ignore[override]
        self.slept.append(seconds)
        self.time += seconds
        await asyncio.sleep(0)


def run(
    reply: Callable[[int, str], Reply],
    folder: Path,
    count: int = 1,
    timeout: float = 30,
    delay: float = 0,
    **limits: float,
) -> tuple[list[Entry], Server, Told, StoppedError | None]:
    """What the journal holds after `count` images, how it was asked, and how it was stopped."""
    annotations, prompt = read_coco(coco.write(folder / "coco", count)), read_prompts()["conversation"]
    requests = [(key_of(facts.id), Request("conversation", facts, prompt)) for facts in annotations]
    clock, stopped = Told(), None
    settings = Limits(**{"concurrency": 1, "attempts": 4, **limits})  # type: ignore[arg-type]

    async def ask() -> None:
        teacher = OpenAI("m", server.url, max_tokens=100, timeout=timeout)
        try:
            await ask_all(requests, teacher, journal, settings, clock=clock)
        finally:
            await teacher.close()

    with serving(reply, delay) as server, Journal(folder / "journal.jsonl") as journal:
        try:
            asyncio.run(ask())
        except StoppedError as error:
            stopped = error
    lines = (folder / "journal.jsonl").read_text().splitlines()
    return [Entry(**json.loads(line)) for line in lines], server, clock, stopped


def first(fault: Reply, then: Reply = GOOD, times: int = 1) -> Callable[[int, str], Reply]:
    return lambda index, text: fault if index < times else then


@pytest.mark.parametrize(
    "fault",
    [
        error(500),
        error(503),
        error(408),
        CUT_OFF,
        CLOSE,
        (200, {"content-type": "application/json"}, "{"),
        (200, {"content-type": "text/html"}, "<p>hello</p>"),
        (200, {"content-type": "application/json"}, "[]"),
        (200, {"content-type": "application/json"}, '{"choices": []}'),
        (200, {"content-type": "application/json"}, '{"choices": [{"message": {"content": 7}}]}'),
    ],
)
def test_a_passing_fault_is_waited_out(fault: Reply, tmp_path: Path) -> None:
    (entry,), server, clock, stopped = run(first(fault, times=2), tmp_path)
    assert stopped is None
    assert (entry.text, entry.failed, entry.input_tokens, entry.output_tokens) == (turns(0), "", 100, 20)
    assert len(server.asked) == 3
    one, two = clock.slept
    assert 0.5 <= one <= 1 <= two <= 2, "twice as long the second time, with jitter"


def test_a_hanging_server_is_left_after_the_timeout(tmp_path: Path) -> None:
    (entry,), server, _, stopped = run(first(HANG), tmp_path, timeout=0.2)
    assert stopped is None
    assert entry.text == turns(0)
    assert len(server.asked) == 2


def test_retry_after_is_honoured_by_everybody(tmp_path: Path) -> None:
    found, server, clock, stopped = run(first(error(429, **{"retry-after": "7"})), tmp_path, count=3)
    assert stopped is None
    assert len(found) == 3
    assert len(server.asked) == 4
    assert clock.slept == [7.0]


def test_a_wait_beyond_an_hour_ends_the_run(tmp_path: Path) -> None:
    found, _, clock, stopped = run(lambda *_: error(429, **{"retry-after": "90000"}), tmp_path)
    assert "it asks to wait 90000 s" in str(stopped)
    assert found == clock.slept == []


@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_request_that_is_refused_is_written_down_and_not_asked_again(status: int, tmp_path: Path) -> None:
    found, server, _, stopped = run(first(error(status, "too long")), tmp_path, count=2)
    assert stopped is None
    assert [entry.failed for entry in found] == [f"http_{status}", ""]
    assert len(server.asked) == 2


def test_what_is_cut_off_is_written_down_as_that(tmp_path: Path) -> None:
    (entry,), *_ = run(lambda *_: completion("[{", finish="length"), tmp_path)
    assert (entry.failed, entry.text) == ("cut_off", "[{")


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (error(401, "bad key"), "HTTP 401"),
        (error(403), "HTTP 403"),
        (error(404, "no such model"), "no such model"),
        (error(429, "insufficient_quota"), "insufficient_quota"),
    ],
)
def test_what_no_request_can_pass_stops_at_once(fault: Reply, expected: str, tmp_path: Path) -> None:
    found, server, _, stopped = run(first(GOOD, fault), tmp_path, count=3)
    assert expected in str(stopped)
    assert "\n" not in str(stopped)
    assert len(found) == 1
    assert len(server.asked) == 2


def test_a_server_that_is_gone_stops_the_run_and_its_request_is_not_judged(tmp_path: Path) -> None:
    found, server, clock, stopped = run(first(GOOD, CLOSE, times=2), tmp_path, count=5)
    assert "so ended 4 attempts, and no request got an answer meanwhile" in str(stopped)
    assert len(found) == 2
    assert len(server.asked) == 2 + 4
    assert len(clock.slept) == 3


def test_one_request_that_never_succeeds_is_rejected_while_others_do(tmp_path: Path) -> None:
    bad = coco.captions(1)[0]["caption"]
    found, server, _, stopped = run(
        lambda index, text: error(500) if bad in text else completion(turns(index)), tmp_path, count=30, concurrency=3
    )
    assert stopped is None
    assert len(found) == 30
    assert [(entry.image, entry.failed) for entry in found if entry.failed] == [(10, "http_500")]
    assert sum(bad in text for text in server.asked) == 4


def test_no_more_are_under_way_than_were_allowed(tmp_path: Path) -> None:
    found, server, *_ = run(lambda index, text: completion(turns(index)), tmp_path, count=40, delay=0.01, concurrency=5)
    assert len(found) == 40
    assert 2 <= server.most <= 5


def test_the_rate_is_kept(tmp_path: Path) -> None:
    _, _, clock, _ = run(lambda index, text: GOOD, tmp_path, count=31, concurrency=4, requests_per_minute=60)
    assert 29 <= clock.time <= 31


def test_the_cost_is_never_passed_and_a_higher_one_continues(tmp_path: Path) -> None:
    prices = {"price_in": 1000.0, "price_out": 1000.0, "max_tokens": 100, "concurrency": 4}  # an answer costs 0.12
    found, server, _, stopped = run(lambda index, text: GOOD, tmp_path, count=40, max_cost=4.0, **prices)
    assert "the same command with a higher one continues" in str(stopped)
    assert 0 < 0.12 * len(found) <= 4.0
    assert len(server.asked) == len(found) < 40
    more, server, _, stopped = run(lambda index, text: GOOD, tmp_path, count=40, max_cost=8.0, **prices)
    assert stopped is None
    assert len(more) == 40
    assert len(server.asked) == 40 - len(found)


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    with Journal(tmp_path / "a.jsonl") as opened:
        for number in range(3):
            opened.write(Entry(key_of(number), number, "conversation", f"ü{number}\n"))
    return tmp_path / "a.jsonl"


def test_a_torn_last_line_is_cut_off(journal: Path) -> None:
    whole = journal.read_bytes()
    for end in range(whole.rindex(b"\n", 0, -1) + 1, len(whole)):
        journal.write_bytes(whole[:end])
        with Journal(journal) as opened:
            assert len(opened) == 2
            assert key_of(1) in opened
            assert key_of(2) not in opened
            opened.write(Entry(key_of(2), 2, "conversation", "ü2\n"))
        assert journal.read_bytes() == whole


def test_answers_are_found_by_their_keys(journal: Path) -> None:
    with Journal(journal) as opened:
        opened.write(Entry(key_of("new"), 9, "conversation", "x"))
        found = list(opened.read(iter([key_of("new"), key_of(1), key_of("none"), key_of(0)])))
    assert [entry and entry.text for entry in found] == ["x", "ü1\n", None, "ü0\n"]


@pytest.mark.parametrize(
    "line", ["{}", "x", '{"key": 3, "image": 1, "kind": "a"}', '{"key": "zz", "image": 1, "kind": "a"}']
)
def test_a_damaged_journal_is_refused_and_left_alone(line: str, journal: Path) -> None:
    damaged = f"{line}\n{journal.read_text()}"
    journal.write_text(damaged)
    with pytest.raises(JournalError, match="line 1 is no entry of a journal"):
        Journal(journal)
    assert journal.read_text() == damaged
