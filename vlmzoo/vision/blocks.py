"""Patches in the order of Qwen-VL's towers: block by block, and in Qwen2.5-VL window by window.

A block is what a merger joins to one token; a patch holds `temporal_patch_size` frames, of an image all the same.
Source: Wang et al., Qwen2-VL (2024), section 2.1; Bai et al., Qwen2.5-VL (2025), section 2.1.1.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from vlmzoo.connector import Grid

CROP = "(channels frames) (height rows y) (width columns x)"
PATCHES = "(height width rows columns) (channels frames y x)"


def to_patches(config: Any, crop: Tensor) -> Tensor:
    """The patches (patches, channels · frames · patch²) of a crop (channels · frames, height, width).

    Raises:
        ValueError: blocks do not fill it.
    """
    block = config.patch_size * config.spatial_merge_size
    if crop.shape[1] % block or crop.shape[2] % block:
        height, width = crop.shape[1:]
        raise ValueError(
            f"crop of {height} x {width} pixels: a {config.model_type} encodes blocks of {block} x {block} pixels"
        )
    if crop.shape[0] == config.in_channels:
        crop = crop.repeat_interleave(config.temporal_patch_size, 0)
    return rearrange(crop, f"{CROP} -> {PATCHES}", **_sizes(config))


def to_crop(config: Any, patches: Tensor, grid: Grid) -> Tensor:
    """The crop (channels · frames, height, width) that these are the patches of."""
    return rearrange(patches, f"{PATCHES} -> {CROP}", height=grid[0] // config.spatial_merge_size, **_sizes(config))


def _sizes(config: Any) -> dict[str, int]:
    merge, patch = config.spatial_merge_size, config.patch_size
    return {"frames": config.temporal_patch_size, "rows": merge, "columns": merge, "y": patch, "x": patch}


def from_blocks(config: Any, state: Tensor, grid: Grid) -> Tensor:
    """Hidden states (patches, dim) of a crop, row by row."""
    merge = config.spatial_merge_size
    pattern = "(height width rows columns) dim -> (height rows width columns) dim"
    return rearrange(state, pattern, height=grid[0] // merge, rows=merge, columns=merge)


def from_windows(config: Any, state: Tensor, grid: Grid) -> Tensor:
    """Hidden states (patches, dim) of a crop, row by row, where whole windows of blocks come one after the other."""
    merge = config.spatial_merge_size
    side = config.window_size // merge // config.patch_size
    height, width = grid[0] // merge, grid[1] // merge
    row, column = torch.arange(height)[:, None], torch.arange(width)
    window = row // side * width + column // side
    order = window.flatten().argsort(stable=True)  # the block that stands in each place
    blocks = state.unflatten(0, (-1, merge**2))[order.argsort().to(state.device)]
    return from_blocks(config, blocks.flatten(0, 1), grid)
