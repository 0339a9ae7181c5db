"""The Triton kernels of `splice_rows` under the interpreter, outputs poisoned."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_splice import INDEXES, TOLERANCE, check, inputs, with_gradients
from vlmzoo.kernels import _splice_triton
from vlmzoo.kernels.splice import splice_rows

OPS = torch.ops.vlmzoo
TILE_OF_DIM = _splice_triton.tile


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Deterministic algorithms fill fresh memory with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the edges that large inputs have."""
    monkeypatch.setattr(_splice_triton, "tile", lambda dim: {"tile_rows": 4, "tile_cols": 4})


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", INDEXES)
def test_equals_the_oracle(name: str, dtype: torch.dtype) -> None:
    check("triton", *inputs(INDEXES[name], dtype))


@pytest.mark.parametrize("dim", [1, 3, 64, 136])
def test_tiles_fit_any_dim(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_splice_triton, "tile", TILE_OF_DIM)
    embeds, rows, index = inputs(INDEXES["one row several times"], torch.float32, dim=dim)
    check("triton", embeds, rows, index)
    check("triton", embeds, rows, index.int())


def test_a_tile_is_whole_and_wastes_little() -> None:
    for dim in (1, 64, 127, 896, 1536, 3584, 4096, 5120):
        tile = TILE_OF_DIM(dim)
        assert tile["tile_rows"] * tile["tile_cols"] == _splice_triton.TILE
        assert dim < 128 or dim % tile["tile_cols"] == 0


@pytest.mark.parametrize("rows_dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_rows_of_another_type_are_cast(dtype: torch.dtype, rows_dtype: torch.dtype) -> None:
    for name in ("in order", "one row several times"):
        check("triton", *inputs(INDEXES[name], dtype, rows_dtype))


@pytest.mark.parametrize(("dtype", "rows_dtype"), [(torch.bfloat16, torch.float32), (torch.float16, torch.bfloat16)])
def test_casts_to_bfloat16(dtype: torch.dtype, rows_dtype: torch.dtype) -> None:
    """To its last bit only: the interpreter cuts off where devices round."""
    embeds, rows, index = inputs(INDEXES["in order"], dtype, rows_dtype)
    got = with_gradients(splice_rows(embeds, rows, index, backend="triton"), embeds, rows)
    want = with_gradients(splice_rows(embeds, rows, index, backend="torch"), embeds, rows)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=0)


def test_gradients_are_those_of_finite_differences() -> None:
    embeds, rows, index = inputs([[3, -1, 3], [-1, 1, -1]], dim=1)
    assert torch.autograd.gradcheck(lambda a, b: splice_rows(a, b, index, backend="triton"), (embeds, rows))


def test_strides_do_not_matter() -> None:
    embeds, rows, index = inputs(INDEXES["in order"], dim=6)
    want = with_gradients(splice_rows(embeds, rows, index, backend="torch"), embeds, rows)
    spread = (
        embeds.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([rows, rows], -1)[..., :6],
        index.T.contiguous().T,
    )
    across = (embeds.mT.contiguous().mT, rows.mT.contiguous().mT, torch.stack([index, index], -1)[..., 0])
    for strided in (spread, across):
        assert not strided[0].is_contiguous()
        got = with_gradients(splice_rows(*strided, backend="triton"), embeds, rows)
        assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    one_sample = inputs(INDEXES["in order"])
    out = splice_rows(one_sample[0][:1].expand(2, -1, -1), *one_sample[1:], backend="triton")
    assert torch.equal(out, splice_rows(one_sample[0][:1].expand(2, -1, -1), *one_sample[1:], backend="torch"))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 1, 3), (2, 1, 1), (2, 7, 1)], ids=str)
def test_a_gradient_whose_strides_are_0(sizes: tuple[int, int, int]) -> None:
    embeds, rows, index = inputs(INDEXES["in order"], dim=3)
    slope = torch.randn(sizes, dtype=torch.float64).expand(embeds.shape)
    got, want = (
        torch.autograd.grad(splice_rows(embeds, rows, index, backend=backend), (embeds, rows), slope)
        for backend in ("triton", "torch")
    )
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_only_the_gradient_that_is_wanted() -> None:
    embeds, rows, index = inputs(INDEXES["one row several times"])
    _, of_embeds, of_rows = with_gradients(splice_rows(embeds, rows, index, backend="triton"), embeds, rows)
    gradient = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(7)).to(embeds)
    for for_embeds, for_rows in ((True, False), (False, True), (False, False)):
        got = OPS.splice_rows_backward(gradient, index, 4, torch.float64, for_embeds, for_rows)
        assert torch.equal(got[0], of_embeds[:, : of_embeds.shape[1] * for_embeds])
        assert torch.equal(got[1], of_rows[:, : 4 * for_rows])
    frozen = splice_rows(embeds.detach(), rows, index, backend="triton")
    assert torch.equal(with_gradients(frozen, rows)[1], of_rows)
    untrained = splice_rows(embeds, rows.detach(), index, backend="triton")
    assert torch.equal(with_gradients(untrained, embeds)[1], of_embeds)


def test_nothing_to_do() -> None:
    embeds, rows, index = inputs(INDEXES["text only"])
    for batch, length, slots, dim in ((0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0)):
        parts = embeds[:batch, :length, :dim], rows[:batch, :slots, :dim], index[:batch, :length]
        out, of_embeds, of_rows = with_gradients(splice_rows(*parts, backend="triton"), embeds, rows)
        assert torch.equal(out, parts[0])
        assert of_embeds[:batch, :length, :dim].all()
        assert not of_rows.any()


def test_a_slot_that_there_is_not_gives_nan_and_no_gradient() -> None:
    embeds, rows, _ = inputs(INDEXES["text only"])
    index = torch.tensor([[-1, 4, 3], [7, 1 << 40, -1]])
    out, of_embeds, of_rows = with_gradients(splice_rows(embeds, rows, index, backend="triton"), embeds, rows)
    assert torch.equal(out.isnan().all(-1), index >= 4)
    assert torch.equal(out.isnan().any(-1), index >= 4)
    assert torch.equal(of_embeds.any(-1), index < 0)
    assert of_rows.any(-1).nonzero().tolist() == [[0, 3]]


def test_offsets_beyond_32_bits(tmp_path: Path) -> None:
    """Strides below 2^31, offsets up to 2^32, in a file that is all hole but for a few pages."""
    storage = torch.from_file(str(tmp_path / "far"), shared=True, size=2**32 + 1024, dtype=torch.float16)
    (tmp_path / "far").unlink()
    far = storage.as_strided((3, 5, 8), (2**30, 2**29 + 16, 1)).copy_(torch.randn(3, 5, 8))
    near = far.clone()
    index = torch.tensor([[-1, 3, -1, -1, 4], [4, -1, 2, 3, -1], [-1, 2, 0, -1, 2]])
    rows = torch.randn(3, 5, 8).half()
    for one, other in (((far, rows), (near, rows)), ((rows, far), (rows, near))):
        assert torch.equal(splice_rows(*one, index, backend="triton"), splice_rows(*other, index, backend="torch"))
    got, want = (OPS.splice_rows_backward(each, index, 5, torch.float16, True, True) for each in (far, near))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_the_ops_are_sound() -> None:
    embeds, rows, index = inputs(INDEXES["one row several times"], torch.float32)
    torch.library.opcheck(OPS.splice_rows.default, (embeds, rows, index))
    torch.library.opcheck(OPS.splice_rows.default, (embeds.detach(), rows.double(), index.int()))
    for wanted in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(OPS.splice_rows_backward.default, (embeds.detach(), index, 4, torch.float16, *wanted))


def test_compiles_whole() -> None:
    embeds, rows, index = inputs(INDEXES["one row several times"], torch.float32)
    compiled = torch.compile(splice_rows, fullgraph=True, backend="aot_eager")
    got = with_gradients(compiled(embeds, rows, index, backend="triton"), embeds, rows)
    want = with_gradients(splice_rows(embeds, rows, index, backend="triton"), embeds, rows)
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_auto_leaves_the_cpu_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Tensor:
        raise AssertionError("Triton ran")

    monkeypatch.setattr(_splice_triton, "forward", never)
    splice_rows(*inputs(INDEXES["in order"]))
    with pytest.raises(AssertionError, match="Triton ran"):
        splice_rows(*inputs(INDEXES["in order"]), backend="triton")


def other_rows(honest: Callable, embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return honest(embeds, rows.flip(1), index)


def first_left_as_text(honest: Callable, embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    return honest(embeds, rows, index.masked_fill(index == 0, -1))


def last_token_unwritten(honest: Callable, embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    out = embeds.new_empty(embeds.shape)
    out[:, :-1] = honest(embeds[:, :-1], rows, index[:, :-1])
    return out


def image_gradient_in_embeds(honest: Callable, gradient: Tensor, index: Tensor, of_embeds: Tensor, of_rows: Tensor):
    honest(gradient, index, of_embeds, of_rows)
    of_embeds.copy_(gradient)


def one_slot_short(honest: Callable, gradient: Tensor, index: Tensor, of_embeds: Tensor, of_rows: Tensor):
    part = of_rows[:, :-1].contiguous()
    honest(gradient, index, of_embeds, part)
    of_rows[:, :-1] = part


def last_reader_only(honest: Callable, gradient: Tensor, index: Tensor, of_embeds: Tensor, of_rows: Tensor):
    again = (index[:, :, None] == index[:, None]).triu(1).any(-1)
    honest(gradient, index.masked_fill(again, -1), gradient.new_empty(len(index), 0, gradient.shape[-1]), of_rows)
    honest(gradient, index, of_embeds, of_rows.new_empty(len(index), 0, gradient.shape[-1]))


@pytest.mark.parametrize(
    ("place", "fault", "name"),
    [
        ("forward", other_rows, "in order"),
        ("forward", first_left_as_text, "in order"),
        ("forward", last_token_unwritten, "in order"),
        ("backward", image_gradient_in_embeds, "in order"),
        ("backward", one_slot_short, "in order"),
        ("backward", last_reader_only, "one row several times"),
    ],
)
def test_the_comparison_sees_planted_faults(
    place: str, fault: Callable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = getattr(_splice_triton, place)
    monkeypatch.setattr(_splice_triton, place, lambda *tensors: fault(honest, *tensors))
    with pytest.raises(AssertionError):
        check("triton", *inputs(INDEXES[name]))
