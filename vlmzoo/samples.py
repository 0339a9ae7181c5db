"""A data set as one model reads it: samples on demand, and batches with their images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from vlmzoo import build
from vlmzoo.config import DataConfig, Sight, StageConfig
from vlmzoo.data.collate import collate
from vlmzoo.data.images import load_image
from vlmzoo.data.layout import BatchLayout
from vlmzoo.data.order import batches
from vlmzoo.data.records import Record, RecordError, read_records
from vlmzoo.data.samples import Sample
from vlmzoo.data.token_cache import TokenCache
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import VisionLanguageProcessor, image_inputs
from vlmzoo.vision.cache import FeatureCache


def seen(record: Record, sees: Sight) -> Record:
    """The record as an arm sees it: with its images, with nothing in their place, or with its description.

    Raises:
        RecordError: a description is asked for, and the record has none.
    """
    if sees == "image" or not record.images:
        return record
    if sees == "description" and record.description is None:
        raise RecordError(f"{record.where}: has no `description`, which the oracle reads instead of its image")
    return record.seen_as(record.description if sees == "description" else None)


class SampleSet:
    """The records of a data set, read and checked; samples are built when they are asked for.

    Args:
        cache: the folder of features and token ids, filled at the first batch; None: texts are tokenised and images
            read as pixels every time, as images that are cut into tiles or keep their proportions always are.
        sees: what stands in the place of each image.
        encoder_moves: its features are not kept then.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: VisionLanguageProcessor,
        data: DataConfig,
        cache: Path | None = None,
        sees: Sight = "image",
        *,
        encoder_moves: bool = False,
    ) -> None:
        self.records = [seen(record, sees) for record in read_records(*build.dataset(data), data.limit)]
        self._model, self._processor, self._data, self._cache_folder = model, processor, data, cache
        self._encoder_moves, self._sees = encoder_moves, sees
        self._builder = processor.sample_builder(data)
        self._where = {path: record.where for record in self.records for path in record.images}

    def __len__(self) -> int:
        return len(self.records)

    def samples(self, indices: Sequence[int], *, generation: bool = False) -> list[Sample]:
        """Samples of these records; for generation without their last answers."""
        records = [self.records[index] for index in indices]
        if generation or self._tokens is None:
            return self._builder.build(records, generation=generation)
        return self._builder.assemble(records, [self._tokens[index] for index in indices])

    def shuffled(self, count: int) -> list[Sample]:
        """The first `count` records for generation, each with the images of the next one that has as many.

        One without images, or with a number of images that no other has, is left out.

        Raises:
            ValueError: that leaves none.
        """
        groups: dict[int, list[int]] = {}
        for index, record in enumerate(self.records[:count]):
            groups.setdefault(len(record.images), []).append(index)
        swaps = [group for number, group in groups.items() if number and len(group) > 1]
        if not swaps:
            raise ValueError(f"no two of the first {count} records of {self._data.path} have images to swap")
        other = {index: group[(place + 1) % len(group)] for group in swaps for place, index in enumerate(group)}
        swapped = [replace(self.records[index], images=self.records[other[index]].images) for index in sorted(other)]
        return self._builder.build(swapped, generation=True)

    def order(self, stage: StageConfig, seed: int, start_step: int = 0) -> Iterator[list[int]]:
        """Endless batches of indices, from a step on."""
        text_only = [not record.images for record in self.records] if stage.group_by == "modality_length" else None
        for batch in batches(len(self.records), stage.batch_size, seed, start_step, text_only):
            if stage.group_by is not None:
                batch.sort(key=lambda index: -sum(len(turn.text.split()) for turn in self.records[index].turns))
            yield batch

    def batch(
        self, samples: Sequence[Sample], padding_side: Literal["left", "right"] = "right", *, idle: bool = False
    ) -> dict[str, Any]:
        """What the model's `forward` takes, on the model's device.

        Args:
            idle: a batch without images gets one that no sample sees, so that all processes run the same modules.
        """
        pad = self._processor.tokenizer.pad_token_id
        device = self._model.device
        batch: dict[str, Any] = {
            key: value.to(device)
            for key, value in collate(samples, pad_token_id=pad, padding_side=padding_side).items()
        }
        if padding_side == "right":
            batch["layout"] = BatchLayout.of_samples(samples, self._model.config.image_token_id)
        images = [path for sample in samples for path in sample.images]
        if images and self._features is not None:
            batch["image_features"] = self._features.batch(images)
        elif images:
            crops = [self._processor.crops(self._image(path), self._data.image_mode) for path in images]
            batch |= image_inputs(crops, [layout for sample in samples for layout in sample.layouts])
            batch["pixel_values"] = batch["pixel_values"].to(device)
        elif idle and self._sees == "image":
            batch["idle_images"] = self._idle_images
        return batch

    @cached_property
    def _idle_images(self) -> dict[str, Any]:
        device, size = self._model.device, self._processor.layouts.image_size
        image = Image.new("RGB", (size, size))
        layout = self._processor.layouts.of_image((size, size))
        images: dict[str, Any]
        if self._features is not None:
            images = {"image_features": self._features.batch([next(iter(self._where))])}
        else:
            images = dict(image_inputs([self._processor.crops(image, self._data.image_mode)], [layout]))
            images["pixel_values"] = images["pixel_values"].to(device)
        if self._model.connector.requires.instruction:
            ids = torch.full((1, 1), int(self._processor.tokenizer.pad_token_id), device=device)
            images |= {"instruction_ids": ids, "instruction_mask": torch.ones_like(ids)}
        return images

    def open_cache(self) -> None:
        """Computes the features and token ids that are not there yet, before anybody waits for a batch.

        Raises:
            RecordError: a conversation that the template cannot express.
        """
        _ = self._features, self._tokens

    @cached_property
    def _tokens(self) -> TokenCache | None:
        return (
            None
            if self._cache_folder is None
            else TokenCache(self._builder, self.records, self._cache_folder / "tokens")
        )

    @cached_property
    def _features(self) -> FeatureCache | None:
        several_sizes = self._processor.layouts.tiled or self._data.image_mode == "native"
        if self._cache_folder is None or not self._where or several_sizes or self._encoder_moves:
            return None
        preprocessing = {
            "mode": self._data.image_mode,
            "size": self._processor.layouts.image_size,
            "processor": self._processor.image_processor.to_dict(),
            "dtype": str(self._model.vision.model.dtype),
        }
        return FeatureCache(
            self._model.vision,
            list(self._where),
            self._pixels,
            preprocessing,
            self._model.connector.requires,
            self._cache_folder / "features",
        )

    def _pixels(self, path: Path) -> Tensor:
        return self._processor.crops(self._image(path), self._data.image_mode)[0]

    def _image(self, path: Path) -> Image.Image:
        return load_image(path, where=self._where[path])
