"""One record as the model sees it: its tokens, which of them are targets, and its images after preprocessing."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vlmzoo.connector import Grid
from vlmzoo.data.images import ImageError, load_image
from vlmzoo.data.records import Record, RecordError
from vlmzoo.data.samples import IGNORE
from vlmzoo.inspection.subject import Subject
from vlmzoo.samples import seen

WINDOW = 8  # tokens before one that decide how it is written

Role = Literal["masked", "supervised", "visual"]


@dataclass(frozen=True)
class Piece:
    """A token, or all of an image's as one."""

    text: str
    role: Role
    cut: bool  # beyond max_length: the model never sees it
    position: int  # of the first token
    token: int  # its id
    count: int = 1


@dataclass(frozen=True)
class Picture:
    """An image as the encoder gets it."""

    name: str
    size: tuple[int, int]  # of the file: width, height
    crops: tuple[Image.Image, ...]  # one, or a thumbnail and then tiles row by row; the image itself without an encoder
    tiles: Grid | None  # rows and columns of tiles
    slots: int


@dataclass(frozen=True)
class View:
    subject: Subject
    record: Record
    pieces: tuple[Piece, ...]
    pictures: tuple[Picture, ...]
    max_length: int
    refusal: str | None  # why training does not take the record

    def count(self, role: Role) -> int:
        """Tokens of a role that the model sees."""
        return sum(
            min(piece.count, max(0, self.max_length - piece.position)) for piece in self.pieces if piece.role == role
        )

    @property
    def length(self) -> int:
        """Tokens before any are cut."""
        return sum(piece.count for piece in self.pieces)


def view(subject: Subject, index: int | None = None, name: str | None = None) -> View:
    """The record of this index, or with this id; the first one without either.

    Raises:
        ValueError: no tokenizer is named, or no record is there.
        RecordError, ImageError: the record cannot be shown.
    """
    builder = subject.builder
    if builder is None:
        raise ValueError(f"{subject.name}: expected --llm, whose tokens are shown; world:llama needs no download")
    record = seen(_find(subject, index, name), subject.sees)
    tokens = builder.tokens([record])
    refusal = None
    try:
        builder.assemble([record], tokens)
    except RecordError as error:
        refusal = str(error)
    layouts = [builder.layout(image, record.where) for image in record.images]
    slots = [builder.num_tokens(layout) for layout in layouts]
    whole = dataclasses.replace(builder, max_length=sys.maxsize)
    (sample,) = whole.assemble([record], tokens)
    pieces = _pieces(subject, sample.input_ids, sample.labels, slots)
    pictures = tuple(
        _picture(subject, image, record.where, count) for image, count in zip(record.images, slots, strict=True)
    )
    return View(subject, record, pieces, pictures, builder.max_length, refusal)


def _find(subject: Subject, index: int | None, name: str | None) -> Record:
    source = subject.source()
    if name is None:
        if not 0 <= (index or 0) < len(source):
            raise ValueError(f"--index {index}: {subject.data.path} has records 0 to {len(source) - 1}")
        return source[index or 0]
    for place in range(len(source)):
        try:
            record = source[place]
        except (RecordError, ImageError) as error:
            if f"(id {name!r})" in str(error):
                raise
            continue
        if record.id == name:
            return record
    raise ValueError(f"--id {name!r}: none of the {len(source)} records of {subject.data.path} has it")


def _pieces(subject: Subject, ids: Sequence[int], labels: Sequence[int], slots: Sequence[int]) -> tuple[Piece, ...]:
    builder = subject.builder
    assert builder is not None
    found: list[Piece] = []
    remaining, place = iter(slots), 0
    texts = written(builder.tokenizer, ids, builder.image_token_id)
    while place < len(ids):
        cut, token = place >= builder.max_length, ids[place]
        if token == builder.image_token_id:
            count = next(remaining)
            found.append(Piece(f"<image × {count}>", "visual", cut, place, token, count))
            place += count
            continue
        role: Role = "masked" if labels[place] == IGNORE else "supervised"
        found.append(Piece(texts[place], role, cut, place, token))
        place += 1
    return tuple(found)


def written(tokenizer: Any, ids: Sequence[int], image_token_id: int) -> list[str]:
    """The text that each token adds to those before it; half a character is `�`, and the rest of it is whole."""
    found, start = [], 0
    for place, token in enumerate(ids):
        if token == image_token_id:
            start = place + 1
            found.append("")
            continue
        first = max(start, place - WINDOW)
        before, now = (
            str(tokenizer.decode(ids[first:end], clean_up_tokenization_spaces=False)) for end in (place, place + 1)
        )
        before = before.rstrip("�")
        found.append(now[len(before) :] if now.startswith(before) else str(tokenizer.decode([token])))
    return found


def _picture(subject: Subject, image: Any, where: str, slots: int) -> Picture:
    pixels, name = load_image(image, where=where), Path(str(image)).name
    processor = subject.processor
    if processor is None:
        return Picture(name, pixels.size, (pixels,), None, slots)
    crops = processor.crops(pixels, subject.data.image_mode)
    tiles = processor.layouts.tiles((pixels.height, pixels.width), processor.layouts.grid)
    shown = tuple(_shown(crop, processor.image_processor) for crop in crops)
    return Picture(name, pixels.size, shown, tiles, slots)


def _shown(crop: Tensor, image_processor: Any) -> Image.Image:
    """A crop (3, height, width) of pixel values as a picture: the normalisation undone."""
    mean, std = (
        torch.tensor(values)[:, None, None] for values in (image_processor.image_mean, image_processor.image_std)
    )
    values = ((crop * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def title(view: View) -> str:
    """What is shown: the data set's file, or the stage."""
    return view.subject.name if not Path(view.subject.name).suffix else Path(view.subject.name).name
