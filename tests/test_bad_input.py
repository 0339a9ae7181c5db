"""Whatever is wrong with what a user brings, it ends in one line that says what and where, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkpoints import run_values, write_data, write_models
from vlmzoo import files
from vlmzoo.cli import main
from vlmzoo.data import images
from vlmzoo.sweeps import trial
from vlmzoo.training import checkpoint

Values = dict[str, Any]
Break = Callable[[Path, Values], object]
"""Spoils the folder, or the run's values, or both."""


@pytest.fixture(scope="session")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    write_models(folder)
    write_data(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    """A copy of a sound folder, to be spoilt."""
    return Path(shutil.copytree(sound, tmp_path / "own"))


def write_run(folder: Path, values: Values) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return file


def train(folder: Path, values: Values, *more: str) -> int:
    return main(["train", str(write_run(folder, values)), "--out", str(folder / "out"), *more])


def the_error(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error; how far training is may stand before it."""
    captured = capsys.readouterr()
    assert captured.out == ""
    *before, last = captured.err.splitlines()
    assert all(": step " in line for line in before), captured.err
    assert last.startswith("vlmzoo: error: ")
    return last.removeprefix("vlmzoo: error: ")


def assert_nothing_looks_whole(out: Path) -> None:
    """No result, nothing written aside left behind, and every checkpoint and feature folder matches its hashes."""
    assert not (out / "result.json").exists()
    left = (
        [path.name for path in out.rglob(".*") if path.suffix != ".lock" and path.name != ".lock"]
        if out.is_dir()
        else []
    )
    assert left == []
    for manifest in out.rglob(files.MANIFEST) if out.is_dir() else []:
        assert files.damage(manifest.parent) is None


# -- what is in the records and their images


def record(**changes: Any) -> Break:
    """Record 1 with other values; None takes one out."""

    def spoil(folder: Path, values: Values) -> None:
        records = json.loads((folder / "data.json").read_text())
        records[1].update(changes)
        records[1] = {key: value for key, value in records[1].items() if value is not None}
        (folder / "data.json").write_text(json.dumps(records))

    return spoil


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


def data(text: str) -> Break:
    return lambda folder, values: (folder / "data.json").write_text(text)


def picture(spoil: Callable[[Path], object]) -> Break:
    """Spoils the picture of record 1."""
    return lambda folder, values: spoil(folder / "images" / "1-0.png")


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def absurd(side: int) -> Callable[[Path], object]:
    """A PNG of a few bytes that says it has side x side pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    whole = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return lambda file: file.write_bytes(whole)


def link_out(file: Path) -> None:
    outside = file.parents[1] / "outside.png"
    file.rename(outside)
    file.symlink_to(outside)


WHERE = "data.json[1] (id 'record-1')"
STRUCTURE: dict[str, tuple[Break, list[str]]] = {
    "missing image": (picture(Path.unlink), [WHERE, "image '1-0.png' is not in", "/images"]),
    "no image folder": (lambda folder, values: shutil.rmtree(folder / "images"), [".json", "no image folder"]),
    "parent path": (record(image="../outside.png"), [WHERE, "'../outside.png' lies outside the image folder"]),
    "absolute path": (record(image="/etc/passwd"), [WHERE, "'/etc/passwd' lies outside the image folder"]),
    "link that leads out": (picture(link_out), [WHERE, "'1-0.png' lies outside the image folder"]),
    "no <image>": (record(conversations=talk("What is it ?", "red")), [WHERE, "0 <image>", "1 images"]),
    "<image> without image": (record(image=None), [WHERE, "1 <image>", "0 images"]),
    "more <image> than images": (record(conversations=talk("<image><image>", "red")), [WHERE, "2 <image>", "1 images"]),
    "no answer": (record(conversations=talk("<image>")), [WHERE, "the last human turn has no answer from gpt"]),
    "empty answer": (record(conversations=talk("<image>", " ")), [WHERE, "turn 1: the answer is empty"]),
    "no conversation": (record(conversations=None), [WHERE, "`conversations` must be a list of turns, got nothing"]),
    "image of another type": (record(image=7), [WHERE, "`image` must be a path or a list of paths, got 7"]),
    "empty data set": (data("[]"), ["data.json: holds no record; expected at least one"]),
    "no list": (data('{"id": 1}'), ["data.json: expected a list of records, got an object"]),
    "not JSON": (data('[{"id": 1,\n'), ["data.json[0]: not valid JSON at line 2"]),
    "not text": (lambda folder, values: (folder / "data.json").write_bytes(b"\xff\xfe"), ["data.json: cannot be read"]),
    "no data file": (
        lambda folder, values: (folder / "data.json").unlink(),
        ["data.json: no such file; expected LLaVA JSON"],
    ),
}
"""Found before the first step of the first stage, though it is the second one that reads these records."""

CONTENT: dict[str, tuple[Break, list[str]]] = {
    "truncated image": (picture(truncate), [WHERE, "1-0.png cannot be decoded"]),
    "no image at all": (picture(lambda file: file.write_text("hello")), [WHERE, "1-0.png cannot be decoded"]),
    "huge image": (picture(absurd(9000)), [WHERE, "1-0.png is 9000 x 9000 pixels; at most 8000 x 8000"]),
    "decompression bomb": (picture(absurd(100_000)), [WHERE, "1-0.png has more pixels than can be decoded"]),
    "special token in a text": (record(conversations=talk("<image>\nWhat </s>", "red")), [WHERE, "'</s>'"]),
    "plain with two answers": (
        lambda folder, values: values["stages"]["finetune"]["data"].update(template="plain"),
        ["data.json[", "template plain takes one human turn with <image> and one answer, got"],
    ),
    "images beyond max_length": (
        lambda folder, values: values["stages"]["finetune"]["data"].update(max_length=4),
        ["data.json[", "its images end at token", "beyond max_length 4"],
    ),
}


@pytest.mark.parametrize("case", STRUCTURE)
def test_the_structure_of_all_data_is_checked_before_the_first_step(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = STRUCTURE[case]
    values = run_values(folder)
    values["stages"]["align"]["data"]["images"] = str(shutil.copytree(folder / "images", folder / "captioned"))
    spoil(folder, values)
    assert train(folder, values) == 2
    message = the_error(capsys)
    assert all(part in message for part in expected), message
    assert not (folder / "out" / "metrics.jsonl").exists()
    assert_nothing_looks_whole(folder / "out")


@pytest.mark.parametrize("case", CONTENT)
def test_what_a_record_holds_is_refused_by_its_name(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, expected = CONTENT[case]
    values = run_values(folder)
    values["stages"].pop("align")
    spoil(folder, values)
    assert train(folder, values) == 2
    message = the_error(capsys)
    assert all(part in message for part in expected), message
    assert_nothing_looks_whole(folder / "out")


# -- what is in the YAML


def put(place: str, value: Any) -> Break:
    def spoil(folder: Path, values: Values) -> None:
        *parents, last = place.split(".")
        for parent in parents:
            values = values[parent]
        values[last] = value

    return spoil


CONFIGURATION: dict[str, tuple[Break, list[str]]] = {
    "unknown key": (put("conector", "mlp"), ["run.yaml", "'conector'", "did you mean 'connector'?"]),
    "unknown nested key": (put("stages.align.batchsize", 4), ["'stages.align.batchsize'", "did you mean 'batch_size'"]),
    "wrong type": (put("stages.align.steps", "many"), ["'stages.align.steps'", "expected a whole number", "'many'"]),
    "list for a text": (put("llm", ["a"]), ["key 'llm': expected a mapping, got ['a']"]),
    "infinite steps": (put("stages.align.steps", float("inf")), ["'stages.align.steps'", "expected a whole number"]),
    "infinite clip": (put("stages.align.clip", float("inf")), ["'stages.align.clip'", "expected a finite number"]),
    "option that is no plain value": (
        put("connector", {"name": "mlp", "options": {"depth": float("nan")}}),
        ["'connector.options.depth'", "expected a value that JSON can hold, got nan"],
    ),
    "no batch": (put("stages.finetune.batch_size", 0), ["'stages.finetune.batch_size'", "expected at least 1, got 0"]),
    "negative micro-batch": (put("stages.align.micro_batch_size", -1), ["'stages.align.micro_batch_size'", "at least"]),
    "negative rate": (put("stages.align.lr.connector", -1.0), ["'stages.align.lr.connector'", "at least 0, got -1.0"]),
    "no checkpoints": (put("checkpoint_every", 0), ["'checkpoint_every'", "expected at least 1, got 0"]),
    "no evaluation batch": (put("evaluation.colors.batch_size", 0), ["'evaluation.colors.batch_size'", "at least 1"]),
    "no new tokens": (put("evaluation.colors.max_new_tokens", 0), ["'evaluation.colors.max_new_tokens'", "at least 1"]),
    "nothing to shuffle": (
        put("evaluation.colors.shuffled", 1),
        ["evaluation.colors.shuffled: no two of the first 1 records of", "data.json have images to swap"],
    ),
    "betas": (put("stages.align.betas", [0.9, 1.0]), ["stages.align.betas", "below 1"]),
    "steps and epochs": (put("stages.finetune.epochs", 1), ["stages.finetune", "either steps or epochs"]),
    "no rate at all": (put("stages.finetune.lr", {}), ["a learning rate for at least one of"]),
    "part that is not there": (put("stages.align.lr", {"conector": 1e-3}), ["stages.align.lr", "'connector'"]),
    "unknown template": (put("stages.align.data.template", "plane"), ["did you mean 'plain'?", "vicuna_v1"]),
    "unknown connector": (put("connector", "qfromer"), ["'qfromer'", "did you mean 'qformer'?", "linear, matryoshka"]),
    "unknown option": (
        put("connector", {"name": "qformer", "options": {"num_query": 4}}),
        ["option of connector 'qformer'", "'num_query'", "did you mean 'num_queries'?", "num_heads"],
    ),
    "option of another type": (
        put("connector", {"name": "qformer", "options": {"num_queries": "four"}}),
        ["connector 'qformer'", "four"],
    ),
    "sizes within a connector": (
        put("connector", {"name": "qformer", "options": {"num_heads": 5}}),
        ["connector 'qformer'", "no multiple of num_heads 5"],
    ),
    "too few layers": (
        put("connector", "gated_cross_attention"),
        ["'gated_cross_attention'", "before layer 3", "has layers 0 to 2", "lower `every`"],
    ),
}


@pytest.mark.parametrize("case", CONFIGURATION)
def test_a_mistake_in_the_yaml_names_its_key(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = CONFIGURATION[case]
    values = run_values(folder)
    spoil(folder, values)
    assert train(folder, values) == 2
    message = the_error(capsys)
    assert all(part in message for part in expected), message
    assert_nothing_looks_whole(folder / "out")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("stages.align.step=3", "did you mean 'steps'?"),
        ("stages.align.lr=[1", "override 'stages.align.lr=[1': not valid YAML"),
        ("dtype", "override 'dtype': expected KEY=VALUE"),
        ("dtype.x=1", "unknown value of dtype"),
    ],
)
def test_a_mistake_in_an_override_names_it(
    override: str, expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(folder, run_values(folder), override) == 2
    assert expected in the_error(capsys)


def test_an_option_of_check_that_is_no_yaml(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "mlp", "depth=[1"]) == 2
    assert "option 'depth=[1': not valid YAML" in the_error(capsys)


# -- what is in the checkpoints


def edit(file: str, **changes: Any) -> Break:
    """A JSON file with other values; None takes one out."""

    def spoil(folder: Path, values: Values) -> None:
        held = {**json.loads((folder / file).read_text()), **changes}
        (folder / file).write_text(json.dumps({key: value for key, value in held.items() if value is not None}))

    return spoil


def delete(*names: str) -> Break:
    return lambda folder, values: [(folder / name).unlink() for name in names]


def all_of(*breaks: Break) -> Break:
    return lambda folder, values: [spoil(folder, values) for spoil in breaks]


TOKENIZER = "llama/tokenizer_config.json"
PARTS: dict[str, tuple[Break, list[str]]] = {
    "no EOS": (
        all_of(edit(TOKENIZER, eos_token=None), put("stages.finetune.data.template", "vicuna_v1")),
        ["tokenizer", "llama", "has no EOS", "set its eos_token"],
    ),
    "no chat template": (delete("llama/chat_template.jinja"), ["tokenizer", "llama", "has no chat template"]),
    "nothing to pad with": (
        edit(TOKENIZER, pad_token=None, unk_token=None, eos_token=None),
        ["tokenizer", "llama", "no pad, unk or eos token"],
    ),
    "config without a tokenizer": (
        lambda folder, values: values.update(llm={"config": json.loads((folder / "llama/config.json").read_text())}),
        ["llm.tokenizer: expected a hub id"],
    ),
    "broken tokenizer": (
        lambda folder, values: truncate(folder / "llama" / "tokenizer.json"),
        ["tokenizer", "llama: cannot be loaded"],
    ),
    "no tokenizer": (delete("llama/tokenizer.json", TOKENIZER), ["tokenizer", "llama", "cannot be loaded"]),
    "no image processor": (delete("clip/preprocessor_config.json"), ["image processor", "clip: cannot be loaded"]),
    "no weights": (delete("clip/model.safetensors"), ["encoder", "clip: cannot be loaded"]),
    "truncated weights": (
        lambda folder, values: truncate(folder / "llama" / "model.safetensors"),
        ["llm", "llama: cannot be loaded"],
    ),
    "weights of another size": (edit("llama/config.json", intermediate_size=80), ["llm", "do not fit", "mlp"]),
    "weights of fewer layers": (edit("clip/config.json", num_hidden_layers=4), ["encoder", "weights are missing"]),
    "no configuration": (
        lambda folder, values: (folder / "clip" / "config.json").write_text("{"),
        ["encoder", "clip: cannot be loaded"],
    ),
    "layer out of range": (
        lambda folder, values: values.update(encoder={"name": values["encoder"], "layer": 9}),
        ["encoder layer 9", "-4 to 3"],
    ),
    "image smaller than a patch": (
        lambda folder, values: values.update(encoder={"name": values["encoder"], "image_size": 4}),
        ["4 x 4 pixels", "patches are 8 pixels"],
    ),
    "an LLM as the encoder": (
        lambda folder, values: values.update(encoder=values["llm"]),
        ["unknown encoder type 'llama'", "clip_vision_model"],
    ),
    "an encoder as the LLM": (
        lambda folder, values: values.update(llm=values["encoder"]),
        ["clip: cannot be loaded"],
    ),
    "no such directory": (put("encoder", "./nowhere"), ["encoder: no directory ./nowhere"]),
    "no such world model": (put("encoder", "world:klip"), ["unknown world model 'klip'", "'clip'"]),
    "neither name nor config": (put("encoder", {"layer": -1}), ["encoder: expected a hub id, a directory"]),
    "config of no known type": (
        put("encoder", {"config": {"model_type": "clap_vision"}}),
        ["encoder.config", "clap_vision"],
    ),
    "config with sizes that do not fit": (
        put("encoder", {"config": {"model_type": "clip_vision_model", "hidden_size": 30, "num_attention_heads": 4}}),
        ["encoder.config", "30"],
    ),
    "config with a value of another type": (
        put("encoder", {"config": {"model_type": "clip_vision_model", "hidden_size": "big"}}),
        ["encoder.config", "hidden_size"],
    ),
}


@pytest.mark.parametrize("case", PARTS)
def test_parts_that_do_not_fit_are_refused_by_name(case: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil, expected = PARTS[case]
    values = run_values(folder)
    spoil(folder, values)
    assert train(folder, values) == 2
    message = the_error(capsys)
    assert all(part in message for part in expected), message
    assert_nothing_looks_whole(folder / "out")


def test_a_tokenizer_larger_than_the_vocabulary(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run_values(folder)
    config = json.loads((folder / "llama" / "config.json").read_text())
    values["llm"] = {"config": {**config, "vocab_size": 12}, "tokenizer": values["llm"]}
    assert train(folder, values) == 2
    message = the_error(capsys)
    assert all(part in message for part in ["tokenizer", "llama", "vocabulary", "12"]), message


# -- what is in the way: a disk, another run, an impatient user


def test_an_output_below_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "out").write_text("here first")
    assert train(folder, run_values(folder), "--out", str(folder / "out" / "run")) == 2
    message = the_error(capsys)
    assert str(folder / "out") in message
    assert (folder / "out").read_text() == "here first"


def test_a_directory_of_another_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run_values(folder)
    values["evaluation"] = {}
    assert train(folder, values) == 0
    held = (folder / "out" / "result.json").read_bytes()
    capsys.readouterr()
    assert train(folder, values, "seed.init=1") == 2
    assert "holds a run of another configuration ('init: 0' there, 'init: 1' here)" in the_error(capsys)
    assert (folder / "out" / "result.json").read_bytes() == held


def test_a_checkpoint_of_another_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = run_values(folder)
    values["evaluation"] = {}
    assert train(folder, values) == 0
    capsys.readouterr()
    for file in ("config.yaml", "result.json"):
        (folder / "out" / file).unlink()
    assert train(folder, values, "seed.init=1") == 2
    message = the_error(capsys)
    assert "checkpoints/" in message
    assert "is of another configuration" in message


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system refuses every write beyond so many bytes of a file, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("num_bytes", "names"),
    [
        pytest.param(100, "out/config.yaml", id="configuration"),
        pytest.param(10_000, "out/cache", id="cache"),
        pytest.param(100_000, "out/checkpoints", id="checkpoint"),
        pytest.param(300_000, "out/checkpoints", id="optimizer"),
    ],
)
def test_a_write_that_the_system_refuses(
    num_bytes: int, names: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = run_values(folder)
    command = ["train", str(write_run(folder, values)), "--out", str(folder / "out")]
    with largest_file(num_bytes):
        assert main(command) == 2
    message = the_error(capsys)
    assert names in message
    assert_nothing_looks_whole(folder / "out")
    assert main(command) == 0  # with room again


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ((checkpoint, "save_file"), "checkpoints/00000003"),
        ((trial, "write_json"), "result.json"),
        ((trial.VisionLanguageModel, "save_pretrained"), "out/model"),
    ],
)
def test_a_full_disk_costs_nothing_that_was_whole(
    place: tuple[Any, str],
    name: str,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write = getattr(*place)

    def full(first: Any, *rest: Any, **options: Any) -> None:
        if place[1] == "write_json" and first.name != "result.json":
            return write(first, *rest)  # the manifest is written at the start, when there still was room
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(first) if place[1] == "write_json" else None)

    values = run_values(folder)
    with monkeypatch.context() as patched:
        patched.setattr(*place, full)
        assert train(folder, values) == 2
    message = the_error(capsys)
    assert name in message
    assert "No space left on device" in message
    assert_nothing_looks_whole(folder / "out")
    assert train(folder, values) == 0


def test_a_model_that_was_not_saved_whole_is_not_evaluated(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(folder, run_values(folder)) == 0
    capsys.readouterr()
    (folder / "out" / "result.json").unlink()  # it is written last
    for place in ("out", "out/model"):
        assert main(["eval", str(folder / place), "--task", "colors"]) == 2
        assert "expected the directory of a run that has ended" in the_error(capsys)


def test_ctrl_c_while_features_are_computed(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    values = run_values(folder)
    with monkeypatch.context() as patched:
        patched.setattr(images.Image, "open", stop)
        assert train(folder, values) == 130
    assert capsys.readouterr().err == "vlmzoo: stopped; the same command continues from here\n"
    assert_nothing_looks_whole(folder / "out")
    assert train(folder, values) == 0


INTERRUPTED = """
import os, signal, sys
from vlmzoo.cli import main
from vlmzoo.training import run

take_step = run.take_step
left = [3]

def interrupted(*arguments):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGINT)  # in the middle of the third step
    return take_step(*arguments)

run.take_step = interrupted
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_in_a_real_process_loses_not_one_step(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values, out = run_values(folder), folder / "out"
    process = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, "train", str(write_run(folder, values)), "--out", str(out)],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.returncode == 130, process.stderr
    assert process.stdout == ""
    assert process.stderr == "vlmzoo: stopped; the same command continues from here\n"
    assert_nothing_looks_whole(out)
    before = (out / "metrics.jsonl").read_text()
    assert len(before.splitlines()) == 3
    assert train(folder, values) == 0
    after = (out / "metrics.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 8
