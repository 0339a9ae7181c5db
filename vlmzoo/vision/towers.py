"""The vision towers that can be an encoder: what each takes, and in what order its patches come."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmzoo.connector import Grid, VisionSpec
from vlmzoo.registry import unknown
from vlmzoo.vision.blocks import from_blocks, from_windows, to_patches

Inputs = Callable[[PreTrainedConfig, Tensor, Sequence[Grid]], dict[str, Any]]
Arrange = Callable[[PreTrainedConfig, Tensor, Sequence[Grid], Grid], Tensor]


def _own_side(config: PreTrainedConfig) -> int:
    return square(config.image_size, "image_size")


def _itself(config: PreTrainedConfig) -> PreTrainedConfig:
    return config


@dataclass(frozen=True)
class Tower:
    """What is to be known of a type of tower beside its configuration.

    module, name: of transformers' class, or of ours.
    inputs: what its `forward` takes for pixels (crops, channels, height, width) whose patches stand on these grids; of
        a `tiled` tower, for images whose crops do.
    num_prefix: how many hidden states stand before the patches, CLS first.
    mixed: whether crops of several sizes, padded on the right and below, can be encoded in one call.
    arrange: from what it gives, those grids and that of the padded crops, to (crops, patches, dim) with each crop's own
        patches first, row by row; None: it gives that.
    side: pixels a side of the images that it was made for.
    width: what its configuration calls the width of its hidden states.
    hidden_states: whether features of single layers can be read, beside what it gives.
    tiled: whether it encodes all crops of an image together, always `max_num_tiles` of them, some of which are empty.
    norm_eps: of its norms, where its configuration names none.
    known: the configuration that this is read from, where it is not its own.
    trim: takes away what stands behind its last hidden state, which no connector reads.
    """

    module: str
    name: str
    inputs: Inputs
    num_prefix: Callable[[PreTrainedConfig], int] = lambda config: 0
    mixed: bool = False
    arrange: Arrange | None = None
    side: Callable[[PreTrainedConfig], int] = _own_side
    width: str = "hidden_size"
    norm_eps: float = 1e-5
    trim: Callable[[Any], None] = lambda model: None
    tiled: bool = False
    hidden_states: bool = True
    known: Callable[[PreTrainedConfig], PreTrainedConfig] = _itself

    @property
    def model(self) -> type[PreTrainedModel]:
        own = self.module.startswith("vlmzoo.")
        module = self.module if own else f"transformers.models.{self.module}.modeling_{self.module}"
        return getattr(importlib.import_module(module), self.name)


def tower(config: PreTrainedConfig) -> Tower:
    """What is known of a configuration's type.

    Raises:
        ValueError: nothing is.
    """
    if config.model_type not in TOWERS:
        raise unknown("encoder type", config.model_type, TOWERS)
    return TOWERS[config.model_type]


def image_side(config: PreTrainedConfig) -> int:
    """Pixels a side of the images that a tower was made for."""
    kind = tower(config)
    return kind.side(kind.known(config))


def num_prefix(config: PreTrainedConfig) -> int:
    """How many hidden states stand before the patches, CLS first."""
    kind = tower(config)
    return kind.num_prefix(kind.known(config))


def spec(config: PreTrainedConfig) -> VisionSpec:
    """What connectors may know of a tower, read from its configuration."""
    kind = tower(config)
    known: Any = kind.known(config)
    return VisionSpec(
        hidden_size=getattr(known, kind.width),
        num_layers=known.num_hidden_layers,
        num_heads=known.num_attention_heads,
        norm_eps=getattr(known, "layer_norm_eps", None) or getattr(known, "rms_norm_eps", kind.norm_eps),
        patch_size=square(known.patch_size, "patch_size"),
        has_cls=num_prefix(config) > 0,
        widths=getattr(known, "widths", ()),
    )


def square(size: int | Sequence[int], what: str) -> int:
    """The one side of a square.

    Raises:
        ValueError: it has two.
    """
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"encoder: expected a square {what}, got {list(sides)}")
    return sides.pop()


def _interpolating(config: PreTrainedConfig, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    resized = tuple(pixels.shape[-2:]) != (square(config.image_size, "image_size"),) * 2
    return {"pixel_values": pixels, "interpolate_pos_encoding": resized}


def _plain(config: PreTrainedConfig, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    return {"pixel_values": pixels}


def _own_size(config: PreTrainedConfig, pixels: Tensor) -> None:
    side = image_side(config)
    if tuple(pixels.shape[-2:]) != (side, side):
        raise ValueError(f"encoder: expected crops of {side} x {side} pixels, got {tuple(pixels.shape[-2:])}")


def _fixed(config: PreTrainedConfig, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    """timm: of the size that it was made for."""
    _own_size(config, pixels)
    return {"pixel_values": pixels}


def _patched(config: PreTrainedConfig, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    """SigLIP 2: flattened patches, the real ones first."""
    patch = config.patch_size
    rows = [
        rearrange(
            image[..., : height * patch, : width * patch],
            "channels (height rows) (width columns) -> (height width) (rows columns channels)",
            rows=patch,
            columns=patch,
        )
        for image, (height, width) in zip(pixels, grids, strict=True)
    ]
    lengths = torch.tensor([len(row) for row in rows], device=pixels.device)
    patches = _padded(rows)
    mask = torch.arange(patches.shape[1], device=pixels.device) < lengths[:, None]
    shapes = torch.tensor(grids, device=pixels.device)
    return {"pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}


def _masked(config: PreTrainedConfig, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    """Idefics 2 and 3: a mask over the padded grid."""
    height, width = (side // config.patch_size for side in pixels.shape[-2:])
    mask = torch.zeros(len(pixels), height, width, dtype=torch.bool, device=pixels.device)
    for crop, (rows, columns) in enumerate(grids):
        mask[crop, :rows, :columns] = True
    return {"pixel_values": pixels, "patch_attention_mask": mask}


def _sized(config: PreTrainedConfig, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    """Pixtral: the size of each crop in pixels."""
    patch = config.patch_size
    sizes = torch.tensor([(height * patch, width * patch) for height, width in grids], device=pixels.device)
    return {"pixel_values": pixels, "image_sizes": sizes}


def _tiled(config: PreTrainedConfig, pixels: Tensor, tilings: Sequence[Grid]) -> dict[str, Any]:
    """Mllama: images with a place for each tile, and which way the tiles that are there stand."""
    _own_size(config, pixels)
    supported = [tuple(tiling) for tiling in config.supported_aspect_ratios]
    if other := set(tilings) - set(supported):
        raise ValueError(f"encoder: expected rows and columns of crops among {supported}, got {sorted(other)}")
    ids = [[supported.index(tiling) + 1] for tiling in tilings]  # 0 is no image's
    counts = torch.tensor([rows * columns for rows, columns in tilings], device=pixels.device)
    mask = torch.arange(config.max_num_tiles, device=pixels.device) < counts[:, None]
    return {
        "pixel_values": pixels.unflatten(0, (len(tilings), 1, config.max_num_tiles)),
        "aspect_ratio_ids": torch.tensor(ids, device=pixels.device),
        "aspect_ratio_mask": mask[:, None].long(),
    }


def _from_tiles(config: PreTrainedConfig, state: Tensor, grids: Sequence[Grid], full: Grid) -> Tensor:
    """Of a tower that gives (images, 1, tiles, patches, dim)."""
    return state.flatten(0, 2)


def _from_padded(config: PreTrainedConfig, state: Tensor, grids: Sequence[Grid], full: Grid) -> Tensor:
    """Of a tower that gives the padded grid."""
    if all(grid == full for grid in grids):
        return state
    rows = [
        rearrange(crop, "(height width) dim -> height width dim", width=full[1])[:height, :width].flatten(0, 1)
        for crop, (height, width) in zip(state, grids, strict=True)
    ]
    return _padded(rows)


def _blocks(config: PreTrainedConfig, pixels: Tensor, grids: Sequence[Grid]) -> dict[str, Any]:
    """Qwen-VL: the patches of all crops one behind the other, in blocks."""
    patch = config.patch_size
    crops = zip(pixels, grids, strict=True)
    patches = [to_patches(config, crop[:, : height * patch, : width * patch]) for crop, (height, width) in crops]
    sizes = torch.tensor([(1, height, width) for height, width in grids], device=pixels.device)
    return {"hidden_states": torch.cat(patches), "grid_thw": sizes}


def _from_packed(of_crop: Callable[[PreTrainedConfig, Tensor, Grid], Tensor]) -> Arrange:
    """Of a tower that gives the patches of all crops one behind the other, each crop's in an order of its own."""

    def arrange(config: PreTrainedConfig, state: Tensor, grids: Sequence[Grid], full: Grid) -> Tensor:
        crops = state.flatten(0, -2).split([height * width for height, width in grids])
        return _padded([of_crop(config, crop, grid) for crop, grid in zip(crops, grids, strict=True)])

    return arrange


def _as_it_is(config: PreTrainedConfig, state: Tensor, grid: Grid) -> Tensor:
    return state


def _without_merger(model: Any) -> None:
    model.merger = nn.Identity()


def _without_mergers(model: Any) -> None:
    """Qwen3-VL: nor those of the hidden states before the last."""
    _without_merger(model)
    model.deepstack_merger_list, model.deepstack_visual_indexes = nn.ModuleList(), ()


def _padded(rows: Sequence[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)


def _cls(config: PreTrainedConfig) -> int:
    return 1


def _side_of_positions(count: str) -> Callable[[PreTrainedConfig], int]:
    """Of a tower that has learnt so many positions, on a square."""
    return lambda config: math.isqrt(getattr(config, count)) * config.patch_size


def _any_side(config: PreTrainedConfig) -> int:
    """Of a tower that takes any size and names none: 32 patches, 448 pixels in Qwen2-VL and Qwen2.5-VL."""
    return 32 * config.patch_size


def _of_timm(config: PreTrainedConfig) -> PreTrainedConfig:
    from vlmzoo.vision import timm_tower  # an extra

    return timm_tower.known(config)


def _all_have_cls(config: Any) -> int:
    return int(all(num_prefix(part) for part in config.parts))


TOWERS: dict[str, Tower] = {
    "clip_vision_model": Tower("clip", "CLIPVisionModel", _interpolating, _cls),
    "siglip_vision_model": Tower("siglip", "SiglipVisionModel", _interpolating),
    "siglip2_vision_model": Tower(
        "siglip2", "Siglip2VisionModel", _patched, mixed=True, side=_side_of_positions("num_patches")
    ),
    "dinov2": Tower("dinov2", "Dinov2Model", _plain, _cls),
    "dinov2_with_registers": Tower(
        "dinov2_with_registers", "Dinov2WithRegistersModel", _plain, lambda config: 1 + config.num_register_tokens
    ),
    "internvl_vision": Tower("internvl", "InternVLVisionModel", _plain, _cls),
    "aimv2_vision_model": Tower("aimv2", "Aimv2VisionModel", _plain),
    "blip_2_vision_model": Tower("blip_2", "Blip2VisionModel", _interpolating, _cls),
    "instructblip_vision_model": Tower("instructblip", "InstructBlipVisionModel", _interpolating, _cls),
    "janus_vision_model": Tower("janus", "JanusVisionModel", _interpolating),
    "idefics2_vision": Tower("idefics2", "Idefics2VisionTransformer", _masked, mixed=True, arrange=_from_padded),
    "idefics3_vision": Tower("idefics3", "Idefics3VisionTransformer", _masked, mixed=True, arrange=_from_padded),
    "smolvlm_vision": Tower("smolvlm", "SmolVLMVisionTransformer", _masked, mixed=True, arrange=_from_padded),
    "mllama_vision_model": Tower(
        "mllama",
        "MllamaVisionModel",
        _tiled,
        _cls,
        arrange=_from_tiles,
        tiled=True,
        width="vision_output_dim",
        hidden_states=False,
    ),
    "pixtral": Tower("pixtral", "PixtralVisionModel", _sized, mixed=True, arrange=_from_packed(_as_it_is)),
    "qwen2_vl_vision": Tower(
        "qwen2_vl",
        "Qwen2VisionTransformerPretrainedModel",
        _blocks,
        mixed=True,
        arrange=_from_packed(from_blocks),
        side=_any_side,
        width="embed_dim",
        norm_eps=1e-6,
        trim=_without_merger,
    ),
    "qwen2_5_vl_vision": Tower(
        "qwen2_5_vl",
        "Qwen2_5_VisionTransformerPretrainedModel",
        _blocks,
        mixed=True,
        arrange=_from_packed(from_windows),
        side=_any_side,
        norm_eps=1e-6,
        trim=_without_merger,
    ),
    "qwen3_vl_vision": Tower(
        "qwen3_vl",
        "Qwen3VLVisionModel",
        _blocks,
        mixed=True,
        arrange=_from_packed(from_blocks),
        side=_side_of_positions("num_position_embeddings"),
        norm_eps=1e-6,
        trim=_without_mergers,
    ),
    "timm_wrapper": Tower(
        "vlmzoo.vision.timm_tower", "TimmTower", _fixed, lambda config: config.num_prefix_tokens, known=_of_timm
    ),
    "vlmzoo_several_towers": Tower("vlmzoo.vision.several", "SeveralTowers", _plain, _all_have_cls),
}
"""By transformers' model types."""
