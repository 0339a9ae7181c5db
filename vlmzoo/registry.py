"""Exact names -> parts, with the options read from each part's constructor."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

LONGEST = 200  # characters of a value in a message


def unknown(what: str, name: object, valid: Iterable[str]) -> ValueError:
    """The one way to say that a name is not known: what was given, the nearest valid one, and all of them."""
    names = sorted(map(str, valid))
    near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {what} {name!r}{hint} Valid: {', '.join(names) or 'none'}")


def shown(value: object) -> str:
    """A value for a message, which stays one line however long the value is."""
    written = repr(value)
    return written if len(written) <= LONGEST else f"{written[: LONGEST - 1]}…"


def matching(what: str, pattern: str, names: Iterable[str]) -> list[str]:
    """The names that a pattern with `*` matches.

    Raises:
        ValueError: none; the message calls it `what` and gives the nearest name.
    """
    names = list(names)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern.replace("*", ""), names, n=1, cutoff=0.0)
        hint = f"; the nearest is {near[0]!r}" if near else ""
        raise ValueError(f"{what} {pattern!r} matches none of {len(names)} names{hint}")
    return found


class Registry:
    """Names of one kind of part. Keyword-only constructor parameters that `provided` does not name are its options."""

    def __init__(self, kind: str, bases: tuple[type, ...] = (object,), provided: Collection[str] = ()) -> None:
        self.kind = kind
        self.bases = bases
        self.provided = frozenset(provided)
        self._parts: dict[str, type] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A class decorator that files the class under exactly this name.

        Raises:
            ValueError: the name is taken, or the class has none of the bases or leaves a method of theirs undefined.
        """

        def add(part: T) -> T:
            if not issubclass(part, self.bases):
                bases = " or ".join(base.__name__ for base in self.bases)
                raise ValueError(f"{self.kind} {name!r}: {part.__qualname__} does not derive from {bases}")
            if missing := sorted(getattr(part, "__abstractmethods__", ())):
                raise ValueError(f"{self.kind} {name!r}: {part.__qualname__} does not define {', '.join(missing)}")
            if name in self._parts:
                held = self._parts[name]
                raise ValueError(
                    f"{self.kind} {name!r} is registered twice: by {held.__module__}.{held.__qualname__} "
                    f"and by {part.__module__}.{part.__qualname__}; names must differ"
                )
            self._parts[name] = part
            return part

        return add

    def remove(self, names: Iterable[str]) -> None:
        """Takes names out again (a plugin that failed half-way leaves nothing behind)."""
        for name in names:
            del self._parts[name]

    def names(self) -> list[str]:
        return sorted(self._parts)

    def get(self, name: str) -> type:
        if name not in self._parts:
            raise unknown(self.kind, name, self._parts)
        return self._parts[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """The part's options by name, as its constructor declares them."""
        parameters = inspect.signature(self.get(name)).parameters
        return {
            key: parameter
            for key, parameter in parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and key not in self.provided
        }

    def resolve(self, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """The given options with every default written out.

        A part whose options name another part writes out that one's too, by a static method
        `resolved(options) -> options`.

        Raises:
            ValueError: an option that the part does not have, or a required one that is missing.
        """
        declared = self.options(name)
        for key in options:
            if key not in declared:
                raise unknown(f"option of {self.kind} {name!r}:", key, declared)
        resolved = {}
        for key, parameter in declared.items():
            if key in options:
                resolved[key] = options[key]
            elif parameter.default is not inspect.Parameter.empty:
                resolved[key] = parameter.default
            else:
                raise ValueError(f"{self.kind} {name!r} needs its option {key!r}, which has no default")
        further = getattr(self.get(name), "resolved", None)
        return further(resolved) if further else resolved

    def create(self, name: str, options: Mapping[str, Any], provided: Mapping[str, Any]) -> Any:
        """A new part from its resolved options and those of the provided values that its constructor names."""
        parameters = inspect.signature(self.get(name)).parameters
        given = {key: value for key, value in provided.items() if key in parameters}
        return self.get(name)(**given, **self.resolve(name, options))
