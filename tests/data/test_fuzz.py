"""Whatever a record, an image or a data file holds, it is read in accord with the contract or refused by name.

The share of `make test` is small; `make test-fuzz` runs thousands, `python -m experiments.benchmarks.fuzz` counts them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.data import damage
from tests.data.damage import ARCHIVES, IMAGES, SUBJECTS, Outcome, cases_of, check_record, good_records, run
from tests.data.planted import dies, hangs, raises
from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data import samples
from vlmzoo.data.images import ImageError, load_image
from vlmzoo.data.records import Record, RecordError, Turn

ODD_RECORDS = 400  # of which the first 385 are every odd value in every place


def assert_sound(outcomes: Sequence[Outcome]) -> None:
    failures = [f"{outcome.case}, {outcome.how}: {outcome.failure}" for outcome in outcomes if outcome.failure]
    assert not failures, "\n".join(failures[:20])
    assert any(outcome.refused for outcome in outcomes), "nothing was damaged enough to be refused"
    assert any(outcome.records_read for outcome in outcomes)


def test_a_share_of_damage_is_read_or_refused() -> None:
    cases = [*cases_of(["record"], ODD_RECORDS), *cases_of(["json file"], 30), *cases_of(list(IMAGES), 10)]
    assert_sound(run(cases))


@pytest.mark.fuzz
@pytest.mark.parametrize("what", SUBJECTS)
def test_much_damage_is_read_or_refused(what: str) -> None:
    assert_sound(run(cases_of([what], 1000 if what in ("record", "json file") else 250, start=100_000)))


def test_a_share_of_damaged_archives_is_read_or_refused() -> None:
    assert_sound(run(cases_of(list(ARCHIVES), 20)))


@pytest.mark.fuzz
@pytest.mark.parametrize("what", ARCHIVES)
def test_many_damaged_archives_are_read_or_refused(what: str) -> None:
    assert_sound(run(cases_of([what], 300, start=100_000)))


# -- any JSON value in any place, as hypothesis finds them

LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20)
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3))
TEXTS = st.sampled_from(["<image>", "Hello", "</s>", "<|im_end|>", " ", "", "\ud800", "é😀"]) | st.text(max_size=20)
TURNS = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt"]) | VALUES, "value": TEXTS | VALUES})
ANYTHING = st.fixed_dictionaries(
    {},
    optional={
        "id": VALUES,
        "image": st.sampled_from(["0.png", "1.png", ["0.png", "2.png"], "../train.json", "absent.png"]) | VALUES,
        "conversations": st.lists(TURNS, max_size=4)
        | st.lists(TEXTS, min_size=2, max_size=4).map(
            lambda texts: [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]
        )
        | VALUES,
        "description": VALUES,
        "capability": VALUES,
    },
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hypothesis")
    damage._write_images(folder)
    return folder


def judge_record(value: Any, folder: Path) -> None:
    (folder / "train.json").write_text(json.dumps([good_records()[0], value]))
    source = build.source(DataConfig(str(folder / "train.json")))
    assert len(source) == 2
    check_record(source[0])
    refusal = None
    try:
        check_record(source[1])
    except (RecordError, ImageError) as error:
        refusal = str(error)
    assert refusal is None or (refusal.startswith("train.json[1]") and "\n" not in refusal), refusal


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(value=ANYTHING)
def test_any_record_is_read_or_refused(value: Any, folder: Path) -> None:
    judge_record(value, folder)


@pytest.mark.fuzz
@settings(max_examples=2000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(value=ANYTHING)
def test_many_records_are_read_or_refused(value: Any, folder: Path) -> None:
    judge_record(value, folder)


# -- bombs


@pytest.mark.parametrize("kind", ["jpeg", "jpeg, progressive", "png", "gif", "webp, animated"])
def test_a_huge_declared_size_is_refused_before_decoding(kind: str, tmp_path: Path) -> None:
    suffix, make = IMAGES[kind]
    file = tmp_path / f"bomb.{suffix}"
    bomb = damage.huge(kind, make(), random.Random(0))
    assert bomb is not None
    file.write_bytes(bomb)
    with pytest.raises(ImageError, match=r"pixels") as caught:
        load_image(file, where="train.json[0]")
    assert caught.value.kind == "too-many-pixels"
    assert str(caught.value).startswith("train.json[0]: image ")


# -- the oracle and the runner can fail


def test_a_hang_a_crash_and_another_error_are_failures() -> None:
    cases = cases_of(["planted"], 3)
    for judge, failure in ((hangs, "no end within 1 s"), (dies, "the process died")):
        outcomes = run(cases, limit=1, judge=judge)
        assert [outcome.failure for outcome in outcomes] == [None, failure, None]
    assert {outcome.failure for outcome in run(cases, judge=raises)} == {"IndexError: from a decoder"}


FAULTY = {
    "an image lost": ((), "<image>\nWhat?", "red", "1 <image> for 0 images"),
    "no answer": ((), "What?", None, "turns do not alternate"),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_record_that_breaks_the_contract_is_caught(name: str) -> None:
    images, question, answer, expected = FAULTY[name]
    turns = (Turn("human", question), *([] if answer is None else [Turn("gpt", answer)]))
    with pytest.raises(damage.BrokenContractError, match=expected):
        check_record(Record("a", images, turns, "train.json[0]"))


def test_a_lost_target_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def shortened(*args: Any) -> Any:
        (found,) = tokenise(*args)
        last = max(place for place, target in enumerate(found.supervised) if target)
        found.supervised[last] = False
        return [found]

    tokenise = samples.tokenise
    monkeypatch.setattr(samples, "tokenise", shortened)
    with pytest.raises(damage.BrokenContractError, match="targets ' red', expected"):
        check_record(Record("a", (), (Turn("human", "What?"), Turn("gpt", "red")), "train.json[0]"))
