"""ScienceQA: multiple choice with and without images, answered by a letter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmzoo.data.records import IMAGE_TOKEN, RecordError
from vlmzoo.data.sources.packed import PackedSource
from vlmzoo.data.sources.source import Source, file_fingerprint, unreadable
from vlmzoo.data.storage import ImageFolder
from vlmzoo.registry import unknown

LETTERS = "ABCDEFGHIJ"
ASKED = "Answer with the option's letter from the given choices directly."


def open_scienceqa(folder: Path, split: str | None, images: str | None) -> Source:
    """The problems of a split, in its order: question, context, choices, and the letter of the right one.

    Args:
        folder: with problems.json and pid_splits.json.
        images: the folder of `SPLIT/ID/image.png`; None: `images/` in the folder.

    Raises:
        RecordError: not such a folder, no split or one that it lacks, or a problem with a fault.

    Source: Lu et al., Learn to Explain (2022); LLaVA's convert_sqa_to_llava.py, layout QCM-A, with the answer as
    LLaVA-1.5 asks for it.
    """
    problems, splits = (_read(folder / name) for name in ("problems.json", "pid_splits.json"))
    if split is None:
        raise RecordError(f"{folder}: has splits {', '.join(splits)}; name one, as {folder}:{next(iter(splits), '')}")
    if split not in splits:
        raise RecordError(f"{folder}: {unknown('split', split, splits)}")
    find = ImageFolder(Path(images).expanduser() if images else folder / "images", str(folder))
    values = _values(folder, problems, split, splits[split])
    return PackedSource(f"{folder.name}:{split}", values, find, lambda: file_fingerprint(folder / "problems.json"))


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise RecordError(f"{file}: not valid JSON at line {error.lineno}: {error.msg}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(file, error) from None
    if not isinstance(found, dict):
        raise RecordError(f"{file}: expected an object by ScienceQA's ids or splits")
    return found


def _values(folder: Path, problems: dict[str, Any], split: str, names: list[str]) -> Iterator[dict[str, Any]]:
    for name in names:
        where = f"{folder / 'problems.json'}: problem {name!r}"
        if name not in problems:
            raise RecordError(f"{where} of split {split} is not there")
        problem = problems[name]
        try:
            question, choices, answer = problem["question"], problem["choices"], problem["answer"]
            hint, image = problem.get("hint") or "N/A", problem.get("image")
        except (KeyError, TypeError, AttributeError):
            raise RecordError(f"{where}: expected an object with `question`, `choices` and `answer`") from None
        if not isinstance(choices, list) or len(choices) > len(LETTERS) or answer not in range(len(choices)):
            raise RecordError(f"{where}: `answer` {answer!r} is none of its choices {choices!r}")
        options = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
        text = f"{question}\nContext: {hint}\nOptions: {options}\n{ASKED}"
        talk = [("human", f"{IMAGE_TOKEN}\n{text}" if image else text), ("gpt", LETTERS[answer])]
        value: dict[str, Any] = {"id": name, "conversations": [{"from": role, "value": said} for role, said in talk]}
        if problem.get("subject"):
            value["capability"] = problem["subject"]
        yield value | ({"image": f"{split}/{name}/{image}"} if image else {})
