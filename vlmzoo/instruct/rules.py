"""The teacher that needs nothing: questions with exact answers from boxes, and from captions where they state it."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise, permutations
from typing import NamedTuple

from vlmzoo.instruct.annotations import Facts, Thing
from vlmzoo.instruct.words import Vocabulary, a, listed, number, plural, some, words


class Turn(NamedTuple):
    question: str
    answer: str
    short: str | None = None  # the same in a word or two; None: it has no such answer


VERSION = 1  # raised with every change of what is said
MOST_TURNS = 5
FEWEST_APART = 0.1  # of the image's side between two centres before one is called left of or above the other
COLOURS = frozenset(
    [
        "red",
        "green",
        "blue",
        "yellow",
        "purple",
        "cyan",
        "white",
        "black",
        "brown",
        "gray",
        "grey",
        "orange",
        "pink",
        "silver",
        "golden",
        "tan",
    ]
)
SIZES = frozenset(("small", "large", "big", "little", "tall", "tiny", "huge"))


def answer(
    kind: str, facts: Facts, vocabulary: Vocabulary, categories: Sequence[str], seed: int, *, short: bool = False
) -> str:
    """What a teacher would answer: the turns as JSON, decided by the seed, the image and the kind alone.

    Args:
        short: answers of a word or two, in a conversation of questions that have one.
    """
    scene = _Scene(facts, vocabulary, categories, random.Random(f"{seed} {facts.id} {kind}"), short)
    rules = {"conversation": conversation, "detailed_description": description, "complex_reasoning": reasoning}
    turns = rules[kind](scene)
    said = [{"question": turn.question, "answer": (turn.short if short else None) or turn.answer} for turn in turns]
    return json.dumps(said, ensure_ascii=False)


class _Scene:
    """What the rules look things up in."""

    def __init__(
        self, facts: Facts, vocabulary: Vocabulary, categories: Sequence[str], rng: random.Random, short: bool
    ) -> None:
        self.facts, self.vocabulary, self.categories, self.rng, self.short = facts, vocabulary, categories, rng, short
        crowds = {thing.category for thing in facts.things if thing.crowd}
        self.present = list(dict.fromkeys(thing.category for thing in facts.things))
        self.counts = Counter(thing.category for thing in facts.things if thing.category not in crowds)
        # Of one of its kind it can be said which one is meant; skis and scissors have no singular.
        self.single = [
            thing
            for thing in facts.things
            if self.counts[thing.category] == 1 and plural(thing.category) != thing.category
        ]
        self.told = [words(caption) for caption in facts.captions]
        self.said = {mention.category for told in self.told for mention in vocabulary.mentions(told)}

    def draw(self, choices: Sequence[str]) -> str:
        return self.rng.choice(choices)

    def inventory(self) -> str:
        parts = [
            some(self.counts[name], name) if name in self.counts else f"a group of {plural(name)}"
            for name in self.present
        ]
        return listed(parts)

    def verb(self) -> str:
        first = self.present[0]
        return "is" if (self.counts.get(first) == 1 and plural(first) != first) or first not in self.counts else "are"


def conversation(scene: _Scene) -> list[Turn]:
    """Two to MOST_TURNS turns about types, presence, counts, places, relations, and what captions state."""
    found = [turn for rule in (kinds, presence, counts, places, relations, attributes, actions) for turn in rule(scene)]
    if scene.short:
        found = [turn for turn in found if turn.short]
    if not found:
        return []
    inventory = bool(scene.present) and not scene.short  # what `kinds` says, if anywhere first
    first, rest = found[:inventory], found[inventory:]
    turns = (first if scene.rng.random() < 0.5 else []) + scene.rng.sample(rest, len(rest))
    kept = {turn.question: turn for turn in turns}
    return list(kept.values())[: scene.rng.randint(3, MOST_TURNS)]


def kinds(scene: _Scene) -> Iterator[Turn]:
    if scene.present:
        asked = scene.draw(
            ("What can be seen in the image?", "Which objects are in the image?", "What does the image show?")
        )
        yield Turn(asked, f"There {scene.verb()} {scene.inventory()} in the image.")


def presence(scene: _Scene) -> Iterator[Turn]:
    """One that is there, and one that neither boxes nor captions know of."""
    phrases = ("Is there {} in the image?", "Can {} be seen in the image?", "Does the image show {}?")
    if scene.present:
        name = scene.rng.choice(scene.present)
        many = scene.counts[name] != 1
        what = plural(name) if many else a(name)
        verb = "are" if many or what == name else "is"
        yield Turn(f"{verb.capitalize()} there {what} in the image?", f"Yes, there {verb} {what} in the image.", "yes")
    absent = [name for name in scene.categories if name not in scene.said and name not in scene.present]
    absent = [name for name in absent if plural(name) != name]
    if absent:
        name = scene.rng.choice(absent)
        yield Turn(scene.draw(phrases).format(a(name)), f"No, there is no {name} in the image.", "no")


def counts(scene: _Scene) -> Iterator[Turn]:
    for name, count in scene.counts.items():
        verb = "is" if count == 1 and plural(name) != name else "are"
        what = f"one {name}" if verb == "is" else f"{number(count)} {plural(name)}"
        asked = scene.draw(
            ("How many {} are there?", "How many {} can be seen?", "What is the number of {} in the image?")
        )
        yield Turn(asked.format(plural(name)), f"There {verb} {what} in the image.", str(count))


def places(scene: _Scene) -> Iterator[Turn]:
    for thing in scene.single:
        asked = scene.draw(
            ("Where is the {}?", "Where in the image is the {}?", "In which part of the image is the {}?")
        )
        said = f"The {thing.category} is {place(thing)} of the image."
        yield Turn(asked.format(thing.category), said, short_place(thing))


def relations(scene: _Scene) -> Iterator[Turn]:
    for first, second in permutations(scene.single, 2):
        for words_of, pair in ((horizontal, ("left", "right")), (vertical, ("above", "below"))):
            if relation := words_of(first, second):
                choice = "to the left or to the right of" if pair[0] == "left" else "above or below"
                asked = f"Is the {first.category} {choice} the {second.category}?"
                short = next(word for word in pair if word in relation)
                yield Turn(asked, f"The {first.category} is {relation} the {second.category}.", short)


def attributes(scene: _Scene) -> Iterator[Turn]:
    """Colour and size of the only object of its kind, where all captions that state it agree."""
    for thing in scene.single:
        stated = [adjectives(told, mention.start) for told in scene.told for mention in scene.vocabulary.mentions(told)
                  if mention.category == thing.category and not mention.plural]  # fmt: skip
        for known, question in ((COLOURS, "What color is the {}?"), (SIZES, "How large is the {}?")):
            values = {word for words_before in stated for word in words_before if word in known}
            if len(values) == 1:
                (value,) = values
                yield Turn(question.format(thing.category), f"The {thing.category} is {value}.", value)


def adjectives(told: list[str], at: int) -> list[str]:
    """Words of colour or size directly before a name."""
    found = []
    while at > 0 and told[at - 1] in COLOURS | SIZES:
        at -= 1
        found.append(told[at])
    return found


def actions(scene: _Scene) -> Iterator[Turn]:
    """What the only object of its kind does, in the words of the first caption that says so."""
    for thing in scene.single:
        name = re.escape(thing.category.lower())
        for caption in scene.facts.captions:
            found = re.search(
                rf"\b(?:an?|the) (?:\w+ )?{name} (?:is |that is )?(\w{{2,}}ing\b[^.;,]*)", caption.lower()
            )
            if found and scene.vocabulary.mentions(words(found[0]))[:1]:
                yield Turn(f"What is the {thing.category} doing?", f"The {thing.category} is {found[1].strip()}.")
                break


def description(scene: _Scene) -> list[Turn]:
    """What captions say, then every object counted and placed."""
    asked = scene.draw(
        (
            "Describe the image in detail.",
            "Give a detailed description of the image.",
            "What is in this image? Please be thorough.",
            "Write a careful description of everything that the image shows.",
        )
    )
    said = [_sentence(max(scene.facts.captions, key=len))]
    if scene.present:
        said.append(f"In all, there {scene.verb()} {scene.inventory()}.")
    said += [f"The {thing.category} is {place(thing)} of the image." for thing in scene.single]
    related = [turn.answer for turn in relations(scene)]
    return [Turn(asked, " ".join(said + related[:3]))]


def reasoning(scene: _Scene) -> list[Turn]:
    """One question whose answer takes more than one look-up: what is seen, and what follows."""
    found = [turn for rule in (order, comparison, remaining) for turn in rule(scene)]
    if not found:
        return []
    turn = scene.rng.choice(found)
    return [Turn(turn.question, f"{_sentence(max(scene.facts.captions, key=len))} {turn.answer}")]


def order(scene: _Scene) -> Iterator[Turn]:
    for axis, way, words_of in ((0, "from left to right", horizontal), (1, "from top to bottom", vertical)):
        row = sorted(scene.single, key=lambda thing: _centre(thing)[axis])
        apart = all(words_of(first, second) for first, second in pairwise(row))
        if 2 <= len(row) <= MOST_TURNS and apart:
            names = [f"the {thing.category}" for thing in row]
            shuffled = listed(scene.rng.sample(names, len(names)))
            steps = [f"{first} is {words_of(one, two)} {second}"
                     for one, two, first, second in zip(row, row[1:], names, names[1:], strict=False)]  # fmt: skip
            asked = f"Going {way}, in which order do {shuffled} come, and why?"
            yield Turn(asked, f"{_sentence(listed(steps))} So the order {way} is {', then '.join(names)}.")


def comparison(scene: _Scene) -> Iterator[Turn]:
    for (one, most), (two, fewest) in permutations(scene.counts.items(), 2):
        if most > fewest:
            asked = f"Are there more {plural(one)} or more {plural(two)} in the image, and how many more?"
            known = f"There {'is' if fewest == 1 else 'are'} {number(fewest)} {two if fewest == 1 else plural(two)}"
            rest = f"{number(most)} {plural(one)}, so the {plural(one)} are more by {number(most - fewest)}."
            yield Turn(asked, f"{known} against {rest}")


def remaining(scene: _Scene) -> Iterator[Turn]:
    for name, count in scene.counts.items():
        if plural(name) == name:
            continue
        asked = f"Suppose that one {name} were taken out of the image. How many {plural(name)} would remain, and why?"
        have = f"There {'is' if count == 1 else 'are'} {number(count)} {name if count == 1 else plural(name)}"
        left = "none would remain" if count == 1 else f"{number(count - 1)} would remain"
        yield Turn(asked, f"{have} in the image. Without one of them, {left}.")


def place(thing: Thing) -> str:
    """Where its centre stands, in thirds of the image."""
    down, across = _thirds(thing)
    if down and across:
        return f"in the {down} {across}"
    return f"on the {across} side" if across else f"at the {down}" if down else "in the center"


def short_place(thing: Thing) -> str:
    """The same as one of nine words, `top-left` to `bottom-right`."""
    down, across = _thirds(thing)
    return f"{down or 'middle'}-{across or 'middle'}" if down or across else "center"


def _thirds(thing: Thing) -> tuple[str, str]:
    x, y = _centre(thing)
    across = "left" if x < 1 / 3 else "right" if x > 2 / 3 else ""
    return "top" if y < 1 / 3 else "bottom" if y > 2 / 3 else "", across


def horizontal(first: Thing, second: Thing) -> str:
    """How the first stands to the second; nothing where their centres are level."""
    apart = _centre(first)[0] - _centre(second)[0]
    return "" if abs(apart) < FEWEST_APART else "to the left of" if apart < 0 else "to the right of"


def vertical(first: Thing, second: Thing) -> str:
    apart = _centre(first)[1] - _centre(second)[1]
    return "" if abs(apart) < FEWEST_APART else "above" if apart < 0 else "below"


def _centre(thing: Thing) -> tuple[float, float]:
    left, top, right, bottom = thing.box
    return (left + right) / 2, (top + bottom) / 2


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".;, ")
    return f"{text[:1].upper()}{text[1:]}."
