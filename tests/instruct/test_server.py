"""A real server: `transformers serve` with a tiny random model, whose answers are rubbish, asked once and judged."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.instruct import coco
from tests.instruct.test_kills import ended, forked, journalled
from vlmzoo.cli import main
from vlmzoo.instruct.journal import Journal
from vlmzoo.instruct.teachers import OpenAI

CONCURRENCY = 2
TEMPLATE = "{% for message in messages %}{{ message.role + ' ' + message.content + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    words = ["<unk>", "</s>", "the", "a", "dog", "person", "frisbee", "is", "in", "image", "park", "to", "user", ":"]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(words), max_position_embeddings=4096, eos_token_id=1, pad_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--device", "cpu", "--dtype", "float32", "--log-level", "info"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as server:
        assert server.stdout
        said = []
        for line in server.stdout:
            said.append(line)
            if "running on" in line:
                break
        else:
            pytest.fail("".join(said))
        threading.Thread(target=server.stdout.read, daemon=True).start()  # else it stops when the pipe is full
        yield f"http://127.0.0.1:{port}/v1"
        server.kill()


def watched(log: Path, kill_at: int) -> Callable[[], None]:
    """Has a process write down every image it asks for, and kill itself before or after its n-th entry."""

    def patch() -> None:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        ask, write, written = OpenAI.ask, Journal.write, 0

        async def asked(self: OpenAI, request: object) -> object:
            os.write(file, f"{request.facts.id}\n".encode())  # type: ignore[attr-defined]
            return await ask(self, request)  # type: ignore[arg-type]

        def wrote(self: Journal, entry: object) -> None:
            nonlocal written
            written += 1
            if written == abs(kill_at) and kill_at < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            write(self, entry)  # type: ignore[arg-type]
            if written == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        OpenAI.ask, Journal.write = asked, wrote  # type: ignore[method-assign,assignment]

    return patch


@pytest.mark.parametrize(("count", "kills"), [(12, 2), pytest.param(200, 12, marks=pytest.mark.instruct)])
def test_each_is_asked_once_written_down_and_judged(
    count: int, kills: int, url: str, model: Path, tmp_path: Path
) -> None:
    folder, out, log, draw = (
        coco.write(tmp_path / "coco", count),
        tmp_path / "a.json",
        tmp_path / "asked",
        random.Random(0),
    )
    arguments = ["synthesize", str(folder), "--out", str(out), "--teacher", "openai", "--base-url", url]
    arguments += ["--model", str(model), "--concurrency", str(CONCURRENCY), "--max-tokens", "8"]
    again = 0
    for killed in range(kills):
        known = journalled(out)
        most = max(2, 2 * (count - len(known)) // (kills - killed + 1))
        kill_at = draw.randrange(1, most) * draw.choice((-1, 1))
        before = log.read_text().split() if log.exists() else []
        assert not ended(forked(arguments, watched(log, kill_at)))
        asked = [int(line) for line in log.read_text().split()[len(before) :]]
        assert not known & set(asked)
        again += len(set(asked) - journalled(out))
        assert len(set(asked) - journalled(out)) <= CONCURRENCY
    known = journalled(out)
    assert main(arguments) == 1
    times = Counter(int(line) for line in log.read_text().split())
    assert sum(times.values()) + count - len(known) == count + again
    entries = [json.loads(line) for line in out.with_suffix(".journal.jsonl").read_text().splitlines()]
    assert len({entry["key"] for entry in entries}) == len(entries) == count
    assert all(entry["input_tokens"] > 100 and 0 < entry["output_tokens"] <= 8 for entry in entries)
    rejected = [json.loads(line) for line in out.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == count
    assert {line["reason"] for line in rejected} <= {"cut_off", "not_json", "empty"}


def test_a_local_model_is_asked_too(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = coco.write(tmp_path / "coco", 3), tmp_path / "a.json"
    arguments = ["synthesize", str(folder), "--out", str(out), "--teacher", "transformers", "--model", str(model)]
    assert main([*arguments, "--max-tokens", "8"]) == 1
    entries = [json.loads(line) for line in out.with_suffix(".journal.jsonl").read_text().splitlines()]
    assert len(entries) == 3
    assert all(0 < entry["output_tokens"] <= 8 for entry in entries)
    assert main([*arguments, "--max-tokens", "4000"]) == 1
    reasons = [json.loads(line)["reason"] for line in out.with_suffix(".rejected.jsonl").read_text().splitlines()]
    assert reasons == ["too_long"] * 3
    assert "0 of " in capsys.readouterr().out
