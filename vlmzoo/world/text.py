"""What is said about scenes: captions, questions, conversations and the statements that teach a language model."""

import random
from dataclasses import dataclass
from itertools import product

from vlmzoo.world.scenes import COLORS, SHAPES, Scene, SceneObject

PLACES = (
    "top-left",
    "top-middle",
    "top-right",
    "middle-left",
    "center",
    "middle-right",
    "bottom-left",
    "bottom-middle",
    "bottom-right",
)
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses"}
CAPABILITIES = ("existence", "attribute", "counting", "spatial", "place")
CAPTION_REQUEST = "Describe the image."

# Text with the part that the scene determines marked True: what a language model is asked to predict.
Piece = tuple[str, bool]


@dataclass(frozen=True)
class Question:
    capability: str
    text: str
    answer: str


def describe(item: SceneObject) -> str:
    """Place first: one lookup of the place then leads to everything else."""
    return f"{PLACES[item.cell]} {item.size} {item.color} {item.shape}"


def caption(scene: Scene) -> str:
    """Every object in the order of the cells, so that the picture determines each word."""
    return " ; ".join(describe(item) for item in scene.objects) + " ."


def horizontal(first: SceneObject, second: SceneObject) -> str:
    """Where `first` stands seen from `second`: left, right or level."""
    return "level" if first.column == second.column else "left" if first.column < second.column else "right"


def vertical(first: SceneObject, second: SceneObject) -> str:
    """Where `first` stands seen from `second`: above, below or level."""
    return "level" if first.row == second.row else "above" if first.row < second.row else "below"


def count(scene: Scene, word: str) -> int:
    """How many objects have the colour or shape `word`; all of them for "objects"."""
    return sum(word in ("objects", item.color, item.shape) for item in scene.objects)


def _pair(scene: Scene, rng: random.Random, present: bool) -> tuple[str, str]:
    """A colour and a shape that stand together in the scene, or that don't, half of them each present elsewhere."""
    together = {(item.color, item.shape) for item in scene.objects}
    if present:
        return rng.choice(sorted(together))
    mixed = set(product({color for color, _ in together}, {shape for _, shape in together})) - together
    absent = set(product(COLORS, SHAPES)) - together
    return rng.choice(sorted(mixed if mixed and rng.random() < 0.5 else absent))


def _counted(scene: Scene, rng: random.Random) -> tuple[str, int]:
    """A colour, a shape or "objects" with its count, every count that occurs equally often."""
    words = rng.choice((tuple(COLORS), SHAPES, ("objects",)))
    number = rng.choice(sorted({count(scene, word) for word in words}))
    return rng.choice([word for word in words if count(scene, word) == number]), number


def ask(scene: Scene, capability: str, rng: random.Random) -> Question | None:
    """A question of `capability` with its answer of one word, or None where the scene allows none.

    Raises:
        ValueError: for a name that is not in CAPABILITIES.
    """
    item = rng.choice(scene.objects)
    if capability == "existence":
        present = rng.random() < 0.5
        color, shape = _pair(scene, rng, present)
        return Question(capability, f"Is there a {color} {shape}?", "yes" if present else "no")
    if capability == "attribute":
        kind = rng.choice(("size", "color", "shape"))
        return Question(capability, f"What {kind} is the {PLACES[item.cell]} object?", getattr(item, kind))
    if capability == "counting":
        word, number = _counted(scene, rng)
        what = PLURALS.get(word) or ("objects" if word == "objects" else f"{word} objects")
        return Question(capability, f"How many {what} are there?", str(number))
    if capability == "place":
        return Question(capability, f"Where is the {item.color} {item.shape}?", PLACES[item.cell])
    if capability != "spatial":
        raise ValueError(f"unknown capability {capability!r}, expected one of {', '.join(CAPABILITIES)}")
    if len(scene.objects) < 2:
        return None
    first, second = rng.sample(scene.objects, 2)
    choices = [("left or right of", horizontal(first, second)), ("above or below", vertical(first, second))]
    words, answer = rng.choice([choice for choice in choices if choice[1] != "level"])
    text = f"Is the {first.color} {first.shape} {words} the {second.color} {second.shape}?"
    return Question(capability, text, answer)


def conversation(scene: Scene, rng: random.Random, num_turns: int) -> list[Question]:
    """`num_turns` different questions about one scene, of capabilities drawn at random."""
    turns: dict[str, Question] = {}
    while len(turns) < num_turns:
        question = ask(scene, rng.choice(CAPABILITIES), rng)
        if question is not None:
            turns[question.text] = question
    return list(turns.values())


def shuffled_caption(scene: Scene, rng: random.Random) -> str:
    """The caption's objects in any order: an equal description that teaches not to trust the order."""
    items = rng.sample(scene.objects, len(scene.objects))
    return " ; ".join(describe(item) for item in items) + " ."


def statement(scene: Scene, rng: random.Random) -> list[Piece]:
    """One fact of the scene in the fewest words: describe, locate, relate, count or exist."""
    item = rng.choice(scene.objects)
    kind = rng.choice(("describe", "locate", "relate", "relate", "count", "exist"))
    if kind == "relate" and len(scene.objects) > 1:
        first, second = rng.sample(scene.objects, 2)
        relation = f"{horizontal(first, second)} {vertical(first, second)} ;"
        return [(f"{first.color} {first.shape} , {second.color} {second.shape} ,", False), (relation, True)]
    if kind in ("locate", "relate"):
        return [(f"{item.color} {item.shape}", False), (f"{PLACES[item.cell]} ;", True)]
    if kind == "describe":
        return [(PLACES[item.cell], False), (f"{item.size} {item.color} {item.shape} ;", True)]
    if kind == "count":
        word, number = _counted(scene, rng)
        return [(f"count {word}", False), (f"{number} ;", True)]
    present = rng.random() < 0.5
    color, shape = _pair(scene, rng, present)
    return [(f"any {color} {shape}", False), ("yes ;" if present else "no ;", True)]


def statements(scene: Scene, rng: random.Random, num_statements: int) -> list[Piece]:
    """A description in any order, the caption, then many statements: text that one scene determines densely."""
    pieces: list[Piece] = [("<s>", False), (shuffled_caption(scene, rng), False), (caption(scene), True)]
    for _ in range(num_statements):
        pieces += statement(scene, rng)
    return pieces


def dialogue(scene: Scene, rng: random.Random, num_turns: int) -> list[Piece]:
    """A description, then questions and answers, exactly as the tokenizer's chat template writes them."""
    seen = caption(scene) if rng.random() < 0.5 else shuffled_caption(scene, rng)
    pieces: list[Piece] = [("<s>", False)]
    for turn, question in enumerate(conversation(scene, rng, num_turns)):
        text = question.text if turn else f"{seen}\n{question.text}"
        pieces += [(f"USER: {text} ASSISTANT:", False), (f"{question.answer}</s>", True)]
    return pieces
