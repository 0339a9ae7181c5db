"""Names are exact, held once, and their options are what the constructor says."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from vlmzoo.connector import connectors
from vlmzoo.registry import Registry, unknown


@pytest.fixture
def registry() -> Registry:
    registry = Registry("part", provided=("dim",))

    @registry.register("plain")
    class Plain:
        def __init__(self, dim: int, depth: int = 1) -> None:
            self.dim, self.depth = dim, depth

    @registry.register("full")
    class Full:
        def __init__(self, *, dim: int, size: int, kind: str = "a", **rest: Any) -> None:
            self.values = {"dim": dim, "size": size, "kind": kind, **rest}

    return registry


def test_names_are_exact_and_sorted(registry: Registry) -> None:
    assert registry.names() == ["full", "plain"]
    assert registry.get("plain").__name__ == "Plain"
    for name in ("Plain", "plain ", "PLAIN", ""):
        with pytest.raises(ValueError, match="unknown part"):
            registry.get(name)


def test_a_name_is_held_once_and_both_who_want_it_are_named(registry: Registry) -> None:
    class Other:
        pass

    with pytest.raises(ValueError) as found:
        registry.register("plain")(Other)
    message = str(found.value)
    assert "part 'plain' is registered twice" in message
    assert f"{__name__}.registry.<locals>.Plain" in message
    assert f"{__name__}.{Other.__qualname__}" in message
    assert registry.get("plain").__name__ == "Plain"


def test_a_name_that_was_removed_is_free(registry: Registry) -> None:
    registry.remove(["plain"])
    assert registry.names() == ["full"]
    registry.register("plain")(int)
    assert registry.get("plain") is int


def test_register_gives_the_class_back(registry: Registry) -> None:
    assert registry.register("number")(int) is int


def test_options_are_the_keyword_only_parameters_that_are_not_provided(registry: Registry) -> None:
    assert list(registry.options("plain")) == []  # a positional one is no option, whatever its default
    assert list(registry.options("full")) == ["size", "kind"]


def test_defaults_are_written_out(registry: Registry) -> None:
    assert registry.resolve("full", {"size": 3}) == {"size": 3, "kind": "a"}
    assert registry.resolve("full", {"kind": None, "size": 3}) == {"size": 3, "kind": None}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": 1, "knid": 2}, "unknown option of part 'full': 'knid'; did you mean 'kind'? Valid: kind, size"),
        ({"size": 1, "xyz": 2}, "unknown option of part 'full': 'xyz'. Valid: kind, size"),
        ({"size": 1, "dim": 2}, "unknown option of part 'full': 'dim'. Valid: kind, size"),
        ({}, "part 'full' needs its option 'size', which has no default"),
    ],
)
def test_options_that_do_not_fit(registry: Registry, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError) as found:
        registry.resolve("full", options)
    assert str(found.value) == expected


def test_a_part_gets_of_what_is_provided_what_it_names(registry: Registry) -> None:
    provided = {"dim": 4, "other": 5}
    assert registry.create("plain", {}, provided).dim == 4
    assert registry.create("full", {"size": 1}, provided).values == {"dim": 4, "size": 1, "kind": "a"}


@pytest.mark.parametrize(
    ("name", "valid", "expected"),
    [
        ("mpl", ["mlp", "linear"], "unknown thing 'mpl'; did you mean 'mlp'? Valid: linear, mlp"),
        ("zzz", ["mlp", "linear"], "unknown thing 'zzz'. Valid: linear, mlp"),
        (3, ["mlp"], "unknown thing 3. Valid: mlp"),
        ("mlp", [], "unknown thing 'mlp'. Valid: none"),
    ],
)
def test_unknown_says_the_nearest_and_all(name: object, valid: Iterable[str], expected: str) -> None:
    assert str(unknown("thing", name, valid)) == expected


def test_no_connector_takes_what_is_filled_in_as_an_option() -> None:
    from vlmzoo.build import load_connectors

    load_connectors()
    assert {"linear", "mlp", "qformer", "perceiver", "gated_cross_attention"} <= set(connectors.names())
    for name in connectors.names():
        assert not {"vision_dim", "text_dim", "vision", "text"} & set(connectors.options(name))
