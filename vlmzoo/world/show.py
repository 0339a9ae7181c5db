"""A contact sheet: what the world looks like and what is said about it."""

import random
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from vlmzoo.world.scenes import draw, sample_scene
from vlmzoo.world.text import CAPABILITIES, ask, caption

COLUMNS, ROWS = 4, 3
PICTURE = 216  # pixels: three times its size
CARD = (300, 424)
MARGIN = 20
INK, FAINT, PAPER, CARD_PAPER = "#1d2330", "#6a7386", "#eceff4", "#ffffff"


def show(out: Path, seed: int = 0) -> Path:
    """`out`, a PNG of a dozen training scenes with their captions and a question of each capability."""
    rng = random.Random(f"show {seed}")
    size = (COLUMNS * (CARD[0] + MARGIN) + MARGIN, ROWS * (CARD[1] + MARGIN) + MARGIN)
    sheet = Image.new("RGB", size, PAPER)
    for row in range(ROWS):
        for column in range(COLUMNS):
            corner = (MARGIN + column * (CARD[0] + MARGIN), MARGIN + row * (CARD[1] + MARGIN))
            sheet.paste(_card(rng), corner)
    out.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out, format="PNG")
    return out


def _card(rng: random.Random) -> Image.Image:
    """One scene with more than one object, its caption and its questions."""
    scene = sample_scene(rng)
    while len(scene.objects) < 2:
        scene = sample_scene(rng)
    card = Image.new("RGB", CARD, CARD_PAPER)
    picture = Image.fromarray(draw(scene)).resize((PICTURE, PICTURE), Image.Resampling.NEAREST)
    card.paste(picture, ((CARD[0] - PICTURE) // 2, 14))
    pen = ImageDraw.Draw(card)
    font = ImageFont.load_default(size=12)
    top = PICTURE + 24
    for line in caption(scene).replace(" ; ", " ;\n").splitlines():
        pen.text((14, top), line, fill=FAINT, font=font)
        top += 15
    top += 6
    for capability in CAPABILITIES:
        question = ask(scene, capability, rng)
        if question is not None:
            lines = textwrap.wrap(f"{question.text}  {question.answer}", 46)
            for number, line in enumerate(lines):
                pen.text((14, top), line, fill=INK, font=font)
                if number == len(lines) - 1:  # the answer a second time, a hair to the right: bold
                    start = pen.textlength(line.removesuffix(question.answer), font=font)
                    pen.text((14.6 + start, top), question.answer, fill=INK, font=font)
                top += 15
    return card
