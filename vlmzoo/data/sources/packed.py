"""Records that stand in memory as texts, packed: of data sets whose own files say nothing about single records."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from vlmzoo.data.images import ImageFile
from vlmzoo.data.records import IMAGE_TOKEN, Record, RecordError, to_record
from vlmzoo.data.sources.source import Source, checked


class Texts:
    """Many texts as one piece of memory, and where each of them begins and the last one ends."""

    def __init__(self, memory: np.ndarray, bounds: np.ndarray) -> None:
        self.memory, self.bounds = memory, bounds

    @classmethod
    def of(cls, texts: Iterable[bytes]) -> Texts:
        memory, bounds = bytearray(), array("q", [0])
        for text in texts:
            memory += text
            bounds.append(len(memory))
        return cls(np.frombuffer(bytes(memory), np.uint8), np.frombuffer(bounds, np.int64))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> str:
        part = self.memory[self.bounds[index] : self.bounds[index + 1]]
        return part.tobytes().decode("utf-8", errors="surrogateescape")


class PackedSource(Source):
    """Records from values of LLaVA's form.

    Args:
        name: the data set, for messages.
        find: an image by its name.

    Raises:
        RecordError: there is none.
    """

    def __init__(
        self,
        name: str,
        values: Iterable[dict[str, Any]],
        find: Callable[[str, str], ImageFile],
        fingerprint: Callable[[], dict[str, Any]],
    ) -> None:
        self._name, self._find, self._fingerprint = name, find, fingerprint
        self._values = Texts.of(json.dumps(value).encode() for value in values)
        if not len(self):
            raise RecordError(f"{name}: holds no record; expected at least one")

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: int) -> Record:
        value = json.loads(self._values[checked(index, len(self))])
        return to_record(value, f"{self._name}[{index}]", str(index), self._find)

    def fingerprint(self) -> dict[str, Any]:
        return self._fingerprint()


def caption(identity: str, image: Any, text: str) -> dict[str, Any]:
    """An image and its caption in LLaVA's form; template plain drops the human text, which is the image alone."""
    turns = [{"from": "human", "value": IMAGE_TOKEN}, {"from": "gpt", "value": text}]
    return {"id": identity, "image": image, "conversations": turns}
