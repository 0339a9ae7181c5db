"""Files of cached features: how rows are narrowed, written whole, and read one by one, none of them unchecked."""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmzoo.config import Features
from vlmzoo.connector import FeatureMap, Grid
from vlmzoo.files import whole_file

TYPES = {
    "I64": torch.int64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
NAMES = {dtype: name for name, dtype in TYPES.items()}
LARGEST = torch.finfo(torch.float8_e4m3fn).max
CHECKS = "checks"  # (rows + 1, tensors), a CRC-32 of each row of each other tensor, by name; last, of the header


class DamageError(ValueError):
    """A file, or a row of it, that is not what was written."""


@dataclass(frozen=True)
class StoredFeatures:
    """Features of one layer as a cache holds them, in the host's memory."""

    grid: Grid
    values: Tensor  # (images, patches, dim)
    scale: Tensor | None = None  # (images, patches, 1), what float8 values are multiplied by
    cls: Tensor | None = None  # (images, dim)
    cls_attention: Tensor | None = None  # (images, heads, patches)
    dtype: torch.dtype | None = None  # the encoder's, where it is stored in a narrower one

    def on(self, device: torch.device | str) -> FeatureMap:
        """The features where they are used. Out of pinned memory they are copied without waiting."""
        values = self.values.to(device, non_blocking=True)
        if self.scale is not None:
            values = values.float() * self.scale.to(device, non_blocking=True)
        cls, attention = (
            None if part is None else part.to(device, self.dtype, non_blocking=True)
            for part in (self.cls, self.cls_attention)
        )
        return FeatureMap.dense(values.to(self.dtype or values.dtype), self.grid, cls, attention)


def narrowed(found: FeatureMap, features: Features) -> StoredFeatures:
    """What is stored of these features, of crops that have one grid.

    `float8` is e4m3 with one scale a patch, so that a row can be read by itself; CLS and its attention are bfloat16.
    """
    grid, dtype = found.grids[0], found.values.dtype
    if features == "compute":
        return StoredFeatures(grid, found.values, None, found.cls, found.cls_attention)
    cls, attention = (None if part is None else part.bfloat16() for part in (found.cls, found.cls_attention))
    if features == "bfloat16":
        return StoredFeatures(grid, found.values.bfloat16(), None, cls, attention, dtype)
    values = found.values.float()
    scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * LARGEST) / LARGEST
    return StoredFeatures(grid, (values / scale).to(torch.float8_e4m3fn), scale, cls, attention, dtype)


@dataclass
class Error:
    """How far values are from what they should be: sums of squares, of the differences and of the values."""

    difference: float = 0.0
    whole: float = 0.0

    def add(self, found: Tensor, exact: Tensor) -> None:
        exact = exact.float()
        self.difference += (found.float() - exact).square().sum(dtype=torch.float64).item()
        self.whole += exact.square().sum(dtype=torch.float64).item()

    def __add__(self, other: Error) -> Error:
        return Error(self.difference + other.difference, self.whole + other.whole)

    @property
    def relative(self) -> float:
        return math.sqrt(self.difference / self.whole) if self.whole else 0.0


def write_shard(file: Path, tensors: dict[str, Tensor], grid: Grid, error: Error) -> None:
    """Writes rows on the host, (rows, …) by name, as safetensors, whole or not at all; hold a lock.

    The format is written here, since `save_file` writes aside once more, under a name that a killed process leaves.

    Raises:
        OSError: it could not be written.
    """
    raw = [_bytes(tensors[name]) for name in sorted(tensors)]
    checks = torch.empty(len(raw[0]) + 1, len(raw), dtype=torch.int64)
    ordered = sorted({**tensors, CHECKS: checks}.items(), key=lambda item: -item[1].itemsize)  # aligned to their types
    header: dict[str, Any] = {
        "__metadata__": {"grid": json.dumps(grid), "error": json.dumps([error.difference, error.whole])}
    }
    end = 0
    for name, tensor in ordered:
        offsets = [end, end := end + tensor.nbytes]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    for column, rows in enumerate(raw):
        checks[:, column] = torch.tensor([*(zlib.crc32(row.data) for row in rows), zlib.crc32(text)])
    with whole_file(file, alone=True) as aside, aside.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            opened.write(_bytes(tensor).data)


class Shard:
    """A file of rows. It is opened for each row, so that any number of them holds neither files nor memory.

    Raises:
        OSError: it cannot be read.
        DamageError: it is not whole, or its header is not what `write_shard` writes.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            with file.open("rb") as opened:
                size = os.fstat(opened.fileno()).st_size
                length = int.from_bytes(opened.read(8), "little")
                if length > size:
                    raise ValueError("its header is cut off")
                text = opened.read(length)
                header = json.loads(text)
                described = header.pop("__metadata__")
                height, width = map(int, json.loads(described["grid"]))
                end = 8 + length + max(item["data_offsets"][1] for item in header.values())
                if size != end:
                    raise ValueError(f"{size} bytes, expected {end}")
                checks = header.pop(CHECKS)
                opened.seek(8 + length + checks["data_offsets"][0])
                numbers = np.frombuffer(opened.read(8 * math.prod(checks["shape"])), np.int64)
            self._checks = numbers.reshape(checks["shape"])
            if self._checks[-1].tolist() != [zlib.crc32(text)] * len(header):
                raise ValueError("its header does not match its checksum")
            self.grid: Grid = height, width
            self.error = Error(*json.loads(described["error"]))
            self.num_rows = len(self._checks) - 1
            self._parts = {
                name: _Part(
                    start=8 + length + item["data_offsets"][0],
                    shape=item["shape"],
                    dtype=TYPES[item["dtype"]],
                    column=column,
                )
                for column, (name, item) in enumerate(sorted(header.items()))
            }
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise DamageError(f"{file}: damaged ({' '.join(str(error).split())})") from None

    def empty(self, name: str, count: int, *, pinned: bool) -> tuple[Tensor, Tensor]:
        """Memory for so many rows: as the tensor that they will be, and as bytes (count, bytes a row)."""
        part = self._parts[name]
        raw = torch.empty(count, part.row_bytes, dtype=torch.uint8, pin_memory=pinned)
        return raw.view(part.dtype).view(count, *part.shape[1:]), raw

    def read(self, row: int, into: dict[str, memoryview]) -> None:
        """Reads the parts of a row that are named into memory of their size.

        Raises:
            OSError: the file cannot be read any more.
            DamageError: the bytes are not those that were written.
        """
        descriptor = os.open(self.file, os.O_RDONLY)
        try:
            for name, memory in into.items():
                part = self._parts[name]
                count = os.preadv(descriptor, [memory], part.start + row * part.row_bytes)
                if count != len(memory) or zlib.crc32(memory) != self._checks[row, part.column]:
                    raise DamageError(f"{self.file}: row {row} of {name!r} does not match its checksum")
        finally:
            os.close(descriptor)

    def remove(self) -> None:
        with suppress(OSError):
            self.file.unlink(missing_ok=True)


@dataclass(frozen=True)
class _Part:
    start: int  # byte of the file
    shape: Sequence[int]  # rows first
    dtype: torch.dtype
    column: int  # of the checksums

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def _bytes(tensor: Tensor) -> np.ndarray:
    """(rows, bytes a row)"""
    return tensor.flatten(1).contiguous().view(torch.uint8).numpy()
