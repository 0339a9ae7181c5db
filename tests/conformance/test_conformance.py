"""The suite passes sound connectors, and each planted fault fails the checks that it has to, and no others."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.conformance import faulty, sound
from vlmzoo.conformance import CHECKS, Subject, check, run
from vlmzoo.connector import connectors


@contextmanager
def registered(connector: type) -> Iterator[str]:
    name = f"test {connector.__name__}"
    connectors.register(name)(connector)
    try:
        yield name
    finally:
        connectors.remove([name])


def failures(connector: type, **options: Any) -> dict[str, str]:
    with registered(connector) as name:
        return {result.name: result.message for result in check(name, options) if not result.passed}


@pytest.mark.parametrize(
    ("connector", "options"),
    [
        (sound.Strided, {}),
        (sound.Strided, {"stride": 7}),
        (sound.Merged, {}),
        (sound.Merged, {"dropout": 0.3}),
        (sound.Pooled, {}),
        (sound.Sparse, {}),
        (sound.Interleaved, {}),
    ],
)
def test_sound_connectors_pass(connector: type, options: Mapping[str, Any]) -> None:
    assert failures(connector, **options) == {}


@pytest.mark.parametrize(("connector", "checks"), faulty.FAULTS)
def test_each_fault_fails_its_checks_and_no_others(connector: type, checks: set[str]) -> None:
    found = failures(connector)
    assert set(found) == checks, found


def test_each_check_has_a_fault_that_only_it_catches() -> None:
    alone = {name for _, checks in faulty.FAULTS if len(checks) == 1 for name in checks}
    assert alone == set(CHECKS)


def test_what_a_connector_raises_is_one_line_of_a_failed_check() -> None:
    found = failures(faulty.raising(RuntimeError("first line\nsecond line")))
    assert len(found) == len(CHECKS)
    assert found["padding_has_no_influence"] == "RuntimeError: first line"
    assert all("\n" not in message for message in found.values())


def test_an_unknown_name_or_option_is_the_users_error() -> None:
    with pytest.raises(ValueError, match="did you mean 'linear'"):
        check("liner", {})
    with pytest.raises(ValueError, match="stride"), registered(sound.Strided) as name:
        check(name, {"strid": 3})


def test_a_check_leaves_the_generator_and_the_model_as_they_were() -> None:
    with registered(faulty.BatchNorm) as name:
        subject = Subject(name)
        before = {key: value.clone() for key, value in subject.model.state_dict().items()}
        state = torch.get_rng_state()
        for each in CHECKS:
            run(each, subject)
        assert torch.equal(torch.get_rng_state(), state)
        assert not subject.model.training
        assert all(torch.equal(value, before[key]) for key, value in subject.model.state_dict().items())


def test_messages_say_what_the_contract_needs_said() -> None:
    with registered(sound.Merged) as name:
        assert "refuses grids [(3, 5)]" in run("tokens_agree_with_num_tokens", Subject(name)).message
    found = failures(faulty.UnusedLayer)
    assert found == {"every_parameter_gets_a_gradient": "no gradient in inner.forgotten.weight, inner.forgotten.bias"}
    result = run("works_on_meta", Subject("linear"))
    assert json.loads(json.dumps(result.as_dict())) == dataclasses.asdict(result)
