"""Prompts and pictures -> inputs: every image has the slots that its connector fills, whatever stands around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from PIL import Image
from transformers import (
    AddedToken,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    LlavaNextImageProcessorPil,
    Siglip2ImageProcessorPil,
)
from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

from tests.checkpoints import CHAT, COLORS, run_values, write_data, write_models
from vlmzoo.config import RunConfig, Template, parse
from vlmzoo.connector import ImageLayout
from vlmzoo.data.images import native_size
from vlmzoo.data.samples import SampleBuilder
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import VisionLanguageProcessor
from vlmzoo.sweeps.checkpoint import evaluate_checkpoint
from vlmzoo.sweeps.trial import new_model, run_trial

CONNECTORS: list[Any] = [
    "mlp",
    {"name": "perceiver", "options": {"num_latents": 5, "num_layers": 1, "num_heads": 2, "head_dim": 8}},
    {"name": "gated_cross_attention", "options": {"memory": "patches", "every": 2, "num_heads": 2, "head_dim": 8}},
]
RED, GREEN, BLUE = (Image.new("RGB", (40, 30), COLORS[name]) for name in ("red", "green", "blue"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_models(tmp_path_factory.mktemp("models"))


def make(models: Path, connector: Any = "mlp", encoder: str = "clip") -> tuple[VisionLanguageModel, Any]:
    run = parse(RunConfig, run_values(models, connector, encoder))
    model = VisionLanguageModel.of_run(run).eval()
    return model, VisionLanguageProcessor.of_run(run, model)


@pytest.fixture(scope="module")
def processor(models: Path) -> Any:
    return make(models)[1]


SLOTS = 9  # of mlp: 24 pixels a side in patches of 8


def layout(model: VisionLanguageModel) -> ImageLayout:
    return ImageLayout((model.vision.grid(24, 24),))


@pytest.mark.parametrize("encoder", ["clip", "siglip"])
@pytest.mark.parametrize("connector", CONNECTORS)
def test_slots_are_those_of_the_model(connector: Any, encoder: str, models: Path) -> None:
    model, processor = make(models, connector, encoder)
    inputs = processor([RED, GREEN, BLUE], ["<image> What <image>", "red <image>"])
    slots = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert slots.tolist() == [2 * model.num_tokens(layout(model)), model.num_tokens(layout(model))]
    assert inputs["pixel_values"].shape == (3, 3, 24, 24)
    with torch.no_grad():
        logits = model(**inputs).logits
    assert logits.shape[:2] == inputs["input_ids"].shape
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()


@pytest.mark.parametrize("connector", ["anyres", {"name": "anyres", "options": {"connector": "matryoshka"}}])
def test_tiles_have_the_slots_of_the_model(connector: Any, models: Path) -> None:
    model, processor = make(models, connector)
    images = [RED, GREEN.resize((30, 70)), BLUE.resize((10, 90))]
    inputs = processor(images, ["<image> What <image>", "red <image>"])
    assert inputs["image_sizes"].tolist() == [[30, 40], [70, 30], [90, 10]]
    theirs = LlavaNextImageProcessorPil(
        size={"shortest_edge": 24},
        crop_size={"height": 24, "width": 24},
        image_grid_pinpoints=[[24, 48], [48, 24], [48, 48], [72, 24], [24, 72]],
    )(images, return_tensors="pt")
    crops = zip(theirs["pixel_values"], inputs["num_crops"].tolist(), strict=True)
    assert torch.equal(inputs["pixel_values"], torch.cat([image[:count] for image, count in crops]))
    counts = [model.num_tokens(processor.layouts.of_image((image.height, image.width))) for image in images]
    assert len(set(counts)) > 1
    slots = (inputs["input_ids"] == model.config.image_token_id).sum(1)
    assert slots.tolist() == [counts[0] + counts[1], counts[2]]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.isfinite(logits[inputs["attention_mask"].bool()]).all()
    assert model.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 2


@pytest.mark.parametrize("connector", [{"name": "matryoshka", "options": {"sides": [3, 2, 1]}}, "mqt"])
def test_a_token_budget_holds_for_processor_and_model(connector: Any, models: Path) -> None:
    model, processor = make(models, connector)
    token, lengths = model.config.image_token_id, []
    for budget in (None, 4, 1):
        inputs = processor(RED, "<image> What color is it ?", token_budget=budget)
        lengths.append(int((inputs["input_ids"] == token).sum()))
        found = model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert found.shape[0] == 1
    assert lengths[0] == model.num_tokens(layout(model))
    assert lengths[1:] == [4, 1]
    inputs["token_budget"] = torch.tensor([1, 1])
    with pytest.raises(ValueError, match="token_budget is given for 2 of 1 images"):
        model(**inputs)


def test_the_slots_stand_where_the_token_stood(processor: Any) -> None:
    token = processor.layouts.image_token_id
    ids = processor(RED, "What <image> is it")["input_ids"][0].tolist()
    words = processor.tokenizer("What is it")["input_ids"]
    assert ids == [*words[:2], *[token] * SLOTS, *words[2:]]


def test_several_turns_with_several_images(processor: Any) -> None:
    turns = [
        {"role": "user", "content": "<image>\n<image>\nWhat color is it ?"},
        {"role": "assistant", "content": "red green"},
        {"role": "user", "content": "<image>\nWhat is it now ?"},
    ]
    text = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    inputs = processor([RED, GREEN, BLUE], text, add_special_tokens=False)
    ids = inputs["input_ids"][0].tolist()
    token = processor.layouts.image_token_id
    bos, eos = processor.tokenizer.bos_token_id, processor.tokenizer.eos_token_id
    assert [ids.count(bos), ids.count(eos), ids.count(token)] == [1, 1, 3 * SLOTS]
    answered = ids.index(eos)
    assert [ids[:answered].count(token), ids[answered:].count(token)] == [2 * SLOTS, SLOTS]
    assert processor.chat_template == CHAT


def test_images_are_in_the_order_of_the_texts(processor: Any) -> None:
    inputs = processor([[RED, GREEN], [BLUE]], ["<image><image>", "<image>"])
    alone = [processor(image, "<image>")["pixel_values"][0] for image in (RED, GREEN, BLUE)]
    assert torch.equal(inputs["pixel_values"], torch.stack(alone))
    assert not torch.equal(alone[0], alone[1])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(side: Literal["left", "right"], processor: Any) -> None:
    texts = ["What", "<image> What color is it ?"]
    inputs = processor(RED, texts, padding_side=side)
    long = inputs["input_ids"].shape[1]
    short = len(processor.tokenizer("What")["input_ids"])
    real = [0] * (long - short) + [1] * short
    assert inputs["attention_mask"].tolist() == [real if side == "left" else real[::-1], [1] * long]
    pads = inputs["input_ids"][0][inputs["attention_mask"][0] == 0]
    assert set(pads.tolist()) == {processor.tokenizer.pad_token_id}
    for row, text in enumerate(texts):
        kept = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
        assert torch.equal(kept, processor([RED][: text.count("<image>")], text)["input_ids"][0])


def test_padding_has_no_influence_on_the_model(models: Path) -> None:
    model, processor = make(models)
    alone = processor(RED, "<image> What")
    for side in ("left", "right"):
        both = processor([RED, GREEN, BLUE], ["<image> What", "<image> What <image> is it"], padding_side=side)
        with torch.no_grad():
            logits = model(**both).logits[0][both["attention_mask"][0].bool()]
            expected = model(**alone).logits[0]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_text_alone(models: Path) -> None:
    model, processor = make(models)
    inputs = processor(text=["What is red ?", "What"])
    assert set(inputs) == {"input_ids", "attention_mask"}
    assert model.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (2, inputs["input_ids"].shape[1] + 3)


@pytest.mark.parametrize(
    ("images", "texts", "expected"),
    [
        ([RED], ["<image><image>"], "the texts hold 2 <image> for 1 images"),
        ([RED, GREEN], ["<image>", "What"], "the texts hold 1 + 0 <image> for 2 images"),
        (None, ["<image>"], "the texts hold 1 <image> for 0 images"),
        (RED, ["What"], "the texts hold 0 <image> for 1 images"),
        ([[RED], [GREEN, BLUE]], ["<image><image>", "<image>"], "the texts hold 2 + 1 <image> for 1 + 2 images"),
        ([[RED], [GREEN]], ["<image><image>"], "the texts hold 2 <image> for 1 + 1 images"),
        ([RED], None, "expected at least one text"),
    ],
)
def test_a_wrong_number_of_images_is_refused(processor: Any, images: Any, texts: Any, expected: str) -> None:
    with pytest.raises(ValueError) as found:
        processor(images, texts)
    assert str(found.value) == expected


def test_connectors_that_read_the_instruction_get_one_an_image(models: Path) -> None:
    options = {"num_queries": 3, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "instruction": True}
    model, processor = make(models, {"name": "qformer", "options": options})
    inputs = processor([RED, GREEN], "<image><image> What", instruction=["What", "What color is it"])
    words = processor.tokenizer("What color is it", add_special_tokens=False)["input_ids"]
    assert inputs["instruction_ids"][1].tolist() == words
    assert inputs["instruction_mask"].tolist() == [[1] + [0] * (len(words) - 1), [1] * len(words)]
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()
    with pytest.raises(ValueError, match="one instruction an image: 1 for 2"):
        processor([RED, GREEN], "<image><image> What", instruction="What")


@pytest.mark.parametrize("how", ["a word", "added", "special"])
def test_an_image_token_that_is_there_keeps_its_id(how: str, tmp_path: Path) -> None:
    models = write_models(tmp_path)
    theirs = AutoTokenizer.from_pretrained(models / "llama")
    if how == "a word":
        file = models / "llama" / "tokenizer.json"
        file.write_text(file.read_text().replace('"picture"', '"<image>"'))
        expected = theirs.convert_tokens_to_ids("picture")
    else:
        expected = len(theirs)
        theirs.add_tokens([AddedToken("<image>", special=how == "special")])
        theirs.save_pretrained(models / "llama")
    model, processor = make(models)
    assert model.config.image_token_id == expected
    found = processor(RED, "What color is<image>?")["input_ids"]
    assert (found == expected).sum() == SLOTS
    SampleBuilder(processor.tokenizer, expected, model.num_tokens, processor.layouts.of_file, Template.plain, 64)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_saved_beside_its_model_it_is_found_by_transformers(connector: Any, models: Path, tmp_path: Path) -> None:
    model, processor = make(models, connector)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(again, VisionLanguageProcessor)
    prompt: Any = ([RED, GREEN], ["What <image> is <image>", "What"])
    before, after = processor(*prompt), again(*prompt)
    assert set(before) == set(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert again.tokenizer.chat_template == CHAT
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**after).logits, model(**before).logits)


def test_a_processor_without_its_model_is_refused(processor: Any) -> None:
    with pytest.raises(ValueError, match="belongs to a model"):
        VisionLanguageProcessor(processor.image_processor, processor.tokenizer)


NAFLEX = {
    "model_type": "siglip2_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_patches": 9,
    "patch_size": 8,
}


@pytest.fixture
def naflex(tmp_path):
    """A SigLIP 2 of native resolution as transformers saves it, and a LLaVA-like folder beside it."""
    write_models(tmp_path)
    write_data(tmp_path)
    AutoModel.from_config(AutoConfig.for_model(**NAFLEX)).save_pretrained(tmp_path / "naflex")
    Siglip2ImageProcessorPil(patch_size=8, max_num_patches=9).save_pretrained(tmp_path / "naflex")
    return tmp_path


@pytest.mark.parametrize("size", [(24, 24), (40, 30), (300, 20), (20, 300), (7, 9), (1000, 900)])
def test_native_sizes_are_those_of_siglip_2(size):
    assert native_size(size, 16, 256) == get_image_size_for_max_num_patches(*size, 16, 256)
    height, width = native_size(size, 8, 9)
    assert height % 8 == width % 8 == 0
    assert height * width <= 9 * 64


def test_native_pixels_are_those_of_siglip_2(naflex):
    run = parse(RunConfig, run_values(naflex, "linear", "naflex"))
    model, processor = new_model(run)
    theirs = AutoImageProcessor.from_pretrained(naflex / "naflex", backend="pil")
    images = [
        Image.open(naflex / "images" / f"{index}-0.png").resize(size) for index, size in ((0, (40, 30)), (1, (20, 60)))
    ]
    inputs = processor(images=images, text=["<image> What", "<image> is it ?"], image_mode="native")
    given = theirs(images, return_tensors="pt")
    assert inputs["crop_sizes"].tolist() == [[8 * h, 8 * w] for h, w in given["spatial_shapes"].tolist()]
    sizes = [tuple(size) for size in inputs["crop_sizes"].tolist()]
    (found,) = model.eval().vision.encode(inputs["pixel_values"], model.connector.requires, sizes)
    expected = model.vision.model(**given, output_hidden_states=True).hidden_states[-2]
    for row, count in enumerate(found.mask.sum(1).tolist()):
        torch.testing.assert_close(found.values[row, :count], expected[row, :count], atol=1e-5, rtol=1e-5)
    slots = (inputs["input_ids"] == model.config.image_token_id).sum(1).tolist()
    assert slots == found.mask.sum(1).tolist()
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_a_run_in_native_resolution(naflex, tmp_path):
    values = run_values(naflex, "linear", "naflex")
    for data in [stage["data"] for stage in values["stages"].values()] + [values["evaluation"]["colors"]["data"]]:
        data["image_mode"] = "native"
    result = run_trial(parse(RunConfig, values), tmp_path / "out", tmp_path / "features")
    assert evaluate_checkpoint(tmp_path / "out", ["colors"]) == result["evaluation"]
    values["encoder"] = str(naflex / "clip")
    with pytest.raises(ValueError, match="image_mode 'native': the encoder takes images of one size"):
        run_trial(parse(RunConfig, values), tmp_path / "clip")
