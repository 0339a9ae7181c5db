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
    from vlmzoo.inspection.subject import Subject

RUNS = Path("runs")

SHORT_PROMPT = "Answer the question using a single word or phrase."  # of LLaVA-1.5
READ_BY = ("images", "llm", "encoder", "connector", "template", "image_mode", "max_length", "limit")
"""Options that say how a data set is read; a run's YAML says it itself."""
DATA_ACTIONS: dict[str, tuple[str, ...]] = {
    "check": (*READ_BY, "stage", "plugin", "workers", "json", "fixed"),
    "show": (),
    "fetch": ("out",),
    "verify": (),
}
"""What can be done with data, and the options that each takes."""


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


def data(args: argparse.Namespace) -> int:
    for name in {name for names in DATA_ACTIONS.values() for name in names} - set(DATA_ACTIONS[args.action]):
        if getattr(args, name):
            raise ValueError(f"--{name.replace('_', '-')}: not for `data {args.action}`")
    return _data_check(args) if args.action == "check" else _data_published(args)


def _data_published(args: argparse.Namespace) -> int:
    """Shows, fetches or verifies a published set, or those of its parts that are named."""
    from vlmzoo.data.published.fetch import fetch, verify
    from vlmzoo.data.published.recipes import describe, recipe

    found, more = recipe(args.data), list(args.more)
    if args.action == "verify" and not more:
        raise ValueError(f"data verify {args.data}: expected its folder too")
    folder = Path(more.pop(0)) if args.action == "verify" else args.out or Path("data") / args.data
    if args.action == "show":
        print(describe(args.data, found.of_parts(more) if more else found, folder))
        return 0
    if args.action == "fetch" and found.parts and not more:
        raise ValueError(f"data fetch {args.data}: name the parts to fetch; `vlmzoo data show {args.data}` lists them")
    chosen = found.of_parts(more)
    if args.action == "fetch":
        fetch(chosen, folder)
    faulty = False
    for verified in verify(chosen, folder):
        print(
            f"{'ok' if verified.fault is None else 'WRONG':6}  {verified.what}  {verified.fault or ''}".rstrip(),
            flush=True,
        )
        faulty = faulty or verified.fault is not None
    return 1 if faulty else 0


def _data_check(args: argparse.Namespace) -> int:
    from vlmzoo.files import write_json
    from vlmzoo.inspection import table
    from vlmzoo.inspection.check import check as check_data
    from vlmzoo.inspection.fixed import write_fixed
    from vlmzoo.samples import READERS

    workers = READERS if args.workers is None else args.workers
    if workers < 1:
        raise ValueError(f"--workers: expected at least 1, got {workers}")
    subjects, reports = _subjects(args, args.more), []
    if args.fixed and len(subjects) > 1:
        raise ValueError(f"--fixed: a run has {len(subjects)} data sets; name one by --stage")
    for subject in subjects:
        reports.append(report := check_data(subject, workers))
        print(table.render(report), flush=True)
        if args.fixed:
            fixed = write_fixed(subject, report, args.fixed, workers)
            print(f"{fixed.file}: {fixed.records:,} records; {fixed.mended:,} mended, {fixed.left_out:,} left out")
    if args.json:
        write_json(args.json, [table.document(report) for report in reports])
    return 1 if any(report.faulty for report in reports) else 0


def inspect(args: argparse.Namespace) -> int:
    from vlmzoo.files import write_whole
    from vlmzoo.inspection import page, terminal
    from vlmzoo.inspection.view import view

    if args.index is not None and args.id is not None:
        raise ValueError("--id: --index was given too")
    subject, *others = _subjects(args, args.overrides)
    shown = view(subject, args.index, args.id)
    plain = args.no_color or not sys.stdout.isatty() or bool(os.environ.get("NO_COLOR"))
    print(terminal.render(shown, colour=not plain))
    if others:
        print(f"stage {subject.name}; by --stage also {', '.join(other.name for other in others)}")
    if args.html:
        write_whole(args.html, page.render(shown))
        print(args.html)
    return 0


def _subjects(args: argparse.Namespace, overrides: list[str]) -> list[Subject]:
    """What a path on the command line names: the data of a run's stages, or one data set."""
    from vlmzoo import build
    from vlmzoo.config import DataConfig
    from vlmzoo.config import parse as parse_config
    from vlmzoo.inspection.subject import is_run, of_data, of_run

    build.load_connectors(args.plugin)
    given = {name: value for name in READ_BY if (value := getattr(args, name)) is not None}
    if is_run(args.data):
        if given:
            raise ValueError(f"--{next(iter(given)).replace('_', '-')}: {args.data} says it; change it by a.b=c")
        return of_run(Path(args.data), overrides, args.stage)
    if args.stage or overrides:
        raise ValueError(f"{'--stage' if args.stage else overrides[0]}: only for a RUN.yaml, got {args.data}")
    if args.connector and not args.encoder:
        raise ValueError("--connector: expected --encoder with it")
    named = {name: given.pop(name) for name in ("llm", "encoder", "connector") if name in given}
    return of_data(parse_config(DataConfig, {"path": args.data, **given}), **named)


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
    if args.short is not None and args.teacher != "rules":
        raise ValueError("--short: only for --teacher rules; tell another teacher by --prompts")
    if args.short is not None and any((args.proportions or (1, 0, 0))[1:]):
        raise ValueError("--short: descriptions and reasoning have no short answers; expected --proportions 1:0:0")

    from vlmzoo.instruct import teachers
    from vlmzoo.instruct.annotations import read_coco
    from vlmzoo.instruct.ask import Limits
    from vlmzoo.instruct.prompts import KINDS, read_prompts
    from vlmzoo.instruct.synthesize import Job, estimate
    from vlmzoo.instruct.synthesize import synthesize as run

    prompts = read_prompts(args.prompts)
    shares = args.proportions or ((58, 23, 77) if args.short is None else (1, 0, 0))
    proportions: dict[str, int] = dict(zip(KINDS, shares, strict=True))
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
    asked = prompts, proportions, args.out, args.limit, args.seed
    job = Job(read_coco(folder), *asked, images, limits, args.short or "")
    for line in job.annotations.faults.lines():
        print(f"{folder}: left out {line}", file=sys.stderr)
    if args.dry_run:
        _print_estimate(estimate(job), args.price_in is not None or args.price_out is not None)
        return 0
    if args.teacher == "rules":
        short = args.short is not None
        teacher: teachers.Teacher = teachers.Rules(job.annotations.categories, args.seed, short=short)
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
