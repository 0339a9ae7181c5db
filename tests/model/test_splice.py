"""Visual tokens from images to the slots of samples."""

from __future__ import annotations

import pytest
import torch

from vlmzoo.connector import VisualTokens
from vlmzoo.splice import arrange


def images(count: int, tokens: int, memory: int | None = None) -> VisualTokens:
    """Tokens and memory whose values name their image: 10 * image + place."""
    values = 10.0 * torch.arange(count)[:, None] + torch.arange(tokens)
    found = VisualTokens(values[..., None], torch.ones(count, tokens, dtype=torch.bool))
    if memory is not None:
        found.memory = (10.0 * torch.arange(count)[:, None] + torch.arange(memory))[..., None]
        found.memory_mask = torch.ones(count, memory, dtype=torch.bool)
        found.memory_mask[0, -1] = False
    return found


def test_samples_get_their_images_in_order() -> None:
    found = images(3, 3)
    found.mask[1, 2] = False
    context = arrange(found, [[0, 1], [], [2]], [3, 3, 3])
    assert context.tokens[..., 0][0].tolist() == [0, 1, 2, 10, 11, 12]
    assert context.tokens[..., 0][2, :3].tolist() == [20, 21, 22]
    assert context.filled.tolist() == [[True] * 5 + [False], [False] * 6, [True] * 3 + [False] * 3]
    assert context.num_slots.tolist() == [6, 0, 3]
    assert context.image_of_slot[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert context.image_of_slot[2, :3].tolist() == [0, 0, 0]


def test_slots_beyond_the_tokens_are_not_filled() -> None:
    context = arrange(images(2, 2), [[0], [1]], [2, 4])
    assert context.filled.tolist() == [[True, True, False, False]] * 2


def test_memory_is_padded_and_masked() -> None:
    context = arrange(images(3, 1, memory=2), [[0, 1], [], [2]], [1, 1, 1])
    assert context.memory is not None
    assert context.memory_mask is not None
    assert context.memory[0, :, :, 0].tolist() == [[0, 1], [10, 11]]
    assert context.memory[2, 0, :, 0].tolist() == [20, 21]
    assert context.memory_mask.tolist() == [
        [[True, False], [True, True]],
        [[False, False], [False, False]],
        [[True, True], [False, False]],
    ]


def test_more_tokens_than_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="returned 3 tokens for an image, its num_tokens said 2"):
        arrange(images(2, 3), [[0], [1]], [2, 2])
