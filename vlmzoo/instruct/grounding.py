"""What plain sentences claim of objects, against an image's captions and boxes.

A claim is judged where it is said plainly: which objects there are, how many, where one stands to another and in the
image. What is said otherwise passes. Words that name objects are first replaced: `there are two @0 and a @1`.

Source: Rohrbach et al., Object Hallucination in Image Captioning (2018), for objects named in text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cached_property

from vlmzoo.instruct.annotations import Box, Facts
from vlmzoo.instruct.words import NUMBERS, Mention, Vocabulary, words

Turn = tuple[str, str]  # question, answer
Phrase = tuple[str, list[Mention]]  # lower-case words, each named object as @ and its number

SLACK = 0.02  # of the image's side, by which a centre may stand beyond where it is said to be
COUNTED = {**{word: count for count, word in enumerate(NUMBERS)}, "zero": 0, "none": 0}

_SENTENCE = re.compile(r"(?<=[.!?;])\s+")
_NUMBER = rf"(\d+|{'|'.join(COUNTED)})"
_HERE = r"(?: (?:are there|is there|can (?:be seen|you see)|do you see|are (?:shown|visible|present)))?"
_IN_IMAGE = r"(?: (?:in|of) (?:the|this) (?:image|picture|scene|photo))?"
_PRESENCE = re.compile(
    rf"(?:(?:is|are) there|can (?:you|one|we) see|do you see|does the image show) (?:any |an? |some )?@(\d+){_IN_IMAGE}"
    rf"|can (?:an? |any )?@(\d+) be seen{_IN_IMAGE}"
)
_HOW_MANY = re.compile(rf"(?:how many|what is the number of) @(\d+){_HERE}{_IN_IMAGE}")
_SUPPOSES = re.compile(r"\b(?:is|are) there\b|\bhow many\b|\bnumber of\b|\bsee\b|\bseen\b|\bshow\b|\bif\b|\bsuppose\b")
_NOT = re.compile(r"\b(?:no|not|without|none|never|nor|neither|if|would|could|might|may|\w+n't)\b")
_DENIAL = re.compile(rf"\b(?:no|not any) @(\d+){_IN_IMAGE}$|\b\w+n't any @(\d+){_IN_IMAGE}$")
_EXACT = re.compile(
    rf"^(?:yes )?there (?:is|are) (?:exactly |only )?(?:\S+ )*?{_NUMBER} @(\d+)(?=$| and\b| an? @| {_NUMBER} @)"
)
_SOME = re.compile(rf"\b{_NUMBER} (?:\w+ )?@(\d+)")
_LINK = r"(?:is |are |stands |sits |located |positioned |placed |standing |directly |just |somewhat )*"
_RELATION = re.compile(
    rf"@(\d+) {_LINK}(?:(?:to|on) the (left|right)(?: side)? of|(above|below)) (?:the |an? )(?:\w+ )?@(\d+)"
)
_ASKED_RELATION = re.compile(rf"^(?:is|are) (?:the |an? )(?:\w+ )?{_RELATION.pattern}$")
_PLACE = re.compile(
    rf"@(\d+) {_LINK}(?:in|at|on|near) the (?:(top|bottom) ?)?(left|right)?(?: (?:side|part|corner|half))?"
    r" of (?:the|this) (?:image|picture|scene|photo)"
)
_SIDES = {"left": (0, -1), "right": (0, 1), "above": (1, -1), "below": (1, 1), "top": (1, -1), "bottom": (1, 1)}


class Scene:
    """What is known of an image, for looking up."""

    def __init__(self, facts: Facts, vocabulary: Vocabulary) -> None:
        self.facts, self.vocabulary = facts, vocabulary
        self.boxes: dict[str, list[Box]] = {}
        for thing in facts.things:
            self.boxes.setdefault(thing.category, []).append(thing.box)
        self.crowds = {thing.category for thing in facts.things if thing.crowd}

    @cached_property
    def known(self) -> set[str]:
        """Categories that boxes or captions name."""
        told = [self.vocabulary.mentions(words(caption)) for caption in self.facts.captions]
        return {*self.boxes, *(mention.category for mentions in told for mention in mentions)}

    def phrase(self, text: str) -> Phrase:
        told = words(text)
        mentions = self.vocabulary.mentions(told)
        for number, mention in reversed(list(enumerate(mentions))):
            told[mention.start : mention.end] = [f"@{number}"]
        return " ".join(told), mentions

    def phrases(self, text: str) -> Iterator[Phrase]:
        return map(self.phrase, _SENTENCE.split(text))

    def refutes(self, mention: Mention, count: int, *, exact: bool) -> bool:
        """Whether the boxes speak against so many, or (not `exact`) against so many and more."""
        boxes = len(self.boxes.get(mention.category, ()))
        if mention.category in self.crowds or (not boxes and mention.category in self.known):
            return False  # a crowd has no number; nor has what captions alone tell of
        return count != boxes if exact and mention.whole else count > boxes


def objects(turn: Turn, scene: Scene) -> str | None:
    """Every object that is named is there; what is said not to be there has no box."""
    (asked, named), yes = scene.phrase(turn[0]), _yes(turn[1])
    if (presence := _PRESENCE.fullmatch(asked)) and yes is not None:
        mention = named[int(presence[1] or presence[2])]
        if yes and mention.category not in scene.known:
            return "object_not_there"
        if not yes and mention.category in scene.boxes and mention.whole:
            return "object_denied"
    elif not _SUPPOSES.search(asked) and any(mention.category not in scene.known for mention in named):
        return "object_not_there"
    for said, mentions in scene.phrases(turn[1]):
        for number, mention in enumerate(mentions):
            before = said[: said.index(f"@{number}")]
            if mention.category not in scene.known and not _NOT.search(before):
                return "object_not_there"
        for denial in _DENIAL.finditer(said):
            mention = mentions[int(denial[1] or denial[2])]
            if mention.category in scene.boxes and mention.whole:
                return "object_denied"
    return None


def counts(turn: Turn, scene: Scene) -> str | None:
    """Answers to `how many` and `there are two dogs` are exact; two dogs elsewhere may be two of three."""
    asked, named = scene.phrase(turn[0])
    if how_many := _HOW_MANY.fullmatch(asked):
        said = re.search(rf"\b{_NUMBER}\b", scene.phrase(turn[1])[0])
        if said and scene.refutes(named[int(how_many[1])], _count(said[1]), exact=True):
            return "wrong_count"
    for said, mentions in scene.phrases(turn[1]):
        text = re.sub(f"{_IN_IMAGE}$", "", said)
        while exact := _EXACT.search(text):
            if scene.refutes(mentions[int(exact[2])], _count(exact[1]), exact=True):
                return "wrong_count"
            text = f"there are{text[exact.end() :]}"
        for some in _SOME.finditer(said):
            if scene.refutes(mentions[int(some[2])], _count(some[1]), exact=False):
                return "wrong_count"
    return None


def relations(turn: Turn, scene: Scene) -> str | None:
    """Of some of the objects named it is true that one is left of, right of, above or below the other."""
    asked, named = scene.phrase(turn[0])
    yes = _yes(turn[1])
    if yes is not None and (found := _ASKED_RELATION.match(asked)) and _stand(found, named, scene) is (not yes):
        return "wrong_relation"
    for said, mentions in scene.phrases(turn[1]):
        if not _NOT.search(said) and any(_stand(found, mentions, scene) is False for found in _RELATION.finditer(said)):
            return "wrong_relation"
    return None


def places(turn: Turn, scene: Scene) -> str | None:
    """Of some of the objects named it is true that it stands in that half or corner of the image."""
    for said, mentions in scene.phrases(turn[1]):
        for found in () if _NOT.search(said) else _PLACE.finditer(said):
            sides = [_SIDES[word] for word in (found[2], found[3]) if word]
            boxes = scene.boxes.get(mentions[int(found[1])].category)
            if boxes and not any(all(_in_half(box, *side) for side in sides) for box in boxes):
                return "wrong_place"
    return None


def _stand(found: re.Match[str], mentions: list[Mention], scene: Scene) -> bool | None:
    """Whether two objects stand so; None where boxes do not tell."""
    first, second = (scene.boxes.get(mentions[int(found[group])].category) for group in (1, 4))
    if not first or not second:
        return None
    axis, sign = _SIDES[found[2] or found[3]]
    apart = [(_centre(one, axis) - _centre(two, axis)) * sign for one in first for two in second if one is not two]
    return max(apart) > -SLACK if apart else None


def _in_half(box: Box, axis: int, sign: int) -> bool:
    return (_centre(box, axis) - 0.5) * sign > -SLACK


def _centre(box: Box, axis: int) -> float:
    return (box[axis] + box[axis + 2]) / 2


def _count(word: str) -> int:
    return COUNTED[word] if word in COUNTED else int(word)


def _yes(answer: str) -> bool | None:
    return {"yes": True, "no": False}.get("".join(words(answer)[:1]))
