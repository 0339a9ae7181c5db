"""In and out of transformers: `from_hf`, `to_hf`, `load`."""

from vlmzoo.interop.convert import beside, from_hf, load, to_hf

__all__ = ["beside", "from_hf", "load", "to_hf"]
