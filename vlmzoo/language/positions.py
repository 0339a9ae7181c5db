"""Positions on the grids of images, for LLMs whose rotary embedding takes time, row and column apart (M-RoPE).

Text counts on in all three. An image's tokens share a time and have rows and columns from there; what follows goes on
behind the largest of them. Each slot keeps how far that is from its place in the text, and so does the text after it:
a token's position then follows from its place, in a prompt and in each step that continues it.

Source: Wang et al., Qwen2-VL (2024), section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from vlmzoo.connector import Connector, Grid, ImageLayout


def has_axes(config: PreTrainedConfig) -> bool:
    """Whether an LLM takes positions of three kinds."""
    return "mrope_section" in (getattr(config.get_text_config(), "rope_parameters", None) or {})


def token_grids(connector: Connector, layout: ImageLayout) -> list[Grid]:
    """The grids of an image's tokens; where they have none each is one of its own, as a token of text would be."""
    count = connector.num_tokens(layout)
    grids = [grid for grid in map(connector.output_grid, layout.grids) if grid is not None]
    return grids if sum(height * width for height, width in grids) == count else [(1, 1)] * count


def grid_offsets(samples: Sequence[Sequence[Grid]]) -> Tensor:
    """What time, row and column of each slot, and the text behind it, have beyond its place: (batch, slots, 4), padded.

    Args:
        samples: the grids of each sample's tokens, in the order of its slots.
    """
    rows = []
    for grids in samples:
        shift, row = 0, [torch.zeros(0, 4, dtype=torch.long)]
        for height, width in grids:
            place = torch.arange(height * width)
            time, after = torch.zeros_like(place), place - height * width + max(height, width)
            row.append(torch.stack([time, place // width, place % width, after], -1) - place[:, None] + shift)
            shift = int(row[-1][-1, 3])
        rows.append(torch.cat(row))
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def on_grids(places: Tensor, offsets: Tensor, slot: Tensor, is_image: Tensor) -> Tensor:
    """Position ids (3, batch, length) of tokens at these places (batch, length) of the text.

    Args:
        offsets: (batch, slots, 4), as `grid_offsets` gives them.
        slot: (batch, length), the last slot at or before each token, -1: none.
        is_image: (batch, length), True where the token stands in that slot.
    """
    found = offsets.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, 4)).masked_fill(slot[..., None] < 0, 0)
    shift = torch.where(is_image[..., None], found[..., :3], found[..., 3:])
    return (places[..., None] + shift).permute(2, 0, 1)
