"""A data set as one model reads it: samples on demand, and batches with their images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vlmzoo import build
from vlmzoo.config import DataConfig, Features, Sight, StageConfig
from vlmzoo.data.collate import Side, collate
from vlmzoo.data.images import ImageFile, load_image
from vlmzoo.data.layout import BatchLayout
from vlmzoo.data.order import batches
from vlmzoo.data.prefetch import prefetched
from vlmzoo.data.records import Record, RecordError
from vlmzoo.data.samples import Sample
from vlmzoo.data.sources.source import Source
from vlmzoo.data.token_cache import TokenCache
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import VisionLanguageProcessor, image_inputs
from vlmzoo.vision.cache import FeatureCache
from vlmzoo.vision.shards import StoredFeatures

READERS = min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
"""Threads that decode images while those before them are computed on."""
HELD = 50_000
"""Records up to which a data set is read when it is opened: a faulty one is refused before training starts, and none is
parsed twice."""


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


class Seen(Source):
    """The records of a source as an arm sees them; those of a small one are read at once."""

    def __init__(self, source: Source, sees: Sight) -> None:
        self._source = source
        self._sees: Sight = sees
        self._held = [seen(record, sees) for record in source] if len(source) <= HELD else None

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> Record:
        return seen(self._source[index], self._sees) if self._held is None else self._held[index]

    def fingerprint(self) -> dict[str, Any]:
        return self._source.fingerprint()

    @property
    def blocks(self) -> np.ndarray | None:
        return self._source.blocks


@dataclass(frozen=True)
class HostBatch:
    """A batch in the host's memory, pinned where the model is on a GPU."""

    moved: dict[str, Tensor]
    kept: dict[str, Any]  # what the model reads on the host
    features: tuple[StoredFeatures, ...]  # empty: no image, or pixels


class SampleSet:
    """The records of a data set; samples are built when they are asked for, and a small set is checked at once.

    Args:
        cache: the folder of features and token ids, filled at the first batch; None: texts are tokenised and images
            read as pixels every time, as images that are cut into tiles or keep their proportions always are.
        sees: what stands in the place of each image.
        encoder_moves: its features are not kept then.
        features: how they are stored.

    Raises:
        RecordError, ImageError: a data set that cannot be opened, or a faulty record of a small one.
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
        features: Features = "compute",
    ) -> None:
        self.records: Source = Seen(build.source(data), sees)
        self._model, self._processor, self._data, self._cache_folder = model, processor, data, cache
        self._encoder_moves, self._sees = encoder_moves, sees
        self._stored: Features = features
        self._builder = processor.sample_builder(data)

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
        for index in range(min(count, len(self.records))):
            groups.setdefault(len(self.records[index].images), []).append(index)
        swaps = [group for number, group in groups.items() if number and len(group) > 1]
        if not swaps:
            raise ValueError(f"no two of the first {count} records of {self._data.path} have images to swap")
        other = {index: group[(place + 1) % len(group)] for group in swaps for place, index in enumerate(group)}
        swapped = [replace(self.records[index], images=self.records[other[index]].images) for index in sorted(other)]
        return self._builder.build(swapped, generation=True)

    def order(self, stage: StageConfig, seed: int, start_step: int = 0) -> Iterator[list[int]]:
        """Endless batches of indices, from a step on."""
        text_only = self._words[1] if stage.group_by == "modality_length" else None
        for batch in batches(len(self), stage.batch_size, seed, start_step, text_only, self.records.blocks):
            if stage.group_by is not None:
                batch.sort(key=lambda index: -self._words[0][index])
            yield batch

    def batch(self, samples: Sequence[Sample], padding_side: Side = "right") -> dict[str, Any]:
        """What the model's `forward` takes, on the model's device."""
        return self.to_device(self.on_host(samples, padding_side))

    def on_host(self, samples: Sequence[Sample], padding_side: Side = "right") -> HostBatch:
        """All of a batch that can be done before its turn; any thread may, once `open_cache` has returned.

        Raises:
            RecordError, ImageError: an image that cannot be used.
            DamageError: stored features that are not what was written.
        """
        pad, pinned = self._processor.tokenizer.pad_token_id, self._model.device.type == "cuda"
        moved, features = collate(samples, pad_token_id=pad, padding_side=padding_side), ()
        kept: dict[str, Any] = {}
        images = [path for sample in samples for path in sample.images]
        where = [sample.record.where for sample in samples for _ in sample.images]
        if images and self._features is not None:
            features = self._features.read(images, pinned=pinned)
        elif images:
            crops = [self._crops(*image) for image in zip(images, where, strict=True)]
            kept |= image_inputs(crops, [layout for sample in samples for layout in sample.layouts])
            moved["pixel_values"] = kept.pop("pixel_values")
        if padding_side == "right":
            layout = BatchLayout.of_samples(samples, self._model.config.image_token_id)
            kept["layout"] = replace(layout, targets=layout.targets.pin_memory()) if pinned else layout
        if pinned:
            moved = {key: value.pin_memory() for key, value in moved.items()}
        return HostBatch(moved, kept, features)

    def to_device(self, batch: HostBatch, *, idle: bool = False) -> dict[str, Any]:
        """What the model's `forward` takes, on the model's device; copies to a GPU are not waited for.

        Args:
            idle: a batch without images gets one that no sample sees, so that all processes run the same modules.
        """
        device = self._model.device
        moved: dict[str, Any] = {key: value.to(device, non_blocking=True) for key, value in batch.moved.items()}
        if batch.features:
            moved["image_features"] = tuple(stored.on(device) for stored in batch.features)
        elif idle and self._sees == "image" and "pixel_values" not in moved:
            moved["idle_images"] = self._idle_images
        return moved | batch.kept

    @cached_property
    def _idle_images(self) -> dict[str, Any]:
        device, size = self._model.device, self._processor.layouts.image_size
        image = Image.new("RGB", (size, size))
        layout = self._processor.layouts.of_image((size, size))
        images: dict[str, Any]
        if self._features is not None:
            first = self._features.read([next(iter(self._images))])
            images = {"image_features": tuple(stored.on(device) for stored in first)}
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

    @property
    def ahead(self) -> int:
        """How many batches are worth making before their turn: on a CPU none, as that takes the model's cores."""
        return 1 + READERS if self._model.device.type == "cuda" else 0

    @property
    def feature_error(self) -> float | None:
        """How far stored features are from the encoder's, relative to their norm; None: not at all, or none stored."""
        return None if self._features is None else self._features.error

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
        if self._cache_folder is None or several_sizes or self._encoder_moves or not self._images:
            return None
        preprocessing = {
            "mode": self._data.image_mode,
            "size": self._processor.layouts.image_size,
            "processor": self._processor.image_processor.to_dict(),
            "dtype": str(self._model.vision.model.dtype),
        }
        return FeatureCache(
            self._model.vision,
            list(self._images),
            self._pixels,
            preprocessing,
            self._model.connector.requires,
            self._cache_folder / "features",
            self._stored,
        )

    @cached_property
    def _images(self) -> dict[ImageFile, int]:
        """Every image, and the last record that has it."""
        return {path: index for index, record in enumerate(self.records) for path in record.images}

    @cached_property
    def _words(self) -> tuple[np.ndarray, np.ndarray]:
        """How many words each record has, and whether it is text alone."""
        words, text_only = np.zeros(len(self), np.int32), np.zeros(len(self), bool)
        for index, record in enumerate(self.records):
            words[index] = sum(len(turn.text.split()) for turn in record.turns)
            text_only[index] = not record.images
        return words, text_only

    def _pixels(self, groups: Iterable[Sequence[ImageFile]]) -> Iterator[Tensor]:
        def pixels(images: Sequence[ImageFile]) -> Tensor:
            return torch.cat([self._crops(image, self.records[self._images[image]].where) for image in images])

        return prefetched(groups, pixels, 2 * READERS, workers=READERS)

    def _crops(self, image: ImageFile, where: str) -> Tensor:
        return self._processor.crops(load_image(image, where=where), self._data.image_mode)
