"""What a teacher is told: for each kind a system prompt, examples, and an image's captions and boxes, as text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import yaml

from vlmzoo.instruct.annotations import Facts
from vlmzoo.instruct.gate import parse

KINDS = ("conversation", "detailed_description", "complex_reasoning")

Message = dict[str, str]  # role, content


class PromptError(ValueError):
    """A prompt's file that cannot be used; the message names it."""


@dataclass(frozen=True)
class Prompt:
    """One kind's messages before the image's own; `version` changes with every letter of them."""

    kind: str
    shots: tuple[Message, ...]
    answer_length: float  # characters of an example's answer, on average
    version: str

    def messages(self, facts: Facts) -> list[Message]:
        return [*self.shots, {"role": "user", "content": described(facts)}]


def described(facts: Facts) -> str:
    """The image's stand-in, as LLaVA has it: its captions, then a line an object."""
    objects = [
        f"{thing.category}{' (a group)' if thing.crowd else ''}: {[round(value, 2) for value in thing.box]}"
        for thing in facts.things
    ]
    return _stand_in(facts.captions, objects)


def read_prompts(folder: Path | None = None) -> dict[str, Prompt]:
    """The prompts of all kinds, from `<kind>/{system.txt,examples.yaml}` in a folder, or those of the package.

    Raises:
        PromptError: a file is missing, or is not as expected.
    """
    if folder is not None and not folder.is_dir():
        raise PromptError(f"{folder}: no such folder of prompts")
    root = resources.files("vlmzoo.instruct") / "prompts" if folder is None else folder
    return {kind: _read(root / kind, kind) for kind in KINDS}


def _read(folder: Traversable, kind: str) -> Prompt:
    system, examples = (_text(folder / name) for name in ("system.txt", "examples.yaml"))
    where = f"{folder}/examples.yaml"
    try:
        found = yaml.safe_load(examples) or []
    except yaml.YAMLError as error:
        raise PromptError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, list):
        raise PromptError(f"{where}: expected a list of examples")
    shots: list[Message] = [{"role": "system", "content": system.strip()}]
    answers = [_example(item, f"{where}: example {number}", shots) for number, item in enumerate(found, 1)]
    length = sum(answers) / len(answers) if answers else 600.0
    version = hashlib.sha256(json.dumps([kind, shots]).encode()).hexdigest()[:16]
    return Prompt(kind, tuple(shots), length, version)


def _example(item: Any, where: str, shots: list[Message]) -> int:
    """Adds an example's question and answer; gives the answer's length."""
    if not isinstance(item, dict) or set(item) != {"captions", "objects", "turns"}:
        raise PromptError(f"{where}: expected captions, objects and turns")
    if not all(isinstance(item[key], list) for key in item):
        raise PromptError(f"{where}: captions, objects and turns must be lists")
    if not all(isinstance(text, str) for text in (*item["captions"], *item["objects"])):
        raise PromptError(f'{where}: captions and objects must be texts, objects as in "dog: [0.1, 0.2, 0.5, 0.8]"')
    answer = json.dumps(item["turns"], ensure_ascii=False)
    if isinstance(reason := parse(answer), str):
        raise PromptError(f"{where}: its turns are no answer ({reason}): expected a list of question and answer")
    shots.append({"role": "user", "content": _stand_in(item["captions"], item["objects"])})
    shots.append({"role": "assistant", "content": answer})
    return len(answer)


def _stand_in(captions: Any, objects: Any) -> str:
    return "\n".join([*captions, "", *objects]).strip()


def _text(file: Traversable) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
