"""Texts that are there already, word for word or nearly, in memory that does not grow.

Word for word: 64-bit hashes of all texts in a table of fixed size. Nearly: MinHash over runs of three words, against
the last WINDOW to 2 * WINDOW texts alone, because an index of a million signatures takes gigabytes.

Source: Broder, On the resemblance and containment of documents (1997).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from vlmzoo.instruct.words import words

WINDOW = 10_000  # texts
THRESHOLD = 0.9  # of runs of words in common
PERMUTATIONS = 64
RUN = 3  # words


class Duplicates:
    def __init__(self, most: int) -> None:
        """
        Args:
            most: how many texts will be kept at most.
        """
        from datasketch import MinHash, MinHashLSH

        self._new_index = lambda: MinHashLSH(threshold=THRESHOLD, num_perm=PERMUTATIONS)
        self._empty = MinHash(num_perm=PERMUTATIONS)  # copied: drawing its permutations takes as long as the rest
        self._table = np.zeros(2 * most + 1, np.uint64)  # open addressing; 0: free
        self._recent: list[tuple[Any, dict[int, Any]]] = [(self._new_index(), {}), (self._new_index(), {})]

    def reason(self, text: str) -> str | None:
        """`duplicate` or `near_duplicate`; None for a new text, which is kept."""
        told = words(text)
        place, value = self._find(" ".join(told))
        if self._table[place] == value:
            return "duplicate"
        signature = self._empty.copy()
        signature.update_batch(_runs(told))
        for index, kept in self._recent:
            if any(kept[key].jaccard(signature) >= THRESHOLD for key in index.query(signature)):
                return "near_duplicate"
        self._table[place] = value
        if len(self._recent[0][1]) == WINDOW:
            self._recent = [(self._new_index(), {}), self._recent[0]]
        index, kept = self._recent[0]
        index.insert(len(kept), signature)
        kept[len(kept)] = signature
        return None

    def _find(self, text: str) -> tuple[int, int]:
        """Where a text's hash stands or belongs."""
        value = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") or 1
        place = value % len(self._table)
        while self._table[place] not in (0, value):
            place = (place + 1) % len(self._table)
        return place, value


def _runs(told: list[str]) -> list[bytes]:
    return sorted({" ".join(told[at : at + RUN]).encode() for at in range(max(1, len(told) - RUN + 1))})
