"""`vlmzoo data check` and `vlmzoo inspect` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.inspection.conftest import FOUND
from tests.test_cli import fails
from vlmzoo.cli import main
from vlmzoo.inspection.subject import is_run

NAMED = ("--llm", "world:llama", "--encoder", "world:clip", "--max-length", "105")


def test_faulty_data_exits_1_and_its_fixed_copy_0(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = data.parent / "out"
    command = ["data", "check", str(data), *NAMED, "--json", str(folder / "found.json"), "--fixed", str(folder)]
    assert main(command) == 1
    assert "8 records; 3 mended, 10 left out" in capsys.readouterr().out
    (found,) = json.loads((folder / "found.json").read_text())
    assert [(finding["index"], finding["kind"]) for finding in found["findings"]] == FOUND
    assert main(["data", "check", str(folder / "train.json"), *NAMED]) == 0


def test_a_run_is_checked_by_its_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    limits = [f"stages.{stage}.data.limit=20" for stage in ("align", "finetune")]
    assert main(["data", "check", "experiments/quick.yaml", *limits]) == 0
    out = capsys.readouterr().out
    assert "align: 20 records" in out
    assert "finetune: 20 records" in out
    assert "evaluation.world: 350 records" in out
    assert "max_length 512" in out
    assert main(["data", "check", "experiments/quick.yaml", "--stage", "evaluation.world"]) == 0
    assert "align" not in capsys.readouterr().out


def test_inspect_prints_and_writes_a_page(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = data.parent / "record.html"
    assert main(["inspect", str(data), "--id", "copy", *NAMED, "--html", str(file)]) == 0
    assert "[[ red </s>]]" in capsys.readouterr().out
    assert "<title>copy · vlmzoo</title>" in file.read_text()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["data", "chekc", "x"], "unknown action 'chekc'; did you mean 'check'?"),
        (["data", "show", "x", "--fixed", "y"], "--fixed: not for `data show`"),
        (["data", "check", "absent.json"], "absent.json: no such file"),
        (["data", "check", "absent.yaml"], "absent.yaml: cannot be read"),
        (["data", "check", "experiments/quick.yaml", "--llm", "world:llama"], "--llm: experiments/quick.yaml says it"),
        (["data", "check", "experiments/quick.yaml", "--stage", "alin"], "unknown stage 'alin'; did you mean 'align'?"),
        (["data", "check", "x.json", "--stage", "align"], "--stage: only for a RUN.yaml"),
        (["data", "check", "x.json", "a=b"], "a=b: only for a RUN.yaml"),
        (["data", "check", "x.json", "--encoder", "world:clip"], "--encoder: expected --llm with it"),
        (["data", "check", "x.json", "--llm", "world:lama"], "nearest is 'llama'"),
        (["data", "check", "x.json", "--connector", "mlp"], "--connector: expected --encoder with it"),
        (["data", "check", "x.json", "--template", "vicuna"], "unknown template 'vicuna'"),
        (["data", "check", "x.json", "--workers", "0"], "--workers: expected at least 1, got 0"),
        (["data", "check", "x.json", "--max-length", "0"], "'max_length': expected at least 1, got 0"),
        (["data", "check", "experiments/quick.yaml", "--fixed", "y"], "a run has 3 data sets; name one by --stage"),
        (["inspect", "world:captions", "--limit", "2"], "expected --llm"),
        (["inspect", "x.json", "--id", "a", "--index", "1"], "--id: --index was given too"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in fails(capsys, *arguments)


def test_a_mixture_is_data_and_no_run(tmp_path: Path) -> None:
    mixture, run = tmp_path / "mixture.yaml", tmp_path / "run.yaml"
    mixture.write_text("sources:\n  - path: a.json\n")
    run.write_text("stages: {}\n")
    assert not is_run(str(mixture))
    assert is_run(str(run))
    assert is_run(str(tmp_path / "absent.yaml"))
    assert not is_run("train.json")
