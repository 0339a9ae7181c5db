"""Pages that need nothing but themselves."""

from __future__ import annotations

from importlib import resources
from string import Template

from vlmzoo import __version__


def page(package: str, name: str, **fields: str) -> str:
    """The HTML of a package's template behind what all pages begin with; `title` and what it names are filled in.

    Args:
        name: of a file that begins within `<head>`, with the styles of this page alone.
    """
    parts = [resources.files("vlmzoo") / "head.html", resources.files(package) / name]
    whole = "".join(part.read_text(encoding="utf-8") for part in parts)
    return Template(whole).substitute(fields, version=__version__)
