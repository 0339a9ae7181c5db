"""Interchangeable connectors between vision encoders and language models, compared fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel

__version__ = "0.1.0"
__all__ = ["VisionLanguageConfig", "VisionLanguageModel", "__version__"]


def __getattr__(name: str) -> Any:
    """The model's classes, imported when first asked for: torch and transformers take seconds to load."""
    if name in ("VisionLanguageModel", "VisionLanguageConfig"):
        from vlmzoo import model

        return getattr(model, name)
    raise AttributeError(f"module 'vlmzoo' has no attribute {name!r}")
