from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerBase

from vlmzoo.config import Template
from vlmzoo.connector import ImageLayout
from vlmzoo.data.collate import collate
from vlmzoo.data.records import Record, RecordError, Turn
from vlmzoo.data.samples import IGNORE, Sample, SampleBuilder
from vlmzoo.data.templates import CAPTION_INSTRUCTION

Tokenizers = dict[str, PreTrainedTokenizerBase]


def record(*texts: str) -> Record:
    turns = tuple(Turn("gpt" if index % 2 else "human", text) for index, text in enumerate(texts))
    images = tuple(Path(f"{index}.png") for index in range(sum(text.count("<image>") for text in texts)))
    return Record("abc", images, turns, "train.json[7] (id 'abc')")


def num_tokens(layout: ImageLayout) -> int:
    return sum(height * width for height, width in layout.grids)


def layout(path: Path, where: str) -> ImageLayout:
    return ImageLayout(((2, 3),))


@pytest.fixture
def builder(tokenizers: Tokenizers) -> SampleBuilder:
    tokenizer = tokenizers["llama"]
    image = tokenizer.convert_tokens_to_ids("<image>")
    assert isinstance(image, int)
    return SampleBuilder(tokenizer, image, num_tokens, layout, Template.vicuna_v1, 500)


def built(builder: SampleBuilder, record: Record, *, generation: bool = False) -> Sample:
    (sample,) = builder.build([record], generation=generation)
    return sample


def test_samples_built_together_are_those_built_alone(builder: SampleBuilder) -> None:
    texts = [("<image>\nWhich?", "The first."), ("Hello", "Hi"), ("<image>\nWho?", "A cat.", "Where?", "There.")]
    records = [record(*conversation) for conversation in texts]
    assert builder.build(records) == [built(builder, item) for item in records]
    with pytest.raises(RecordError, match="holds '</s>'"):
        builder.build([records[0], record("<image></s>", "A.")])


def test_every_image_has_its_slots_and_no_label(builder: SampleBuilder) -> None:
    sample = built(builder, record("<image><image>\nWhich?", "The first.", "And <image>?", "No."))
    slots = [index for index, token in enumerate(sample.input_ids) if token == builder.image_token_id]
    assert len(slots) == 3 * 6
    assert slots[5] - slots[0] == 5
    assert all(sample.labels[index] == IGNORE for index in slots)
    assert sample.layouts == (ImageLayout(((2, 3),)),) * 3
    targets = [label for label in sample.labels if label != IGNORE]
    assert builder.tokenizer.decode(targets) == "The first.</s> No.</s>"
    pairs = zip(sample.input_ids, sample.labels, strict=True)
    assert all(label in (IGNORE, token) for token, label in pairs)


def test_text_alone(builder: SampleBuilder) -> None:
    sample = built(builder, record("Hello", "Hi"))
    assert (sample.images, sample.layouts, sample.instruction_ids) == ((), (), ())
    assert builder.image_token_id not in sample.input_ids


def test_a_generation_sample_is_the_prompt(builder: SampleBuilder) -> None:
    whole = built(builder, record("<image>\nWhich?", "The first."))
    prompt = built(builder, record("<image>\nWhich?", "The first."), generation=True)
    assert whole.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    assert set(prompt.labels) == {IGNORE}


def test_truncation_counts_visual_tokens_and_keeps_whole_images(builder: SampleBuilder) -> None:
    question = record("<image>\nWhich?", "The first of a very long list of words.")
    whole = built(builder, question)
    last_slot = max(index for index, token in enumerate(whole.input_ids) if token == builder.image_token_id)
    first_target = next(index for index, label in enumerate(whole.labels) if label != IGNORE)
    cut = built(replace(builder, max_length=first_target + 1), question)
    assert cut.input_ids == whole.input_ids[: first_target + 1]
    assert cut.labels == whole.labels[: first_target + 1]
    where = r"^train\.json\[7\] \(id 'abc'\): "
    with pytest.raises(RecordError, match=where + rf"no target within {first_target} tokens"):
        built(replace(builder, max_length=first_target), question)
    with pytest.raises(RecordError, match=where + rf"its images end at token {last_slot + 1}, beyond .* {last_slot}"):
        built(replace(builder, max_length=last_slot), question)
    with pytest.raises(RecordError, match=where + rf"its prompt has {first_target} tokens"):
        built(replace(builder, max_length=first_target - 1), question, generation=True)


def test_faults_of_the_template_name_the_record(builder: SampleBuilder, tokenizers: Tokenizers) -> None:
    where = r"^train\.json\[7\] \(id 'abc'\): "
    with pytest.raises(RecordError, match=where + "a human turn holds '</s>'"):
        built(builder, record("<image></s>", "A."))
    with pytest.raises(RecordError, match=where + "template plain takes"):
        built(replace(builder, template=Template.plain), record("Hi", "A."))
    blind = tokenizers["llama"].chat_template
    tokenizers["llama"].chat_template = str(blind).replace("message.content.strip()", "message.content[8:]", 1)
    try:
        with pytest.raises(RecordError, match=where + "its text has 0 <image> for 1 images"):
            built(replace(builder, template=Template.chat), record("<image>\nWhich?", "A."))
    finally:
        tokenizers["llama"].chat_template = blind


def test_instructions_are_those_of_each_images_turn(builder: SampleBuilder) -> None:
    reading = replace(builder, instruction=True)
    one = built(reading, record("<image>\nWhich?", "A.", "<image> And this?", "B."))
    texts = [reading.tokenizer.decode(ids) for ids in one.instruction_ids]
    assert texts == ["Which?", "And this?"]
    assert all(builder.tokenizer.bos_token_id not in ids for ids in one.instruction_ids)
    longer = built(reading, record("<image>\nWhich?", "Else.", "<image> And this?", "B.", "More?", "C."))
    assert longer.instruction_ids == one.instruction_ids
    plain = built(replace(reading, template=Template.plain), record("Describe.\n<image>", "A cube"))
    assert [reading.tokenizer.decode(ids) for ids in plain.instruction_ids] == [CAPTION_INSTRUCTION]


class Without:
    """A tokenizer with some attributes replaced."""

    def __init__(self, tokenizer: Any, **values: Any) -> None:
        self._tokenizer, self._values = tokenizer, values

    def __getattr__(self, name: str) -> Any:
        return self._values[name] if name in self._values else getattr(self._tokenizer, name)


@pytest.mark.parametrize(
    ("template", "values", "message"),
    [
        (Template.vicuna_v1, {"eos_token": None}, "has no EOS .* set its eos_token"),
        (Template.chat, {"chat_template": None}, "has no chat template; set its chat_template"),
        (Template.plain, {"pad_token_id": None}, "has no pad token; set its pad_token"),
        (Template.plain, {"added_tokens_decoder": {}}, "<image> has id None, the model expects"),
        (Template.plain, {"is_fast": False}, "gives no character offsets; expected a fast"),
    ],
)
def test_tokenizers_that_lack_something(
    template: Template, values: dict[str, Any], message: str, builder: SampleBuilder
) -> None:
    lacking: Any = Without(builder.tokenizer, name_or_path="some/llm", **values)
    with pytest.raises(ValueError, match=f"^tokenizer some/llm:? ?{message}"):
        replace(builder, tokenizer=lacking, template=template)


@pytest.mark.parametrize("side", ["left", "right"])
def test_collate_pads_and_masks(side: Any, builder: SampleBuilder) -> None:
    reading = replace(builder, instruction=True)
    samples = [
        built(reading, record("<image><image>\nWhich?", "The first.")),
        built(reading, record("Hello", "Hi")),
        built(reading, record("<image>", "A.")),
    ]
    batch = collate(samples, pad_token_id=9, padding_side=side)
    width = max(len(sample.input_ids) for sample in samples)
    for index, sample in enumerate(samples):
        place = slice(0, len(sample.input_ids)) if side == "right" else slice(width - len(sample.input_ids), width)
        outside = torch.ones(width, dtype=torch.bool)
        outside[place] = False
        assert batch["input_ids"][index, place].tolist() == sample.input_ids
        assert batch["labels"][index, place].tolist() == sample.labels
        assert batch["attention_mask"][index, place].all()
        assert (batch["input_ids"][index, outside] == 9).all()
        assert (batch["labels"][index, outside] == IGNORE).all()
        assert not batch["attention_mask"][index, outside].any()
    assert batch["instruction_ids"].shape[0] == 3
    assert batch["instruction_mask"].sum(1).tolist() == [len(samples[0].instruction_ids[0])] * 2 + [0]


def test_collate_without_images_or_instructions(builder: SampleBuilder) -> None:
    batch = collate([built(builder, record("<image>", "A."))], pad_token_id=0)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    only = collate([built(replace(builder, instruction=True), record("<image>", "A."))], pad_token_id=0)
    assert only["instruction_ids"].shape == (1, 1)
    assert only["instruction_mask"].tolist() == [[0]]
