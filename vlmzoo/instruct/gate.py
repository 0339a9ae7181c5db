"""The quality gate: what a teacher answered -> turns, or the short name of the reason why not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from vlmzoo.instruct import grounding
from vlmzoo.instruct.grounding import Scene, Turn
from vlmzoo.instruct.words import words

LANGUAGE_FROM = 60  # characters: what is shorter has no language that could be told
MOST_QUESTION = 100  # words
TURNS = {"conversation": (2, 12), "detailed_description": (1, 1), "complex_reasoning": (1, 1)}
ANSWER_WORDS = {"conversation": (1, 150), "detailed_description": (8, 400), "complex_reasoning": (8, 400)}

MARKUP = re.compile(r"<image>|\b(?:USER|ASSISTANT):|</s>|<\|")
REFERS = re.compile(
    r"\b(?:captions?|bounding[ -]box\w*|(?:the|these|those|given|provided) boxes|annotat\w+|coordinates?"
    r"|(?:given|provided|above) (?:text|descriptions?|information|context|sentences)"
    r"|(?:based on|according to|from) the (?:text|descriptions?|sentences))\b",
    re.IGNORECASE,
)
UNTELLABLE = re.compile(
    r"\b(?:textures?|materials?|fabrics?|made (?:of|from)|lighting|light source|brightness|shadows?|reflections?"
    r"|written|writing|letters?|fonts?|logos?|brands?|inscriptions?|text on|facial expressions?"
    r"|(?:what|which) (?:words?|texts?|numbers?) (?:is|are) on|what do(?:es)? [\w ]*(?:say|read))\b",
    re.IGNORECASE,
)

Rule = Callable[[str, list[Turn], Scene], str | None]


def parse(text: str) -> list[Turn] | str:
    """The turns of an answer, a JSON list of objects with `question` and `answer`; or a reason."""
    text = text.strip()
    if not text:
        return "empty"
    if fenced := re.fullmatch(r"```(?:json)?\s*(.*?)\s*```", text, re.DOTALL):
        text = fenced[1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return "not_json"
    if not isinstance(found, list):
        return "not_turns"
    turns = []
    for item in found:
        if not isinstance(item, dict) or not all(isinstance(item.get(key), str) for key in ("question", "answer")):
            return "not_turns"
        turn = " ".join(item["question"].split()), " ".join(item["answer"].split())
        if not all(turn):
            return "empty_turn"
        turns.append(turn)
    return turns or "nothing_said"


def judge(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    """The reason why turns about an image are rejected; None: they are not."""
    return next((reason for rule in RULES if (reason := rule(kind, turns, scene))), None)


def length(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    fewest, most = TURNS[kind]
    if not fewest <= len(turns) <= most:
        return "too_few_turns" if len(turns) < fewest else "too_many_turns"
    fewest, most = ANSWER_WORDS[kind]
    for question, answer in turns:
        if len(question.split()) > MOST_QUESTION:
            return "question_too_long"
        if not fewest <= len(answer.split()) <= most:
            return "answer_too_short" if len(answer.split()) < fewest else "answer_too_long"
    return None


def markup(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    """What a chat template would take for its own."""
    return "markup" if any(MARKUP.search(part) for turn in turns for part in turn) else None


def repetition(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    asked = [tuple(words(question)) for question, _ in turns]
    return "repeated_question" if len(set(asked)) < len(asked) else None


def references(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    return "refers_to_annotations" if any(REFERS.search(part) for turn in turns for part in turn) else None


def tellable(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    return "not_tellable_from_text" if any(UNTELLABLE.search(question) for question, _ in turns) else None


def language(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    import py3langid

    told = [" ".join(turn) for turn in turns]
    long = (text for text in (*told, " ".join(told)) if len(text) >= LANGUAGE_FROM)
    return "not_english" if any(py3langid.classify(text)[0] != "en" for text in long) else None


def grounded(kind: str, turns: list[Turn], scene: Scene) -> str | None:
    """What the turns say of objects, turn by turn against the annotations."""
    rules = (grounding.objects, grounding.counts, grounding.relations, grounding.places)
    return next((reason for turn in turns for rule in rules if (reason := rule(turn, scene))), None)


RULES: tuple[Rule, ...] = (length, markup, repetition, references, tellable, language, grounded)
