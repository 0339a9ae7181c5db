"""A record in a terminal: tokens coloured by what becomes of them."""

from __future__ import annotations

from itertools import groupby

from vlmzoo.inspection.view import Piece, View

RESET = "\x1b[0m"
COLOURS = {"masked": "\x1b[2m", "supervised": "\x1b[1;32m", "visual": "\x1b[1;35m", "cut": "\x1b[9;31m"}
MARKS = {"masked": ("", ""), "supervised": ("[[", "]]"), "visual": ("", ""), "cut": ("{{", "}}")}
"""What stands around them where there are no colours."""


def render(view: View, *, colour: bool) -> str:
    """The record's text, one run of tokens after another, and how many there are of each kind."""
    runs = [
        _painted(kind, "".join(piece.text for piece in run), colour) for kind, run in groupby(view.pieces, key=_kind)
    ]
    lines = [view.record.where, "", "".join(runs), "", counts(view)]
    lines.append("  ".join(_painted(kind, kind, colour) for kind in COLOURS))
    for number, picture in enumerate(view.pictures):
        width, height = picture.size
        tiles = f", a thumbnail and {picture.tiles[0]} x {picture.tiles[1]} tiles" if picture.tiles else ""
        crop = picture.crops[0]
        seen = f" seen at {crop.width} x {crop.height}{tiles}" if view.subject.processor else ""
        lines.append(f"image {number}: {picture.name}, {width} x {height}{seen}: {_tokens(picture.slots)}")
    if view.refusal:
        lines.append(f"training refuses it: {view.refusal}")
    return "\n".join(lines)


def counts(view: View) -> str:
    """How many tokens there are of each kind."""
    visual, supervised, masked = (view.count(role) for role in ("visual", "supervised", "masked"))
    cut = max(0, view.length - view.max_length)
    return (
        f"{_tokens(view.length)}: {visual} visual, {supervised} supervised, {masked} masked"
        f"{f', {cut} cut' if cut else ''} (max_length {view.max_length})"
    )


def _tokens(number: int) -> str:
    return f"{number} token" + ("" if number == 1 else "s")


def _kind(piece: Piece) -> str:
    return "cut" if piece.cut else piece.role


def _painted(kind: str, text: str, colour: bool) -> str:
    if not colour:
        before, after = MARKS[kind]
        return f"{before}{text}{after}"
    return f"{COLOURS[kind]}{text.replace(chr(10), f'{RESET}{chr(10)}{COLOURS[kind]}')}{RESET}"
