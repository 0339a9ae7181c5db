from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, Gemma3TextConfig, LlamaConfig, Qwen3Config

from vlmzoo.training.recompute import elementwise_recomputed

Recompute = Callable[[], AbstractContextManager[Any]]
SIZES = {"hidden_size": 16, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 50, "num_key_value_heads": 1, "head_dim": 8}


class Storages(TorchDispatchMode):
    """How many bytes made inside are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.held = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            self._know(value, count=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._know(value, count=True)
        return result

    def _know(self, value: Any, count: bool) -> None:
        if isinstance(value, Tensor) and value.untyped_storage()._cdata not in self._known:
            storage = value.untyped_storage()
            size = storage.nbytes() if count else 0
            self._known.add(storage._cdata)
            self.held += size
            weakref.finalize(storage, self._free, storage._cdata, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "clip":
        return AutoModel.from_config(CLIPVisionConfig(**SIZES, image_size=16, patch_size=4, hidden_act="quick_gelu"))
    config = {"llama": LlamaConfig, "gemma3": Gemma3TextConfig, "qwen3": Qwen3Config}[name](**TEXT)
    return AutoModelForCausalLM.from_config(config)


def forward(model: nn.Module, name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        if name == "clip":
            return model(torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)).last_hidden_state
        return model(torch.arange(24).view(2, 12), use_cache=False).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen3", "clip"])
def test_gradients_are_the_same_to_the_bit_with_less_kept(name: str, dtype: torch.dtype) -> None:
    def gradients(recompute: Recompute) -> tuple[list[Tensor], int]:
        model = model_of(name)
        with Storages() as storages:
            with recompute():
                loss = forward(model, name, dtype).float().square().sum()
            held = storages.held
        loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None], held

    (found, less), (expected, more) = gradients(elementwise_recomputed), gradients(nullcontext)
    assert len(found) == len(expected) > 10
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert less < more


def test_a_swiglu_layer_keeps_its_two_halves_alone() -> None:
    model = model_of("llama")
    layer, states = model.get_submodule("model.layers.0.mlp"), torch.randn(1, 3, 16, requires_grad=True)
    with Storages() as storages, elementwise_recomputed():
        result = layer(states)
    assert storages.held - result.untyped_storage().nbytes() == 4 * 3 * (40 + 40)


def test_a_norm_keeps_its_input_and_a_number_of_each() -> None:
    model = model_of("llama")
    layer, states = model.get_submodule("model.norm"), torch.randn(3, 16, requires_grad=True) * 1
    with Storages() as storages, elementwise_recomputed():
        result = layer(states)
    assert storages.held - result.untyped_storage().nbytes() == 4 * 3  # a root each


@pytest.fixture(params=["kept", "computed again"])
def changed(request: pytest.FixtureRequest) -> Iterator[tuple[Tensor, Tensor]]:
    """A result, and a tensor whose change its gradient does not survive."""
    with elementwise_recomputed():
        value, weight = (torch.randn(3, requires_grad=True) for _ in range(2))
        inner = value * 2
        product = inner * (weight * 2)
        yield (inner * weight if request.param == "kept" else product.exp() * product).sum(), inner


def test_a_tensor_changed_in_place_is_refused_as_torch_does(changed: tuple[Tensor, Tensor]) -> None:
    result, inner = changed
    with torch.no_grad():
        inner += 1
    with pytest.raises(RuntimeError, match="changed in place"):
        result.backward()


def test_a_second_derivative() -> None:
    value, weight = (torch.linspace(-1, 2, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def product(value: Tensor, weight: Tensor) -> Tensor:
        with elementwise_recomputed():
            gated = nn.functional.silu(value.sin()) * weight.cos()
            return gated * gated.exp()

    assert torch.autograd.gradgradcheck(product, (value, weight))


def test_weights_are_not_asked_for_before_their_turn() -> None:
    """Shards are gathered module by module in the backward pass: a product with one is kept."""
    weight, states = nn.Parameter(torch.randn(4)), torch.randn(3, 4, requires_grad=True) * 1
    matrix = torch.randn(4, 4, requires_grad=True)
    with elementwise_recomputed():
        result = (states * weight) @ matrix
    kept = weight.data
    weight.data = torch.empty(0)  # as ZeRO-3 does
    (gradient,) = torch.autograd.grad(result.sum(), matrix)
    torch.testing.assert_close(gradient, (states * kept).sum(0)[:, None].expand(4, 4))


def test_a_part_of_a_product_is_that_part() -> None:
    left, right = (torch.randn(4, 6, requires_grad=True) for _ in range(2))

    def gradients(recompute: Recompute) -> tuple[Tensor, ...]:
        with recompute():
            result = ((left * 2) * (right * 3))[1:, ::2].T.exp2() * (left * right).view(3, 8)[:, 2:5]
            result = result * ((left * 2) * (right * 3))[1:, ::2].T
        return torch.autograd.grad(result.sum(), (left, right))

    for found, expected in zip(gradients(elementwise_recomputed), gradients(nullcontext), strict=True):
        assert torch.equal(found, expected)
