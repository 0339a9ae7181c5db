"""From annotations to instruction data: everything is asked once, then all answers are judged in the plan's order."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlmzoo.files import held, whole_file, write_whole
from vlmzoo.instruct import gate, report
from vlmzoo.instruct.annotations import Annotations
from vlmzoo.instruct.ask import Limits, ask_all
from vlmzoo.instruct.duplicates import Duplicates
from vlmzoo.instruct.grounding import Scene, Turn
from vlmzoo.instruct.journal import Entry, Journal, key_of
from vlmzoo.instruct.plan import num_requests, requests
from vlmzoo.instruct.prompts import Prompt, described
from vlmzoo.instruct.report import Sample, Tally
from vlmzoo.instruct.teachers import Request, Teacher, estimated_tokens
from vlmzoo.instruct.words import Vocabulary


@dataclass(frozen=True)
class Job:
    """All that decides what is asked, and where it is written: OUT.json, and beside it the rest."""

    annotations: Annotations
    prompts: Mapping[str, Prompt]
    proportions: Mapping[str, int]
    out: Path
    limit: int | None = None
    seed: int = 0
    images: Path | None = None  # where the report finds image files
    limits: Limits = field(default_factory=Limits)
    format_prompt: str = ""  # ends a record's first question

    def beside(self, ending: str) -> Path:
        return self.out.with_suffix(ending)

    def __len__(self) -> int:
        return num_requests(len(self.annotations), self.proportions, self.limit)

    def requests(self) -> Iterator[Request]:
        for image, kind in requests(len(self.annotations), self.proportions, self.limit, self.seed):
            yield Request(kind, self.annotations[image], self.prompts[kind])


def estimate(job: Job) -> dict[str, dict[str, float]]:
    """For each kind how many requests there are, and an estimate of their tokens and cost.

    Lengths are those of every prompt, and of the examples' answers, at four characters a token.
    """
    found = {kind: {"requests": 0, "input_tokens": 0.0, "output_tokens": 0.0, "cost": 0.0} for kind in job.proportions}
    for request in job.requests():
        row = found[request.kind]
        row["requests"] += 1
        row["input_tokens"] += estimated_tokens(request.input_length)
        row["output_tokens"] += estimated_tokens(request.prompt.answer_length)
    for row in found.values():
        row["cost"] = job.limits.cost(row["input_tokens"], row["output_tokens"])
    return found


def synthesize(job: Job, teacher: Teacher) -> Tally:
    """Asks what has not been asked yet, then writes records, rejected answers and the report; the tally of them.

    Raises:
        StoppedError: the teacher is gone or the money is spent; the journal is whole, and the same call goes on.
        ValueError: another process works on the same file, or a package is missing.
    """
    for package in ("datasketch", "py3langid"):  # said before days of asking
        if find_spec(package) is None:
            raise ValueError(f"the quality gate needs {package}: pip install 'vlmzoo[instruct]'")
    total = len(job)
    with held(job.beside(".lock"), wait=False) as ours:
        if not ours:
            raise ValueError(f"{job.out}: another process is writing it; wait for it or choose another --out")
        with Journal(job.beside(".journal.jsonl")) as journal:
            keyed = ((_key(teacher, request), request) for request in job.requests())
            with _bar(total, "asked") as bar:
                asyncio.run(_ask(_counted(keyed, journal, bar), teacher, journal, job.limits, bar.update))
            return _judged(job, teacher, journal, total)


async def _ask(keyed: Any, teacher: Teacher, journal: Journal, limits: Limits, told: Callable[[], Any]) -> None:
    try:
        await ask_all(keyed, teacher, journal, limits, told)
    finally:
        await teacher.close()


def _counted(keyed: Iterator[tuple[str, Request]], journal: Journal, bar: Any) -> Iterator[tuple[str, Request]]:
    for key, request in keyed:
        if key in journal:
            bar.update()
        else:
            yield key, request


def _judged(job: Job, teacher: Teacher, journal: Journal, total: int) -> Tally:
    tally = Tally(job.seed, job.annotations.faults.lines())
    vocabulary, duplicates = Vocabulary(job.annotations.categories), Duplicates(total)
    entries = journal.read(_key(teacher, request) for request in job.requests())
    with (
        whole_file(job.out, alone=True) as accepted,
        whole_file(job.beside(".rejected.jsonl"), alone=True) as rejected,
        accepted.open("w", encoding="utf-8") as records,
        rejected.open("w", encoding="utf-8") as refused,
        _bar(total, "judged") as bar,
    ):
        records.write("[")
        for request, entry in zip(job.requests(), entries, strict=True):
            assert entry is not None, "everything was asked"
            turns, reason = _judge(request, entry, vocabulary, duplicates)
            if reason is None:
                records.write(",\n" if tally.accepted else "\n")
                records.write(json.dumps(_record(request, turns, job.format_prompt), ensure_ascii=False))
            else:
                place = {"image": request.facts.file_name, "kind": request.kind}
                refused.write(json.dumps({**place, "reason": reason, "answer": entry.text}, ensure_ascii=False) + "\n")
            tally.add(Sample(request.kind, request.facts, turns, entry.text, reason))
            bar.update()
        records.write("\n]\n")
    tally.input_tokens, tally.output_tokens = journal.input_tokens, journal.output_tokens
    write_whole(job.beside(".report.html"), report.render(job.out.name, teacher.identity, tally, job.images))
    return tally


def _judge(
    request: Request, entry: Entry, vocabulary: Vocabulary, duplicates: Duplicates
) -> tuple[list[Turn], str | None]:
    """The turns of an answer, as far as there are any, and the reason why it is rejected."""
    if entry.failed:
        return [], entry.failed
    turns = gate.parse(entry.text)
    if isinstance(turns, str):
        return [], turns
    reason = gate.judge(request.kind, turns, Scene(request.facts, vocabulary))
    return turns, reason or duplicates.reason(" ".join(part for turn in turns for part in turn))


def _record(request: Request, turns: list[Turn], format_prompt: str) -> dict[str, Any]:
    """LLaVA's form, and the kind."""
    said = []
    for number, (question, answer) in enumerate(turns):
        lines = [question] if number else ["<image>", question, *([format_prompt] if format_prompt else [])]
        said.append({"from": "human", "value": "\n".join(lines)})
        said.append({"from": "gpt", "value": answer})
    facts = request.facts
    return {"id": f"{facts.id}-{request.kind}", "image": facts.file_name, "conversations": said, "kind": request.kind}


def _key(teacher: Teacher, request: Request) -> str:
    return key_of(teacher.identity, request.prompt.version, request.facts.id, described(request.facts))


def _bar(total: int, what: str) -> Any:
    return tqdm(total=total, desc=what, unit="request", file=sys.stderr, disable=not sys.stderr.isatty())
