"""Questions with their images and every arm's answer, for the report: where arms agree, and where they do not."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vlmzoo.sweeps.plan import Trial

if TYPE_CHECKING:
    from vlmzoo.data.images import ImageFile

A_CAPABILITY = 8  # samples of each
THUMBNAIL = 288  # pixels a side at most


@dataclass(frozen=True)
class Sample:
    """One question."""

    capability: str
    image: str | None  # a data URI; None: the image is not there any more
    prompt: str
    expected: str
    answers: Mapping[str, str]  # arm -> what it said
    disagree: bool  # some connectors are right and others wrong


def samples(trials: Sequence[Trial]) -> list[Sample]:
    """Of each capability A_CAPABILITY questions of the first task, half of them where connectors disagree.

    The answers are those of the first seed, encoder and LLM of the study for which there are any.
    """
    shown = _one_seed(trials)
    if not shown or not shown[0].run.evaluation:
        return []
    task = next(iter(shown[0].run.evaluation))
    told = {trial.connector: _predictions(trial, task) for trial in shown}
    first = next(iter(told.values()))
    by_capability: dict[str, list[str]] = {}
    for identity, item in first.items():
        by_capability.setdefault(item["capability"], []).append(identity)
    images = _images(shown[0], task)
    connectors = [trial.connector for trial in shown if not trial.is_baseline]

    def sample(identity: str) -> Sample:
        item = first[identity]
        return Sample(
            capability=item["capability"],
            image=_thumbnail(images.get(identity)),
            prompt=item["prompt"],
            expected=item["expected"],
            answers={arm: said[identity]["answer"] for arm, said in told.items()},
            disagree=mixed(identity),
        )

    def mixed(identity: str) -> bool:
        return len({told[connector][identity]["score"] for connector in connectors}) > 1

    chosen = []
    for identities in by_capability.values():
        disagreed = [identity for identity in identities if mixed(identity)][: A_CAPABILITY // 2]
        others = [identity for identity in identities if identity not in disagreed]
        chosen += sorted([*disagreed, *others[: A_CAPABILITY - len(disagreed)]], key=identities.index)
    return [sample(identity) for identity in chosen]


def _one_seed(trials: Sequence[Trial]) -> list[Trial]:
    """The finished trials of one seed, encoder and LLM: connectors first, then baselines."""
    done = [trial for trial in trials if trial.result() is not None]
    connectors = [trial for trial in done if not trial.is_baseline]
    if not connectors:
        return []
    first = connectors[0]
    same = [t for t in connectors if (t.seed, t.encoder, t.llm) == (first.seed, first.encoder, first.llm)]
    return same + [t for t in done if t.is_baseline and (t.seed, t.llm) == (first.seed, first.llm)]


def _predictions(trial: Trial, task: str) -> dict[str, dict[str, Any]]:
    lines = (trial.folder / "predictions" / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return {item["id"]: item for item in map(json.loads, lines)}


def _images(trial: Trial, task: str) -> dict[str, ImageFile]:
    """Question -> its first image, as far as the data set is still there."""
    from vlmzoo import build

    data = trial.run.evaluation[task].data
    try:
        return {record.id: record.images[0] for record in build.source(data) if record.images}
    except ValueError:
        return {}


def _thumbnail(file: ImageFile | None) -> str | None:
    if file is None:
        return None
    from vlmzoo.data.images import load_image

    image = load_image(file, where=str(file))
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="JPEG", quality=88)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
