"""How results are compared, and what a failed check raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from vlmzoo.connector import VisualInput, VisualTokens

FLOAT32 = 1e-5
"""The largest difference that another order of the same float32 sums may make, relative to the largest value."""


class CheckFailed(Exception):  # noqa: N818
    """What a connector does not keep, in one line."""


def require(condition: bool | Tensor, message: str) -> None:
    if not condition:
        raise CheckFailed(message)


def connect(connector: Callable[[VisualInput], VisualTokens], visual: VisualInput) -> VisualTokens:
    with torch.no_grad():
        return connector(visual)


def tensors(found: VisualTokens) -> dict[str, Tensor]:
    """All that a connector gave, by name; a memory without a mask is one whose tokens are all real."""
    parts = {"tokens": found.tokens, "mask": found.mask}
    if found.memory is not None:
        parts["memory"] = found.memory
        if found.memory_mask is not None:
            parts["memory_mask"] = found.memory_mask
    return parts | {f"additions to layer {index}": values for index, values in found.additions.items()}


def by_image(found: VisualTokens) -> list[dict[str, Tensor]]:
    """What a connector gave for each image, without what its masks hide."""
    images = []
    for image, mask in enumerate(found.mask):
        parts = {"tokens": found.tokens[image][mask]}
        if found.memory is not None:
            memory = found.memory[image]
            parts["memory"] = memory if found.memory_mask is None else memory[found.memory_mask[image]]
        parts |= {f"additions to layer {index}": values[image][mask] for index, values in found.additions.items()}
        images.append(parts)
    return images


def require_equal(
    found: Tensor | Mapping[str, Tensor], expected: Tensor | Mapping[str, Tensor], what: str, tolerance: float = FLOAT32
) -> None:
    """Fails where values differ by more than `tolerance` times the largest one, or 1; with 0 they agree bit for bit."""
    if isinstance(found, Tensor) and isinstance(expected, Tensor):
        found, expected = {"": found}, {"": expected}
    assert isinstance(found, Mapping)
    assert isinstance(expected, Mapping)
    require(found.keys() == expected.keys(), f"{what}: {', '.join(found)} instead of {', '.join(expected)}")
    for key, value in expected.items():
        _require_equal(found[key], value, f"{what}: {key}" if key else what, tolerance)


def _require_equal(found: Tensor, expected: Tensor, what: str, tolerance: float) -> None:
    kinds = [f"{tuple(value.shape)} {value.dtype}" for value in (found, expected)]
    require(kinds[0] == kinds[1], f"{what}: {kinds[0]} instead of {kinds[1]}")
    if torch.equal(found, expected):
        return
    difference = (found.double() - expected.double()).abs().max().item()
    allowed = tolerance * max(1.0, expected.double().abs().max().item())
    require(difference <= allowed, f"{what} differ by {difference:.1e}, more than {allowed:.1e}")  # as NaN does
