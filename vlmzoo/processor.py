"""Text with `<image>` and pictures -> what the model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin

from vlmzoo import build
from vlmzoo.config import DataConfig, EncoderConfig, RunConfig
from vlmzoo.connector import Grid, ImageLayout
from vlmzoo.data.images import ImageFile, cut, image_size, native_size, to_native_pixel_values, to_pixel_values
from vlmzoo.data.samples import SampleBuilder
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel

ImageMode = Literal["square", "pad", "native"]


@dataclass(frozen=True)
class Layouts:
    """What the model tells its processor: the size, grid and tiles of images, and the slots that each takes."""

    image_size: int
    grid: Grid
    patch_size: int
    mixed: bool  # whether images of several sizes can be encoded together
    tiles: Callable[[tuple[int, int], Grid], Grid | None]
    num_tokens: Callable[[ImageLayout], int]
    image_token_id: int
    instruction: bool  # whether the connector reads the instruction
    max_positions: int | None  # of the LLM

    @classmethod
    def of(cls, model: VisionLanguageModel) -> Layouts:
        size = model.vision.image_size
        return cls(
            image_size=size,
            grid=model.vision.grid(size, size),
            patch_size=model.vision.spec.patch_size,
            mixed=model.vision.tower.mixed,
            tiles=model.connector.tiles,
            num_tokens=model.num_tokens,
            image_token_id=model.config.image_token_id,
            instruction=model.connector.requires.instruction,
            max_positions=getattr(model.config.text_config, "max_position_embeddings", None),
        )

    @property
    def tiled(self) -> bool:
        """Whether images are cut into tiles."""
        return self.tiles((self.image_size, self.image_size), self.grid) is not None

    def native(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size, in pixels, at which an image of this size is encoded in its own proportions.

        Raises:
            ValueError: the encoder takes images of one size.
        """
        if not self.mixed:
            raise ValueError(
                "image_mode 'native': the encoder takes images of one size, unlike SigLIP 2's or Pixtral's"
            )
        return native_size(size, self.patch_size, self.grid[0] * self.grid[1])

    def of_image(self, size: tuple[int, int], token_budget: int | None = None, mode: ImageMode = "pad") -> ImageLayout:
        """The layout of an image of this size, (height, width) in pixels."""
        if (tiles := self.tiles(size, self.grid)) is not None:
            return ImageLayout((self.grid,) * (1 + tiles[0] * tiles[1]), size, token_budget)
        if mode != "native":
            return ImageLayout((self.grid,), token_budget=token_budget)
        height, width = (side // self.patch_size for side in self.native(size))
        return ImageLayout(((height, width),), size, token_budget)

    def of_file(self, path: ImageFile, where: str, mode: ImageMode = "pad") -> ImageLayout:
        """The layout of an image in a file, which is read where its size matters; `where` names it in messages."""
        matters = self.tiled or mode == "native"
        return self.of_image(
            image_size(path, where=where) if matters else (self.image_size, self.image_size), mode=mode
        )

    def __deepcopy__(self, memo: dict) -> Layouts:
        return self  # transformers copies a processor to write its configuration; the connector stays out of it


class VisionLanguageProcessor(ProcessorMixin):
    """The encoder's image processor and the LLM's tokenizer, with `<image>` laid out as the connector needs it.

    Args:
        image_processor: any of transformers' that scales, crops and normalises.
        tokenizer: with `<image>` as a special token, as `build.tokenizer` gives it.
        layouts: of the model.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, layouts: Layouts | None = None) -> None:
        super().__init__(image_processor, tokenizer, chat_template=tokenizer.chat_template)
        if layouts is None:
            raise ValueError("a VisionLanguageProcessor belongs to a model: use of_run or from_pretrained")
        self.layouts = layouts

    @classmethod
    def of_run(cls, run: RunConfig, model: VisionLanguageModel) -> VisionLanguageProcessor:
        """The processor of a run's model."""
        tokenizer = build.tokenizer(run.llm, model.text_spec.vocab_size)
        return cls(build.image_processor(run.encoder), tokenizer, Layouts.of(model))

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> VisionLanguageProcessor:  # pyright: ignore
        """The processor beside a saved model; the connector tells the number of tokens without its weights."""
        config = VisionLanguageConfig.from_pretrained(path)
        with torch.device("meta"):
            model = VisionLanguageModel(config)
        image_processor = build.image_processor(EncoderConfig(name=str(path)))
        return cls(image_processor, AutoTokenizer.from_pretrained(path), Layouts.of(model))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # pyright: ignore
        """Writes the tokenizer's and the image processor's own files, as transformers' loaders expect them."""
        self.tokenizer.save_pretrained(save_directory)
        self.image_processor.save_pretrained(save_directory)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]

    def sample_builder(self, data: DataConfig) -> SampleBuilder:
        """What turns a data set's records into samples for this model."""
        return SampleBuilder(
            tokenizer=self.tokenizer,
            image_token_id=self.layouts.image_token_id,
            num_tokens=self.layouts.num_tokens,
            layout=partial(self.layouts.of_file, mode=data.image_mode),
            template=data.template,
            max_length=min(data.max_length, self.layouts.max_positions or data.max_length),
            instruction=self.layouts.instruction,
        )

    def pixel_values(self, image: Image.Image, mode: Literal["square", "pad"] = "pad") -> Tensor:
        """(3, height, width) of one image."""
        return to_pixel_values(image, self.image_processor, mode, self.layouts.image_size)

    def crops(self, image: Image.Image, mode: ImageMode = "pad") -> Tensor:
        """(crops, 3, height, width) of one image, which is a single crop where the connector has no tiles.

        With tiles the mode does not matter: all of the image is seen.
        """
        tiles = self.layouts.tiles((image.height, image.width), self.layouts.grid)
        if tiles is None and mode == "native":
            size = self.layouts.native((image.height, image.width))
            return to_native_pixel_values(image.convert("RGB"), self.image_processor, size)[None]
        if tiles is None:
            return self.pixel_values(image, "square" if mode == "square" else "pad")[None]
        crops = cut(image.convert("RGB"), tiles, self.layouts.image_size, self.image_processor.resample)
        return torch.stack([self.pixel_values(crop, "square") for crop in crops])

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        images: Image.Image | Sequence[Image.Image] | Sequence[Sequence[Image.Image]] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        instruction: str | Sequence[str] | None = None,
        token_budget: int | None = None,
        image_mode: ImageMode = "pad",
        padding_side: Literal["left", "right"] = "left",
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for prompts, padded on the left as generation needs it.

        Args:
            images: in the order of the `<image>` in all texts, or a list of them for each text.
            instruction: for each image, where the connector reads one.
            token_budget: the most tokens an image may take, where the connector can make fewer; None: all.

        Raises:
            ValueError: images and `<image>` do not agree in number, or the connector needs an instruction.
        """
        texts = [text] if isinstance(text, str) else list(text or ())
        if not texts:
            raise ValueError("expected at least one text")
        flat = _flatten(images)
        token = self.layouts.image_token_id
        add = kwargs.get("add_special_tokens", True)
        rows = [self.tokenizer(one, add_special_tokens=add)["input_ids"] for one in texts]
        placed = [ids.count(token) for ids in rows]
        by_text = [item for item in images if isinstance(item, Sequence)] if isinstance(images, Sequence) else []
        given = [len(item) for item in by_text] or [len(flat)]
        if given != (placed if by_text else [sum(placed)]):
            raise ValueError(f"the texts hold {_sum(placed)} {build.IMAGE_TOKEN} for {_sum(given)} images")
        layouts = [self.layouts.of_image((image.height, image.width), token_budget, image_mode) for image in flat]
        slots = iter([self.layouts.num_tokens(layout) for layout in layouts])
        rows = [[copy for item in ids for copy in [item] * (next(slots) if item == token else 1)] for ids in rows]
        batch = self.tokenizer.pad({"input_ids": rows}, padding_side=padding_side, return_tensors="pt")
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        if flat:
            inputs |= image_inputs([self.crops(image, image_mode) for image in flat], layouts)
        if flat and token_budget is not None:
            inputs["token_budget"] = torch.full((len(flat),), token_budget)
        if flat and self.layouts.instruction:
            instructions = [instruction] if isinstance(instruction, str) else list(instruction or ())
            if len(instructions) != len(flat):
                raise ValueError(f"the connector reads one instruction an image: {len(instructions)} for {len(flat)}")
            ids = [self.tokenizer(one, add_special_tokens=False)["input_ids"] for one in instructions]
            padded = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
            inputs["instruction_ids"] = padded["input_ids"]
            inputs["instruction_mask"] = padded["attention_mask"]
        return BatchFeature(inputs)


def image_inputs(crops: Sequence[Tensor], layouts: Sequence[ImageLayout]) -> dict[str, Tensor]:
    """The model's inputs for the crops (crops, 3, height, width) of each image, and what it needs to know of them."""
    sizes = [crop.shape[-2:] for image in crops for crop in image]
    inputs = {}
    if len(set(sizes)) > 1:  # padded on the right and below
        height, width = (max(size[side] for size in sizes) for side in (0, 1))
        crops = [F.pad(image, (0, width - image.shape[-1], 0, height - image.shape[-2])) for image in crops]
        inputs["crop_sizes"] = torch.tensor(sizes)
    if any(layout.size for layout in layouts):
        inputs["num_crops"] = torch.tensor([layout.num_crops for layout in layouts])
        inputs["image_sizes"] = torch.tensor([layout.size for layout in layouts])
    return {"pixel_values": torch.cat(list(crops)), **inputs}


def _flatten(images: Any) -> list[Image.Image]:
    if images is None:
        return []
    if isinstance(images, Image.Image):
        return [images]
    return [image for item in images for image in _flatten(item)]


def _sum(counts: Sequence[int]) -> str:
    return " + ".join(map(str, counts))


AutoProcessor.register(VisionLanguageConfig, VisionLanguageProcessor)
