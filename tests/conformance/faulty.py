"""Connectors that each break one promise, and the checks that have to say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.conformance.sound import Interleaved, Pooled, Reader, Sparse, Strided
from vlmzoo.connector import Connector, FeatureRequest, ImageLayout, LayerContext, TextSpec, VisualInput, VisualTokens

FAULTS: list[tuple[type, set[str]]] = []


def caught_by(*checks: str) -> Callable[[type], type]:
    def add(connector: type) -> type:
        FAULTS.append((connector, set(checks)))
        return connector

    return add


@caught_by("tokens_agree_with_num_tokens")
class OneTokenFewer(Strided):
    def num_tokens(self, grid):
        return super().num_tokens(grid) + 1


@caught_by("tokens_agree_with_num_tokens")
class WrongForNonSquareGrids(Strided):
    def num_tokens(self, grid):
        return -(-(max(grid) ** 2) // self.stride)


@caught_by("tokens_agree_with_num_tokens")
class WrongOutputGrid(Strided):
    def output_grid(self, grid):
        return grid


@caught_by("tokens_agree_with_num_tokens")
class RealTokensLast(Sparse):
    def forward(self, visual: VisualInput) -> VisualTokens:
        found = super().forward(visual)
        return VisualTokens(found.tokens.flip(1), found.mask.flip(1))


class PerImage(Connector):
    """One token an image, from whatever `summary` (images, vision_dim) makes of it."""

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, image: ImageLayout) -> int:
        return 1

    def summary(self, visual: VisualInput) -> Tensor:
        features = visual.maps[0]
        total = features.values.new_zeros(visual.num_images, features.values.shape[-1])
        crops = features.values.masked_fill(~features.mask[..., None], 0).sum(1)
        return total.index_add(0, visual.image_of_crop, crops)

    def forward(self, visual: VisualInput) -> VisualTokens:
        tokens = self.project(self.summary(visual))[:, None]
        return VisualTokens(tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool))


@caught_by("images_are_independent")
class BatchNorm(PerImage):
    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__(vision_dim, text_dim)
        self.norm = nn.BatchNorm1d(vision_dim)

    def summary(self, visual: VisualInput) -> Tensor:
        return self.norm(super().summary(visual))


@caught_by("images_are_independent", "batch_of_one_equals_batch_of_many")
class MixesImages(PerImage):
    def summary(self, visual: VisualInput) -> Tensor:
        found = super().summary(visual)
        return found + 0.1 * found.mean(0)


class ReaderOfAllImages(Reader):
    def means(self, context: LayerContext) -> Tensor:
        means = super().means(context)
        return means.sum(1, keepdim=True).expand_as(means)


@caught_by("images_are_independent", "batch_of_one_equals_batch_of_many")
class TextSeesLaterImages(Interleaved):
    """(And the padding of samples with fewer images.)"""

    reader = ReaderOfAllImages


@caught_by("padding_has_no_influence")
class SumsThePadding(PerImage):
    def summary(self, visual: VisualInput) -> Tensor:
        features = visual.maps[0]
        total = features.values.new_zeros(visual.num_images, features.values.shape[-1])
        return total.index_add(0, visual.image_of_crop, features.values.sum(1))


@caught_by("padding_has_no_influence", "batch_of_one_equals_batch_of_many")
class CountsThePadding(SumsThePadding):
    def summary(self, visual: VisualInput) -> Tensor:
        return super().summary(visual) / visual.maps[0].values.shape[1]


@caught_by("padding_has_no_influence", "batch_of_one_equals_batch_of_many")
class ReadsPaddedInstruction(Pooled):
    def forward(self, visual: VisualInput) -> VisualTokens:
        assert visual.instruction is not None
        visual.instruction.mask = torch.ones_like(visual.instruction.mask)
        return super().forward(visual)


class ReaderOfPadding(Reader):
    def means(self, context: LayerContext) -> Tensor:
        assert context.memory is not None
        return self.project(context.memory.sum(2))


@caught_by("padding_has_no_influence")
class LayerReadsPadding(Interleaved):
    reader = ReaderOfPadding


@caught_by("batch_of_one_equals_batch_of_many")
class DependsOnTheBatchSize(PerImage):
    def summary(self, visual: VisualInput) -> Tensor:
        return super().summary(visual) / visual.num_images


class ReaderThatNeedsAnImage(Reader):
    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        assert context.memory is not None, "no memory"
        return super().forward(hidden, context)


@caught_by("batch_of_one_equals_batch_of_many")
class FailsOnTextOnly(Interleaved):
    reader = ReaderThatNeedsAnImage


@caught_by("every_parameter_gets_a_gradient")
class UnusedLayer(Strided):
    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__(vision_dim, text_dim)
        self.forgotten = nn.Linear(vision_dim, text_dim)


@caught_by("every_parameter_gets_a_gradient")
class DetachedBias(Strided):
    def forward(self, patches, grid):
        return nn.functional.linear(patches[:, :: self.stride], self.project.weight, self.project.bias.detach())


@caught_by("every_parameter_gets_a_gradient")
class ListsWhatGetsAGradient(Strided):
    without_gradient = frozenset({"project.bias"})


@caught_by("every_parameter_gets_a_gradient")
class ListsWhatIsNotThere(Strided):
    without_gradient = frozenset({"projection.bias"})


@caught_by("image_reaches_the_loss")
class DetachedFeatures(Strided):
    def forward(self, patches, grid):
        return super().forward(patches.detach(), grid)


@caught_by("image_reaches_the_loss")
class AsksForALayerTooMany(PerImage):
    requires = FeatureRequest(layers=(-2, -5))


class ReaderThatForgetsToCheckpointTheGate(Reader):
    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        if self.gradient_checkpointing and self.training:
            return hidden + (super().forward(hidden, context) - hidden).detach()
        return super().forward(hidden, context)


@caught_by("checkpointed_gradients_are_the_same")
class AnotherPathWithCheckpointing(Interleaved):
    reader = ReaderThatForgetsToCheckpointTheGate


class ReaderThatKeepsTheMemory(Reader):
    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        self.kept = context
        if context.memory is not None and self.gradient_checkpointing and self.training:
            return checkpoint(self.recompute, hidden, use_reentrant=False)  # pyright: ignore[reportReturnType]
        return super().forward(hidden, context)

    def recompute(self, hidden: Tensor) -> Tensor:
        return self.read(hidden, self.kept)


@caught_by("checkpointed_gradients_are_the_same")
class MemoryInTheModule(Interleaved):
    """The backward of the first of two forwards recomputes with the memory of the second."""

    reader = ReaderThatKeepsTheMemory


class ReaderOfThePrompt(Reader):
    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        return hidden if hidden.shape[1] == 1 else super().forward(hidden, context)


@caught_by("cached_decoding_equals_full_forward")
class NoImageWhileDecoding(Interleaved):
    reader = ReaderOfThePrompt


@caught_by("dtype_and_device_are_kept")
class AlwaysFloat32(Strided):
    def forward(self, patches, grid):
        return super().forward(patches, grid).float()


@caught_by("dtype_and_device_are_kept", "save_and_load_are_exact")
class ConstantThatIsNoBuffer(Strided):
    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__(vision_dim, text_dim)
        self.scale = 1 + torch.arange(text_dim) / text_dim

    def forward(self, patches, grid):
        return super().forward(patches, grid) * self.scale


@caught_by("deterministic_under_a_seed")
class SeedsItself(Strided):
    def __init__(self, vision_dim: int, text_dim: int) -> None:
        torch.manual_seed(42)
        super().__init__(vision_dim, text_dim)


@caught_by("deterministic_under_a_seed")
class DrawsFromNumpy(Strided):
    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__(vision_dim, text_dim)
        with torch.no_grad():
            self.project.bias.copy_(torch.from_numpy(np.random.randn(text_dim)))


@caught_by("save_and_load_are_exact")
class BufferThatIsNotSaved(Strided):
    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__(vision_dim, text_dim)
        self.register_buffer("scale", 1 + torch.arange(text_dim) / text_dim, persistent=False)

    def forward(self, patches, grid):
        return super().forward(patches, grid) * self.scale


@caught_by("works_on_meta")
class CountsWithAWeight(Strided):
    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__(vision_dim, text_dim)
        self.register_buffer("step", torch.tensor(2))

    def num_tokens(self, grid):
        return -(-grid[0] * grid[1] // int(self.step))


@caught_by("works_on_meta", "dtype_and_device_are_kept")
class WaitsForTheDevice(Pooled):
    def __init__(self, vision_dim: int, text_dim: int, text: TextSpec) -> None:
        super().__init__(vision_dim, text_dim, text)
        self.requires = Pooled.requires

    def forward(self, visual: VisualInput) -> VisualTokens:
        assert max(visual.image_of_crop.tolist()) < visual.num_images
        return super().forward(visual)


@caught_by("compiles")
class BreaksTheGraph(Strided):
    def forward(self, patches, grid):
        torch._dynamo.graph_break()
        return super().forward(patches, grid)


def raising(error: Exception) -> Any:
    class Raising(Strided):
        def forward(self, patches, grid):
            raise error

    return Raising
