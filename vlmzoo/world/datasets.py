"""The world's data sets as LLaVA JSON and PNG files."""

import difflib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from pathlib import Path

from PIL import Image

from vlmzoo.world import DATASETS, VERSION
from vlmzoo.world.scenes import Scene, Split, draw, sample_scene
from vlmzoo.world.text import CAPABILITIES, CAPTION_REQUEST, TAUGHT, Question, caption, conversation, sample_question

NUM_TURNS = 6  # of a stage-2 conversation: an image costs 36 tokens, a turn about a dozen

Example = tuple[Scene, list[Question]]


def captions(rng: random.Random) -> Iterator[Example]:
    """Endless scenes with the one request for their caption."""
    while True:
        scene = sample_scene(rng)
        yield scene, [Question("caption", CAPTION_REQUEST, caption(scene))]


def conversations(rng: random.Random) -> Iterator[Example]:
    """Endless scenes with several turns of questions and answers."""
    while True:
        scene = sample_scene(rng)
        yield scene, conversation(scene, rng, NUM_TURNS)


def _asked(rng: random.Random, split: Split, capabilities: Sequence[str]) -> Iterator[Example]:
    """Endless scenes of `split`, one question each: capabilities in turn, existence answered yes and no in turn."""
    for number in count():
        capability = capabilities[number % len(capabilities)]
        wanted = ("yes", "no")[number // len(capabilities) % 2] if capability == "existence" else None
        while True:
            scene, question = sample_question(rng, split, capability)
            if wanted in (None, question.answer):
                break
        yield scene, [question]


def questions(rng: random.Random) -> Iterator[Example]:
    """What models are compared by: evaluation scenes, every capability."""
    return _asked(rng, "evaluation", CAPABILITIES)


def validation(rng: random.Random) -> Iterator[Example]:
    """What learning rates are chosen by: scenes of their own, without rare combinations."""
    return _asked(rng, "validation", TAUGHT)


SOURCES = {"captions": captions, "conversations": conversations, "questions": questions, "validation": validation}


def examples(name: str, size: int, seed: int) -> Iterator[Example]:
    """The first `size` examples of a data set, without writing anything.

    Raises:
        ValueError: no data set has this name, or `size` is not positive.
    """
    if name not in DATASETS:
        names, nearest = ", ".join(DATASETS), difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown world data set {name!r}, expected one of {names}; nearest is {nearest!r}")
    if size < 1:
        raise ValueError(f"world data set {name!r} of size {size}, expected at least 1")
    source = SOURCES[name](random.Random(f"{name} {seed}"))
    return (next(source) for _ in range(size))


def write_dataset(name: str, directory: Path, size: int, seed: int) -> Path:
    """The path of the data set's JSON file, in a folder of its own under `directory` with its `images/`.

    A folder that stands is whole (it is written aside and renamed) and is returned at once.

    Raises:
        ValueError: no data set has this name, or `size` is not positive.
    """
    stream = examples(name, size, seed)
    folder = directory / f"{name}-v{VERSION}-{size}-{seed}"
    file = folder / f"{name}.json"

    def fill(aside: Path) -> None:
        records = []
        for number, (scene, turns) in enumerate(stream):
            record = _record(f"{name}-{number:06d}", scene, turns)
            if name in ("questions", "validation"):
                record["capability"] = turns[0].capability
            Image.fromarray(draw(scene)).save(aside / "images" / str(record["image"]), compress_level=1)
            records.append(record)
        (aside / file.name).write_text(json.dumps(records, indent=1))

    write_once(folder, fill)
    return file


def write_once(folder: Path, fill: Callable[[Path], None]) -> None:
    """Has a folder with `images/` in it filled aside and renamed, unless it stands: one that stands is whole."""
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        (aside / "images").mkdir()
        fill(aside)
        aside.chmod(0o755)
        os.replace(aside, folder)
    except OSError:
        if not folder.is_dir():  # else another process has written the same folder first
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _record(identity: str, scene: Scene, turns: list[Question]) -> dict[str, object]:
    """One record of LLaVA's format, the image in its first turn; `description` is all that can be said of the image."""
    values = []
    for number, turn in enumerate(turns):
        values.append({"from": "human", "value": turn.text if number else f"<image>\n{turn.text}"})
        values.append({"from": "gpt", "value": turn.answer})
    return {
        "id": identity,
        "image": f"{identity}.png",
        "conversations": values,
        "description": caption(scene),
    }
