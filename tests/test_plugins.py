"""Connectors from outside: a file named on the command line, or another installed package. No edit here is needed."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkpoints import run_values, write_data, write_models
from vlmzoo import build
from vlmzoo.cli import main
from vlmzoo.connector import connectors

PLUGIN = '''
from torch import nn
from vlmzoo.connector import TokenConnector, register


@register("strided")
class Strided(TokenConnector):
    """Every `stride`-th patch, projected."""

    def __init__(self, vision_dim: int, text_dim: int, *, stride: int = 2):
        super().__init__()
        self.stride, self.project = stride, nn.Linear(vision_dim, text_dim)

    def num_tokens(self, grid):
        return -(-grid[0] * grid[1] // self.stride)

    def forward(self, patches, grid):
        return self.project(patches[:, :: self.stride])
'''
BROKEN = PLUGIN.replace("patches[:, :: self.stride]", "patches[:, 1 :: self.stride]")  # one token fewer than it says


@pytest.fixture
def new_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forgets, each time that it is called and at the end, every plugin that was loaded."""

    def forget() -> None:
        monkeypatch.undo()
        monkeypatch.setattr(build, "_plugins", {})
        monkeypatch.setattr(build, "_loaded", set())
        monkeypatch.setattr(connectors, "_parts", dict(connectors._parts))

    build.load_connectors()
    forget()
    return forget


@pytest.fixture
def plugin(tmp_path: Path, new_process: Callable[[], None]) -> Path:
    file = tmp_path / "strided.py"
    file.write_text(PLUGIN)
    return file


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_models(tmp_path_factory.mktemp("models"))
    write_data(folder)
    return folder


@pytest.fixture
def run_file(models: Path, tmp_path: Path) -> Path:
    values = run_values(models, {"name": "strided", "options": {"stride": 4}})
    values["evaluation"]["colors"]["data"]["limit"] = 4
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def train(run_file: Path, plugin: Path | None, out: str = "out", *more: str) -> int:
    named = ["--plugin", str(plugin)] if plugin else []
    return main(["train", str(run_file), "--out", str(run_file.parent / out), *named, *more])


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("vlmzoo: error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_it_is_short() -> None:
    assert len(PLUGIN.strip().splitlines()) <= 20


def test_it_trains_through_the_command_line(
    plugin: Path, run_file: Path, capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]
) -> None:
    out = run_file.parent / "out"
    assert train(run_file, plugin) == 0
    result = json.loads((out / "result.json").read_text())
    assert (result["connector"], result["visual_tokens"]) == ("strided", 3)
    assert result["trainable_parameters"] == 32 * 48 + 48
    held = yaml.safe_load((out / "config.yaml").read_text())["connector"]
    assert held == {"name": "strided", "options": {"stride": 4}, "lr": None, "plugin": held["plugin"]}
    assert held["plugin"] == json.loads((out / "model" / "config.json").read_text())["plugin"]["sha256"]

    new_process()
    capsys.readouterr()
    command = ["eval", str(out), "--task", "colors", "--json"]
    assert main(command) == 2
    assert "connector 'strided' comes from the plugin strided.py: pass --plugin strided.py" in the_error(capsys)
    assert main([*command, "--plugin", str(plugin)]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["colors"] == result["evaluation"]["colors"]


def test_a_plugin_changed_since_is_noticed(
    plugin: Path, run_file: Path, capsys: pytest.CaptureFixture[str], new_process: Callable[[], None]
) -> None:
    assert train(run_file, plugin) == 0
    plugin.write_text(PLUGIN + "# changed\n")
    capsys.readouterr()

    new_process()
    assert train(run_file, plugin) == 2  # the same directory
    message = the_error(capsys)
    assert "holds a run of another configuration" in message
    assert "plugin" in message

    resolved = run_file.parent / "resolved.yaml"
    resolved.write_text((run_file.parent / "out" / "config.yaml").read_text())
    assert train(resolved, plugin, "elsewhere") == 2
    assert "connector 'strided': the run expects a plugin of hash" in the_error(capsys)
    assert not (run_file.parent / "elsewhere" / "result.json").exists()

    new_process()
    assert train(resolved, None, "elsewhere") == 2
    assert "unknown connector 'strided'" in the_error(capsys)
    with pytest.warns(UserWarning, match="is not the file that it was saved with"):
        main(["eval", str(run_file.parent / "out"), "--task", "colors", "--plugin", str(plugin)])

    new_process()
    plugin.write_text(PLUGIN)
    assert train(resolved, plugin, "elsewhere") == 0


def test_check_passes_it(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(plugin), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["passed"]
    (found,) = document["connectors"]
    assert found["name"] == "strided"
    assert {"tokens_agree_with_num_tokens", "compiles"} <= {check["name"] for check in found["checks"]}


def test_check_names_what_is_broken(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plugin.write_text(BROKEN)
    assert main(["check", str(plugin), "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    assert not document["passed"]
    failed = [check for check in document["connectors"][0]["checks"] if not check["passed"]]
    assert "tokens_agree_with_num_tokens" in [check["name"] for check in failed]
    assert all(check["message"] for check in failed)


def test_check_says_in_words_what_is_broken(
    plugin: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmzoo import conformance

    name = "tokens_agree_with_num_tokens"
    monkeypatch.setattr(conformance, "CHECKS", {name: conformance.CHECKS[name]})
    plugin.write_text(BROKEN)
    assert main(["check", str(plugin)]) == 1
    first, last = capsys.readouterr().out.splitlines()
    assert re.match(rf"FAILED  strided  {name} +\d+ tokens", first)
    assert last == "strided: 1 of 1 checks failed"


def test_list_shows_it_with_its_options(plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "connectors", "--plugin", str(plugin), "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["connectors"]}
    assert rows["strided"] == {
        "name": "strided",
        "summary": "Every `stride`-th patch, projected.",
        "options": {"stride": 2},
    }


def test_the_same_file_twice_is_loaded_once(plugin: Path) -> None:
    build.load_connectors([plugin, plugin])
    assert build.connectors_of(plugin) == ["strided"]
    assert "strided" in connectors.names()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import nowhere_to_be_found", "ModuleNotFoundError: No module named 'nowhere_to_be_found'"),
        ("raise RuntimeError('first\\nsecond')", "RuntimeError: first"),
        ("import sys; sys.exit(3)", "SystemExit: 3"),
        ("raise SystemExit", "SystemExit"),
        ("def x(:", "SyntaxError"),
        ("x = 1", "registers no connector; decorate a class with @register(NAME)"),
        (PLUGIN.replace("strided", "mlp"), "connector 'mlp' is registered twice: by vlmzoo.connectors.mlp."),
        (PLUGIN + "\nraise KeyError('late')", "KeyError: 'late'"),
        (PLUGIN.replace("num_tokens", "count"), "connector 'strided': Strided does not define num_tokens"),
        (PLUGIN.replace("(TokenConnector)", "(nn.Module)"), "Strided does not derive from TokenConnector or Connector"),
    ],
)
def test_a_file_that_cannot_be_loaded_leaves_nothing_behind(
    text: str, expected: str, plugin: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = connectors.names()
    plugin.write_text(text)
    for command in (["list", "connectors", "--plugin", str(plugin)], ["check", str(plugin)]):
        assert main(command) == 2
        message = the_error(capsys)
        assert f"plugin {plugin}: " in message
        assert expected in message
    assert connectors.names() == before


@pytest.mark.parametrize("name", ["nowhere.py", "folder"])
def test_a_file_that_is_not_there(name: str, plugin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (plugin.parent / "folder").mkdir()
    assert main(["list", "connectors", "--plugin", str(plugin.parent / name)]) == 2
    assert f"{name}: cannot be read" in the_error(capsys)


@pytest.fixture
def package(tmp_path: Path, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `other`, installed as pip leaves it, with an entry point for its connector."""
    site = tmp_path / "site"
    info = site / "other_connectors-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-connectors\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vlmzoo.connectors]\nfrom_a_package = other_connectors:Part\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "other_connectors", raising=False)
    return site


def test_a_connector_of_another_package_trains_without_being_named(
    package: Path, run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = PLUGIN.replace('"strided"', '"from_a_package"').replace("class Strided", "class Part")
    (package / "other_connectors.py").write_text(text)
    assert main(["list", "connectors", "--json"]) == 0
    assert "from_a_package" in {row["name"] for row in json.loads(capsys.readouterr().out)["connectors"]}
    assert train(run_file, None, "out", "connector.name=from_a_package") == 0
    result: dict[str, Any] = json.loads((run_file.parent / "out" / "result.json").read_text())
    assert (result["connector"], result["visual_tokens"]) == ("from_a_package", 3)


@pytest.mark.parametrize(
    ("text", "expected"), [("raise RuntimeError('broken')", "RuntimeError: broken"), ("x = 1", "AttributeError: ")]
)
def test_a_package_that_cannot_be_loaded_is_named_every_time(
    text: str, expected: str, package: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (package / "other_connectors.py").write_text(text)
    for _ in range(2):
        assert main(["list", "connectors"]) == 2
        message = the_error(capsys)
        assert "connector 'from_a_package' of the package other-connectors: " in message
        assert expected in message
