"""Interchangeable connectors between vision encoders and language models, compared fairly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmzoo.interop import load
    from vlmzoo.model import VisionLanguageConfig, VisionLanguageModel
    from vlmzoo.processor import VisionLanguageProcessor

__version__ = "0.1.0"
__all__ = ["VisionLanguageConfig", "VisionLanguageModel", "VisionLanguageProcessor", "__version__", "load"]


def __getattr__(name: str) -> Any:
    """The model's classes and `load`, imported when first asked for: torch and transformers take seconds to load."""
    if name.startswith("_") or name not in __all__:
        raise AttributeError(f"module 'vlmzoo' has no attribute {name!r}")
    if name == "load":
        from vlmzoo import interop

        return interop.load
    from vlmzoo import model, processor  # both, so that any of them makes all known to transformers' Auto classes

    return getattr(processor if name == "VisionLanguageProcessor" else model, name)
