"""What every connector promises, as checks that name what is broken.

From pytest, for a connector of your own that is registered as "mine":

    subject = Subject("mine")

    @pytest.mark.parametrize("check", CHECKS)
    def test_mine(check: str) -> None:
        result = run(check, subject)
        assert result.passed, result.message
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlmzoo.conformance import alone, whole
from vlmzoo.conformance.compare import CheckFailed
from vlmzoo.conformance.subject import Subject

CHECKS: Mapping[str, Callable[[Subject], str]] = {
    check.__name__: check
    for check in (
        alone.tokens_agree_with_num_tokens,
        whole.images_are_independent,
        alone.padding_has_no_influence,
        alone.batch_of_one_equals_batch_of_many,
        whole.every_parameter_gets_a_gradient,
        whole.image_reaches_the_loss,
        whole.checkpointed_gradients_are_the_same,
        whole.cached_decoding_equals_full_forward,
        alone.dtype_and_device_are_kept,
        alone.deterministic_under_a_seed,
        whole.save_and_load_are_exact,
        alone.works_on_meta,
        alone.compiles,
    )
}
"""Each says what it looked at, or raises where the connector does not keep its promise."""


@dataclass(frozen=True)
class Result:
    """How one check ended. The message says what was looked at, or in one line what is wrong."""

    name: str
    passed: bool
    message: str
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(name: str, options: Mapping[str, Any] | None = None) -> Iterator[Result]:
    """The result of every check of a registered connector, each as soon as it is there.

    Raises:
        ValueError: an unknown name or option.
    """
    subject = Subject(name, options)
    return (run(each, subject) for each in CHECKS)


def run(name: str, subject: Subject) -> Result:
    """The result of one check, whatever the connector raises. torch's generators are left as they were."""
    begin = time.perf_counter()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        try:
            message, passed = CHECKS[name](subject), True
        except CheckFailed as error:
            message, passed = str(error), False
        except Exception as error:  # a connector may raise anything, and then it has failed this check
            first = str(error).strip().partition("\n")[0]
            message, passed = f"{type(error).__name__}: {first}", False
    return Result(name, passed, message, time.perf_counter() - begin)
