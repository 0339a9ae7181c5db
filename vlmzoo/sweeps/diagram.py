"""A connector as a small picture: what its parts make of an image, in the order in which they do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from torch import Tensor, nn

from vlmzoo.connector import TokenConnectorAdapter, VisualTokens
from vlmzoo.sweeps.costs import TEXT_LENGTH, Unweighted

WIDTH, GAP, MARGIN = 860, 26, 8  # pixels: the widest row, between two boxes, around all
BOX, ROW = 58, 92  # pixels: the height of a box, and of a row
STYLE = """
text { font: 12px system-ui, "Segoe UI", Roboto, sans-serif; fill: #1d2126; text-anchor: middle; }
.soft { fill: #5d6670; font-size: 11px; } .shape { font-size: 11px; font-variant-numeric: tabular-nums; }
rect { fill: #f6f6f3; stroke: #b9b9b2; }
.end { fill: #e6eef8; stroke: #2a6fbb; } .llm { fill: #fbeee6; stroke: #d2622b; }
.weight { fill: none; stroke-dasharray: 3 3; } path { stroke: #5d6670; fill: none; } .head { fill: #5d6670; }
@media (prefers-color-scheme: dark) {
  text { fill: #e9ebec; } .soft { fill: #9aa4ad; } rect { fill: #22262a; stroke: #50575e; }
  .end { fill: #1c2a3a; stroke: #6aa5e8; } .llm { fill: #35251b; stroke: #e88a58; } .weight { fill: none; }
  path { stroke: #9aa4ad; } .head { fill: #9aa4ad; }
}
"""


@dataclass
class Box:
    """Something on the way: what it is called, what it is, and the shape of what it gives."""

    name: str
    kind: str
    shape: str
    style: str = ""
    times: int = 1
    beside: bool = False  # the box before it, not behind

    @property
    def title(self) -> str:
        return self.name if self.times == 1 else f"{self.times} × {self.name}"

    @property
    def width(self) -> int:
        return max(64, 14 + 7 * max(len(self.title), len(self.kind), len(self.shape)))


def render(name: str, parts: Unweighted) -> str:
    """The picture as SVG."""
    rows = list(_rows(_flow(parts)))
    height = MARGIN + ROW * len(rows) - (ROW - BOX) + MARGIN
    width = max(sum(box.width + GAP for box in row) - GAP for row in rows) + 2 * MARGIN + GAP
    drawn = []
    for number, row in enumerate(rows):
        x, y = MARGIN, MARGIN + ROW * number
        for index, box in enumerate(row):
            drawn.append(_drawn(box, x, y))
            right, last = x + box.width, index == len(row) - 1
            if not last and row[index + 1].beside:
                drawn.append(f'<text x="{right + GAP / 2}" y="{y + BOX / 2 + 5}">+</text>')
            elif not last:
                drawn.append(_arrow(f"M{right + 3} {y + BOX / 2}H{right + GAP - 8}", right + GAP - 4, y + BOX / 2, 0))
            elif number + 1 < len(rows):  # to the next row's first box
                middle, below = y + BOX + (ROW - BOX) / 2, MARGIN + rows[number + 1][0].width / 2
                path = f"M{x + box.width / 2} {y + BOX + 3}V{middle}H{below}V{y + ROW - 8}"
                drawn.append(_arrow(path, below, y + ROW - 4, 90))
            x = right + GAP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" role="img" aria-label="what {escape(name)} does to an image"><style>{STYLE}</style>'
        f"{''.join(drawn)}</svg>\n"
    )


def _rows(boxes: list[Box]) -> Iterator[list[Box]]:
    row: list[Box] = []
    for box in boxes:
        if row and sum(other.width + GAP for other in row) + box.width > WIDTH:
            yield row
            row = []
        row.append(box)
    yield row


def _drawn(box: Box, x: float, y: float) -> str:
    middle = x + box.width / 2
    lines = [("", box.title), ("soft", box.kind), ("shape", box.shape)]
    lines = [(style, text) for style, text in lines if text]
    first = y + BOX / 2 + 4 - 8 * (len(lines) - 1)
    texts = "".join(
        f'<text class="{style}" x="{middle:.1f}" y="{first + 16 * number:.1f}">{escape(text)}</text>'
        for number, (style, text) in enumerate(lines)
    )
    return f'<rect class="{box.style}" x="{x}" y="{y}" width="{box.width}" height="{BOX}" rx="6"/>{texts}'


def _arrow(path: str, x: float, y: float, turned: int) -> str:
    return (
        f'<path d="{path}"/><path class="head" d="M0 0l-7 -4v8z" transform="translate({x:.1f} {y:.1f}) '
        f'rotate({turned})" stroke="none"/>'
    )


def _flow(parts: Unweighted) -> list[Box]:
    """From patches to tokens: the connector's own parts, as they are called, and its layers inside the LLM."""
    connector, visual = parts.connector, parts.visual
    module = connector.inner if isinstance(connector, TokenConnectorAdapter) else connector
    inside = {layer: index for index, layers in connector.llm_layers().items() for layer in layers}
    called: list[Box] = []
    hooks = [
        child.register_forward_hook(_noting(called, name, child))
        for name, child in _children(module)
        if child not in inside and not isinstance(child, nn.Dropout | nn.Identity)
    ]
    try:
        found, _ = parts.run()
    finally:
        for hook in hooks:
            hook.remove()
    first = visual.maps[0]
    kinds = [
        "of the encoder" if len(visual.maps) == 1 else f"{len(visual.maps)} of its layers",
        *(["and CLS"] if first.cls is not None else []),
        *(["and its attention"] if first.cls_attention is not None else []),
    ]
    start = Box("patches", " ".join(kinds), _shape(first.values), "end")
    weights = [
        Box(name, "weights", _sizes(value.shape), "weight", beside=True)
        for name, value in module.named_parameters(recurse=False)
    ]
    if visual.instruction is not None:
        weights.insert(0, Box("instruction", "the human turn", f"{TEXT_LENGTH}", "end", beside=True))
    return [start, *weights, *called, *_results(found, inside, connector.llm_layers())]


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Direct parts; those of a list under the list's name."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            yield from ((name, item) for item in child.children())
        else:
            yield name, child


def _noting(called: list[Box], name: str, module: nn.Module) -> Any:
    def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
        tensor = (
            output if isinstance(output, Tensor) else next((x for x in _flat(output) if isinstance(x, Tensor)), None)
        )
        box = Box(name, type(module).__name__, "" if tensor is None else _shape(tensor))
        if called and (called[-1].name, called[-1].kind) == (box.name, box.kind):
            called[-1].times += 1
            called[-1].shape = box.shape
        else:
            called.append(box)

    return note


def _results(found: VisualTokens, inside: dict[Any, int], layers: Any) -> list[Box]:
    boxes = [Box("tokens", "in the LLM's input", _shape(found.tokens), "end")]
    if found.memory is not None:
        boxes.append(Box("memory", "", _shape(found.memory), "end", beside=True))
    if inside:
        name = " or ".join(sorted({type(layer).__name__ for layer in inside}))
        boxes.append(Box(name, f"before LLM layers {_places(sorted(layers))}", "", "llm", times=len(inside)))
    if found.additions:
        boxes.append(Box("additions", f"before LLM layers {_places(sorted(found.additions))}", "", "llm", beside=True))
    return boxes


def _places(indices: list[int]) -> str:
    if len(indices) <= 4:
        return ", ".join(map(str, indices))
    return f"{indices[0]}, {indices[1]}, …, {indices[-1]}"


def _flat(output: Any) -> list[Any]:
    if isinstance(output, VisualTokens):
        return [output.tokens]
    if isinstance(output, list | tuple):
        return [item for part in output for item in _flat(part)]
    return [output]


def _shape(tensor: Tensor) -> str:
    """Without the batch of one."""
    return _sizes(tensor.shape[1:] if tensor.dim() > 2 or tensor.shape[0] == 1 else tensor.shape)


def _sizes(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))
