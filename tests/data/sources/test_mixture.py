"""Mixtures: how often each record is seen, in what order, and which entry is at fault."""

from __future__ import annotations

import re
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tests.data.sources.conftest import COUNT, told, write_json, write_parquet, write_shards
from vlmzoo import build
from vlmzoo.config import DataConfig
from vlmzoo.data import order
from vlmzoo.data.records import RecordError
from vlmzoo.data.sources.mixture import spread

Values = list[dict[str, Any]]


def mixture(file: Path, *entries: dict[str, Any] | str) -> str:
    file.write_text(yaml.safe_dump({"sources": list(entries)}))
    return str(file)


@pytest.fixture
def folder(tmp_path: Path, values: Values) -> Path:
    write_json(tmp_path / "a", values)
    write_parquet(tmp_path / "b", values)
    write_shards(tmp_path / "c", values)
    return tmp_path


@pytest.mark.parametrize(
    ("weight", "cap", "expected"),
    [(1, None, 23), (2, None, 46), (2.5, None, 58), (0.5, None, 12), (3, 30, 30), (0.1, 9, 2)],
)
def test_weights_and_caps(folder: Path, weight: float, cap: int | None, expected: int) -> None:
    path = mixture(folder / "m.yaml", {"path": "a/data.json", "weight": weight, "cap": cap})
    source = build.source(DataConfig(path))
    assert len(source) == expected == (min(cap or 99, round(weight * COUNT)))
    seen = Counter(record.id for record in source)
    assert set(seen.values()) <= {expected // COUNT, -(-expected // COUNT)}
    assert sum(seen.values()) == expected
    assert max(int(record.id[1:]) for record in list(source)[-(expected % COUNT) :]) >= COUNT // 2  # not the head
    assert told(build.source(DataConfig(path))) == told(source)


def test_sources_follow_one_another(folder: Path, values: Values) -> None:
    path = mixture(folder / "m.yaml", "a/data.json", {"path": "b/*.parquet", "weight": 2}, "c/{000..002}.tar")
    source = build.source(DataConfig(path))
    alone = told(build.source(DataConfig(str(folder / "a/data.json"))))
    assert told(source) == alone * 4
    assert source[0].where.startswith("data.json[0]")
    assert source[COUNT].where.startswith("0.parquet[0]")
    nested = mixture(folder / "a" / "n.yaml", {"path": "../m.yaml", "weight": 0.5}, "data.json")
    assert len(build.source(DataConfig(nested))) == 2 * COUNT + COUNT
    assert len(build.source(DataConfig(nested)).fingerprint()["sources"][0]["sources"]) == 3


@pytest.mark.parametrize("weight", [1, 2.3, 0.4])
def test_blocks_of_a_mixture_are_those_of_its_sources(
    folder: Path, weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block is of one row group; records of a random-access source are blocks of their own."""
    monkeypatch.setattr(order, "WINDOW", 8)
    source = build.source(DataConfig(mixture(folder / "m.yaml", {"path": "b", "weight": weight}, "a/data.json")))
    assert source.blocks is not None
    assert source.blocks[-1] == len(source)
    assert (np.diff(source.blocks) > 0).all()
    begin = 0
    for end in source.blocks.tolist():
        wheres = [source[index].where.split(" ")[0] for index in range(begin, end)]
        files, numbers = {where.split("[")[0] for where in wheres}, [int(w.split("[")[1][:-1]) for w in wheres]
        assert len(files) == 1
        assert len({number // 4 for number in numbers}) == 1
        begin = end
    whole = list(islice(order.batches(len(source), 5, 1, blocks=source.blocks), 20))
    assert sorted([index for batch in whole for index in batch][: len(source)]) == list(range(len(source)))
    assert list(islice(order.batches(len(source), 5, 1, 7, blocks=source.blocks), 13)) == whole[7:]
    assert build.source(DataConfig(mixture(folder / "r.yaml", "a/data.json", "c"))).blocks is None


@pytest.mark.parametrize(("length", "count"), [(10, 3), (10, 9), (10, 10), (1000, 700), (7, 1), (5, 0)])
def test_a_part_is_spread_over_the_whole(length: int, count: int) -> None:
    found = spread(length, count, "seed")
    assert len(set(found.tolist())) == len(found) == count
    assert all(number * length // count <= index < (number + 1) * length // count for number, index in enumerate(found))
    assert found.tolist() == spread(length, count, "seed").tolist()
    if count == 700:
        assert found.tolist() != spread(length, count, "other").tolist()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "absent.json"}, "m.yaml: sources[1]: "),
        ({"path": "a/data.json", "wieght": 2}, "unknown key 'sources[1].wieght': 'wieght'; did you mean 'weight'"),
        ({"path": "a/data.json", "weight": -1}, "key 'sources[1].weight': expected at least 0"),
        ({"path": "a/data.json", "weight": 0.01}, "sources[1]: weight 0.01 of 23 records leaves none"),
        ({"path": "a/data.json", "format": "jsno"}, "unknown value of sources[1].format: 'jsno'"),
        ({"path": "n.yaml"}, "sources[1]: "),
        ({"path": "m.yaml"}, "the mixture holds itself (m.yaml -> m.yaml)"),
    ],
)
def test_faults_name_the_entry(entry: dict[str, Any], message: str, folder: Path) -> None:
    with pytest.raises(RecordError, match=re.escape(message)) as caught:
        build.source(DataConfig(mixture(folder / "m.yaml", "a/data.json", entry)))
    assert "\n" not in str(caught.value)


def test_cycles_are_refused(folder: Path) -> None:
    mixture(folder / "a.yaml", "b.yaml")
    mixture(folder / "b.yaml", "a/data.json", "c.yaml")
    mixture(folder / "c.yaml", "a.yaml")
    with pytest.raises(RecordError, match=re.escape("holds itself (a.yaml -> b.yaml -> c.yaml -> a.yaml)")):
        build.source(DataConfig(str(folder / "a.yaml")))
    (folder / "e.yaml").write_text("sources: []")
    with pytest.raises(RecordError, match=r"e\.yaml: holds no source"):
        build.source(DataConfig(str(folder / "e.yaml")))


def test_the_world_may_be_mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmzoo import world

    monkeypatch.setenv("VLMZOO_CACHE", str(folder / "cache"))
    monkeypatch.setitem(world.DATASETS, "captions", 5)
    source = build.source(DataConfig(mixture(folder / "m.yaml", "world:captions", "a/data.json")))
    assert len(source) == 5 + COUNT
