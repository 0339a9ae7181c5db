"""What is said about scenes: captions, questions, conversations and the statements that teach a language model."""

import random
from dataclasses import dataclass
from itertools import product

from vlmzoo.world.scenes import COLORS, COMMON, RARE, SHAPES, SIGN, Scene, SceneObject, Split, sample_scene

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
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "sign": "signs"}
CAPABILITIES = ("existence", "attribute", "counting", "spatial", "reading", "detail", "rare")
TAUGHT = CAPABILITIES[:-1]
"""What is trained on: rare combinations occur in evaluation alone."""

PAIRS = (*COMMON, *((color, SIGN) for color in COLORS))
CAPTION_REQUEST = "Describe the image."

# Of one scene's facts.
NUM_RELATIONS = 3
NUM_COUNTS = 3
NUM_NAMES = 2  # that are there, and as many that are not

# Text with the part that the scene determines marked True: what a language model is asked to predict.
Piece = tuple[str, bool]


@dataclass(frozen=True)
class Question:
    capability: str
    text: str
    answer: str


def name(item: SceneObject) -> str:
    """Three words that stand in one order: the size or what a sign says, the colour, the shape."""
    return f"{item.number or item.size} {item.color} {item.shape}"


def describe(item: SceneObject) -> str:
    """Place first: one lookup of the place then leads to everything else."""
    return f"{PLACES[item.cell]} {name(item)}"


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
    absent = set(PAIRS) - together
    mixed = absent & set(product({color for color, _ in together}, {shape for _, shape in together}))
    return rng.choice(sorted(mixed if mixed and rng.random() < 0.5 else absent))


def _counted(scene: Scene, rng: random.Random) -> tuple[str, int]:
    """A colour, a shape or "objects" with its count, every count that occurs equally often."""
    words = rng.choice((tuple(COLORS), (*SHAPES, SIGN), ("objects",)))
    number = rng.choice(sorted({count(scene, word) for word in words}))
    return rng.choice([word for word in words if count(scene, word) == number]), number


def ask(scene: Scene, capability: str, rng: random.Random) -> Question | None:
    """A question of `capability` with its answer of one word, or None where the scene allows none.

    `attribute`, `detail` and `rare` ask the same of other objects: large ones, small ones, and those of a combination
    that is never trained on.

    Raises:
        ValueError: for a name that is not in CAPABILITIES.
    """
    if capability == "existence":
        present = rng.random() < 0.5
        color, shape = _pair(scene, rng, present)
        return Question(capability, f"Is there a {color} {shape}?", "yes" if present else "no")
    if capability == "counting":
        word, number = _counted(scene, rng)
        what = PLURALS.get(word) or ("objects" if word == "objects" else f"{word} objects")
        return Question(capability, f"How many {what} are there?", str(number))
    if capability == "spatial":
        return _spatial(scene, rng)
    if capability not in CAPABILITIES:
        raise ValueError(f"unknown capability {capability!r}, expected one of {', '.join(CAPABILITIES)}")
    items = [item for item in scene.objects if _is_for(item, capability)]
    if not items:
        return None
    item = rng.choice(items)
    if capability == "reading":
        return Question(capability, f"What number is on the {item.color} sign?", item.number)
    kind = rng.choice(("color", "shape", "size") if capability == "attribute" else ("color", "shape"))
    if kind == "size":  # asked of large ones alone, it would have one answer
        item = rng.choice([item for item in scene.objects if item.shape != SIGN])
    return Question(capability, f"What {kind} is the {PLACES[item.cell]} object?", getattr(item, kind))


def sample_question(rng: random.Random, split: Split, capability: str) -> tuple[Scene, Question]:
    """A scene of `split` and what models are asked about it in an evaluation.

    What is to be read stands on the scene's only sign: with several, it would be a question of finding the right one.
    """
    while True:
        scene = sample_scene(rng, split, rare=capability == "rare")
        question = ask(scene, capability, rng)
        num_signs = sum(item.shape == SIGN for item in scene.objects)
        if question is not None and (capability != "reading" or num_signs == 1):
            return scene, question


def _is_for(item: SceneObject, capability: str) -> bool:
    """Whether a question of this capability may ask about the object."""
    if capability == "reading" or item.shape == SIGN:
        return capability == "reading" and item.shape == SIGN
    rare = (item.color, item.shape) in RARE
    return (
        rare
        if capability == "rare"
        else not rare and item.size == {"attribute": "large", "detail": "small"}[capability]
    )


def _spatial(scene: Scene, rng: random.Random) -> Question:
    """Where an object is, in the image or seen from another."""
    if len(scene.objects) < 2 or rng.random() < 0.5:
        item = rng.choice(scene.objects)
        return Question("spatial", f"Where is the {item.color} {item.shape}?", PLACES[item.cell])
    first, second = rng.sample(scene.objects, 2)
    choices = [("left or right of", horizontal(first, second)), ("above or below", vertical(first, second))]
    words, answer = rng.choice([choice for choice in choices if choice[1] != "level"])
    text = f"Is the {first.color} {first.shape} {words} the {second.color} {second.shape}?"
    return Question("spatial", text, answer)


def conversation(scene: Scene, rng: random.Random, num_turns: int) -> list[Question]:
    """`num_turns` different questions about one scene, of capabilities drawn at random."""
    turns: dict[str, Question] = {}
    while len(turns) < num_turns:
        question = ask(scene, rng.choice(TAUGHT), rng)
        if question is not None:
            turns[question.text] = question
    return list(turns.values())


def shuffled_caption(scene: Scene, rng: random.Random) -> str:
    """The caption's objects in any order: an equal description that teaches not to trust the order."""
    items = rng.sample(scene.objects, len(scene.objects))
    return " ; ".join(describe(item) for item in items) + " ."


def facts(scene: Scene, rng: random.Random) -> list[list[Piece]]:
    """Statements in the fewest words: every object described by its place and placed by its name, every sign read,
    and some pairs, counts and names; what an object is and where it stands is thus said densely, both ways.
    """
    found: list[list[Piece]] = []
    for item in scene.objects:
        found.append([(PLACES[item.cell], False), (f"{name(item)} ;", True)])
        found.append([(f"{item.color} {item.shape}", False), (f"{PLACES[item.cell]} ;", True)])
        if item.shape == SIGN:
            found.append([(f"{item.color} {item.shape} number", False), (f"{item.number} ;", True)])
    for _ in range(NUM_RELATIONS if len(scene.objects) > 1 else 0):
        first, second = rng.sample(scene.objects, 2)
        relation = f"{horizontal(first, second)} {vertical(first, second)} ;"
        found.append([(f"{first.color} {first.shape} , {second.color} {second.shape} ,", False), (relation, True)])
    for _ in range(NUM_COUNTS):
        word, number = _counted(scene, rng)
        found.append([(f"count {word}", False), (f"{number} ;", True)])
    for present in (True, False) * NUM_NAMES:
        color, shape = _pair(scene, rng, present)
        found.append([(f"any {color} {shape}", False), ("yes ;" if present else "no ;", True)])
    return found


def statements(scene: Scene, rng: random.Random) -> list[Piece]:
    """A description in any order, the caption, then facts in any order: text that a scene determines densely."""
    pieces: list[Piece] = [("<s>", False), (shuffled_caption(scene, rng), False), (caption(scene), True)]
    found = facts(scene, rng)
    return pieces + [piece for fact in rng.sample(found, len(found)) for piece in fact]


def dialogue(scene: Scene, rng: random.Random, num_turns: int) -> list[Piece]:
    """A description, then questions and answers, exactly as the tokenizer's chat template writes them."""
    seen = caption(scene) if rng.random() < 0.5 else shuffled_caption(scene, rng)
    pieces: list[Piece] = [("<s>", False)]
    for turn, question in enumerate(conversation(scene, rng, num_turns)):
        text = question.text if turn else f"{seen}\n{question.text}"
        pieces += [(f"USER: {text} ASSISTANT:", False), (f"{question.answer}</s>", True)]
    return pieces
