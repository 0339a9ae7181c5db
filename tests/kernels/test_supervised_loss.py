"""`supervised_loss` against the cross-entropy of all logits, in float64: value, gradients, work and memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from vlmzoo.kernels import supervised_loss as module
from vlmzoo.kernels.supervised_loss import supervised_loss

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
BATCH, LENGTH, DIM, VOCAB = 3, 9, 8, 21
ROW = 4 * VOCAB  # bytes of one row's logits


def inputs(dtype: torch.dtype = torch.float64, share: float = 0.5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    sizes = {"hidden": (BATCH, LENGTH, DIM), "weight": (VOCAB, DIM), "bias": (VOCAB,)}
    found = {name: torch.randn(size, generator=generator).to(dtype).requires_grad_() for name, size in sizes.items()}
    labels = torch.randint(VOCAB, (BATCH, LENGTH), generator=generator)
    labels[torch.rand(BATCH, LENGTH, generator=generator) >= share] = -100
    return found | {"labels": labels}


def leaves(tensors: dict[str, Any]) -> list[Tensor]:
    return [tensor for tensor in tensors.values() if tensor.requires_grad]


def plain(hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None = None, ignore_index: int = -100):
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    return F.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)),
        labels.flatten(),
        reduction="sum",
        ignore_index=ignore_index,
    )


def error(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp(min=1e-30))


def check(tensors: dict[str, Any], tolerance: float = 1e-12, **options: Any) -> None:
    """Sum and gradients are those of all logits in float64."""
    exact = {
        name: tensor.detach().double().requires_grad_(tensor.requires_grad) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    want = plain(**exact)
    got = supervised_loss(**tensors, **options)
    assert error(got, want) <= tolerance
    slopes = torch.autograd.grad(got * 0.3, leaves(tensors))
    for leaf, slope, exactly in zip(
        leaves(tensors), slopes, torch.autograd.grad(want * 0.3, leaves(exact)), strict=True
    ):
        assert slope.dtype == leaf.dtype
        assert error(slope, exactly) <= 2 * tolerance


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 4, 1000])
def test_equals_the_cross_entropy_of_all_logits(dtype: torch.dtype, share: float, chunk_rows: int) -> None:
    check(inputs(dtype, share), TOLERANCE[dtype], chunk_bytes=chunk_rows * ROW)
    without_bias = {name: tensor for name, tensor in inputs(dtype, share).items() if name != "bias"}
    check(without_bias, TOLERANCE[dtype], chunk_bytes=chunk_rows * ROW)


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("bias",), ("weight", "bias"), ("hidden", "bias")])
def test_only_what_is_trained_has_a_gradient(frozen: tuple[str, ...]) -> None:
    tensors = inputs()
    for name in frozen:
        tensors[name].requires_grad_(False)
    check(tensors, chunk_bytes=4 * ROW)


def test_gradients_are_those_of_finite_differences() -> None:
    tensors = inputs()
    labels = tensors.pop("labels")

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return supervised_loss(hidden, weight, labels, bias=bias, num_items=7, chunk_bytes=4 * ROW)

    assert torch.autograd.gradcheck(loss, tuple(tensors.values()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_errs_no_more_than_the_plain_way_by_much(dtype: torch.dtype) -> None:
    tensors = inputs(dtype, 1.0)
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in tensors.items()}
    want = torch.autograd.grad(plain(**exact), leaves(exact))
    got = torch.autograd.grad(supervised_loss(**tensors, chunk_bytes=4 * ROW), leaves(tensors))
    eager = torch.autograd.grad(plain(**tensors), leaves(tensors))
    for one, other, exactly in zip(got, eager, want, strict=True):
        assert error(one, exactly) <= 2 * error(other, exactly)


@pytest.mark.parametrize("num_items", [8, torch.tensor(8)], ids=["int", "tensor"])
def test_is_a_float32_sum_over_a_given_number(num_items: int | Tensor) -> None:
    tensors = inputs(torch.bfloat16)
    whole, part = supervised_loss(**tensors), supervised_loss(**tensors, num_items=num_items)
    assert whole.dtype == part.dtype == torch.float32
    assert whole.shape == ()
    assert torch.equal(part, whole / 8)
    (slope,), (whole_slope,) = (torch.autograd.grad(loss, tensors["hidden"]) for loss in (part, whole))
    assert torch.equal(slope, whole_slope / 8)


def test_without_targets_the_loss_and_its_gradients_are_0() -> None:
    tensors = inputs(share=0.0)
    loss = supervised_loss(**tensors, num_items=5)
    assert float(loss.detach()) == 0
    gradients = torch.autograd.grad(loss, leaves(tensors))
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves(tensors)]
    assert not any(gradient.any() for gradient in gradients)


def test_rows_may_be_given_and_be_too_many() -> None:
    tensors = inputs()
    want = supervised_loss(**tensors)
    slopes = torch.autograd.grad(want, leaves(tensors))
    supervised = (tensors["labels"].flatten() != -100).nonzero()[:, 0]
    ignored = (tensors["labels"].flatten() == -100).nonzero()[:, 0]
    with torch.no_grad():
        tensors["hidden"].flatten(0, 1)[ignored[0]] = torch.nan
    for rows in (supervised, torch.cat([ignored[:1], supervised, ignored[:1]])):
        got = supervised_loss(**tensors, rows=rows, chunk_bytes=4 * ROW)
        torch.testing.assert_close(got, want)
        for one, other in zip(torch.autograd.grad(got, leaves(tensors)), slopes, strict=True):
            torch.testing.assert_close(one, other)


def test_another_label_may_be_the_ignored_one() -> None:
    tensors = inputs()
    tensors["labels"] = tensors["labels"].masked_fill(tensors["labels"] == -100, 3)
    check(tensors | {"labels": tensors["labels"]}, chunk_bytes=4 * ROW)
    want = plain(**tensors, ignore_index=3)
    torch.testing.assert_close(supervised_loss(**tensors, ignore_index=3), want)


def test_hidden_may_have_any_leading_axes_and_strides() -> None:
    tensors = inputs()
    want = supervised_loss(**tensors)
    flat = tensors | {"hidden": tensors["hidden"].flatten(0, 1), "labels": tensors["labels"].flatten()}
    assert torch.equal(supervised_loss(**flat), want)
    across = tensors | {"hidden": tensors["hidden"].mT.contiguous().mT, "weight": tensors["weight"].T.contiguous().T}
    torch.testing.assert_close(supervised_loss(**across), want)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation gave."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_more_logits_than_the_budget() -> None:
    hidden, weight = torch.randn(2, 64, 4, requires_grad=True), torch.randn(512, 4, requires_grad=True)
    labels = torch.randint(512, (2, 64))
    with Largest() as seen:
        supervised_loss(hidden, weight, labels, chunk_bytes=10 * 512 * 4 + 3).backward()
    assert seen.elements == 10 * 512
    with Largest() as seen:
        supervised_loss(hidden, weight, labels, chunk_bytes=1).backward()
    assert seen.elements == 512 * 4  # the weight, its gradient; a row of logits is less
    with Largest() as seen:
        plain(hidden, weight, labels).backward()
    assert seen.elements == 128 * 512


def test_multiplies_only_what_it_has_to() -> None:
    tensors = {name: tensor for name, tensor in inputs().items() if name != "bias"}
    product = 2 * int((tensors["labels"] != -100).sum()) * DIM * VOCAB

    def products() -> float:
        with FlopCounterMode(display=False) as counter:
            loss = supervised_loss(**tensors, chunk_bytes=4 * ROW)
            if loss.requires_grad:
                loss.backward()
        return counter.get_total_flops() / product

    assert products() == 3
    tensors["weight"].requires_grad_(False)
    assert products() == 2
    tensors["hidden"].requires_grad_(False)
    assert products() == 1
    for tensor in (tensors["weight"], tensors["hidden"]):
        tensor.requires_grad_()
    with torch.no_grad():
        assert products() == 1


@pytest.mark.parametrize("backward_inside", [False, True])
def test_under_autocast(backward_inside: bool) -> None:
    tensors = inputs(torch.float32, 1.0)
    exact = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in tensors.items()}
    want = torch.autograd.grad(plain(**exact), leaves(exact))
    with torch.autocast("cpu", torch.bfloat16):
        loss, eager = supervised_loss(**tensors, chunk_bytes=4 * ROW), plain(**tensors)
        if backward_inside:
            got, other = (torch.autograd.grad(each, leaves(tensors)) for each in (loss, eager))
    if not backward_inside:
        got, other = (torch.autograd.grad(each, leaves(tensors)) for each in (loss, eager))
    assert loss.dtype == torch.float32
    assert 1e-5 < error(loss, plain(**exact)) < 1e-2  # it did multiply in bfloat16
    for one, another, exactly in zip(got, other, want, strict=True):
        assert one.dtype == torch.float32
        assert error(one, exactly) <= 2 * error(another, exactly)


def test_the_weights_gradient_is_summed_in_float32() -> None:
    """Each of 4096 rows adds 2^-9 of the first one's: in bfloat16 none of them would be seen."""
    hidden = torch.full((4097, 1), 2.0**-9, dtype=torch.bfloat16)
    hidden[0] = 1
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4097, dtype=torch.long)
    (gradient,) = torch.autograd.grad(supervised_loss(hidden, weight, labels, chunk_bytes=8), weight)
    assert gradient.flatten().tolist() == [-4.5, 4.5]


def test_backward_runs_again_and_once_only() -> None:
    tensors = inputs()
    loss = supervised_loss(**tensors)
    first = torch.autograd.grad(loss, leaves(tensors), retain_graph=True)
    again = torch.autograd.grad(loss, leaves(tensors), retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, leaves(tensors), create_graph=True)


def test_inside_a_compiled_function() -> None:
    tensors = inputs(torch.float32)

    def whole(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return supervised_loss(hidden * 2, weight, labels, bias=bias, num_items=4) + 1

    compiled = torch.compile(whole, backend="aot_eager")
    for share in (0.5, 0.2, 0.9):
        tensors = inputs(torch.float32, share)
        got, want = compiled(**tensors), whole(**tensors)
        torch.testing.assert_close(got, want)
        for one, other in zip(
            torch.autograd.grad(got, leaves(tensors)), torch.autograd.grad(want, leaves(tensors)), strict=True
        ):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"hidden": torch.zeros(5)},
            r"hidden \(..., dim\) and labels \(...\) must go together, got \(5,\) and \(2, 3\)",
        ),
        ({"labels": torch.zeros(2, 4).long()}, r"must go together, got \(2, 3, 5\) and \(2, 4\)"),
        ({"labels": torch.zeros(2, 3).int()}, "labels must be torch.int64, got torch.int32"),
        ({"labels": torch.tensor([[0, 1, -100], [2, 7, 0]])}, "labels must be -100 or from 0 to 6, got 7"),
        ({"labels": torch.tensor([[0, 1, -100], [2, -1, 0]])}, "labels must be -100 or from 0 to 6, got -1"),
        ({"weight": torch.zeros(5, 7)}, r"weight must be \(vocab, 5\), got \(5, 7\)"),
        ({"weight": torch.zeros(7, 5).half()}, "weight must be torch.float32 as hidden is, got torch.float16"),
        ({"bias": torch.zeros(5)}, r"bias must be \(7,\), got \(5,\)"),
        ({"bias": torch.zeros(7).double()}, "bias must be torch.float32 as hidden is, got torch.float64"),
    ],
)
def test_refuses_in_one_line(change: dict[str, Any], says: str) -> None:
    whole = {"hidden": torch.zeros(2, 3, 5), "weight": torch.zeros(7, 5), "labels": torch.zeros(2, 3).long()}
    with pytest.raises(ValueError, match=says) as refusal:
        supervised_loss(**{**whole, **change})
    assert "\n" not in str(refusal.value)


def last_row_lost(honest: Callable, hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, *rest: Any) -> Tensor:
    return honest(hidden[:-1], weight, bias, labels[:-1], rest[0][:-1], rest[1])


def without_bias(honest: Callable, hidden: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> Tensor:
    return honest(hidden, weight, bias * 0, *rest)


def weight_by_half(honest: Callable, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return honest(hidden, (weight + weight.detach()) / 2, *rest)


@pytest.mark.parametrize("fault", [last_row_lost, without_bias, weight_by_half])
def test_the_comparison_sees_planted_faults(fault: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = module._sum
    monkeypatch.setattr(module, "_sum", lambda *tensors: fault(honest, *tensors))
    with pytest.raises(AssertionError):
        check(inputs())
