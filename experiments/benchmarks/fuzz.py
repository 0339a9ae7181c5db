"""What becomes of damaged data: thousands of records, images and data files, each read in accord with the contract or
refused with its name, none of them crashing, hanging or lost.

    python -m experiments.benchmarks.fuzz            # writes experiments/results/data/fuzz.md; two minutes on two cores
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.data.damage import ARCHIVES, IMAGES, SUBJECTS, Outcome, cases_of, run
from vlmzoo.files import write_whole

OUT = Path("experiments/results/data/fuzz.md")
ORDER = [*IMAGES, "record", "json file", *ARCHIVES]


def table(outcomes: Sequence[Outcome], seconds: float) -> str:
    """The page: a row for each kind of data and of damage, and the failures."""
    lines = [
        "# Damaged data",
        "",
        f"{len(outcomes):,} data sets of four records, one part of each damaged, in {seconds:.0f} s: "
        f"{sum(outcome.failure is not None for outcome in outcomes)} crashed, hung, lost a record, broke the contract "
        "or gave an error without a name. By `python -m experiments.benchmarks.fuzz`.",
        "",
        "Refused: an error that names the record (or the file, where no record could be told apart). Read: every "
        "record passed the contract, all its answers being targets and each `<image>` having its image; damage may be "
        "such that a decoder does not see it.",
        "",
        "| what | how it was damaged | cases | refused | read | failed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for what in ORDER:
        of_kind = [outcome for outcome in outcomes if outcome.case.what == what]
        for how in sorted({outcome.how for outcome in of_kind}):
            group = [outcome for outcome in of_kind if outcome.how == how]
            failed = sum(outcome.failure is not None for outcome in group)
            refused = sum(outcome.refused for outcome in group if outcome.failure is None)
            lines.append(f"| {what} | {how} | {len(group)} | {refused} | {len(group) - refused - failed} | {failed} |")
    failures = [outcome for outcome in outcomes if outcome.failure]
    if failures:
        lines += ["", "## Failures", ""]
        lines += [
            f"- {outcome.case.what} {outcome.case.seed}, {outcome.how}: {outcome.failure}" for outcome in failures
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=240, help="cases of each kind (default: 240)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--without", action="append", default=[], choices=ORDER, help="a kind that is left out")
    args = parser.parse_args()
    kinds = [name for name in (*SUBJECTS, *ARCHIVES) if name not in args.without]
    cases = [case for name in kinds for case in cases_of([name], args.count * (2 if name == "record" else 1))]
    begun = time.perf_counter()
    outcomes = run(cases)
    write_whole(args.out, table(outcomes, time.perf_counter() - begun))
    print(args.out)
    return 1 if any(outcome.failure for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
