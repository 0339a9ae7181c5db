"""Several vision towers as one, their features side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from vlmzoo.connector import NORMED, Grid
from vlmzoo.vision.encoder import VisionEncoder
from vlmzoo.vision.towers import image_side, spec, tower


class SeveralTowersConfig(PreTrainedConfig):
    """The parts' configurations, and how pixels were normalised for each.

    Args:
        parts: of towers that encode one image at a time.
        means, stds: of the channels, a list a part.

    Raises:
        ValueError: a part that encodes all crops of an image together.
    """

    model_type = "vlmzoo_several_towers"

    def __init__(
        self,
        parts: Sequence[PreTrainedConfig | dict[str, Any]] = (),
        means: Sequence[Sequence[float]] = (),
        stds: Sequence[Sequence[float]] = (),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.parts = [_config(part) for part in parts]
        self.means, self.stds = [list(mean) for mean in means], [list(std) for std in stds]
        for part in self.parts:
            if tower(part).tiled:
                raise ValueError(f"encoder: a {part.model_type} cannot stand beside others, it encodes whole images")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "parts": [part.to_dict() for part in self.parts]}

    # What connectors may know: widths add up, layers are those that all have, the grid is the first part's.

    @property
    def hidden_size(self) -> int:
        return sum(self.widths)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(spec(part).hidden_size for part in self.parts)

    @property
    def num_hidden_layers(self) -> int:
        return min(spec(part).num_layers for part in self.parts)

    @property
    def num_attention_heads(self) -> int:
        return spec(self.parts[0]).num_heads

    @property
    def patch_size(self) -> int:
        return spec(self.parts[0]).patch_size

    @property
    def image_size(self) -> int:
        return image_side(self.parts[0])


def _config(part: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    if isinstance(part, PreTrainedConfig):
        return part
    values = dict(part)
    return AutoConfig.for_model(values.pop("model_type"), **values)


@dataclass
class SideBySide:
    """What the towers give; hidden states are read as those of one, and joined when they are."""

    encoders: Sequence[VisionEncoder]
    outputs: Sequence[Any]
    grids: Sequence[Grid]  # of each tower
    num_crops: int

    @property
    def last_hidden_state(self) -> Tensor:
        return self._joined([output.last_hidden_state for output in self.outputs])

    @property
    def hidden_states(self) -> SideBySide:
        return self

    def __getitem__(self, layer: int) -> Tensor:
        if layer >= 0:
            layer -= 1 + min(encoder.spec.num_layers for encoder in self.encoders)
        return self._joined([output.hidden_states[layer] for output in self.outputs])

    def _joined(self, states: Sequence[Tensor]) -> Tensor:
        patches, cls = [], []
        for encoder, state, grid in zip(self.encoders, states, self.grids, strict=True):
            if encoder.tower.arrange is not None:
                state = encoder.tower.arrange(encoder.model.config, state, [grid] * self.num_crops, grid)
            cls.append(state[:, :1])
            patches.append(_on_grid(state[:, encoder.num_prefix :], grid, self.grids[0]))
        joined = torch.cat(patches, -1)
        if not all(encoder.num_prefix for encoder in self.encoders):
            return joined
        return torch.cat([torch.cat(cls, -1), joined], 1)


def _on_grid(patches: Tensor, grid: Grid, target: Grid) -> Tensor:
    """Patches (crops, patches, dim) of one grid on another, bilinearly."""
    if grid == target:
        return patches
    image = rearrange(patches, "crops (height width) dim -> crops dim height width", height=grid[0])
    resized = F.interpolate(image.float(), target, mode="bilinear", antialias=True).to(patches.dtype)
    return rearrange(resized, "crops dim height width -> crops (height width) dim")


class SeveralTowers(PreTrainedModel):
    """Towers that see the same image, each at its own size and with its own normalisation.

    Pixels come as the first one takes them. The features of the others are resampled to the first one's grid and stand
    behind its channels; so does CLS, where all have one. A hidden state is counted from the last in each of them.

    Source: Tong et al., Eyes Wide Shut? (2024), section 4, and Tong et al., Cambrian-1 (2024), section 3.2, which joins
    features in this way too; Shi et al., Eagle (2024), section 2.3: channel concatenation.
    """

    config: SeveralTowersConfig
    config_class = SeveralTowersConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: SeveralTowersConfig, parts: Sequence[PreTrainedModel] | None = None) -> None:
        super().__init__(config)
        towers = parts or [tower(part).model._from_config(part) for part in config.parts]
        self.encoders = nn.ModuleList(VisionEncoder(part, layer=NORMED) for part in towers)
        self.post_init()

    @classmethod
    def of(cls, parts: Sequence[PreTrainedModel], processors: Sequence[Any]) -> SeveralTowers:
        """Towers and their image processors as one."""
        config = SeveralTowersConfig(
            [part.config for part in parts],
            [processor.image_mean for processor in processors],
            [processor.image_std for processor in processors],
        )
        return cls(config, parts)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: the parts initialise themselves."""

    def forward(self, pixel_values: Tensor, output_attentions: bool = False, **kwargs: Any) -> SideBySide:
        """The parts' outputs for pixels (crops, 3, height, width).

        Raises:
            ValueError: attention is asked for.
        """
        if output_attentions:
            raise ValueError("several encoders have no CLS attention in common; name one encoder for this connector")
        outputs, grids, encoders = [], [], []
        first = self.config.image_size
        for index, encoder in enumerate(self.encoders):
            assert isinstance(encoder, VisionEncoder)
            pixels = self._for_part(pixel_values, index, encoder.image_size / first)
            grid = encoder.grid(*pixels.shape[-2:])
            given = encoder.tower.inputs(encoder.model.config, pixels, [grid] * len(pixels))
            outputs.append(encoder.model(**given, output_hidden_states=True))
            grids.append(grid)
            encoders.append(encoder)
        return SideBySide(encoders, outputs, grids, len(pixel_values))

    def _for_part(self, pixels: Tensor, index: int, scale: float) -> Tensor:
        if scale != 1:
            size = [round(side * scale) for side in pixels.shape[-2:]]
            pixels = F.interpolate(pixels.float(), size, mode="bicubic", antialias=True).to(pixels.dtype)
        config = self.config
        if (config.means[index], config.stds[index]) == (config.means[0], config.stds[0]):
            return pixels

        def channels(values: Sequence[float]) -> Tensor:
            return pixels.new_tensor(values)[:, None, None]

        plain = pixels * channels(config.stds[0]) + channels(config.means[0])
        return (plain - channels(config.means[index])) / channels(config.stds[index])


AutoConfig.register(SeveralTowersConfig.model_type, SeveralTowersConfig)
