from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vlmzoo.language.loss import summed_cross_entropy


def rows(count: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(count, 40, generator=generator, dtype=torch.float64)
    labels = torch.randint(40, (count,), generator=generator)
    return logits.to(dtype).requires_grad_(), labels


@pytest.mark.parametrize("count", [0, 1, 9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_cross_entropy(count: int, dtype: torch.dtype) -> None:
    logits, labels = rows(count, dtype)
    exact = logits.detach().double().requires_grad_()
    found, expected = summed_cross_entropy(logits, labels), F.cross_entropy(exact, labels, reduction="sum")
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    for loss in (found / 7, expected / 7):
        loss.backward(retain_graph=True)
        loss.backward()  # as often as it is asked
    assert logits.grad is not None
    assert exact.grad is not None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-3}[dtype]
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=0, atol=tolerance)


def test_it_can_be_differentiated_twice() -> None:
    logits, labels = rows(3, torch.float64)
    assert torch.autograd.gradcheck(lambda logits: summed_cross_entropy(logits, labels), (logits,))
    assert torch.autograd.gradgradcheck(lambda logits: summed_cross_entropy(logits, labels), (logits,))


def test_backward_makes_one_tensor_like_the_logits() -> None:
    logits, labels = rows(9, torch.float32)
    made: set[int] = set()

    class Made(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == logits.shape:
                kept.append(result)
                made.add(result.untyped_storage().data_ptr())
            return result

    kept: list[Tensor] = []  # so that no address is used twice
    loss = summed_cross_entropy(logits, labels)
    with Made():
        torch.autograd.grad(loss, logits)
    assert len(made) == 1
