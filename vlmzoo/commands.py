"""What each command does, with imports as late as they can be: `vlmzoo --help` waits for none of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmzoo.conformance import Result

RUNS = Path("runs")


def show_list(args: argparse.Namespace) -> int:
    from vlmzoo.sweeps import catalogue

    if args.dims and args.kind != "connectors":
        raise ValueError(f"--dims: only connectors stand between two widths, not {args.kind}")
    with _quiet(args.json):
        rows = catalogue.entries(args.kind, args.plugin)
        costs = catalogue.costs([row["name"] for row in rows], *args.dims) if args.dims else None
    if args.json:
        _print_json({args.kind: [row | costs[row["name"]] for row in rows] if costs else rows})
        return 0
    if costs is not None:
        print(catalogue.cost_table(costs))
        return 0
    for row in rows:
        options = ", ".join(f"{name}={value}" for name, value in row.get("options", {}).items())
        print(f"{row['name']}\n    {row['summary']}")
        if options:
            print(f"    options: {options}")
    return 0


def check(args: argparse.Namespace) -> int:
    from vlmzoo.config import assignment

    options = dict(assignment(override, "option", "num_queries=8") for override in args.overrides)

    from vlmzoo import build, conformance

    with _quiet(args.json):
        build.load_connectors(args.plugin)
        names = build.connectors_of(Path(args.connector)) if args.connector.endswith(".py") else [args.connector]
        results = {name: _shown(name, conformance.check(name, options), quiet=args.json) for name in names}
    passed = all(result.passed for found in results.values() for result in found)
    if args.json:
        checks = [
            {
                "name": name,
                "passed": all(result.passed for result in found),
                "checks": [result.as_dict() for result in found],
            }
            for name, found in results.items()
        ]
        _print_json({"passed": passed, "connectors": checks})
    return 0 if passed else 1


def _shown(name: str, results: Iterable[Result], *, quiet: bool) -> list[Result]:
    """The results, printed as they come."""
    found = []
    for result in results:
        found.append(result)
        if not quiet:
            print(f"{'ok' if result.passed else 'FAILED':6}  {name}  {result.name:36}  {result.message}", flush=True)
    failed = sum(not result.passed for result in found)
    if not quiet:
        print(
            f"{name}: " + (f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks passed")
        )
    return found


def train(args: argparse.Namespace) -> int:
    from vlmzoo.config import RunConfig, load
    from vlmzoo.training import trackers

    trackers.check(args.track)
    if args.no_cache and args.cache:
        raise ValueError("--no-cache: --cache was given too")
    run = load(RunConfig, args.config, args.overrides)
    out = args.out or RUNS / args.config.stem

    from vlmzoo import build
    from vlmzoo.sweeps.table import duration
    from vlmzoo.sweeps.trial import run_trial

    build.load_connectors(args.plugin)
    result = run_trial(run, out, None if args.no_cache else args.cache or out / "cache", args.track)
    if not result:  # one of several processes, of which the first one tells
        return 0
    _print_scores(result["evaluation"])
    print(f"{out}: {result['connector']}, {duration(result['seconds'])}")
    return 0


def transplant(args: argparse.Namespace) -> int:
    from vlmzoo import build
    from vlmzoo.config import RunConfig, load
    from vlmzoo.sweeps.table import duration
    from vlmzoo.sweeps.transplant import transplant
    from vlmzoo.sweeps.trial import run_trial

    build.load_connectors(args.plugin)
    file = transplant(
        args.source, args.connector, args.data, args.out, images=args.images, base=args.base, encoder=args.encoder
    )
    result = run_trial(load(RunConfig, file, args.overrides), args.out, args.out / "cache")
    if not result:
        return 0
    for stage, loss in result["final_loss"].items():
        print(f"{stage}: loss {loss:.3f}")
    print(f"{args.out / 'model'}: {result['connector']}, {duration(result['seconds'])}")
    return 0


def evaluate(args: argparse.Namespace) -> int:
    from vlmzoo import build
    from vlmzoo.sweeps.checkpoint import evaluate_checkpoint

    if args.data and len(args.task) > 1:
        raise ValueError(f"--data gives the questions of one task, got {len(args.task)}: {', '.join(args.task)}")
    if args.images and not args.data:
        raise ValueError("--images: expected --data with it")
    with _quiet(args.json):
        build.load_connectors(args.plugin)
        scores = evaluate_checkpoint(args.checkpoint, args.task, data=args.data, images=args.images, out=args.out)
    if args.json:
        _print_json({"checkpoint": str(args.checkpoint), "tasks": scores})
    else:
        _print_scores(scores)
    return 0


def sweep(args: argparse.Namespace) -> int:
    from vlmzoo.config import SweepConfig, load
    from vlmzoo.training import trackers

    trackers.check(args.track)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("a sweep starts its own processes; expected it once, not by torchrun (docs/scale.md)")
    study = load(SweepConfig, args.config, args.overrides)
    if args.workers is not None and args.workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {args.workers}")
    out = args.out or RUNS / args.config.stem

    from vlmzoo import build
    from vlmzoo.sweeps.engine import train_command
    from vlmzoo.sweeps.plan import plan, resolve
    from vlmzoo.sweeps.sweep import state, states
    from vlmzoo.sweeps.sweep import sweep as run_sweep
    from vlmzoo.sweeps.table import render

    with _quiet(args.json):
        build.load_connectors(args.plugin)
        study = resolve(study)
        trials = plan(study, out)
        if not args.dry_run:
            outcome = run_sweep(study, out, train_command(out / "cache", args.plugin, args.track), workers=args.workers)
    if args.dry_run:
        if args.json:
            keys = ("hash", "connector", "encoder", "llm", "seed")
            rows = [{**{key: getattr(trial, key) for key in keys}, "state": state(trial)} for trial in trials]
            _print_json({"out": str(out), "trials": rows})
        else:
            print(states(trials))
        return 0
    if args.json:
        _print_json(outcome.summary)
    else:
        print(f"\n{render(outcome.summary)}\n\n{out / 'report.html'}")
    for trial, failure in outcome.failed:
        print(f"FAILED  {trial.title}: {failure.message}", file=sys.stderr)
    return 1 if outcome.failed else 0


def report(args: argparse.Namespace) -> int:
    from vlmzoo.sweeps.sweep import write_report
    from vlmzoo.sweeps.table import render

    print(f"{render(write_report(args.directory))}\n\n{args.directory / 'report.html'}")
    return 0


def synthesize(args: argparse.Namespace) -> int:
    if args.out.suffix != ".json":
        raise ValueError(f"--out {args.out}: expected a file that ends in .json")
    if args.teacher != "rules" and not args.model:
        raise ValueError(f"--teacher {args.teacher}: expected --model with it")
    for option in ("base_url", "price_in", "price_out", "max_cost"):
        if getattr(args, option) is not None and args.teacher != "openai":
            raise ValueError(f"--{option.replace('_', '-')}: only for --teacher openai")
    if args.max_cost is not None and (args.price_in is None or args.price_out is None):
        raise ValueError("--max-cost: expected --price-in and --price-out with it")
    if args.images is not None and not args.images.is_dir():
        raise ValueError(f"--images {args.images}: no such folder")

    from vlmzoo.instruct import teachers
    from vlmzoo.instruct.annotations import read_coco
    from vlmzoo.instruct.ask import Limits
    from vlmzoo.instruct.prompts import KINDS, read_prompts
    from vlmzoo.instruct.synthesize import Job, estimate
    from vlmzoo.instruct.synthesize import synthesize as run

    prompts = read_prompts(args.prompts)
    proportions: dict[str, int] = dict(zip(KINDS, args.proportions, strict=True))
    folder = _coco_folder(args.source, args.limit)
    images = args.images or (folder / "images" if (folder / "images").is_dir() else None)
    limits = Limits(
        concurrency=args.concurrency,
        requests_per_minute=args.requests_per_minute,
        attempts=args.attempts,
        max_cost=args.max_cost,
        price_in=args.price_in or 0.0,
        price_out=args.price_out or 0.0,
        max_tokens=args.max_tokens,
    )
    job = Job(read_coco(folder), prompts, proportions, args.out, args.limit, args.seed, images, limits)
    for line in job.annotations.faults.lines():
        print(f"{folder}: left out {line}", file=sys.stderr)
    if args.dry_run:
        _print_estimate(estimate(job), args.price_in is not None or args.price_out is not None)
        return 0
    if args.teacher == "rules":
        teacher: teachers.Teacher = teachers.Rules(job.annotations.categories, args.seed)
    elif args.teacher == "transformers":
        teacher = teachers.Local(args.model, max_tokens=args.max_tokens)
    else:
        teacher = teachers.OpenAI(args.model, args.base_url, max_tokens=args.max_tokens, timeout=args.timeout)
    tally = run(job, teacher)
    print(f"{tally.table()}\n\n{args.out}: {tally.accepted} records" + (f", images in {images}" if images else ""))
    print(job.beside(".report.html"))
    return 0 if tally.accepted else 1


def _coco_folder(source: str, limit: int | None) -> Path:
    """The folder of annotations; scenes of the world are drawn into the cache folder at first use, one a request."""
    if not source.startswith("world:"):
        return Path(source).expanduser()
    from vlmzoo import build
    from vlmzoo.registry import unknown
    from vlmzoo.world import DATASETS
    from vlmzoo.world.coco import write_coco

    name = source.removeprefix("world:")
    if name not in DATASETS:
        raise unknown("world data set", name, DATASETS)
    return write_coco(name, build.cache_folder() / "world", limit or DATASETS[name], seed=0)


def _print_estimate(rows: dict[str, dict[str, float]], priced: bool) -> None:
    names = ("requests", "input_tokens", "output_tokens", *(["cost"] if priced else []))
    rows = {**rows, "in all": {name: sum(row[name] for row in rows.values()) for name in names}}
    print(f"{'':<21}" + "".join(f"{name.replace('_', ' '):>15}" for name in names))
    for kind, row in rows.items():
        print(f"{kind:<21}" + "".join(f"{row[name]:>15,.{2 if name == 'cost' else 0}f}" for name in names))
    print("tokens are estimates: four characters each, answers as long as the examples'")


def world(args: argparse.Namespace) -> int:
    if args.action == "build":
        from vlmzoo.world.build import build

        for model in build(args.only, args.out or RUNS / "world", seed=args.seed):
            print(model)
    else:
        from vlmzoo.world.show import show

        print(show(args.out or RUNS / "world.png", args.seed))
    return 0


@contextmanager
def _quiet(json_only: bool) -> Iterator[None]:
    """Whatever anybody prints meanwhile goes to standard error where standard output is for one JSON document."""
    if not json_only:
        yield
        return
    with redirect_stdout(sys.stderr):
        yield


def _print_json(document: Any) -> None:
    print(json.dumps(document, indent=1, allow_nan=False))


def _print_scores(scores: dict[str, dict[str, Any]]) -> None:
    for task, found in scores.items():
        print(f"{task}: {100 * found['accuracy']:.1f} % of {found['num_items']} (mean over capabilities)")
        for name, accuracy in found["capabilities"].items():
            print(f"    {name:<16} {100 * accuracy:5.1f} %")
