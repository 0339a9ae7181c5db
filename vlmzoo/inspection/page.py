"""A record as a page that needs nothing but itself."""

from __future__ import annotations

import base64
import io
from html import escape

from PIL import Image

from vlmzoo.inspection.terminal import counts
from vlmzoo.inspection.view import Picture, Piece, View, title
from vlmzoo.page import page

WIDEST = 768  # pixels of a picture that no encoder has scaled


def render(view: View) -> str:
    """The page as HTML."""
    data, builder = view.subject.data, view.subject.builder
    assert builder is not None
    facts = [f"template {builder.template.value}", f"max_length {view.max_length}"]
    if view.subject.processor is not None and any(picture.tiles is None for picture in view.pictures):
        facts.append(f"image_mode {data.image_mode}")
    refusal = f'<p class="warn">Training refuses it: {escape(view.refusal)}</p>' if view.refusal else ""
    return page(
        "vlmzoo.inspection",
        "inspect.html",
        title=escape(view.record.id),
        where=escape(f"{title(view)} · {view.record.where}"),
        facts=escape(" · ".join(facts)),
        counts=escape(counts(view)),
        refusal=refusal,
        bar=_bar(view),
        tokens="".join(_token(piece) for piece in view.pieces),
        pictures=_pictures(view),
    )


def _bar(view: View) -> str:
    """The sequence as one bar: what part of it is image, prompt, target, or cut off."""
    runs: list[tuple[str, int]] = []
    for piece in view.pieces:
        kind = "cut" if piece.cut else piece.role
        if runs and runs[-1][0] == kind:
            runs[-1] = kind, runs[-1][1] + piece.count
        else:
            runs.append((kind, piece.count))
    return "".join(f'<i class="{kind}" style="flex:{count}" title="{count} {kind}"></i>' for kind, count in runs)


def _token(piece: Piece) -> str:
    role = f"{piece.role} cut" if piece.cut else piece.role
    said = f"id {piece.token} · position {piece.position} · {role}"
    text = escape(piece.text).replace("\n", "<b>⏎</b>\n") or "<b>∅</b>"
    return f'<span class="{role}" title="{said}">{text}</span>'


def _pictures(view: View) -> str:
    if not view.pictures:
        return ""
    seen = "Images as the encoder gets them" if view.subject.processor else "Images as they are: no encoder is named"
    return f"<section><h2>{seen}</h2>{''.join(_figure(picture) for picture in view.pictures)}</section>"


def _figure(picture: Picture) -> str:
    width, height = picture.size
    first, *tiles = (_embedded(crop) for crop in picture.crops)
    seen = picture.crops[0]
    what = f"{'thumbnail of ' if picture.tiles else ''}{seen.width} × {seen.height}"
    caption = f"{escape(picture.name)} · {width} × {height} in the file · {picture.slots} tokens"
    parts = [f'<div><img src="{first}" alt="as the encoder gets it"><p class="note">{what}</p></div>']
    if picture.tiles:
        rows, columns = picture.tiles
        grid = "".join(f'<img src="{tile}" alt="tile {number}">' for number, tile in enumerate(tiles))
        parts.append(
            f'<div class="wide"><div class="tiles" style="grid-template-columns:repeat({columns},1fr)">{grid}</div>'
            f'<p class="note">{rows} × {columns} tiles of {seen.width} × {seen.height}</p></div>'
        )
    return f'<figure><figcaption>{caption}</figcaption><div class="crops">{"".join(parts)}</div></figure>'


def _embedded(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((WIDEST, WIDEST))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
