"""The spatial vision aggregator against its equations, query by query in float64, and with a fault in ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.connectors.parts import VISION, create, distance, rescale, visual_input
from vlmzoo.connector import LayerContext
from vlmzoo.connectors import sva

OPTIONS = {"side": 2, "window": 2, "depth": 2, "hidden_size": 12, "num_heads": 2, "num_inside": 2, "every": 2}
WIDTHS = (8, 16)
TOLERANCE = 1e-5


def connector(**options: Any) -> Any:
    part = create("sva", {**OPTIONS, **options}, vision=replace(VISION, widths=WIDTHS))
    rescale(part)
    return part


def patches(seed: int = 1) -> Tensor:
    return torch.randn(3, 16, sum(WIDTHS), generator=torch.Generator().manual_seed(seed))


def norm(x: Tensor, layer: Any) -> Tensor:
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + layer.eps).sqrt() * layer.weight.double() + layer.bias.double()


def linear(x: Tensor, layer: Any) -> Tensor:
    return x @ layer.weight.double().T + (0 if layer.bias is None else layer.bias.double())


def mlp(x: Tensor, layer: Any) -> Tensor:
    x = linear(x, layer.up)
    return linear(x * 0.5 * (1 + torch.erf(x / sqrt(2))), layer.down)


def sampled(query: Tensor, windows: list[Tensor], context: Tensor, sampler: Any) -> Tensor:
    """One query (dim,) with its windows, (window², dim) an encoder."""
    inner = linear(torch.cat([query, linear(context, sampler.context)]), sampler.enter)
    attention = sampler.attention
    q = linear(norm(inner, attention.query_norm), attention.query).view(2, 6)
    keys, values = [], []
    for source, window in enumerate(windows):
        for place, patch in enumerate(window):
            seen = patch + sampler.positions[source, place].double()
            keys.append(linear(norm(seen, attention.key_norms[source]), attention.keys[source]).view(2, 6))
            values.append(linear(norm(seen, attention.value_norms[source]), attention.values[source]).view(2, 6))
    heads = []
    for head in range(2):
        weights = torch.stack([q[head] @ key[head] / sqrt(6) for key in keys]).softmax(0)
        heads.append(sum(weight * value[head] for weight, value in zip(weights, values, strict=True)))
    inner = norm(inner + linear(torch.cat(heads), attention.out), sampler.norm)
    return query + mlp(inner, sampler.leave)


def windows_of(part: Any, image: Tensor, row: int, column: int) -> tuple[list[Tensor], Tensor]:
    """What the query in this place sees of an image (16, dim), and the mean of the first encoder."""
    maps = []
    for features, project in zip(image.double().split(WIDTHS, -1), part.projects, strict=True):
        maps.append(norm(mlp(features, project[0]), project[1]).view(4, 4, -1))
    places = [(2 * row + down, 2 * column + right) for down in range(2) for right in range(2)]
    return [torch.stack([found[place] for place in places]) for found in maps], maps[0].mean((0, 1))


def expected(part: Any, image: Tensor) -> Tensor:
    """The tokens (4, text_dim) of one image."""
    tokens = []
    for row in range(2):
        for column in range(2):
            query = part.query.double()
            for sampler in part.samplers:
                query = sampled(query, *windows_of(part, image, row, column), sampler)
            tokens.append(mlp(query, part.project))
    return torch.stack(tokens)


def difference(part: Any) -> float:
    with torch.no_grad():
        found = part(visual_input(patches(), [(4, 4)] * 3)).tokens
        return distance(found, torch.stack([expected(part, image) for image in patches()]))


def test_tokens_follow_the_equations() -> None:
    assert difference(connector()) <= TOLERANCE


def context_of(part: Any) -> LayerContext:
    found = part(visual_input(patches(), [(4, 4)] * 3))
    places = torch.tensor([[[1, 2, 3, 4]], [[-1] * 4], [[0, 1, 2, 3]]])
    return LayerContext(found.memory[:, None], found.memory_mask[:, None], torch.zeros(3, 6), token_of_slot=places)


def test_hidden_states_in_slots_look_again_and_others_stay() -> None:
    part = connector()
    hidden = torch.randn(3, 6, 32, generator=torch.Generator().manual_seed(2))
    (layer,) = part.llm_layers()[1]
    assert list(part.llm_layers()) == [1, 3]
    with torch.no_grad():
        found = layer(hidden, context_of(part))
        want = hidden.double().clone()
        for sample, first in ((0, 1), (2, 0)):
            for slot in range(4):
                seen = windows_of(part, patches()[sample], *divmod(slot, 2))
                want[sample, first + slot] = sampled(hidden[sample, first + slot].double(), *seen, layer.sampler)
    assert distance(found, want) <= TOLERANCE
    assert torch.equal(found[1], hidden[1]), "a sample without slots"
    assert torch.equal(found[0, [0, 5]], hidden[0, [0, 5]]), "text"
    without = replace(context_of(part), token_of_slot=None)
    assert layer(hidden, without) is hidden


def no_context(part: Any, patch: pytest.MonkeyPatch) -> None:
    for sampler in part.samplers:
        nn.init.zeros_(sampler.context.weight)


def no_positions(part: Any, patch: pytest.MonkeyPatch) -> None:
    for sampler in part.samplers:
        patch.setattr(sampler, "positions", None)


def columns_first(part: Any, patch: pytest.MonkeyPatch) -> None:
    honest = sva.rearrange
    patch.setattr(
        sva, "rearrange", lambda x, pattern, **s: honest(x, pattern.replace("(rows columns)", "(columns rows)"), **s)
    )


def strided_windows(part: Any, patch: pytest.MonkeyPatch) -> None:
    honest = sva.rearrange
    turned = {"(height rows) (width columns)": "(rows height) (columns width)"}

    def other(x: Tensor, pattern: str, **sizes: int) -> Tensor:
        for old, new in turned.items():
            pattern = pattern.replace(old, new)
        return honest(x, pattern, **sizes)

    patch.setattr(sva, "rearrange", other)


def encoders_swapped(part: Any, patch: pytest.MonkeyPatch) -> None:
    for sampler in part.samplers:
        sampler.attention.keys = nn.ModuleList(reversed(sampler.attention.keys))


def no_residual(part: Any, patch: pytest.MonkeyPatch) -> None:
    honest = sva.Sampler.forward
    patch.setattr(sva.Sampler, "forward", lambda self, queries, *seen: honest(self, queries, *seen) - queries)


def mean_of_the_second(part: Any, patch: pytest.MonkeyPatch) -> None:
    honest = part._seen

    def other(features: Tensor, grid: Any) -> Tensor:
        seen = honest(features, grid).unflatten(2, (9, -1))
        second = part.projects[1](features[..., WIDTHS[0] :]).mean(1)
        seen[:, :, -1] = second[:, None]
        return seen.flatten(2)

    patch.setattr(part, "_seen", other)


def tanh_gelu(part: Any, patch: pytest.MonkeyPatch) -> None:
    part.project.activation = lambda x: F.gelu(x, approximate="tanh")


FAULTS = [
    no_context,
    no_positions,
    columns_first,
    strided_windows,
    encoders_swapped,
    no_residual,
    mean_of_the_second,
    tanh_gelu,
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_a_fault_shows(fault: Callable[[Any, pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    part = connector()
    with torch.no_grad():
        honest = torch.stack([expected(part, image) for image in patches()])
        fault(part, monkeypatch)
        found = part(visual_input(patches(), [(4, 4)] * 3)).tokens
    assert distance(found, honest) > 10 * TOLERANCE
