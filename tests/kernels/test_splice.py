"""`splice_rows` by torch's operations against the oracle, and what the model's splice does by it."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels import oracle
from vlmzoo.kernels import splice
from vlmzoo.kernels._device import obstacle
from vlmzoo.kernels.splice import splice_rows
from vlmzoo.splice import VisualContext
from vlmzoo.splice import splice as splice_visual

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
TEXT_ONLY = [[-1, -1, -1], [-1, -1, -1]]
INDEXES = {
    "in order": [[-1, 0, 1, 2, -1, -1, 3], [0, 1, -1, -1, 2, -1, -1]],
    "any order, rows left over": [[3, -1, 0], [-1, 1, -1]],
    "one row several times": [[2, 2, -1, 0, 2, -2], [3, -1, 3, 3, 3, 3]],
    "text only": TEXT_ONLY,
    "image only": [[0, 1, 2, 3], [3, 2, 1, 0]],
}


def inputs(
    index: list[list[int]], dtype: torch.dtype = torch.float64, rows_dtype: torch.dtype | None = None, dim: int = 5
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(index[0]))
    embeds = torch.randn(len(index), len(index[0]), dim, generator=generator).to(dtype)
    rows = torch.randn(len(index), 4, dim, generator=generator).to(rows_dtype or dtype)
    return embeds.requires_grad_(), rows.requires_grad_(), torch.tensor(index)


def with_gradients(output: Tensor, *leaves: Tensor) -> list[Tensor]:
    slope = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    return [output, *torch.autograd.grad(output, leaves, slope, materialize_grads=True)]


def check(backend: str, embeds: Tensor, rows: Tensor, index: Tensor) -> None:
    """Output and gradient of embeds are the oracle's to the bit; that of rows where it is no sum of several tokens'."""
    got = with_gradients(splice_rows(embeds, rows, index, backend=backend), embeds, rows)
    want = with_gradients(oracle.splice_rows(embeds, rows, index), embeds, rows)
    exact = with_gradients(oracle.splice_rows(embeds.double(), rows.double(), index), embeds, rows)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert got[2].dtype == rows.dtype
    several = any(line[line >= 0].unique(return_counts=True)[1].gt(1).any() for line in index)
    if several:
        tolerance = max(TOLERANCE[embeds.dtype], TOLERANCE[rows.dtype])
        assert (got[2].double() - exact[2].double()).norm() <= tolerance * exact[2].double().norm()
    else:
        assert torch.equal(got[2], want[2])


@pytest.mark.parametrize("rows_dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", INDEXES)
def test_equals_the_oracle(name: str, dtype: torch.dtype, rows_dtype: torch.dtype) -> None:
    check("auto", *inputs(INDEXES[name], dtype, rows_dtype))


def test_gradients_are_those_of_finite_differences() -> None:
    embeds, rows, index = inputs(INDEXES["one row several times"])
    assert torch.autograd.gradcheck(lambda a, b: splice_rows(a, b, index), (embeds, rows))


def test_without_slots_nothing_changes() -> None:
    embeds, rows, index = inputs(TEXT_ONLY)
    out, of_embeds, of_rows = with_gradients(splice_rows(embeds, rows[:, :0], index), embeds, rows)
    assert torch.equal(out, embeds)
    assert of_embeds.all()
    assert not of_rows.any()


def test_a_slot_that_there_is_not_is_refused() -> None:
    embeds, rows, _ = inputs(TEXT_ONLY)
    with pytest.raises(RuntimeError, match="out of bounds"):
        splice_rows(embeds, rows, torch.tensor([[-1, 4, -1], [-1, -1, -1]]))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_models_splice_is_gather_and_where_to_the_bit(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 6, 16, generator=generator).to(dtype).requires_grad_()
    tokens = torch.randn(2, 4, 16, generator=generator).requires_grad_()
    is_image = torch.tensor([[0, 1, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1]]).bool()
    filled = torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0]]).bool()
    none = torch.zeros(2, 4, dtype=torch.long)
    visual = VisualContext(tokens, filled, none, none, num_slots=torch.tensor([3, 2]))
    slot = visual.slot_of_token(is_image)
    out, unfilled = splice_visual(embeds, visual, is_image, slot)
    taken = tokens.gather(1, slot.clamp(min=0)[..., None].expand(-1, -1, 16)).to(dtype)
    want = torch.where(is_image[..., None], taken, embeds)
    for one, other in zip(with_gradients(out, embeds, tokens), with_gradients(want, embeds, tokens), strict=True):
        assert torch.equal(one, other)
    assert unfilled.nonzero().tolist() == [[0, 2]]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiles_whole_and_runs_on_meta(backend: str) -> None:
    embeds, rows, index = inputs(INDEXES["in order"], torch.float32)
    compiled = torch.compile(splice_rows, fullgraph=True, backend="aot_eager")
    want = with_gradients(splice_rows(embeds, rows, index), embeds, rows)
    for one, other in zip(
        with_gradients(compiled(embeds, rows, index, backend=backend), embeds, rows), want, strict=True
    ):
        assert torch.equal(one, other)
    assert splice_rows(embeds.to("meta"), rows.to("meta"), index.to("meta"), backend=backend).shape == embeds.shape


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"backend": "cuda"}, "unknown splice backend 'cuda'; valid: auto, torch, triton"),
        ({"embeds": torch.zeros(3, 5)}, r"embeds must be \(batch, length, dim\), got \(3, 5\)"),
        ({"rows": torch.zeros(6, 5)}, r"rows must be \(2, slots, 5\), got \(6, 5\)"),
        ({"rows": torch.zeros(2, 4, 6)}, r"rows must be \(2, slots, 5\), got \(2, 4, 6\)"),
        ({"rows": torch.zeros(1, 4, 5)}, r"rows must be \(2, slots, 5\), got \(1, 4, 5\)"),
        ({"index": torch.zeros(2, 4).long()}, r"index must be int32 or int64 \(2, 3\), got torch.int64 \(2, 4\)"),
        ({"index": torch.zeros(2, 3)}, r"index must be int32 or int64 \(2, 3\), got torch.float32 \(2, 3\)"),
        ({"rows": torch.zeros(2, 4, 5).long()}, "must be floating point, got torch.float32 and torch.int64"),
    ],
)
def test_refuses_in_one_line(change: dict[str, Any], says: str) -> None:
    whole = {"embeds": torch.zeros(2, 3, 5), "rows": torch.zeros(2, 4, 5), "index": torch.zeros(2, 3).long()}
    with pytest.raises(ValueError, match=says) as refusal:
        splice_rows(**{**whole, **change})
    assert "\n" not in str(refusal.value)


def test_triton_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice, "obstacle", lambda device: f"no {device.type} today")
    with pytest.raises(ValueError, match="splice backend 'triton' cannot run here: no cpu today"):
        splice_rows(*inputs(TEXT_ONLY), backend="triton")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_triton_on_the_device_equals_the_oracle() -> None:
    device = torch.device("cuda")
    assert obstacle(device) is None
    for dim, dtype, rows_dtype in itertools.product((5, 896, 1536), TOLERANCE, TOLERANCE):
        for index in INDEXES.values():
            check("triton", *(tensor.to(device) for tensor in inputs(index, dtype, rows_dtype, dim)))
