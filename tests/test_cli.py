"""The command line: quick, helpful, and one line for every mistake."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sweeps.conftest import make_study, write_sweep
from vlmzoo.cli import COMMANDS, main


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vlmzoo: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("statement", ["import vlmzoo", "import vlmzoo.cli; vlmzoo.cli.main(['--help'])"])
def test_neither_import_nor_help_loads_what_is_slow(statement: str) -> None:
    code = f"{statement}\nimport sys\nassert not {{'torch', 'transformers', 'scipy', 'numpy'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert f"example:\n  vlmzoo {name}" in out


def test_the_overview_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["sweep", "a.yaml", "--dry-rnu"], "unknown option '--dry-rnu'; did you mean '--dry-run'?"),
        (
            ["list", "connectors", "--dims", "1024"],
            "expected the widths of encoder and LLM as in 1024,4096, got '1024'",
        ),
        (["list", "conectors"], "unknown kind 'conectors'; did you mean 'connectors'?"),
        (["train"], "required: RUN.yaml"),
        (["report", "a", "b"], "unexpected argument 'b'"),
        (["train", "missing.yaml"], "missing.yaml: cannot be read"),
        (["report", "nowhere"], "nowhere/study.yaml: cannot be read"),
        (["sweep", "a.yaml", "--workers", "two"], "invalid int value: 'two'"),
        (["eval", "x", "--task", "world", "--images", "y"], "--images: expected --data with it"),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in fails(capsys, *arguments)


def test_an_unknown_key_names_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("encoder: world:clip\nconnector: mlp\nllm: world:llama\nstages: {}\nseeed: {init: 1}\n")
    assert "did you mean 'seed'?" in fails(capsys, "train", str(file))


def raising(error: BaseException):
    def run(args: object) -> int:
        raise error

    return run


def patch(monkeypatch: pytest.MonkeyPatch, run: object) -> None:
    import dataclasses

    monkeypatch.setitem(COMMANDS, "report", dataclasses.replace(COMMANDS["report"], run=run))


def test_a_full_disk_names_the_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    patch(monkeypatch, raising(OSError(errno.ENOSPC, "No space left on device", "runs/a/result.json")))
    assert "runs/a/result.json: No space left on device" in fails(capsys, "report", "x")


def test_ctrl_c_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    patch(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "vlmzoo: stopped; the same command continues from here\n"


@pytest.mark.parametrize("error", [TypeError("a bug"), ValueError("raised by code that is not ours")])
def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    patch(monkeypatch, raising(error))
    with pytest.raises(type(error)):
        main(["report", "x"])


def test_report_writes_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_sweep(tmp_path, make_study(["mlp", "linear"], [0, 1]))
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "mlp" in out
    assert "accuracy" in out
    assert {"summary.json", "summary.csv", "report.html"} <= {file.name for file in tmp_path.iterdir()}


def test_list_as_json_is_one_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "connectors", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["connectors"]}
    assert {"linear", "mlp", "qformer", "perceiver", "gated_cross_attention"} <= set(listed)
    assert all(row["summary"] for row in listed.values())


def test_list_counts_what_connectors_cost(capsys: pytest.CaptureFixture[str]) -> None:
    """Against counts by hand: linear's one product, mlp's two, and what they keep for the backward pass."""
    assert main(["list", "connectors", "--dims", "1024,4096", "--json"]) == 0
    listed = {row["name"]: row for row in json.loads(capsys.readouterr().out)["connectors"]}
    patches = 24 * 24
    assert listed["linear"]["flops"] == 2 * patches * 1024 * 4096
    assert listed["linear"]["activation_bytes"] == 2 * patches * 1024
    assert listed["mlp"]["flops"] == 2 * patches * (1024 * 4096 + 4096 * 4096)
    assert listed["mlp"]["activation_bytes"] == 2 * patches * (1024 + 4096 + 4096)
    assert listed["mlp"]["weight_bytes"] == 2 * listed["mlp"]["parameters"] == 2 * (1024 * 4096 + 4096**2 + 2 * 4096)
    assert {name: listed[name]["tokens"] for name in ("qformer", "internvl", "gemma3", "mllama")} == {
        "qformer": 32,
        "internvl": 144,
        "gemma3": 36,
        "mllama": 1,
    }
    assert all(row["flops"] > 0 for row in listed.values())


def test_a_connector_that_refuses_the_widths_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "connectors", "--dims", "1024,4090"]) == 0
    out = capsys.readouterr().out
    assert "qwen_vl: connector 'qwen_vl': the LLM's width 4090" in out
    assert "4.19M" in out
    assert main(["list", "llms", "--dims", "1024,4096"]) == 2
    assert "only connectors stand between two widths" in capsys.readouterr().err


def test_json_keeps_what_others_print_out_of_the_document(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vlmzoo.sweeps import catalogue

    def noisy(kind: str, plugins: object) -> list[dict[str, str]]:
        print("loading weights")
        return [{"name": "a", "summary": "b"}]

    monkeypatch.setattr(catalogue, "entries", noisy)
    assert main(["list", "tasks", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"tasks": [{"name": "a", "summary": "b"}]}
    assert "loading weights" in captured.err


STUDY = """
run:
  encoder: world:clip
  connector: mlp
  llm: world:llama
  stages:
    align: {data: world:captions, lr: {connector: 1e-3}, steps: 2}
connectors: [linear, mlp]
seeds: [0, 1]
"""


def test_a_dry_run_shows_the_trials_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    assert main(["sweep", str(file), "seeds=[3]", "--dry-run", "--json", "--out", str(tmp_path / "out")]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [(trial["connector"], trial["seed"], trial["state"]) for trial in trials] == [
        ("linear", 3, "to do"),
        ("mlp", 3, "to do"),
    ]
    assert not (tmp_path / "out").exists()
    assert main(["sweep", str(file), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.count("to do") == 4


def test_an_unknown_connector_in_a_study_is_refused_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    out = tmp_path / "out"
    message = fails(capsys, "sweep", str(file), "connectors=[linear, qfromer]", "--out", str(out))
    assert "did you mean 'qformer'?" in message
    assert not out.exists()


def test_workers_must_be_a_number_above_zero(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY)
    assert "expected at least 1, got 0" in fails(capsys, "sweep", str(file), "--workers", "0")
