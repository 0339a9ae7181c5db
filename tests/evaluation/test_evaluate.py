import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPImageProcessorPil, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests import tiny
from vlmzoo import build
from vlmzoo.config import DataConfig, Template
from vlmzoo.connector import Connector, ImageLayout
from vlmzoo.data.collate import collate
from vlmzoo.data.images import ImageError
from vlmzoo.data.records import Record, Turn
from vlmzoo.data.samples import Sample, SampleBuilder
from vlmzoo.evaluation.evaluate import evaluate, write_predictions
from vlmzoo.evaluation.metrics import Prediction, score
from vlmzoo.processor import Layouts, VisionLanguageProcessor
from vlmzoo.samples import SampleSet

WORDS = "what is it where how many a red blue cube ball cat on the left right one two yes no ? . USER ASSISTANT :"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: index for index, word in enumerate([*special, *WORDS.split()])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_special_tokens({"extra_special_tokens": ["<image>"]})
    return fast


QUESTIONS = [
    ("<image>\nwhat is it ?", "a red cube", "colour"),
    ("<image>\nhow many ?", "two", "count"),
    ("where is it ? <image> on the left or on the right ?", "on the left", None),
    ("is a cube a ball ?", "no", "text"),
    ("<image>", "yes", "text"),
]


class Scripted:
    """Answers each prompt by the next of its texts, then EOS, then padding; keeps what it was given."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]) -> None:
        self.tokenizer, self.answers, self.calls, self.training = tokenizer, list(answers), [], True

    def eval(self) -> None:
        self.training = False

    def generate(self, **inputs: Any) -> Tensor:
        assert not self.training
        self.calls.append(inputs)
        rows = []
        for prompt in inputs["input_ids"]:
            ids = [*self.tokenizer(self.answers.pop(0), add_special_tokens=False)["input_ids"], 2]
            rows.append([*prompt.tolist(), *ids, *[0] * (8 - len(ids))])
        return torch.tensor(rows)


def samples(tokenizer: PreTrainedTokenizerBase) -> list[Sample]:
    builder = SampleBuilder(
        tokenizer,
        build.image_token_id(tokenizer),
        lambda layout: 3,
        lambda path, where: ImageLayout(((1, 3),)),
        Template.vicuna_v1,
        100,
    )
    records = []
    for index, (question, answer, capability) in enumerate(QUESTIONS):
        turns = (Turn("human", question), Turn("gpt", answer))
        images = (Path("a.png"),) * question.count("<image>")
        records.append(Record(f"q{index}", images, turns, "where", capability))
    return builder.build(records, generation=True)


def test_answers_are_what_follows_the_prompt(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    model = Scripted(tokenizer, ["a red cube .", "one", "on the left", "", "yes yes"])
    batch_of = partial(collate, pad_token_id=0, padding_side="left")
    found = evaluate(
        model,
        samples(tokenizer),
        batch_of,
        tokenizer=tokenizer,
        template=Template.vicuna_v1,
        batch_size=2,
        max_new_tokens=8,
    )
    assert found[1] == Prediction("q1", "<image>\nhow many ?", "one", "two", 0.0, "count")
    assert [prediction.score for prediction in found] == [1, 0, 1, 0, 0]
    assert score(found)["capabilities"] == {"all": 1, "colour": 1, "count": 0, "text": 0}
    assert [len(call["input_ids"]) for call in model.calls] == [2, 2, 1]
    for call in model.calls:
        assert "labels" not in call
        assert (call["do_sample"], call["num_beams"], call["max_new_tokens"]) == (False, 1, 8)
        assert (call["eos_token_id"], call["pad_token_id"]) == ([2], 0)
    path = tmp_path / "predictions" / "task.jsonl"
    write_predictions(path, found)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [set(line) for line in lines] == [{"id", "prompt", "answer", "expected", "score", "capability"}] * 5
    assert [Prediction(**line) for line in lines] == found
    assert [file.name for file in path.parent.iterdir()] == ["task.jsonl"]


def test_padding_on_the_right_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match="expected padding on the left"):
        evaluate(
            Scripted(tokenizer, ["yes"] * 5),
            samples(tokenizer),
            partial(collate, pad_token_id=0),
            tokenizer=tokenizer,
            template=Template.vicuna_v1,
            batch_size=5,
            max_new_tokens=8,
        )


@pytest.fixture
def data(tmp_path: Path) -> DataConfig:
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (5, 30, 24, 3), dtype=np.uint8)
    records = []
    for index, (question, answer, capability) in enumerate(QUESTIONS):
        Image.fromarray(noise[index]).save(tmp_path / "images" / f"{index}.png")
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        image = {"image": f"{index}.png"} if "<image>" in question else {}
        records.append({"id": f"q{index}", "conversations": turns, **image} | _named(capability))
    (tmp_path / "task.json").write_text(json.dumps(records))
    return DataConfig(str(tmp_path / "task.json"))


def _named(capability: str | None) -> dict[str, str]:
    return {} if capability is None else {"capability": capability}


@pytest.mark.parametrize("connector", ["mlp", tiny.MemoryConnector, tiny.HybridConnector])
def test_scores_do_not_depend_on_the_batch_size(
    connector: str | type[Connector], tokenizer: PreTrainedTokenizerBase, data: DataConfig
) -> None:
    model = tiny.model(connector, {**tiny.LLAMA, "vocab_size": len(tokenizer), "eos_token_id": 2})
    model.config.image_token_id = build.image_token_id(tokenizer)
    processor = VisionLanguageProcessor(CLIPImageProcessorPil(), tokenizer, Layouts.of(model))
    records = SampleSet(model, processor, data)

    def answers(batch_size: int) -> list[Prediction]:
        return evaluate(
            model,
            records.samples(range(len(records)), generation=True),
            partial(records.batch, padding_side="left"),
            tokenizer=tokenizer,
            template=data.template,
            batch_size=batch_size,
            max_new_tokens=6,
        )

    alone = answers(1)
    assert len({prediction.answer for prediction in alone}) > 1
    assert answers(2) == answers(5) == alone
    with torch.no_grad():
        model.connector.get_parameter(next(name for name, _ in model.connector.named_parameters())).add_(1)
    assert answers(5) != alone  # the images have their part in the answers


def test_shuffled_images_are_always_anothers(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    model = tiny.model("mlp", {**tiny.LLAMA, "vocab_size": len(tokenizer)})
    model.config.image_token_id = build.image_token_id(tokenizer)
    processor = VisionLanguageProcessor(CLIPImageProcessorPil(), tokenizer, Layouts.of(model))
    records = SampleSet(model, processor, data)
    own = {record.id: [path.name for path in record.images] for record in records.records}
    swapped = {sample.record.id: [path.name for path in sample.images] for sample in records.shuffled(5)}
    with_image = [name for name, images in own.items() if images]
    assert list(swapped) == with_image  # a question about no image is left out
    assert len(with_image) < len(own)
    assert sorted(swapped.values()) == sorted(own[name] for name in with_image)
    assert all(swapped[name] != own[name] for name in with_image)


def test_a_broken_image_is_named_with_its_record(tokenizer: PreTrainedTokenizerBase, data: DataConfig) -> None:
    model = tiny.model("mlp", {**tiny.LLAMA, "vocab_size": len(tokenizer)})
    model.config.image_token_id = build.image_token_id(tokenizer)
    records = SampleSet(model, VisionLanguageProcessor(CLIPImageProcessorPil(), tokenizer, Layouts.of(model)), data)
    broken = Path(data.path).parent / "images" / "1.png"
    broken.write_bytes(broken.read_bytes()[:500])
    with pytest.raises(ImageError, match=r"^task\.json\[1\] \(id 'q1'\): image .*1\.png cannot be decoded"):
        records.batch(records.samples([0, 1]))
