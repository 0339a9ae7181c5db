"""Judges that go wrong, light enough that a new process has them at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from tests.data.damage import Case, Outcome


def hangs(case: Case, folder: Path) -> Outcome:
    while case.seed == 1:
        time.sleep(1)
    return Outcome(case, "planted", 1)


def dies(case: Case, folder: Path) -> Outcome:
    if case.seed == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    return Outcome(case, "planted", 1)


def raises(case: Case, folder: Path) -> Outcome:
    raise IndexError("from a decoder")
