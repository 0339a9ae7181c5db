"""Layers inside an unmodified decoder: hooks that keep no state, and a call that carries all of it.

Each decoder layer gets one pre-hook that knows nothing but its index. What runs there travels with the call as a
keyword argument, so two models over one decoder, threads, nested calls and the recomputation of a checkpointed layer
(which may run the hooks again, with the arguments of then) each meet their own layers and memory, and nobody else's.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmzoo.connector import InLLMLayer, LayerContext
from vlmzoo.language.packing import Packing

ARGUMENT = "in_llm"
_current = threading.local()  # the last decoder layer's call, from its pre-hook to its post-hook


@dataclass
class InLLMCall:
    """What runs inside the decoder during one forward."""

    layers: Mapping[int, Sequence[InLLMLayer]]
    context: LayerContext
    additions: Mapping[int, Tensor]  # layer -> like the hidden states, zero but at visual positions
    packing: Packing | None = None  # the hidden states are packed, context and in-LLM layers are not
    rows: Tensor | None = None  # all that is wanted of the last layer's hidden states, flattened: (rows,)
    reached: set[int] = field(default_factory=set)

    def places(self) -> set[int]:
        return set(self.layers) | set(self.additions)

    def run(self, index: int, hidden: Tensor) -> Tensor:
        self.reached.add(index)
        if index in self.additions:
            hidden = hidden + self.additions[index].to(hidden.dtype)
        if layers := self.layers.get(index, ()):
            hidden = hidden if self.packing is None else self.packing.unpack(hidden)
            for layer in layers:
                hidden = layer(hidden, self.context)
            hidden = hidden if self.packing is None else self.packing.pack(hidden)
        return hidden

    def end(self, index: int, hidden: Tensor) -> Tensor:
        """Behind the last layer: (1, rows, text_dim) where rows are wanted."""
        hidden = self.run(index, hidden)
        return hidden if self.rows is None else take_rows(hidden, self.rows)


def take_rows(values: Tensor, rows: Tensor) -> Tensor:
    """(batch, length, dim) -> (1, rows, dim)."""
    return values.flatten(0, 1).index_select(0, rows)[None]


def decoder_layers(language: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers of a causal LM, whatever its family calls them.

    Raises:
        ValueError: no list of as many layers as the configuration names.
    """
    count = language.config.get_text_config().num_hidden_layers
    for child in language.get_decoder().children():
        if isinstance(child, nn.ModuleList) and len(child) == count:
            return child
    raise ValueError(f"{type(language).__name__}: found no list of its {count} decoder layers")


@contextmanager
def compiled(language: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """An LLM whose decoder layers are compiled inside, one by one, for any length; what stands between them is not."""
    layers = list(decoder_layers(language)) if enabled else []
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class has it still


def attach(language: PreTrainedModel) -> None:
    """Puts the hooks on a decoder, once; they do nothing in calls that carry no `InLLMCall`."""
    layers = decoder_layers(language)
    for index, layer in enumerate(layers):
        if not any(isinstance(hook, partial) and hook.func is _before for hook in layer._forward_pre_hooks.values()):
            layer.register_forward_pre_hook(partial(_before, index, index == len(layers) - 1), with_kwargs=True)
            if index == len(layers) - 1:
                layer.register_forward_hook(partial(_after, len(layers)), always_call=True)


def check_reached(call: InLLMCall, language: PreTrainedModel) -> None:
    """Raises where a decoder did not hand the call to its layers: their result would silently be missing."""
    if missing := call.places() - call.reached:
        raise ValueError(
            f"{type(language).__name__} has no place for in-LLM layers before decoder layers {sorted(missing)}: "
            f"it has {len(decoder_layers(language))} and must hand keyword arguments on to them"
        )


def _before(index: int, last: bool, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
    call: InLLMCall | None = kwargs.pop(ARGUMENT, None)
    if last:
        _current.call = call
    if call is not None:
        if args:
            args = (call.run(index, args[0]), *args[1:])
        else:
            kwargs["hidden_states"] = call.run(index, kwargs["hidden_states"])
    return args, kwargs


def _after(index: int, module: nn.Module, args: tuple, output: Any) -> Any:
    call, _current.call = getattr(_current, "call", None), None
    if call is None or output is None:  # None: the layer raised
        return output
    if isinstance(output, torch.Tensor):
        return call.end(index, output)
    return (call.end(index, output[0]), *output[1:])
