"""What the cache gives is what the builder gives, whoever wrote it and whatever has happened to it since."""

import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from vlmzoo.config import Template
from vlmzoo.connector import ImageLayout
from vlmzoo.data import token_cache
from vlmzoo.data.records import Record, RecordError, Turn
from vlmzoo.data.samples import SampleBuilder
from vlmzoo.data.token_cache import TokenCache
from vlmzoo.data.tokens import Tokenised

Tokenizers = dict[str, PreTrainedTokenizerBase]

TEXTS = [
    ("<image>\nWhich?", "The first."),
    ("<image>\nWho?", "A cat."),
    ("<image><image>\nWhich of the two?", "The second."),
    ("<image>\nWhat is it?", "字 and é 🎉"),
    ("<image>\nHow many?", "Two cats"),
    ("<image>\nWhere?", "There."),
    ("<image>", "A red cube."),
]


def record(index: int, *texts: str) -> Record:
    turns = tuple(Turn("gpt" if place % 2 else "human", text) for place, text in enumerate(texts))
    images = tuple(Path(f"{place}.png") for place in range(texts[0].count("<image>")))
    return Record(str(index), images, turns, f"train.json[{index}]")


RECORDS = [record(index, *texts) for index, texts in enumerate(TEXTS)]


def builder_of(
    tokenizer: PreTrainedTokenizerBase, template: Template = Template.vicuna_v1, *, instruction: bool = False
) -> SampleBuilder:
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    grid = ImageLayout(((2, 3),))
    return SampleBuilder(tokenizer, image, lambda layout: 6, lambda path, where: grid, template, 500, instruction)


@pytest.fixture
def builder(tokenizers: Tokenizers) -> SampleBuilder:
    return builder_of(tokenizers["llama"])


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_cache, "SHARD", 3)
    monkeypatch.setattr(token_cache, "BATCH", 2)


def found(cache: TokenCache) -> list[Tokenised]:
    return [cache[index] for index in range(len(RECORDS))]


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("instruction", [False, True])
@pytest.mark.parametrize("template", list(Template))
def test_it_holds_what_the_builder_gives(
    template: Template, instruction: bool, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    if template is Template.chat and not tokenizer.chat_template:
        return
    builder = builder_of(tokenizer, template, instruction=instruction)
    expected = builder.tokens(RECORDS)
    assert any(item.instruction_ids for item in expected) == instruction
    for _ in range(2):  # written, then read
        assert found(TokenCache(builder, RECORDS, tmp_path / "cache")) == expected
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 3


def test_nothing_is_tokenised_twice(builder: SampleBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = found(TokenCache(builder, RECORDS, tmp_path))
    monkeypatch.setattr(SampleBuilder, "tokens", None)
    assert found(TokenCache(builder, RECORDS, tmp_path)) == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda builder, tokenizers: (builder, RECORDS[1:]),
        lambda builder, tokenizers: (builder, [*RECORDS[:-1], record(6, "<image>", "A red cube!")]),
        lambda builder, tokenizers: (replace(builder, template=Template.plain), RECORDS),
        lambda builder, tokenizers: (replace(builder, instruction=True), RECORDS),
        lambda builder, tokenizers: (builder_of(tokenizers["llama, not legacy"]), RECORDS),
    ],
    ids=["records", "text", "template", "instruction", "tokenizer"],
)
def test_whatever_decides_the_ids_names_them(
    change: Callable[[SampleBuilder, Tokenizers], tuple[SampleBuilder, list[Record]]],
    builder: SampleBuilder,
    tokenizers: Tokenizers,
    tmp_path: Path,
) -> None:
    TokenCache(builder, RECORDS, tmp_path)
    TokenCache(*change(builder, tokenizers), tmp_path)
    assert len([place for place in tmp_path.iterdir() if place.suffix != ".lock"]) == 2


def test_what_does_not_decide_them_does_not(builder: SampleBuilder, tmp_path: Path) -> None:
    """Connectors with other numbers of slots, and models with another longest input, share the ids."""
    TokenCache(builder, RECORDS, tmp_path)
    other = replace(builder, num_tokens=lambda layout: 1, max_length=40)
    TokenCache(other, [replace(item, id="other", where="other.json[0]") for item in RECORDS], tmp_path)
    assert len([place for place in tmp_path.iterdir() if place.suffix != ".lock"]) == 1


def test_new_code_writes_anew(builder: SampleBuilder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TokenCache(builder, RECORDS, tmp_path)
    monkeypatch.setattr(token_cache.inspect, "getsource", lambda module: f"# {module.__name__}, changed")
    TokenCache(builder, RECORDS, tmp_path)
    assert len([place for place in tmp_path.iterdir() if place.suffix != ".lock"]) == 2


@pytest.mark.parametrize("kept", [0.5, 0.0])
def test_a_damaged_one_is_written_again(
    kept: float, builder: SampleBuilder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = found(TokenCache(builder, RECORDS, tmp_path))
    (shard,) = tmp_path.glob("*/*.safetensors")
    shard.write_bytes(shard.read_bytes()[: int(kept * shard.stat().st_size)])
    assert found(TokenCache(builder, RECORDS, tmp_path)) == expected
    assert "token cache: " in (said := capsys.readouterr().err)
    assert "does not match its hash; computing it again" in said


def test_a_conversation_that_cannot_be_rendered_leaves_nothing(builder: SampleBuilder, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"train.json\[7\]: a gpt turn holds '</s>'"):
        TokenCache(builder, [*RECORDS, record(7, "<image>\nWho?", "Nobody.</s>")], tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_of_two_at_once_one_writes(tokenizers: Tokenizers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, calls = SampleBuilder.tokens, []

    def counted(*arguments: Any) -> Any:
        calls.append(threading.get_ident())
        return tokens(*arguments)

    monkeypatch.setattr(SampleBuilder, "tokens", counted)
    results: list[list[Tokenised]] = []

    def read() -> None:
        results.append(found(TokenCache(builder_of(tokenizers["llama"]), RECORDS, tmp_path)))

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(calls)) == 1
    assert results[0] == results[1]
