import pytest

from vlmzoo.evaluation.metrics import Prediction, exact_match, normalise, score


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  A red\n cube. ", "a red cube"),
        ('"Yes!"', "yes"),
        ("(two)", "two"),
        ("it's 3.5", "it's 3.5"),
        ("-5", "-5"),
        ("50%", "50%"),
        ("STRASSE", "strasse"),
        ("?", ""),
    ],
)
def test_normalise(text: str, normal: str) -> None:
    assert normalise(text) == normal
    assert normalise(normal) == normal


def test_exact_match_is_of_the_whole_answer() -> None:
    assert exact_match("Red.", "red") == 1
    assert exact_match("red cube", "red") == 0
    assert exact_match("-5", "5") == 0
    assert exact_match("", "red") == 0


def prediction(capability: str, value: float) -> Prediction:
    return Prediction("1", "What?", "a", "b", value, capability)


def test_capabilities_weigh_the_same_whatever_their_size() -> None:
    found = score([prediction("colour", 1.0), *[prediction("count", value) for value in (0.0, 0.0, 1.0, 0.0)]])
    assert found == {"accuracy": 0.625, "capabilities": {"colour": 1.0, "count": 0.25}, "num_items": 5}
    assert list(found["capabilities"]) == ["colour", "count"]


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="no predictions"):
        score([])
