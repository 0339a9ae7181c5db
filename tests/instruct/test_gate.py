"""Every rule of the gate, by an answer that breaks it and the nearest one that does not; and the rule-based teacher."""

from __future__ import annotations

import json

import pytest

from vlmzoo.instruct import gate, rules
from vlmzoo.instruct.annotations import Facts, Thing
from vlmzoo.instruct.duplicates import Duplicates
from vlmzoo.instruct.grounding import Scene
from vlmzoo.instruct.words import Vocabulary, plural, words

FACTS = Facts(
    7,
    "a.jpg",
    (640, 480),
    ("A man rides a brown horse next to two dogs.", "A man on a horse, some sheep and a kite behind him."),
    (
        Thing("person", (0.1, 0.1, 0.3, 0.9)),
        Thing("horse", (0.2, 0.3, 0.6, 0.95)),
        Thing("dog", (0.7, 0.7, 0.8, 0.9)),
        Thing("dog", (0.8, 0.1, 0.9, 0.2)),
        Thing("sheep", (0.6, 0.1, 0.9, 0.2), crowd=True),
    ),
)
CATEGORIES = ("person", "horse", "dog", "cat", "sheep", "kite", "car")
VOCABULARY = Vocabulary(CATEGORIES)
SCENE = Scene(FACTS, VOCABULARY)
FILLER = ("What is the mood of the scene?", "It looks calm, and everybody seems to like being there.")


def reason(question: str, answer: str, kind: str = "conversation") -> str | None:
    turns = [(question, answer), FILLER] if kind == "conversation" else [(question, answer)]
    return gate.judge(kind, turns, SCENE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "empty"),
        (" \n", "empty"),
        ("Sure! Here is the conversation", "not_json"),
        ('[{"question": "a", "answer": "b"}', "not_json"),
        ("[" * 100_000, "not_json"),
        ('{"question": "a", "answer": "b"}', "not_turns"),
        ('["a", "b"]', "not_turns"),
        ('[{"question": "a"}]', "not_turns"),
        ('[{"question": "a", "answer": 3}]', "not_turns"),
        ('[{"question": " ", "answer": "b"}]', "empty_turn"),
        ("[]", "nothing_said"),
        ('```json\n[{"question": "a", "answer": "b  c"}]\n```', [("a", "b c")]),
        ('[{"question": "a", "answer": "b"}]', [("a", "b")]),
    ],
)
def test_an_answer_is_turns_or_has_a_reason(text: str, expected: object) -> None:
    assert gate.parse(text) == expected


@pytest.mark.parametrize(
    ("question", "answer", "expected"),
    [
        # objects
        ("What is there?", "A man rides a horse.", None),
        ("What is there?", "A cat sleeps.", "object_not_there"),
        ("What is there?", "There is a car behind the man.", "object_not_there"),
        ("What is there?", "There is no car.", None),
        ("What is there?", "The man flies a kite.", None),
        ("What is the cat doing?", "It sleeps.", "object_not_there"),
        ("Is there a cat in the image?", "No.", None),
        ("Is there a cat in the image?", "Yes.", "object_not_there"),
        ("Is there a dog?", "Yes, there is.", None),
        ("Is there a dog?", "No, there is not.", "object_denied"),
        ("Can a horse be seen in the image?", "No.", "object_denied"),
        ("What is missing?", "There is no horse in the image.", "object_denied"),
        ("What is missing?", "There is no horse on the left.", None),
        ("What is missing?", "There are no women in the image.", None),
        ("What does he eat?", "He eats a hot dog.", "object_not_there"),
        ("What color is the horse?", "It is orange or brown.", None),
        ("What does he do?", "He can bear the cold, and will train for a race.", None),
        # counts
        ("How many dogs are there?", "There are two dogs.", None),
        ("How many dogs are there?", "Two.", None),
        ("How many dogs are there?", "Three.", "wrong_count"),
        ("How many dogs are there?", "There is 1 dog.", "wrong_count"),
        ("How many dogs can be seen?", "I see 4 of them.", "wrong_count"),
        ("How many brown dogs are there?", "One.", None),
        ("How many sheep are there?", "About twenty.", None),
        ("How many men are there?", "There is one man.", None),
        ("How many cats are there?", "None.", None),
        ("How many cats are there?", "One.", "wrong_count"),
        ("What is there?", "There are two dogs and one horse in the image.", None),
        ("What is there?", "There are two dogs, two horses and a man.", "wrong_count"),
        ("What is there?", "There is one dog in the image.", "wrong_count"),
        ("What is there?", "There is one dog sitting on the right.", None),
        ("What is there?", "The man looks at three dogs.", "wrong_count"),
        ("What is there?", "The man looks at one of the dogs.", None),
        # relations
        ("Where is he?", "The man is to the left of the horse.", None),
        ("Where is he?", "The man is to the right of the horse.", "wrong_relation"),
        ("Where is he?", "The horse is located on the right side of the man.", None),
        ("Where is he?", "The horse is located on the left side of the man.", "wrong_relation"),
        ("Where is it?", "A dog is above the horse.", None),
        ("Where is it?", "The sheep is below the horse.", "wrong_relation"),
        ("Is the horse to the right of the man?", "Yes, it is.", None),
        ("Is the horse to the left of the man?", "Yes, it is.", "wrong_relation"),
        ("Is the horse to the left of the man?", "No, it is not.", None),
        # places
        ("Where is it?", "The horse is on the left side of the image.", None),
        ("Where is it?", "The horse is on the right side of the image.", "wrong_place"),
        ("Where is it?", "A dog is in the top right corner of the image.", None),
        ("Where is it?", "A dog is in the top-left corner of the image.", "wrong_place"),
        ("Where is it?", "A dog is at the bottom of the picture.", None),
        # form and what may be said
        ("What does the caption say?", "It is nice.", "refers_to_annotations"),
        ("What is there?", "According to the bounding boxes, a man.", "refers_to_annotations"),
        ("What is there?", "Based on the description, a man.", "refers_to_annotations"),
        ("What material is the saddle made of?", "Leather.", "not_tellable_from_text"),
        ("How is the lighting?", "Soft.", "not_tellable_from_text"),
        ("What does the sign on the wall say?", "Stop.", "not_tellable_from_text"),
        ("<image> What is there?", "A man.", "markup"),
        ("What is there?", "USER: What?", "markup"),
        (
            "Was ist auf dem Bild zu sehen?",
            "Ein Mann reitet, und viele Leute sehen ihm zu.",
            "not_english",
        ),
        ("What " * 101, "A man.", "question_too_long"),
        ("What is there?", "so " * 151, "answer_too_long"),
        (FILLER[0].upper(), "A man.", "repeated_question"),
    ],
)
def test_a_turn_passes_or_has_a_reason(question: str, answer: str, expected: str | None) -> None:
    assert reason(question, answer) == expected


def test_kinds_have_lengths_of_their_own() -> None:
    assert gate.judge("conversation", [FILLER], SCENE) == "too_few_turns"
    assert gate.judge("detailed_description", [FILLER, FILLER], SCENE) == "too_many_turns"
    assert reason("Describe it.", "A man.", "detailed_description") == "answer_too_short"
    assert gate.judge("detailed_description", [FILLER], SCENE) is None


def test_every_answer_of_the_rules_passes_and_is_the_same_again() -> None:
    for kind in gate.TURNS:
        for seed in range(200):
            said = rules.answer(kind, FACTS, VOCABULARY, CATEGORIES, seed)
            assert said == rules.answer(kind, FACTS, VOCABULARY, CATEGORIES, seed)
            turns = gate.parse(said)
            assert not isinstance(turns, str), turns
            assert gate.judge(kind, turns, SCENE) is None, turns


def test_the_rules_state_what_captions_state_and_nothing_of_a_crowd() -> None:
    said = [rules.answer("conversation", FACTS, VOCABULARY, CATEGORIES, seed) for seed in range(300)]
    turns = {(turn["question"], turn["answer"]) for text in said for turn in json.loads(text)}
    assert ("What color is the horse?", "The horse is brown.") in turns
    assert ("Is there a cat in the image?", "No, there is no cat in the image.") in turns
    assert ("Where is the horse?", "The horse is in the center of the image.") in turns
    assert not any("kite" in question and answer.startswith("No") for question, answer in turns)
    assert not any("sheep" in question and "many" in question for question, _ in turns)
    assert not any(question == "Where is the dog?" for question, _ in turns), "which of the two?"


def test_short_answers_are_a_word_or_two_say_the_same_and_pass() -> None:
    short, long = (
        {(turn["question"], turn["answer"]) for seed in range(300) for turn in json.loads(text(seed))}
        for text in (
            lambda seed: rules.answer("conversation", FACTS, VOCABULARY, CATEGORIES, seed, short=True),
            lambda seed: rules.answer("conversation", FACTS, VOCABULARY, CATEGORIES, seed),
        )
    )
    assert ("What color is the horse?", "brown") in short
    assert ("Is there a cat in the image?", "no") in short
    assert ("Where is the horse?", "center") in short
    assert all(len(answer.split()) <= 2 for _, answer in short)
    said = dict(long)
    assert all(answer.split("-")[-1] in said[question].lower() for question, answer in short if answer.isalpha())
    for seed in range(100):
        turns = gate.parse(rules.answer("conversation", FACTS, VOCABULARY, CATEGORIES, seed, short=True))
        assert not isinstance(turns, str)
        assert gate.judge("conversation", turns, SCENE) in (None, "too_few_turns"), turns


def test_an_image_without_boxes_gives_nothing_rather_than_something_false() -> None:
    bare = Facts(8, "b.jpg", (10, 10), ("A quiet place.",), ())
    said = json.loads(rules.answer("complex_reasoning", bare, VOCABULARY, CATEGORIES, 0))
    assert said == []
    described = json.loads(rules.answer("detailed_description", bare, VOCABULARY, CATEGORIES, 0))
    assert described[0]["answer"] == "A quiet place."


def test_names_of_objects_are_found_the_longest_first() -> None:
    found = VOCABULARY.mentions(words("Two hot dogs, a traffic light, the men and an orange; an orange cat"))
    assert [(mention.category, mention.plural) for mention in found] == [
        ("hot dog", True),
        ("traffic light", False),
        ("person", True),
        ("orange", False),
        ("cat", False),
    ]
    nouns = ("bus", "person", "knife", "wine glass", "couch", "sheep", "teddy bear", "lady", "key")
    expected = ["buses", "people", "knives", "wine glasses", "couches", "sheep", "teddy bears", "ladies", "keys"]
    assert list(map(plural, nouns)) == expected


def test_duplicates_are_found_word_for_word_always_and_nearly_in_the_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vlmzoo.instruct.duplicates.WINDOW", 2)
    long = " ".join(f"word{number}" for number in range(200))
    found = Duplicates(100)
    assert found.reason(long) is None
    assert found.reason(long.upper() + "!") == "duplicate"
    assert found.reason(f"{long} more") == "near_duplicate"
    assert found.reason(" ".join(reversed(long.split()))) is None
    for number in range(4):
        assert found.reason(f"another text with the number {number} in it, which is {number * 7}") is None
    assert found.reason(long) == "duplicate"
    assert found.reason(f"{long} more") is None, "out of the window"
