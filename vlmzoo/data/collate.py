"""Samples -> one batch of tensors. Images are the caller's: pixels, or features from a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vlmzoo.data.samples import IGNORE, Sample

Side = Literal["left", "right"]


def collate(samples: Sequence[Sample], *, pad_token_id: int, padding_side: Side = "right") -> dict[str, Tensor]:
    """`input_ids`, `attention_mask` and `labels` (batch, length); `instruction_ids` and `instruction_mask`
    (images, length) where the samples have instructions. Generation takes `padding_side="left"`.
    """
    input_ids, attention_mask = _pad([sample.input_ids for sample in samples], pad_token_id, padding_side)
    labels, _ = _pad([sample.labels for sample in samples], IGNORE, padding_side)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    instructions = [ids for sample in samples for ids in sample.instruction_ids]
    if instructions:
        batch["instruction_ids"], batch["instruction_mask"] = _pad(instructions, pad_token_id, "right")
    return batch


def _pad(rows: Sequence[Sequence[int]], value: int, side: Side) -> tuple[Tensor, Tensor]:
    """The rows as one tensor, and a mask that is 1 where a value is real."""
    lengths = torch.tensor([len(row) for row in rows])
    width = max(1, int(lengths.max()))
    places = torch.arange(width)
    if side == "right":
        padded = [[*row, *[value] * (width - len(row))] for row in rows]
        mask = places < lengths[:, None]
    else:
        padded = [[*[value] * (width - len(row)), *row] for row in rows]
        mask = places >= width - lengths[:, None]
    return torch.tensor(padded, dtype=torch.long), mask.long()
