"""Asking a teacher everything of a plan that its journal lacks: several at a time, within rates and costs."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass

from vlmzoo.instruct.journal import Entry, Journal
from vlmzoo.instruct.teachers import Answer, Request, Teacher, TeacherError, estimated_tokens

FIRST_WAIT = 1.0  # seconds before the second attempt; twice as long before each further one
LONGEST_WAIT = 60.0
CAUTION = 1.5  # an estimate of tokens may be as much too low
LONGEST_RETRY_AFTER = 3600.0  # seconds that a server may ask for; beyond them it is taken to be gone


class StoppedError(ValueError):
    """The teacher is gone, or the money is spent; the journal has everything up to here."""


@dataclass(frozen=True)
class Limits:
    """How fast and how much may be asked; prices are per million tokens."""

    concurrency: int = 8
    requests_per_minute: float | None = None
    attempts: int = 8
    max_cost: float | None = None
    price_in: float = 0.0
    price_out: float = 0.0
    max_tokens: int = 1024

    def cost(self, input_tokens: float, output_tokens: float) -> float:
        return (input_tokens * self.price_in + output_tokens * self.price_out) / 1e6


class Clock:
    """Time as asyncio has it; tests put another in its place."""

    now: Callable[[], float] = staticmethod(time.monotonic)
    sleep: Callable[[float], Awaitable[None]] = staticmethod(asyncio.sleep)


class Rate:
    """A token bucket of one second's requests, and the time before which a server wants to hear of nobody."""

    def __init__(self, requests_per_minute: float | None, clock: Clock) -> None:
        self._gap = 60.0 / requests_per_minute if requests_per_minute else 0.0
        self._burst = min(1.0, self._gap) if self._gap else 0.0
        self._clock, self._next, self._paused = clock, clock.now(), 0.0

    def pause(self, seconds: float) -> None:
        self._paused = max(self._paused, self._clock.now() + seconds)

    async def turn(self) -> None:
        now = self._clock.now()
        mine = self._next = max(self._next, now - self._burst) + self._gap
        while (wait := max(mine - self._gap, self._paused) - self._clock.now()) > 0:
            await self._clock.sleep(wait)


async def ask_all(
    requests: Iterable[tuple[str, Request]],
    teacher: Teacher,
    journal: Journal,
    limits: Limits,
    told: Callable[[], None] = lambda: None,
    clock: Clock | None = None,
) -> None:
    """Asks for every (key, request) whose key the journal lacks; at most `concurrency` are under way at any time.

    Args:
        told: called after each answer.

    Raises:
        StoppedError: no request can succeed any more, or the next one might cost more than is left.
    """
    run = _Run(teacher, journal, limits, clock or Clock(), told)
    stream = ((key, request) for key, request in requests if key not in journal)
    workers = [asyncio.create_task(run.work(stream)) for _ in range(limits.concurrency)]
    try:
        await asyncio.gather(*workers)
    except StoppedError as stopped:
        if not run.spent:
            raise
        await asyncio.wait(workers)  # those under way are paid for: they are written down
        raise StoppedError(str(stopped)) from None
    finally:
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        journal.sync()


class _Run:
    def __init__(
        self, teacher: Teacher, journal: Journal, limits: Limits, clock: Clock, told: Callable[[], None]
    ) -> None:
        self.teacher, self.journal, self.limits, self.clock, self.told = teacher, journal, limits, clock, told
        self.rate = Rate(limits.requests_per_minute, clock)
        self.reserved, self.freed = 0.0, asyncio.Event()
        self.spent = False  # no request more, for its cost
        self.answered = 0

    async def work(self, stream: Iterator[tuple[str, Request]]) -> None:
        while not self.spent and (item := next(stream, None)) is not None:
            key, request = item
            cost = await self._reserve(request)
            entry = await self._entry(key, request)
            self.journal.write(entry)
            self.reserved -= cost
            self.freed.set()
            self.told()

    async def _reserve(self, request: Request) -> float:
        """What the request may cost at most, by estimate, kept back until its answer tells what it did cost.

        Raises:
            StoppedError: there is not so much left, and nobody under way keeps anything back.
        """
        if self.limits.max_cost is None:
            return 0.0
        most = self.limits.cost(CAUTION * estimated_tokens(request.input_length), self.limits.max_tokens)
        while not self.spent:
            paid = self.limits.cost(self.journal.input_tokens, self.journal.output_tokens)
            if paid + most + self.reserved <= self.limits.max_cost:
                self.reserved += most
                return most
            if paid + most > self.limits.max_cost:
                self.spent = True
                raise StoppedError(
                    f"--max-cost {self.limits.max_cost:g}: {paid:.4g} are spent on {len(self.journal)} answers, the "
                    f"next one may cost {most:.2g}; the same command with a higher one continues"
                )
            self.freed.clear()
            await self.freed.wait()
        raise StoppedError("spent")  # another said so in full

    async def _entry(self, key: str, request: Request) -> Entry:
        """What is written down of a request: its answer, or why there is none."""
        facts = request.facts
        try:
            answer = await self._answer(request)
        except TeacherError as error:
            if error.fate == "stop":
                raise StoppedError(str(error)) from None
            return Entry(key, facts.id, request.kind, failed=error.reason)
        failed = "cut_off" if answer.cut_off else ""
        return Entry(key, facts.id, request.kind, answer.text, failed, answer.input_tokens, answer.output_tokens)

    async def _answer(self, request: Request) -> Answer:
        """The answer after as many attempts as it takes.

        Raises:
            TeacherError: it is refused, or every attempt failed while others were answered.
            StoppedError: every attempt failed, and meanwhile nobody was answered: the teacher is gone.
        """
        before = self.answered
        for attempt in range(1, self.limits.attempts + 1):
            await self.rate.turn()
            try:
                answer = await self.teacher.ask(request)
            except TeacherError as error:
                if error.fate != "retry":
                    raise
                if (error.wait or 0) > LONGEST_RETRY_AFTER:
                    raise StoppedError(f"{error}; it asks to wait {error.wait:g} s") from None
                if attempt == self.limits.attempts:
                    if self.answered > before:
                        raise
                    times = f"{attempt} attempts" if attempt > 1 else "the only attempt"
                    raise StoppedError(f"{error}; so ended {times}, and no request got an answer meanwhile") from None
                if error.wait is not None:
                    self.rate.pause(error.wait)
                else:
                    longest = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
                    await self.clock.sleep(longest * random.uniform(0.5, 1.0))
            else:
                self.answered += 1
                return answer
        raise AssertionError("unreachable: the last attempt returns or raises")
