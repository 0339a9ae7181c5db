"""Answers are worked out again here from the question's words and the scene's objects alone."""

import random
import re
from collections import Counter

import pytest
from sklearn.datasets import load_digits

from vlmzoo.world.datasets import examples
from vlmzoo.world.scenes import RARE, Scene, SceneObject, sample_scene
from vlmzoo.world.text import CAPABILITIES, ask, caption, conversation, statements

ROWS = {"top": 0, "middle": 1, "bottom": 2}
COLUMNS = {"left": 0, "middle": 1, "right": 2}


def position(place: str) -> tuple[int, int]:
    if place == "center":
        return 1, 1
    row, column = place.split("-")
    return ROWS[row], COLUMNS[column]


def find(scene: Scene, color: str, shape: str) -> list[SceneObject]:
    return [item for item in scene.objects if (item.color, item.shape) == (color, shape)]


def solve(scene: Scene, text: str) -> str:
    """An answer found by reading the question."""
    if match := re.fullmatch(r"Is there a (\w+) (\w+)\?", text):
        return "yes" if find(scene, *match.groups()) else "no"
    if match := re.fullmatch(r"What (\w+) is the (\S+) object\?", text):
        row, column = position(match[2])
        (item,) = [item for item in scene.objects if (item.cell // 3, item.cell % 3) == (row, column)]
        return {"size": item.size, "color": item.color, "shape": item.shape}[match[1]]
    if match := re.fullmatch(r"What number is on the (\w+) sign\?", text):
        (item,) = find(scene, match[1], "sign")
        assert item.digit is not None
        return str(load_digits().target[item.digit])
    if match := re.fullmatch(r"How many (\w+ objects|\w+) are there\?", text):
        word = match[1].removesuffix(" objects")
        singular = {"crosses": "cross"}.get(word, word.removesuffix("s"))
        if word == "objects":
            return str(len(scene.objects))
        return str(len([item for item in scene.objects if item.shape == singular or item.color == word]))
    if match := re.fullmatch(r"Where is the (\w+) (\w+)\?", text):
        (item,) = find(scene, *match.groups())
        rows, columns = {v: k for k, v in ROWS.items()}, {v: k for k, v in COLUMNS.items()}
        return "center" if item.cell == 4 else f"{rows[item.cell // 3]}-{columns[item.cell % 3]}"
    match = re.fullmatch(r"Is the (\w+) (\w+) (left or right of|above or below) the (\w+) (\w+)\?", text)
    assert match, text
    (first,), (second,) = find(scene, match[1], match[2]), find(scene, match[4], match[5])
    if match[3] == "above or below":
        assert first.cell // 3 != second.cell // 3
        return "above" if first.cell // 3 < second.cell // 3 else "below"
    assert first.cell % 3 != second.cell % 3
    return "left" if first.cell % 3 < second.cell % 3 else "right"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_answers_are_right(capability: str) -> None:
    rng = random.Random(capability)
    asked = 0
    while asked < 300:
        scene = sample_scene(rng, "evaluation", rare=capability == "rare")
        question = ask(scene, capability, rng)
        if question is not None:
            assert question.answer == solve(scene, question.text), (scene, question)
            assert question.capability == capability
            asked += 1


def test_caption_names_everything_and_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(200):
        scene = sample_scene(rng)
        told = [entry.split() for entry in caption(scene).removesuffix(" .").split(" ; ")]
        read = [(position(place), size, color, shape) for place, size, color, shape in told]
        assert read == [
            (divmod(item.cell, 3), item.number or item.size, item.color, item.shape) for item in scene.objects
        ]


def test_statements_are_true() -> None:
    rng = random.Random(0)
    kinds = Counter()
    for _ in range(100):
        scene = sample_scene(rng)
        text = " ".join(piece for piece, _ in statements(scene, rng)[3:])
        for fact in text.removesuffix(" ;").split(" ; "):
            words = fact.replace(" ,", "").split()
            if words[0] == "any":
                assert words[3] == ("yes" if find(scene, words[1], words[2]) else "no")
            elif words[0] == "count":
                attributes = [{"objects", item.color, item.shape} for item in scene.objects]
                assert int(words[2]) == sum(words[1] in names for names in attributes)
            elif words[2] == "number":
                (item,) = find(scene, words[0], words[1])
                assert words[3] == item.number
            elif len(words) == 6:
                (first,), (second,) = find(scene, *words[:2]), find(scene, *words[2:4])
                across = first.cell % 3 - second.cell % 3
                down = first.cell // 3 - second.cell // 3
                assert words[4] == ("left" if across < 0 else "right" if across > 0 else "level")
                assert words[5] == ("above" if down < 0 else "below" if down > 0 else "level")
            else:
                place = words[2] if len(words) == 3 else words[0]
                color, shape = words[:2] if len(words) == 3 else words[2:]
                (item,) = find(scene, color, shape)
                assert (item.cell // 3, item.cell % 3) == position(place)
                assert len(words) == 3 or (item.number or item.size) == words[1]
            kinds[words[0] if words[0] in ("any", "count") else len(words)] += 1
    assert min(kinds[kind] for kind in ("any", "count", 3, 4, 6)) > 50


def test_held_out_questions_are_balanced() -> None:
    counted: dict[str, Counter[str]] = {}
    for _, (question,) in examples("questions", 2800, seed=0):
        counted.setdefault(question.capability, Counter())[question.answer] += 1
    assert {name: sum(answers.values()) for name, answers in counted.items()} == dict.fromkeys(CAPABILITIES, 400)
    assert counted["existence"] == {"yes": 200, "no": 200}
    relations = counted["spatial"]
    assert abs(relations["left"] - relations["right"]) < 40
    assert abs(relations["above"] - relations["below"]) < 40
    for name in CAPABILITIES[1:]:
        assert counted[name].most_common(1)[0][1] < 0.4 * 400, counted[name]


def test_attribute_and_detail_and_rare_ask_of_their_own_objects() -> None:
    """Large, small and never-taught objects; only what is asked about differs."""
    for scene, (question,) in examples("questions", 1400, seed=0):
        match = re.fullmatch(r"What (color|shape) is the (\S+) object\?", question.text)
        rare = [item for item in scene.objects if (item.color, item.shape) in RARE]
        assert len(rare) == (question.capability == "rare")
        if match is None:
            assert question.capability not in ("detail", "rare")
            continue
        (item,) = [item for item in scene.objects if divmod(item.cell, 3) == position(match[2])]
        if question.capability == "rare":
            assert rare == [item]
        else:
            assert item.size == {"attribute": "large", "detail": "small"}[question.capability]


def test_conversation_asks_different_questions() -> None:
    rng = random.Random(0)
    for _ in range(100):
        turns = conversation(sample_scene(rng), rng, 6)
        assert len({turn.text for turn in turns}) == 6


def test_unknown_capability_is_refused() -> None:
    rng = random.Random(0)
    with pytest.raises(ValueError, match="unknown capability 'colour', expected one of existence"):
        ask(sample_scene(rng), "colour", rng)
