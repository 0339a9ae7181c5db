"""Weights in transformers' models and in ours, in both directions.

In a pattern `*` stands for a number and `**`, at its end, for the rest of a name.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig

from vlmzoo import build

Tensors = tuple[Tensor, ...]


def _unchanged(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Some weights of theirs and the same ones of ours, as many of each as the functions give and take.

    A rule without `ours` says that weights have no part in reading images and answering.
    """

    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    to_ours: Callable[[Tensors], Tensors] = _unchanged
    to_theirs: Callable[[Tensors], Tensors] = _unchanged


def same(theirs: str, ours: str) -> Rule:
    """The same weights under two names."""
    return Rule((theirs,), (ours,))


def copied(theirs: str, ours: str) -> Rule:
    """Weights that another rule names too: ours twice."""
    return Rule((theirs,), (ours,), lambda t: (t[0].clone(),))


def without_first(theirs: str, ours: str) -> Rule:
    """A parameter that has a first dimension of one in theirs."""
    return Rule((theirs,), (ours,), lambda t: (t[0].squeeze(0),), lambda t: (t[0].unsqueeze(0),))


def chunks(theirs: str, *ours: str) -> Rule:
    """One matrix or vector that is several of ours, one below the other."""
    return Rule((theirs,), ours, lambda t: t[0].chunk(len(ours)), lambda t: (torch.cat(t),))


def stacked(theirs: Mapping[str, int], ours: str) -> Rule:
    """Matrices of so many rows each that are one of ours, one below the other."""
    return Rule(tuple(theirs), (ours,), lambda t: (torch.cat(t),), lambda t: t[0].split(list(theirs.values())))


def dropped(theirs: str) -> Rule:
    """Weights of theirs that ours has no use for."""
    return Rule((theirs,), ())


def to_ours(weights: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Their weights under our names; all rules that fit a name apply, a later one's name wins.

    Raises:
        ValueError: a weight that no rule fits.
    """
    return _renamed(weights, [(rule.theirs, rule.ours, rule.to_ours) for rule in rules])


def to_theirs(weights: Mapping[str, Tensor], rules: Sequence[Rule]) -> dict[str, Tensor]:
    """Our weights under their names.

    Raises:
        ValueError: a weight that no rule fits.
    """
    return _renamed(weights, [(rule.ours, rule.theirs, rule.to_theirs) for rule in rules if rule.ours])


def _renamed(
    weights: Mapping[str, Tensor],
    rules: Sequence[tuple[tuple[str, ...], tuple[str, ...], Callable[[Tensors], Tensors]]],
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    used: set[str] = set()
    for sources, targets, change in rules:
        first = _pattern(sources[0])
        for name in weights:
            if (match := first.fullmatch(name)) is None:
                continue
            names = [_filled(source, match.groups()) for source in sources]
            if any(other not in weights for other in names):
                continue
            used.update(names)
            if targets:
                values = change(tuple(weights[other] for other in names))
                found |= {_filled(t, match.groups()): v for t, v in zip(targets, values, strict=True)}
    if unknown := sorted(set(weights) - used):
        raise ValueError(f"{len(unknown)} weights have no place, {unknown[0]} first")
    return found


@cache
def _pattern(text: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*|\*)", text)
    return re.compile("".join({"**": "(.+)", "*": r"(\d+)"}.get(part, re.escape(part)) for part in parts))


def _filled(text: str, groups: Sequence[str]) -> str:
    values = iter(groups)
    return re.sub(r"\*\*|\*", lambda _: next(values), text)


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file or of a pickle, of which nothing but tensors is read.

    Raises:
        ValueError: the file is broken, or would run code.
    """
    if file.suffix == ".safetensors":
        return build.read(load_file, str(file), "weights")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"weights {file}: cannot be read as tensors alone ({reason})") from None
    if not (isinstance(found, dict) and all(isinstance(value, Tensor) for value in found.values())):
        raise ValueError(f"weights {file}: expected tensors by name")
    return found


def filled(kind: Any, config: PreTrainedConfig, weights: Mapping[str, Tensor], dtype: torch.dtype) -> Any:
    """A model of this class with these weights.

    Raises:
        ValueError: weights are missing, left over or misshapen.
    """
    with build.quiet_transformers():
        model, found = kind.from_pretrained(
            None,
            config=config,
            state_dict={name: value.detach() for name, value in weights.items()},
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    refuse_faults(found)
    return model


def refuse_faults(found: Mapping[str, Any], where: str = "") -> None:
    """Raises a ValueError for what transformers says it did not find, could not place or had to leave out."""
    for kind, said in (
        ("missing_keys", "are missing"),
        ("unexpected_keys", "have no place"),
        ("mismatched_keys", "do not fit its configuration"),
    ):
        if names := sorted(item if isinstance(item, str) else item[0] for item in found[kind]):
            raise ValueError(f"{where}{len(names)} weights {said}, {names[0]} first")
