"""What is known of one of transformers' image-text models: its parts in ours, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from vlmzoo.interop.weights import Rule, same
from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
from vlmzoo.vision.towers import num_prefix


class UnsupportedError(ValueError):
    """A model of a known class, with a setting that our connector does not have."""


def _as_they_are(inputs: dict[str, Any], model: VisionLanguageModel) -> None:
    pass


@dataclass(frozen=True)
class Architecture:
    """One class of transformers.

    model: its name.
    connector: the name of ours.
    config: what `VisionLanguageConfig` takes for a configuration of theirs; raises `UnsupportedError`.
    rules: the weights of a model with that configuration.
    translate: makes the original's keywords, `input_ids` among them, those of our model's `forward`, in place.
    back: a configuration of theirs, as values, for one of ours (a value of None: theirs has no such part); raises
        `UnsupportedError`. None: the class has parts that ours does not keep.
    needs: what their config.json must hold, for which transformers would take defaults without a word.
    unties: whether the LLM's head and its embeddings, which may be one in theirs, are two in ours.
    """

    model: str
    connector: str
    config: Callable[[Any], dict[str, Any]]
    rules: Callable[[Any], Sequence[Rule]]
    translate: Callable[[dict[str, Any], VisionLanguageModel], None] = _as_they_are
    back: Callable[[VisionLanguageConfig], Mapping[str, Any]] | None = None
    needs: tuple[str, ...] = ("vision_config", "text_config")
    unties: bool = False


def expect(found: Any, expected: Any, what: str) -> None:
    """Raises `UnsupportedError` where a setting is not the only one that is supported."""
    if found != expected:
        raise UnsupportedError(f"{what} is {found!r}, expected {expected!r}")


def without_cls(config: PreTrainedConfig, strategy: str) -> None:
    """Raises `UnsupportedError` where CLS would be a token, or a patch be cut off in its place."""
    expected = "default" if num_prefix(config) == 1 else "full"
    expect(strategy, expected, f"vision_feature_select_strategy of a {config.model_type}")


def parts(vision: str, language: str = "model.language_model.") -> list[Rule]:
    """The rules of an encoder and of an LLM with a head of its own."""
    return [
        same(f"{vision}**", "vision.model.**"),
        same(f"{language}**", "language.model.**"),
        same("lm_head.**", "language.lm_head.**"),
    ]
