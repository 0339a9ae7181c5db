"""Where a batch's samples, images and targets stand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmzoo.data.samples import IGNORE, Sample


@dataclass(frozen=True)
class BatchLayout:
    """What a model would otherwise have to ask the device for, and wait."""

    lengths: tuple[int, ...] | None  # tokens of each sample, padded on the right; None: the mask says it
    slots: tuple[int, ...]  # of each sample's images
    targets: Tensor  # (targets,), where in the flattened batch the next token is one

    @classmethod
    def of_samples(cls, samples: Sequence[Sample], image_token_id: int) -> BatchLayout:
        """The layout of these samples as `collate` pads them on the right."""
        lengths = tuple(len(sample.input_ids) for sample in samples)
        width = max(lengths)
        targets = [
            row * width + place
            for row, sample in enumerate(samples)
            for place, label in enumerate(sample.labels[1:])
            if label != IGNORE
        ]
        slots = tuple(sample.input_ids.count(image_token_id) for sample in samples)
        return cls(lengths, slots, torch.tensor(targets, dtype=torch.long))

    @classmethod
    def of_tensors(cls, input_ids: Tensor, labels: Tensor | None, image_token_id: int) -> BatchLayout:
        """The same read off a batch of tensors, however it is padded."""
        slots = (input_ids == image_token_id).sum(1).tolist()
        if labels is None:
            return cls(None, tuple(slots), input_ids.new_empty(0))
        targets = torch.nn.functional.pad(labels[:, 1:] != IGNORE, (0, 1)).flatten().nonzero().squeeze(1)
        return cls(None, tuple(slots), targets)
