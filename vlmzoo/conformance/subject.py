"""What the checks work on: a connector inside a tiny model, and a batch with all that a connector must cope with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmzoo import build
from vlmzoo.config import ConnectorConfig
from vlmzoo.connector import Connector, FeatureMap, Grid, ImageLayout, Instruction, VisualInput
from vlmzoo.model import IGNORE, VisionLanguageModel

VISION: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 24,  # as many as CLIP-L, so that the layers a paper names exist
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
TEXT: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 8,  # twice Flamingo's interval, so that two layers inside the LLM follow one another
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "initializer_range": 0.15,  # 1 / sqrt(48): with less the logits hardly depend on the images
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GRIDS: tuple[Grid, ...] = ((4, 4), (2, 6), (3, 5))
CROPS = ((0,), (1, 0), (2,), (0,))  # the grids of each image's crops
SIZE = (40, 100)  # (height, width) in pixels of every original, for connectors that cut it into tiles
IMAGES = ((0, 1), (), (2,), (3,))  # of each sample
NOISE = 0.1


@dataclass(frozen=True)
class Batch:
    """Left-padded samples with their images; every text token is a target."""

    input_ids: Tensor
    attention_mask: Tensor
    visual: VisualInput | None

    @property
    def labels(self) -> Tensor:
        return self.input_ids.masked_fill(~self.is_text, IGNORE)

    @property
    def is_text(self) -> Tensor:
        return self.attention_mask.bool() & (self.input_ids < TEXT["vocab_size"])

    def inputs(self) -> dict[str, Any]:
        """Keyword arguments for the model."""
        inputs: dict[str, Any] = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.visual is not None:
            inputs["image_features"] = self.visual.maps
            inputs["num_crops"] = torch.tensor([layout.num_crops for layout in self.visual.layouts])
            if sizes := [layout.size for layout in self.visual.layouts if layout.size is not None]:
                inputs["image_sizes"] = torch.tensor(sizes)
            if self.visual.instruction is not None:
                inputs["instruction_ids"] = self.visual.instruction.input_ids
                inputs["instruction_mask"] = self.visual.instruction.mask
        return inputs

    def sample(self, row: int) -> Batch:
        """One sample alone, without padding."""
        real = self.attention_mask[row].bool()
        visual = take(self.visual, IMAGES[row]) if self.visual is not None and IMAGES[row] else None
        return Batch(self.input_ids[row : row + 1, real], self.attention_mask[row : row + 1, real], visual)


class Subject:
    """A registered connector with its options, built once and shared by all checks.

    Raises:
        ValueError: an unknown name or option.
    """

    def __init__(self, name: str, options: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.options = build.connector_options(ConnectorConfig(name, dict(options or {})))

    def build(self, seed: int | None = 0) -> Connector:
        """A new connector, as it is initialised."""
        spec = self.model.vision.spec
        return build.connector(self.name, self.options, vision=spec, text=self.model.text_spec, seed=seed).eval()

    @cached_property
    def model(self) -> VisionLanguageModel:
        """A tiny model with the connector; what was initialised to zero (tanh gates, for one) has been perturbed."""
        config = ConnectorConfig(self.name, self.options)
        model = VisionLanguageModel.from_parts({"config": VISION}, config, {"config": TEXT})
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(0)
            for parameter in model.connector.parameters():
                if not parameter.any():
                    parameter.add_(torch.randn_like(parameter), alpha=NOISE)
        return model.eval()

    @property
    def connector(self) -> Connector:
        return self.model.connector

    def logits(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self.model(**batch.inputs()).logits

    @contextmanager
    def training(self) -> Iterator[VisionLanguageModel]:
        """The model in training mode without gradients; afterwards it is as it was (running statistics too)."""
        buffers = {name: value.clone() for name, value in self.model.named_buffers()}
        self.model.zero_grad(set_to_none=True)
        try:
            yield self.model.train()
        finally:
            self.model.eval().zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, value in self.model.named_buffers():
                    value.copy_(buffers[name])

    @cached_property
    def grids(self) -> tuple[Grid, ...]:
        """Those of `GRIDS` that the connector does not refuse with a ValueError."""
        found = tuple(grid for grid in GRIDS if _accepts(self.connector, grid))
        if not found:
            raise ValueError(f"it refuses every grid of {', '.join(f'{h} x {w}' for h, w in GRIDS)} patches")
        return found

    @cached_property
    def layouts(self) -> tuple[ImageLayout, ...]:
        return tuple(map(self._layout, CROPS))

    def _layout(self, crops: Sequence[int]) -> ImageLayout:
        """These crops, or for a connector with tiles a thumbnail and, where they are several, all its tiles."""
        grids = tuple(self.grids[crop % len(self.grids)] for crop in crops)
        if (tiles := self.connector.tiles(SIZE, grids[0])) is None:
            return ImageLayout(grids)
        return ImageLayout(grids[:1] * (1 + math.prod(tiles) if len(grids) > 1 else 1), SIZE)

    def batch(self) -> Batch:
        """Samples with two, no, one and one images, an image of two crops among them; always the same ones."""
        generator = torch.Generator().manual_seed(0)
        token = self.model.config.image_token_id

        def words(count: int) -> list[int]:
            return torch.randint(2, TEXT["vocab_size"], (count,), generator=generator).tolist()

        rows = []
        for row, images in enumerate(IMAGES):
            ids = words(row) if images else words(4)
            for image in images:
                ids += [token] * self.connector.num_tokens(self.layouts[image]) + words(3)
            rows.append(ids)
        length = max(map(len, rows))
        input_ids = torch.tensor([[0] * (length - len(ids)) + ids for ids in rows])
        attention_mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in rows])
        return Batch(input_ids, attention_mask, self.visual())

    def visual(self, seed: int = 0) -> VisualInput:
        """The images of the batch."""
        request = self.connector.requires
        generator = torch.Generator().manual_seed(seed)
        grids = tuple(grid for layout in self.layouts for grid in layout.grids)
        counts = torch.tensor([height * width for height, width in grids])
        mask = torch.arange(int(counts.max())) < counts[:, None]

        def features() -> FeatureMap:
            values = torch.randn(*mask.shape, VISION["hidden_size"], generator=generator)
            cls = torch.randn(len(grids), VISION["hidden_size"], generator=generator)
            scores = torch.randn(len(grids), VISION["num_attention_heads"], mask.shape[1], generator=generator)
            attention = scores.masked_fill(~mask[:, None], -torch.inf).softmax(-1)
            return FeatureMap(
                values * mask[..., None],
                grids,
                mask,
                cls if request.cls else None,
                attention if request.cls_attention else None,
            )

        lengths = torch.tensor([3, 5, 2, 4])
        instruction = Instruction(
            torch.randint(2, TEXT["vocab_size"], (len(lengths), 5), generator=generator),
            torch.arange(5) < lengths[:, None],
        )
        return VisualInput(
            maps=tuple(features() for _ in request.layers or (None,)),
            image_of_crop=torch.tensor([image for image, layout in enumerate(self.layouts) for _ in layout.grids]),
            sample_of_image=torch.tensor([sample for sample, images in enumerate(IMAGES) for _ in images]),
            layouts=self.layouts,
            instruction=instruction if request.instruction else None,
        )


def _accepts(connector: Connector, grid: Grid) -> bool:
    try:
        connector.num_tokens(ImageLayout((grid,)))
    except ValueError:
        return False
    return True


def convert(visual: VisualInput, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> VisualInput:
    """The same images on another device, their features in another type."""

    def to(value: Tensor | None) -> Any:
        return None if value is None else value.to(device, dtype)

    maps = tuple(
        FeatureMap(to(old.values), old.grids, old.mask.to(device), to(old.cls), to(old.cls_attention))
        for old in visual.maps
    )
    instruction = visual.instruction
    if instruction is not None:
        instruction = Instruction(instruction.input_ids.to(device), instruction.mask.to(device))
    crops, samples = visual.image_of_crop.to(device), visual.sample_of_image.to(device)
    return VisualInput(maps, crops, samples, visual.layouts, instruction)


def take(visual: VisualInput, images: Sequence[int]) -> VisualInput:
    """Some images of a batch, without padding that only others needed."""
    crops = torch.isin(visual.image_of_crop, torch.tensor(images))
    layouts = tuple(visual.layouts[image] for image in images)
    grids = tuple(grid for layout in layouts for grid in layout.grids)
    width = max(height * width for height, width in grids)

    def picked(old: FeatureMap) -> FeatureMap:
        attention = old.cls_attention[crops][..., :width] if old.cls_attention is not None else None
        cls = old.cls[crops] if old.cls is not None else None
        return FeatureMap(old.values[crops, :width], grids, old.mask[crops, :width], cls, attention)

    instruction = visual.instruction
    if instruction is not None:
        mask = instruction.mask[list(images)]
        length = int(mask.sum(1).max())
        instruction = Instruction(instruction.input_ids[list(images), :length], mask[:, :length])
    return VisualInput(
        maps=tuple(picked(old) for old in visual.maps),
        image_of_crop=torch.tensor([index for index, layout in enumerate(layouts) for _ in layout.grids]),
        sample_of_image=visual.sample_of_image[list(images)] - visual.sample_of_image[images[0]],
        layouts=layouts,
        instruction=instruction,
    )


def swap_image(visual: VisualInput, image: int, other: VisualInput) -> VisualInput:
    """The images of a batch, one of which is that of another batch of the same form."""
    crop = visual.image_of_crop == image

    def mixed(a: Tensor | None, b: Tensor | None) -> Any:
        return None if a is None or b is None else torch.where(crop.view(-1, *[1] * (a.ndim - 1)), b, a)

    maps = tuple(
        FeatureMap(
            mixed(a.values, b.values), a.grids, a.mask, mixed(a.cls, b.cls), mixed(a.cls_attention, b.cls_attention)
        )
        for a, b in zip(visual.maps, other.maps, strict=True)
    )
    instruction = visual.instruction
    if instruction is not None and other.instruction is not None:
        ids = instruction.input_ids.clone()
        ids[image] = other.instruction.input_ids[image]
        instruction = Instruction(ids, instruction.mask)
    return replace(visual, maps=maps, instruction=instruction)


def pad(visual: VisualInput, garbage: float, more: int) -> VisualInput:
    """The same images with more padding, and something in it."""

    def padded(old: FeatureMap) -> FeatureMap:
        mask = F.pad(old.mask, (0, more))
        values = F.pad(old.values, (0, 0, 0, more)).masked_fill(~mask[..., None], garbage)
        attention = old.cls_attention
        if attention is not None:
            attention = F.pad(attention, (0, more)).masked_fill(~mask[:, None], garbage)
        return FeatureMap(values, old.grids, mask, old.cls, attention)

    instruction = visual.instruction
    if instruction is not None:
        mask = F.pad(instruction.mask, (0, more))
        ids = F.pad(instruction.input_ids, (0, more)).masked_fill(~mask, TEXT["vocab_size"] - 1)
        instruction = Instruction(ids, mask)
    return replace(visual, maps=tuple(padded(old) for old in visual.maps), instruction=instruction)
