"""In and out of transformers: `from_hf`, `to_hf`, `load`."""

from vlmzoo.interop.convert import from_hf, load, to_hf

__all__ = ["from_hf", "load", "to_hf"]
