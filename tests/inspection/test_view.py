"""What is shown of a record is what the model sees: the same tokens, targets and pixels."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.inspection.conftest import ASK, record
from vlmzoo.config import DataConfig
from vlmzoo.data.images import ImageError
from vlmzoo.inspection import page, terminal
from vlmzoo.inspection.subject import Subject, of_data
from vlmzoo.inspection.view import view, written


def subject(data: Path, encoder: str | None = "world:clip", connector: str = "mlp", length: int = 2048) -> Subject:
    config = DataConfig(str(data), max_length=length)
    (found,) = of_data(config, llm="world:llama", encoder=encoder, connector=connector)
    return found


def test_tokens_and_targets_are_the_samples(data: Path) -> None:
    found = subject(data)
    shown = view(found, 0)
    assert found.builder is not None
    (sample,) = found.builder.build([found.source()[0]])
    ids = [token for piece in shown.pieces for token in [piece.token] * piece.count]
    assert ids == sample.input_ids
    targets = [piece.position for piece in shown.pieces if piece.role == "supervised"]
    assert targets == [place for place, label in enumerate(sample.labels) if label != -100]
    assert (shown.count("visual"), shown.count("supervised"), shown.length) == (36, 2, len(ids))


def test_a_record_is_found_by_its_id(data: Path) -> None:
    assert view(subject(data), name="copy").record.where == "train.json[8] (id 'copy')"
    with pytest.raises(ValueError, match="'nobody': none of the 18 records"):
        view(subject(data), name="nobody")
    with pytest.raises(ImageError, match=r"id 'missing'.*absent\.jpg"):
        view(subject(data), name="missing")
    with pytest.raises(ValueError, match="has records 0 to 17"):
        view(subject(data), 18)


def test_what_is_cut_is_told_apart_and_counted(data: Path) -> None:
    shown = view(subject(data, length=80), name="long answer")
    assert [piece.cut for piece in shown.pieces] == [piece.position >= 80 for piece in shown.pieces]
    assert shown.count("visual") + shown.count("supervised") + shown.count("masked") == 80
    assert f"{shown.length - 80} cut (max_length 80)" in terminal.render(shown, colour=False)
    assert shown.refusal is None
    refused = view(subject(data, length=40), name="long answer")
    assert "its images end at token" in terminal.render(refused, colour=False)
    assert "Training refuses it" in page.render(refused)


def test_the_terminal_colours_targets_and_marks_them_without_colours(data: Path) -> None:
    shown = view(subject(data), 0)
    assert "[[ red </s>]]" in terminal.render(shown, colour=False)
    coloured = terminal.render(shown, colour=True)
    assert "\x1b[1;32m red </s>\x1b[0m" in coloured
    assert "\x1b[1;35m<image × 36>\x1b[0m" in coloured
    assert "\x1b" not in terminal.render(shown, colour=False)


def pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r"data:image/png;base64,([^\"]+)", html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(text)))) for text in found]


def test_the_page_shows_the_pixels_that_the_encoder_gets(data: Path) -> None:
    found = subject(data)
    (shown,) = pictures(page.render(view(found, 0)))
    assert found.processor is not None
    processor = found.processor.image_processor
    crop = found.processor.crops(Image.open(data.parent / "images" / "a.jpg"), "pad")[0].numpy().transpose(1, 2, 0)
    expected = (crop * processor.image_std + processor.image_mean) * 255
    assert np.abs(shown - expected).max() <= 0.51


def test_tiles_stand_in_their_grid(data: Path) -> None:
    shown = view(subject(data, connector="anyres"), 0)
    (picture,) = shown.pictures
    assert picture.tiles is not None
    rows, columns = picture.tiles
    html = page.render(shown)
    assert len(pictures(html)) == 1 + rows * columns
    assert f"repeat({columns},1fr)" in html
    assert f"a thumbnail and {rows} x {columns} tiles" in terminal.render(shown, colour=False)


def test_the_page_needs_nothing_but_itself_and_runs_nothing_of_the_record(data: Path) -> None:
    data.write_text(json.dumps([record("<b>x</b>", ASK, "<script>alert(1)</script> $title", image="a.jpg")]))
    html = page.render(view(subject(data, encoder=None), 0))
    assert "<script" not in html
    assert "<b>x" not in html
    assert not re.findall(r"(?:src|href)=\"(?!data:)", html)
    assert "no encoder is named" in html


def test_without_images_there_is_no_section_for_them(data: Path) -> None:
    assert "<h2>Images" not in page.render(view(subject(data), 9))


def test_without_a_tokenizer_nothing_can_be_shown(data: Path) -> None:
    (alone,) = of_data(DataConfig(str(data)))
    with pytest.raises(ValueError, match=r"expected --llm.*world:llama needs no download"):
        view(alone, 0)


def test_tokens_of_a_byte_level_tokenizer_join_to_the_text() -> None:
    from tests.data.conftest import bytelevel

    tokenizer = bytelevel()
    text = "A naïve 😀 cat\n\nsat on  it."
    ids = tokenizer(text)["input_ids"]
    pieces = written(tokenizer, ids, -1)
    assert "".join(pieces).replace("�", "") == text
    assert len(pieces) == len(ids)


def test_every_record_of_the_world_can_be_shown() -> None:
    (world,) = of_data(DataConfig("world:conversations", limit=3), llm="world:qwen", encoder="world:siglip")
    for index in range(3):
        assert page.render(view(world, index)).count("<span") > 20
