"""Connectors that transformers lacks: against their equations, written out in float64, and their papers' counts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.connectors.parts import TEXT, VISION, adapted, create, distance, rescale, visual_input
from vlmzoo.connector import ImageLayout, TextSpec, VisionSpec
from vlmzoo.connectors import attention_pooling as pooling
from vlmzoo.connectors._layers import gelu_tanh
from vlmzoo.sweeps.trial import num_trainable

Weights = dict[str, Tensor]
GRID = (4, 6)
OPTIONS: dict[str, dict[str, Any]] = {
    "minigpt_v2": {"group": 3},
    "average_pool": {"side": 3},
    "c_abstractor": {"side": 3, "depth": 2, "hidden_size": 20, "position_side": 5},
    "ldp": {},
    "ldp_v2": {"side": 3},
    "token_packer": {"factor": 2, "layers": (1, 2, 3), "hidden_size": 16, "num_heads": 2},
    "qwen_vl": {"side": 3, "head_dim": 8},
    "attention_pooling": {"num_queries": 5, "num_heads": 2},
    "matryoshka": {"sides": (3, 2, 1)},
    "mqt": {"side": 3, "num_heads": 2},
}
CLIP_L = VisionSpec(hidden_size=1024, num_layers=24, num_heads=16, norm_eps=1e-5, patch_size=14, has_cls=True)
MISTRAL = TextSpec(4096, num_layers=32, num_heads=32, norm_eps=1e-5, intermediate_size=14336, vocab_size=32000)


def linear(x: Tensor, w: Weights, name: str) -> Tensor:
    out = torch.einsum("...i,oi->...o", x, w[f"{name}.weight"])
    return out + w[f"{name}.bias"] if f"{name}.bias" in w else out


def norm(x: Tensor, w: Weights, name: str, eps: float) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def silu(x: Tensor) -> Tensor:
    return x / (1 + (-x).exp())


def mlp(x: Tensor, w: Weights, name: str, act: Callable[[Tensor], Tensor] = gelu) -> Tensor:
    return linear(act(linear(x, w, f"{name}.up")), w, f"{name}.down")


def region_means(x: Tensor, side: int) -> Tensor:
    """(crops, height, width, dim) -> (crops, side, side, dim), by the bounds that adaptive pooling is defined by."""
    _, height, width, _ = x.shape
    rows = [(i * height // side, -(-(i + 1) * height // side)) for i in range(side)]
    columns = [(i * width // side, -(-(i + 1) * width // side)) for i in range(side)]
    means = [[x[:, a:b, c:d].mean((1, 2)) for c, d in columns] for a, b in rows]
    return torch.stack([torch.stack(row, 1) for row in means], 1)


def convolve(x: Tensor, kernel: Tensor, stride: int = 1) -> Tensor:
    """A depthwise 3 x 3 convolution of (crops, height, width, dim) by its definition; kernel (dim, 1, 3, 3)."""
    padded = F.pad(x, (0, 0, 1, 1, 1, 1))
    height, width = x.shape[1:3]
    parts = [
        padded[:, i : i + height, j : j + width] * kernel[:, 0, i, j] for i in range(3) for j in range(3)
    ]  # centred on each place
    return torch.stack(parts).sum(0)[:, ::stride, ::stride]


def attend(q: Tensor, k: Tensor, v: Tensor, w: Weights, name: str, heads: int) -> Tensor:
    """One sample: (queries, dim), (keys, dim), (keys, dim)."""
    found = []
    for part in torch.arange(q.shape[-1]).chunk(heads):
        scores = linear(q, w, f"{name}.query")[:, part] @ linear(k, w, f"{name}.key")[:, part].T / len(part) ** 0.5
        found.append(scores.softmax(-1) @ linear(v, w, f"{name}.value")[:, part])
    return linear(torch.cat(found, -1), w, f"{name}.out")


def excited(
    x: Tensor, w: Weights, name: str, act: Callable[[Tensor], Tensor], gate: Callable[[Tensor], Tensor]
) -> Tensor:
    return x * gate(linear(act(linear(x.mean((1, 2)), w, f"{name}.down")), w, f"{name}.up"))[:, None, None]


def minigpt_v2(w: Weights, x: Tensor) -> Tensor:
    return torch.stack([linear(torch.cat([x[:, 3 * i + j] for j in range(3)], -1), w, "project") for i in range(8)], 1)


def average_pool(w: Weights, x: Tensor) -> Tensor:
    return mlp(region_means(x.unflatten(1, GRID), 3).flatten(1, 2), w, "project")


def bilinear(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """(dim, side, side) at the centres of a grid's cells, (height, width, dim)."""

    def weights(length: int, side: int) -> Tensor:
        matrix = torch.zeros(length, side, dtype=table.dtype)
        for place in range(length):
            at = min(max((place + 0.5) * side / length - 0.5, 0), side - 1)
            low = int(at)
            matrix[place, low] += 1 - (at - low)
            matrix[place, min(low + 1, side - 1)] += at - low
        return matrix

    rows, columns = (weights(length, table.shape[-1]) for length in grid)
    return torch.einsum("hi,wj,dij->hwd", rows, columns, table)


def reg_block(x: Tensor, w: Weights, name: str) -> Tensor:
    def conv(x: Tensor, part: str) -> Tensor:
        return torch.einsum("...i,oi->...o", x, w[f"{name}.{part}.weight"][:, :, 0, 0])

    hidden = silu(norm(conv(x, "reduce"), w, f"{name}.reduce_norm", 1e-6))
    hidden = silu(norm(convolve(hidden, w[f"{name}.depthwise.weight"]), w, f"{name}.depthwise_norm", 1e-6))
    hidden = excited(hidden, w, f"{name}.excite", silu, torch.sigmoid)
    hidden = norm(conv(hidden, "expand"), w, f"{name}.expand_norm", 1e-6)
    way = x
    if f"{name}.shortcut.0.weight" in w:
        way = norm(conv(x, "shortcut.0"), w, f"{name}.shortcut.1", 1e-6)
    return silu(hidden + way)


def c_abstractor(w: Weights, x: Tensor) -> Tensor:
    hidden = x.unflatten(1, GRID) + bilinear(w["positions"], GRID)
    for part in ("before.0", "before.1"):
        hidden = reg_block(hidden, w, part)
    hidden = region_means(hidden, 3)
    for part in ("after.0", "after.1"):
        hidden = reg_block(hidden, w, part)
    return mlp(hidden.flatten(1, 2), w, "project", silu)


def hard_sigmoid(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


def ldp(w: Weights, x: Tensor) -> Tensor:
    hidden = mlp(x, w, "project").unflatten(1, GRID)
    for index, stride in ((0, 1), (1, 2)):
        name = f"blocks.{index}"
        inner = norm(convolve(hidden, w[f"{name}.depthwise.weight"], stride), w, f"{name}.depthwise_norm", 1e-6)
        inner = excited(inner * hard_sigmoid(inner), w, f"{name}.excite", torch.relu, hard_sigmoid)
        inner = torch.einsum("...i,oi->...o", inner, w[f"{name}.pointwise.weight"][:, :, 0, 0])
        inner = norm(inner, w, f"{name}.pointwise_norm", 1e-6)
        hidden = hidden + inner if stride == 1 else inner
    return hidden.flatten(1, 2)


def ldp_v2(w: Weights, x: Tensor) -> Tensor:
    tokens = region_means(mlp(x, w, "project").unflatten(1, GRID), 3)
    return (tokens + convolve(tokens, w["positions.weight"]) + w["positions.bias"]).flatten(1, 2)


def token_packer(w: Weights, x: Tensor) -> Tensor:
    fine = x.unflatten(1, GRID)
    keys = norm(mlp(fine, w, "key"), w, "key_norm", 1e-6)
    values = norm(mlp(fine, w, "value"), w, "value_norm", 1e-6)
    tokens = []
    for row in range(2):
        for column in range(3):
            block = (slice(None), slice(2 * row, 2 * row + 2), slice(2 * column, 2 * column + 2))
            # halving by bilinear interpolation is the mean of each block
            coarse = fine[block][..., -VISION.hidden_size :].mean((1, 2))
            query = norm(linear(coarse, w, "query"), w, "query_norm", 1e-6)
            own = zip(query, keys[block].flatten(1, 2), values[block].flatten(1, 2), strict=True)
            tokens.append(torch.stack([attend(q[None], k, v, w, "attention", 2)[0] for q, k, v in own]))
    return mlp(torch.stack(tokens, 1), w, "project")


def masked_autoencoder_positions(dim: int, side: int) -> Tensor:
    """`get_2d_sincos_pos_embed` of the MAE's code, in numpy as there."""

    def of(dim: int, places: np.ndarray) -> np.ndarray:
        omega = 1.0 / 10000 ** (np.arange(dim // 2, dtype=float) / (dim / 2.0))
        out = np.einsum("m,d->md", places.reshape(-1), omega)
        return np.concatenate([np.sin(out), np.cos(out)], axis=1)

    grid = np.stack(np.meshgrid(np.arange(side, dtype=float), np.arange(side, dtype=float)), axis=0)
    grid = grid.reshape([2, 1, side, side])
    return torch.from_numpy(np.concatenate([of(dim // 2, grid[0]), of(dim // 2, grid[1])], axis=1))


def qwen_vl(w: Weights, x: Tensor) -> Tensor:
    positions = masked_autoencoder_positions(TEXT.hidden_size, 3)
    there = positions.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    there = F.interpolate(there, size=GRID, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(0, 2)
    memory = norm(linear(x, w, "resampler.project"), w, "resampler.memory_norm", 1e-6)
    queries = norm(w["resampler.queries"], w, "resampler.query_norm", 1e-6) + positions
    read = torch.stack([attend(queries, keys + there, keys, w, "resampler.attention", 4) for keys in memory])
    return linear(norm(read, w, "norm", 1e-6), w, "out")


def attention_pooling(w: Weights, x: Tensor) -> Tensor:
    queries = norm(w["queries"], w, "query_norm", 1e-5)
    memory = norm(x, w, "memory_norm", 1e-5)
    return linear(torch.stack([attend(queries, keys, keys, w, "attention", 2) for keys in memory]), w, "project")


def matryoshka(w: Weights, x: Tensor) -> Tensor:
    return mlp(region_means(x.unflatten(1, GRID), 3).flatten(1, 2), w, "project")


def mqt(w: Weights, x: Tensor) -> Tensor:
    positions = masked_autoencoder_positions(VISION.hidden_size, 3)
    there = positions.reshape(1, 3, 3, -1).permute(0, 3, 1, 2)
    there = F.interpolate(there, size=GRID, mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(0, 2)
    queries = norm(w["queries"] + positions, w, "query_norm", 1e-6)
    keys, values = norm(there, w, "key_norm", 1e-6), norm(x, w, "value_norm", 1e-6)
    return linear(torch.stack([attend(queries, keys, one, w, "attention", 2) for one in values]), w, "project")


EQUATIONS: dict[str, Callable[[Weights, Tensor], Tensor]] = {
    "minigpt_v2": minigpt_v2,
    "average_pool": average_pool,
    "c_abstractor": c_abstractor,
    "ldp": ldp,
    "ldp_v2": ldp_v2,
    "token_packer": token_packer,
    "qwen_vl": qwen_vl,
    "attention_pooling": attention_pooling,
    "matryoshka": matryoshka,
    "mqt": mqt,
}


def made(name: str) -> Any:
    ours = create(name, OPTIONS[name]).eval()
    rescale(ours)
    return ours


def difference(name: str, ours: Any, honest: Any) -> float:
    """Ours in float32 against the equations, with the weights of `honest`, in float64."""
    layers = len(OPTIONS[name].get("layers", (0,)))
    generator = torch.Generator().manual_seed(4)
    patches = torch.randn(2, GRID[0] * GRID[1], layers * VISION.hidden_size, generator=generator)
    weights = {key: value.detach().double() for key, value in honest.state_dict().items()}
    return distance(adapted(ours)(visual_input(patches, [GRID] * 2)).tokens, EQUATIONS[name](weights, patches.double()))


@pytest.mark.parametrize("name", EQUATIONS)
def test_equals_its_equations(name: str) -> None:
    ours = made(name)
    assert difference(name, ours, ours) <= 1e-4


@pytest.mark.parametrize("queries", [1, 5])
def test_attention_pooling_of_many_patches_equals_its_equations(queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "MANY", 1)
    monkeypatch.setitem(OPTIONS, "attention_pooling", {"num_queries": queries, "num_heads": 2})
    ours = made("attention_pooling")
    assert difference("attention_pooling", ours, ours) <= 1e-4
    honest = copy.deepcopy(ours)
    ours.attention.value.bias = None
    assert difference("attention_pooling", ours, honest) > 1e-4


def replaced(path: str, value: Any) -> Callable[[Any], None]:
    """A submodule or attribute set to something else."""

    def fault(ours: Any) -> None:
        *parents, last = path.split(".")
        for parent in parents:
            ours = ours[int(parent)] if parent.isdigit() else getattr(ours, parent)
        setattr(ours, last, value)

    return fault


def turned(ours: Any) -> None:
    """The image mirrored along its diagonal."""
    honest = ours.forward
    height, width = GRID
    ours.forward = lambda patches, grid: honest(
        patches.unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2), grid
    )


def strided_first(ours: Any) -> None:
    ours.blocks[0], ours.blocks[1] = ours.blocks[1], ours.blocks[0]


def first_layer_queries(ours: Any) -> None:
    honest = ours.query.forward
    ours.query.forward = lambda x: honest(x.roll(1, 1))


def values_with_positions(ours: Any) -> None:
    attention, seen = ours.resampler.attention, []
    keys, values = attention.keys, attention.values
    attention.keys = lambda memory: keys(seen.append(memory) or memory)
    attention.values = lambda memory: values(seen[-1])


def turned_in(ours: Any) -> None:
    """The same, of the images that come in."""
    honest = ours._read
    height, width = GRID
    ours._read = lambda patches, grid, count: honest(
        patches.unflatten(1, (width, height)).transpose(1, 2).flatten(1, 2), grid, count
    )


FAULTS = [
    ("minigpt_v2", turned),
    ("minigpt_v2", replaced("project.bias", None)),
    ("average_pool", replaced("side", 4)),
    ("average_pool", replaced("project.activation", gelu_tanh)),
    ("average_pool", turned),
    ("c_abstractor", replaced("after", nn.Identity())),
    ("c_abstractor", replaced("before.0.shortcut.1", nn.Identity())),
    ("c_abstractor", replaced("before.1.excite", nn.Identity())),
    ("c_abstractor", replaced("before.0.excite.gate", F.hardsigmoid)),
    ("c_abstractor", replaced("before.0.excite.activation", F.relu)),
    ("c_abstractor", replaced("after.0.depthwise_norm", nn.Identity())),
    ("c_abstractor", replaced("project.activation", F.gelu)),
    ("c_abstractor", turned),
    ("ldp", strided_first),
    ("ldp", replaced("blocks.0.residual", False)),
    ("ldp", replaced("blocks.1.excite.gate", torch.sigmoid)),
    ("ldp", replaced("blocks.0.excite.activation", F.silu)),
    ("ldp", replaced("blocks.1.pointwise_norm", nn.Identity())),
    ("ldp", turned),
    ("ldp_v2", replaced("positions", nn.Identity())),
    ("ldp_v2", replaced("positions.bias", None)),
    ("ldp_v2", replaced("project.activation", F.silu)),
    ("token_packer", replaced("factor", 1)),
    ("token_packer", first_layer_queries),
    ("token_packer", replaced("value_norm", nn.Identity())),
    ("token_packer", replaced("query_norm", nn.Identity())),
    ("token_packer", turned),
    ("qwen_vl", values_with_positions),
    ("qwen_vl", replaced("norm", nn.Identity())),
    ("qwen_vl", replaced("resampler.query_norm", nn.Identity())),
    ("qwen_vl", turned),
    ("attention_pooling", replaced("query_norm", nn.Identity())),
    ("attention_pooling", replaced("memory_norm", nn.Identity())),
    ("matryoshka", replaced("sides", (4, 1))),
    ("matryoshka", replaced("project.activation", F.silu)),
    ("mqt", replaced("key_norm", nn.Identity())),
    ("mqt", replaced("query_norm", nn.Identity())),
    ("mqt", turned_in),
]


@pytest.mark.parametrize(("name", "fault"), FAULTS)
def test_the_comparison_sees(name: str, fault: Callable[[Any], None]) -> None:
    ours, honest = made(name), made(name)
    fault(ours)
    try:
        found = difference(name, ours, honest)
    except RuntimeError:  # another number of tokens
        return
    assert found > 1e-4


@pytest.mark.parametrize(
    ("name", "options", "counted"),
    [
        ("vip_llava", {}, 37.8),
        ("minigpt_v2", {}, 16.8),
        ("average_pool", {}, 21.0),
        ("c_abstractor", {}, 36.8 + 0.6),  # and its positions
        ("ldp", {}, 71.4),
        ("ldp_v2", {}, 21.0),
        ("token_packer", {}, 36.7),
        ("internvl", {}, 33.57),
        ("qwen2_vl", {}, 33.56),
        ("idefics2", {}, 739.5),
        ("gemma3", {}, 4.2),
        ("idefics3", {"factor": 2}, 16.8),
        ("idefics3", {"factor": 3}, 37.7),
        ("idefics3", {"factor": 4}, 67.1),
        ("ovis", {}, 671.4),
        ("qwen_vl", {}, 72.4 + 16.8),  # and its projection
        ("matryoshka", {}, 21.0),
        ("mqt", {}, 8.7),
        ("d_abstractor", {}, 56.0),
    ],
)
def test_default_sizes_are_the_counted_ones(name: str, options: dict[str, Any], counted: float) -> None:
    with torch.device("meta"):
        connector = create(name, options, CLIP_L, MISTRAL)
    assert sum(p.numel() for p in connector.parameters()) / 1e6 == pytest.approx(counted, abs=0.06)


def with_budget(name: str, budget: int | None, grids: list[tuple[int, int]], training: bool = False) -> list[int]:
    """The slots of each image, after it was seen that its tokens fit them, and are those that no budget gives."""
    ours = made(name)
    generator = torch.Generator().manual_seed(5)
    most = max(height * width for height, width in grids)
    visual = visual_input(torch.randn(len(grids), most, VISION.hidden_size, generator=generator), grids)
    visual.layouts = tuple(ImageLayout((grid,), token_budget=budget) for grid in grids)
    counts = [ours.num_tokens(layout) for layout in visual.layouts]
    found = ours.train(training)(visual)
    assert training or found.mask.sum(1).tolist() == counts
    return counts if not training else found.mask.sum(1).tolist()


@pytest.mark.parametrize(
    ("name", "budget", "counts"),
    [
        ("matryoshka", None, [9, 6]),
        ("matryoshka", 8, [4, 6]),
        ("matryoshka", 5, [4, 4]),
        ("matryoshka", 1, [1, 1]),
        ("mqt", None, [9, 9]),
        ("mqt", 4, [4, 4]),
        ("mqt", 100, [9, 9]),
    ],
)
def test_a_budget_decides_how_many_tokens(name: str, budget: int | None, counts: list[int]) -> None:
    assert with_budget(name, budget, [(4, 6), (4, 2)]) == counts


@pytest.mark.parametrize(("name", "possible"), [("matryoshka", {9, 4, 1}), ("mqt", {2, 4, 6, 8})])
def test_training_meets_every_number_of_tokens(name: str, possible: set[int]) -> None:
    torch.manual_seed(0)
    assert {with_budget(name, None, [(4, 6)], training=True)[0] for _ in range(60)} == possible


def test_the_first_queries_are_the_same_with_fewer() -> None:
    ours = made("mqt")
    visual = visual_input(torch.randn(1, 24, VISION.hidden_size), [GRID])
    every = ours(visual).tokens
    visual.layouts = (ImageLayout((GRID,), token_budget=4),)
    assert distance(ours(visual).tokens, every[:, :4]) <= 1e-5


def prumerge(w: Weights, x: Tensor, attention: Tensor, neighbours: int) -> list[Tensor]:
    """LLaVA-PruMerge, patch by patch."""
    images = []
    for patches, seen in zip(x, attention, strict=True):
        first, third = np.quantile(seen.numpy(), [0.25, 0.75])
        kept = max(1, sum(value > third + 1.5 * (third - first) for value in seen.tolist()))
        order = sorted(range(len(seen)), key=lambda place: -seen[place])
        tokens = []
        for place in order[:kept]:
            others = [other for other in range(len(seen)) if other != place]
            others.sort(key=lambda other: -F.cosine_similarity(patches[place], patches[other], dim=0))
            tokens.append(patches[place] + sum(seen[other] * patches[other] for other in others[:neighbours]))
        tokens.append(torch.stack([seen[place] * patches[place] for place in order[kept:]]).sum(0))
        images.append(mlp(torch.stack(tokens), w, "project"))
    return images


def test_prumerge_equals_its_algorithm_where_images_keep_different_numbers() -> None:
    ours = create("prumerge", {"num_neighbours": 3})
    rescale(ours)
    patches = torch.randn(3, 24, VISION.hidden_size, generator=torch.Generator().manual_seed(6))
    attention = torch.rand(3, 24, generator=torch.Generator().manual_seed(7)) / 24
    attention[0, [3, 20]] = torch.tensor([0.4, 0.3])
    attention[1, [0, 7, 8, 11]] = torch.tensor([0.2, 0.25, 0.3, 0.1])
    visual = visual_input(patches, [GRID] * 3)
    heads = attention[:, None] + torch.tensor([0.01, -0.01])[:, None]
    visual.maps[0].cls_attention = heads  # the heads' mean is what counts
    found = ours(visual)
    weights = {key: value.detach().double() for key, value in ours.state_dict().items()}
    expected = prumerge(weights, patches.double(), attention.double(), 3)
    assert found.mask.sum(1).tolist() == [len(tokens) for tokens in expected] == [3, 5, 2]
    for tokens, mask, want in zip(found.tokens, found.mask, expected, strict=True):
        assert distance(tokens[mask], want) <= 1e-4
    assert max(found.mask.sum(1)) <= ours.num_tokens(visual.layouts[0])


def test_minigpt4_trains_its_projection_alone() -> None:
    with torch.device("meta"):
        connector = create("minigpt4", {}, CLIP_L, MISTRAL)
    assert num_trainable(connector) / 1e6 == pytest.approx(3.15, abs=0.01)
    assert {name for name, value in connector.named_parameters() if value.requires_grad} == {
        "project.weight",
        "project.bias",
    }
