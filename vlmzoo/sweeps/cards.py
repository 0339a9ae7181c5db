"""docs/connectors.md: a card a connector, from its docstring and what is counted on the meta device.

python -m vlmzoo.sweeps.cards docs
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmzoo import build
from vlmzoo.connector import connectors
from vlmzoo.files import write_whole
from vlmzoo.sweeps import catalogue
from vlmzoo.sweeps.costs import GRID, TEXT_LENGTH, unweighted
from vlmzoo.sweeps.diagram import render
from vlmzoo.sweeps.table import count

DIMS = (1024, 4096)  # CLIP-L and a Llama of seven billion weights
HEAD = f"""# Connectors

Made by `make docs` from the docstrings in [connectors/](../connectors) and from what each connector does on the meta
device, with its defaults, to one image of {GRID[0]} × {GRID[1]} patches between an encoder of width {DIMS[0]} and an
LLM of width {DIMS[1]}. Layers inside the LLM are counted, over {TEXT_LENGTH} tokens of text; FLOPs are those of a
forward pass, activations what is kept for the backward pass, in bfloat16.
`vlmzoo list connectors --dims {DIMS[0]},{DIMS[1]}` prints the table for any widths, and of plugins too.
"""


def cards() -> tuple[str, dict[str, str]]:
    """The page, and its pictures (SVG) by file name."""
    names = own_connectors()
    costs = catalogue.costs(names, *DIMS)
    pictures = {f"{name}.svg": render(name, unweighted(name, *DIMS)) for name in names}
    return "\n".join([HEAD, _table(costs), *(_card(name, costs[name]) for name in names)]), pictures


def own_connectors() -> list[str]:
    """The connectors of this repository, without those of plugins."""
    build.load_connectors()
    return [name for name in connectors.names() if connectors.get(name).__module__.startswith("vlmzoo.connectors.")]


def _table(costs: Mapping[str, Mapping[str, Any]]) -> str:
    rows = ["| connector | tokens | parameters | FLOPs | weights | activations |", "|---|--:|--:|--:|--:|--:|"]
    for name, found in costs.items():
        rows.append(
            f"| [{name}](#{name}) | {found['tokens']} | {count(found['parameters'])} | {count(found['flops'])} | "
            f"{found['weight_bytes'] / 2**20:,.0f} MiB | {found['activation_bytes'] / 2**20:,.1f} MiB |"
        )
    return "\n".join(rows) + "\n"


def _card(name: str, cost: Mapping[str, Any]) -> str:
    text = re.sub(r"^(Source|Differs): ", r"**\1:** ", inspect.getdoc(connectors.get(name)) or "", flags=re.MULTILINE)
    text = re.sub(r"\n(\*\*Differs)", r"\n\n\1", text)
    options = ", ".join(f"`{option}={_default(parameter)}`" for option, parameter in connectors.options(name).items())
    lines = [
        f"## {name}\n",
        f"{text}\n",
        f"![what {name} does to an image](connectors/{name}.svg)\n",
        f"{cost['tokens']} tokens, {count(cost['parameters'])} parameters, {count(cost['flops'])} FLOPs."
        + (f" Options: {options}." if options else " It has no options.")
        + "\n",
    ]
    return "\n".join(lines)


def _default(parameter: inspect.Parameter) -> str:
    value = parameter.default
    return "…" if value is parameter.empty else str(list(value) if isinstance(value, tuple) else value)


def main(folder: Path) -> None:
    """Writes connectors.md and its pictures below a folder."""
    page, pictures = cards()
    write_whole(folder / "connectors.md", page)
    for old in (folder / "connectors").glob("*.svg"):
        if old.name not in pictures:
            old.unlink()
    for name, picture in pictures.items():
        write_whole(folder / "connectors" / name, picture)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
