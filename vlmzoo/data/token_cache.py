"""Token ids of a data set's conversations, written once and shared by every run that reads them."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Iterable, Sequence, Sized
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vlmzoo.data import templates, tokens
from vlmzoo.data.records import Record
from vlmzoo.data.samples import SampleBuilder
from vlmzoo.data.sources.source import Source
from vlmzoo.data.tokens import Tokenised
from vlmzoo.files import computed_once

SHARD = 8192  # conversations a file: what is held in memory while they are written
BATCH = 256  # conversations a call of the tokenizer

Records = Sequence[Record] | Source


class TokenCache:
    """Tokenised conversations by index, memory-mapped from safetensors.

    A folder's name is a hash of all that decides the ids: the conversations, the template, the tokenizer, and the
    code that writes them.

    Args:
        folder: where caches stand; made if it is not there.

    Raises:
        RecordError: a conversation that the template cannot express.
    """

    def __init__(self, builder: SampleBuilder, records: Records, folder: Path) -> None:
        place = folder / _key(builder, records)
        computed_once(place, lambda aside: _write(builder, records, aside), "token cache")
        self._shards = [_Shard(file) for file in sorted(place.glob("*.safetensors"))]

    def __getitem__(self, index: int) -> Tokenised:
        shard, row = divmod(index, SHARD)
        return self._shards[shard][row]


class _Rows:
    """Lists of numbers of different lengths as one tensor, and where each of them ends."""

    def __init__(self, values: Tensor, ends: Tensor) -> None:
        self._values, self._bounds = values, [0, *ends.tolist()]

    def __getitem__(self, row: int) -> list[Any]:
        return self._values[self._bounds[row] : self._bounds[row + 1]].tolist()


class _Shard:
    def __init__(self, file: Path) -> None:
        with safe_open(file, framework="pt") as opened:
            self._ids, self._supervised, self._instructions = (
                _Rows(opened.get_tensor(name), opened.get_tensor(ends))
                for name, ends in (("ids", "ends"), ("supervised", "ends"), ("instruction_ids", "instruction_ends"))
            )
            self._images = [0, *opened.get_tensor("images").tolist()]

    def __getitem__(self, row: int) -> Tokenised:
        instructions = range(self._images[row], self._images[row + 1])
        return Tokenised(
            self._ids[row], self._supervised[row], tuple(self._instructions[image] for image in instructions)
        )


def _write(builder: SampleBuilder, records: Records, place: Path) -> None:
    bar = tqdm(total=len(records), desc="tokens", unit="text", file=sys.stderr, disable=not sys.stderr.isatty())
    with bar:
        for start in range(0, len(records), SHARD):
            found, end = [], min(start + SHARD, len(records))
            for first in range(start, end, BATCH):
                found += builder.tokens([records[index] for index in range(first, min(first + BATCH, end))])
                bar.update(start + len(found) - first)
            save_file(_tensors(found), place / f"{start // SHARD:05}.safetensors")


def _tensors(found: Sequence[Tokenised]) -> dict[str, Tensor]:
    instructions = [ids for item in found for ids in item.instruction_ids]
    return {
        "ids": _joined([item.input_ids for item in found], torch.int32),
        "supervised": _joined([item.supervised for item in found], torch.bool),
        "ends": _ends(item.input_ids for item in found),
        "instruction_ids": _joined(instructions, torch.int32),
        "instruction_ends": _ends(instructions),
        "images": _ends(item.instruction_ids for item in found),
    }


def _joined(rows: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensor:
    return torch.tensor([value for row in rows for value in row], dtype=dtype)


def _ends(rows: Iterable[Sized]) -> Tensor:
    return torch.tensor(list(accumulate(len(row) for row in rows)), dtype=torch.int64)


def _key(builder: SampleBuilder, records: Records) -> str:
    tokenizer: Any = builder.tokenizer
    deciding = {
        "code": [inspect.getsource(module) for module in (templates, tokens)],
        "transformers": transformers.__version__,
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "special_tokens": tokenizer.special_tokens_map,
        "chat_template": tokenizer.chat_template,
        "template": builder.template.value,
        "instruction": builder.instruction,
    }
    digest = hashlib.sha256(json.dumps(deciding, sort_keys=True).encode())
    for index in range(len(records)):
        digest.update(json.dumps([turn.text for turn in records[index].turns]).encode())
    return digest.hexdigest()[:16]
