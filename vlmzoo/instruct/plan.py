"""Which image is asked for which kind: kinds in exact proportions, and nearly each image once before any twice."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count, islice

import numpy as np


def requests(
    num_images: int, proportions: Mapping[str, int], limit: int | None, seed: int
) -> Iterator[tuple[int, str]]:
    """(image, kind) of every request, by default one an image; a longer plan begins as a shorter one does.

    The images stand in a circle, in an order drawn from the seed. Each kind begins where the share of the one before
    ends and takes image after image, so that the kinds' arcs cover the circle once, but for rounding, before they
    overlap.

    Raises:
        ValueError: more requests than there are images and kinds to ask for.
    """
    total = num_requests(num_images, proportions, limit)
    return islice(_endless(num_images, proportions, seed), total)


def num_requests(num_images: int, proportions: Mapping[str, int], limit: int | None) -> int:
    most = num_images * sum(proportions.values()) // max(proportions.values())
    wanted = num_images if limit is None else limit
    if wanted > most:
        raise ValueError(f"--limit {wanted}: {num_images} images in these proportions allow at most {most} requests")
    return wanted


def _endless(num_images: int, proportions: Mapping[str, int], seed: int) -> Iterator[tuple[int, str]]:
    circle = np.random.default_rng(seed).permutation(num_images).astype(np.int32)
    total = sum(proportions.values())
    starts, passed = {}, 0
    for kind, share in proportions.items():
        starts[kind] = num_images * passed // total
        passed += share
    taken = dict.fromkeys(proportions, 0)
    for asked in count(1):
        kind = max(proportions, key=lambda kind: proportions[kind] * asked - taken[kind] * total)  # furthest behind
        yield int(circle[(starts[kind] + taken[kind]) % num_images]), kind
        taken[kind] += 1
