"""The command line: what may be said, and how every mistake ends in one line."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from vlmzoo import __version__, commands
from vlmzoo.registry import unknown
from vlmzoo.training.trackers import TRACKERS

Arguments = Callable[[argparse.ArgumentParser], None]


@dataclass(frozen=True)
class Command:
    run: Callable[[argparse.Namespace], int]
    summary: str
    example: str
    arguments: Arguments


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line like all of ours, with the nearest option."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see `{self.prog} --help`")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Options and positionals in any order.

        Raises:
            ValueError: anything that the command does not take.
        """
        options = ["--help", *re.findall(r"--[\w-]+", self.format_usage())]
        for argument in arguments:
            if argument.startswith("--") and (option := argument.partition("=")[0]) not in options:
                raise unknown("option", option, options)
        known, rest = self.parse_known_intermixed_args(arguments)
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}; see `{self.prog} --help`")
        return known


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 where what was looked at is faulty or a trial failed, 2 for a mistake, 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        print("vlmzoo: stopped; the same command continues from here", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `vlmzoo list connectors | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        return _fail(f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        if not _ours(error):
            raise
        return _fail(str(error))


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"vlmzoo {__version__}")
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    command = COMMANDS[name]
    parser = Parser(
        prog=f"vlmzoo {name}",
        description=command.summary[0].upper() + command.summary[1:] + ".",
        epilog=f"example:\n  {command.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.arguments(parser)
    return command.run(parser.parse(rest))


def _fail(message: str) -> int:
    print(f"vlmzoo: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _ours(error: ValueError) -> bool:
    """Whether the error was written for the user: raised by this package or a plugin, not by a library under it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).startswith("vlmzoo")


def _overview() -> str:
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: vlmzoo COMMAND ...",
            "",
            "What should stand between the vision encoder and the language model?",
            "",
            "commands:",
            *lines,
            "",
            "example:",
            "  vlmzoo sweep experiments/connectors.yaml",
            "",
            "`vlmzoo COMMAND --help` says more and gives an example.",
        ]
    )


def _plugin(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin", metavar="FILE.py", type=Path, action="append", default=[], help="a file that registers connectors"
    )


def _track(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--track",
        metavar="NAME",
        type=_one_of("tracker", *TRACKERS),
        action="append",
        default=[],
        help=f"show the figures of training there too: {', '.join(TRACKERS)}; may be given several times",
    )


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON document and nothing else")


def _overrides(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", default=[], help=what)


def _one_of(what: str, *names: str) -> Callable[[str], str]:
    def choose(name: str) -> str:
        if name not in names:
            raise argparse.ArgumentTypeError(str(unknown(what, name, names)))
        return name

    return choose


def _dims(text: str) -> tuple[int, int]:
    vision, comma, language = text.partition(",")
    if not (comma and vision.isdecimal() and language.isdecimal() and int(vision) and int(language)):
        raise argparse.ArgumentTypeError(f"expected the widths of encoder and LLM as in 1024,4096, got {text!r}")
    return int(vision), int(language)


def _list(parser: argparse.ArgumentParser) -> None:
    kinds = ("connectors", "encoders", "llms", "tasks", "datasets")
    parser.add_argument("kind", metavar="KIND", type=_one_of("kind", *kinds), help=", ".join(kinds))
    parser.add_argument(
        "--dims", metavar="VISION,TEXT", type=_dims, help="what each connector costs between widths such as 1024,4096"
    )
    _plugin(parser)
    _json(parser)


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("connector", metavar="NAME|FILE.py", help="a connector, or a file that registers some")
    _overrides(parser, "options of the connector, such as num_queries=8")
    _plugin(parser)
    _json(parser)


def _train(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="RUN.yaml", type=Path)
    _overrides(parser, "keys of the run to change, such as stages.align.steps=50")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, help="the run's directory (default: runs/<name of the YAML>)"
    )
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, help="where features and token ids are kept (default: OUT/cache)"
    )
    parser.add_argument("--no-cache", action="store_true", help="keep none, and compute them in every step")
    _track(parser)
    _plugin(parser)


def _transplant(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a vision-language model: a directory or a hub id")
    parser.add_argument("--connector", metavar="NAME", required=True, help="the new connector")
    parser.add_argument("--data", metavar="FILE", type=Path, required=True, help="captions to align it on: LLaVA JSON")
    parser.add_argument("--images", metavar="DIR", type=Path, help="their images (default: images/ beside FILE)")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, required=True, help="its directory; model/ in it is the result"
    )
    parser.add_argument("--base", metavar="LLM", help="the LLM, for LLaVA's own checkpoints that hold none")
    parser.add_argument(
        "--encoder", metavar="NAME", help="the encoder, for LLaVA's own checkpoints (default: named there)"
    )
    _overrides(parser, "keys of the run to change, such as stages.align.epochs=0.5 or connector.options.num_queries=64")
    _plugin(parser)


def _eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's directory, or the model/ in it")
    parser.add_argument("--task", metavar="NAME", action="append", required=True, help="`world`, or a task of the run")
    parser.add_argument("--data", metavar="FILE", type=Path, help="questions of your own, as LLaVA JSON, for the task")
    parser.add_argument("--images", metavar="DIR", type=Path, help="their images (default: images/ beside FILE)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where predictions are written (default: nowhere)")
    _plugin(parser)
    _json(parser)


def _sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="STUDY.yaml", type=Path)
    _overrides(parser, "keys of the study to change, such as run.stages.align.steps=50")
    parser.add_argument("--out", metavar="DIR", type=Path, help="its directory (default: runs/<name of the YAML>)")
    parser.add_argument("--workers", metavar="N", type=int, help="trials at a time (default: as many as cores or GPUs)")
    parser.add_argument("--dry-run", action="store_true", help="only show the trials, and which are done")
    _track(parser)
    _plugin(parser)
    _json(parser)


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="SWEEP_DIR", type=Path)


def _world(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", metavar="build|show", type=_one_of("action", "build", "show"))
    parser.add_argument("--only", metavar="NAME", help="build: this model alone")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of the training or the scenes (default: 0)")
    parser.add_argument(
        "--out", metavar="PATH", type=Path, help="build: a folder (default: runs/world); show: a PNG (runs/world.png)"
    )


def _read_by(parser: argparse.ArgumentParser) -> None:
    """How a data set that is named by itself is read; a run's YAML says all that."""
    parser.add_argument("--images", metavar="DIR", help="its images (default: images/ beside the file)")
    parser.add_argument("--llm", "--tokenizer", metavar="NAME", help="count tokens as this LLM's tokenizer makes them")
    parser.add_argument("--encoder", metavar="NAME", help="count an image's tokens too, of this encoder")
    parser.add_argument("--connector", metavar="NAME", help="behind it (default: mlp)")
    parser.add_argument("--template", metavar="NAME", type=_one_of("template", "plain", "vicuna_v1", "chat"))
    parser.add_argument("--image-mode", metavar="MODE", type=_one_of("image mode", "square", "pad", "native"))
    parser.add_argument("--max-length", metavar="N", type=int, help="tokens at which it is cut (default: 2048)")
    parser.add_argument("--limit", metavar="N", type=int, help="only the first so many records")
    parser.add_argument("--stage", metavar="NAME", help="of a RUN.yaml, this stage's data alone, or evaluation.TASK's")
    _plugin(parser)


def _inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA|RUN.yaml", help="a data set, or a run with the data of its stages")
    _overrides(parser, "keys of the run to change")
    parser.add_argument("--index", metavar="N", type=int, help="of the record (default: 0)")
    parser.add_argument("--id", metavar="ID", help="of the record, instead")
    _read_by(parser)
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page with its images there too")
    parser.add_argument("--no-color", action="store_true", help="marks instead of colours, as without a terminal")


def _data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "action",
        metavar="check|show|fetch|verify",
        type=_one_of("action", *commands.DATA_ACTIONS),
        help="look for what is wrong; show, download or verify a published set",
    )
    parser.add_argument("data", metavar="DATA|RUN.yaml|NAME", help="check: a data set or a run; else a published set")
    parser.add_argument(
        "more",
        metavar="DIR|PART|a.b=c",
        nargs="*",
        help="verify: its folder; fetch, show: some of its parts; check: keys of the run",
    )
    _read_by(parser)
    parser.add_argument("--workers", metavar="N", type=int, help="check: threads (default: one a core, 8 at most)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="check: write every finding there too")
    parser.add_argument("--fixed", metavar="DIR", type=Path, help="check: write a copy without what is wrong there")
    parser.add_argument("--out", metavar="DIR", type=Path, help="fetch: where the set is put (default: data/NAME)")


def _proportions(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) != 3 or not all(part.isdecimal() for part in parts) or not any(map(int, parts)):
        raise argparse.ArgumentTypeError(
            f"expected conversation : detailed description : complex reasoning as in 58:23:77, got {text!r}"
        )
    conversation, description, reasoning = map(int, parts)
    return conversation, description, reasoning


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(0)
        if not 0 < value < 1e15:
            raise argparse.ArgumentTypeError(
                f"expected {'a whole number' if kind is int else 'a number'} above zero, got {text!r}"
            )
        return value

    return read


def _synthesize(parser: argparse.ArgumentParser) -> None:
    whole, number = _above_zero(int), _above_zero(float)
    add = parser.add_argument
    add("source", metavar="COCO_DIR|world:NAME", help="a folder with annotations/{captions,instances}_*.json")
    add("--out", metavar="FILE.json", type=Path, required=True, help="the records; journal and report stand beside it")
    add("--teacher", metavar="NAME", default="rules", type=_one_of("teacher", "rules", "openai", "transformers"),
        help="rules (default), openai or transformers")  # fmt: skip
    add("--model", metavar="NAME", help="the teacher's model: of the server, or a directory or hub id")
    add("--base-url", metavar="URL", help="a server of the OpenAI interface, such as http://localhost:8000/v1")
    add("--limit", metavar="N", type=whole, help="how many requests (default: one an image)")
    add("--proportions", metavar="A:B:C", type=_proportions,
        help="conversation : detailed description : complex reasoning (default: 58:23:77)")  # fmt: skip
    add("--short", metavar="PROMPT", nargs="?", const=commands.SHORT_PROMPT,
        help="rules alone: conversations in answers of a word or two, and how the first question asks for it "
        f"(default: {commands.SHORT_PROMPT!r})")  # fmt: skip
    add("--seed", metavar="N", type=int, default=0, help="of the plan and the rules (default: 0)")
    add("--prompts", metavar="DIR", type=Path, help="your own <kind>/{system.txt,examples.yaml}")
    add("--images", metavar="DIR", type=Path, help="image files for the report (default: COCO_DIR/images, if there)")
    add("--concurrency", metavar="N", type=whole, default=8, help="requests at a time (default: 8)")
    add("--requests-per-minute", metavar="N", type=number, help="at most so many (default: no limit)")
    add("--attempts", metavar="N", type=whole, default=8, help="of a request before it is given up (default: 8)")
    add("--timeout", metavar="SECONDS", type=number, default=120.0, help="of one attempt (default: 120)")
    add("--max-tokens", metavar="N", type=whole, default=1024, help="of an answer (default: 1024)")
    add("--max-cost", metavar="X", type=number, help="stop before more is spent; needs the prices")
    add("--price-in", metavar="X", type=number, help="of a million tokens read")
    add("--price-out", metavar="X", type=number, help="of a million tokens written")
    add("--dry-run", action="store_true", help="ask nothing: show how many requests, tokens and what cost to expect")


COMMANDS = {
    "list": Command(
        commands.show_list, "list what can be named in a YAML", "vlmzoo list connectors --plugin my.py", _list
    ),
    "check": Command(
        commands.check, "test whether a connector keeps its contract", "vlmzoo check qformer num_queries=8", _check
    ),
    "train": Command(
        commands.train,
        "train and evaluate one run; the same command again continues",
        "vlmzoo train experiments/quick.yaml connector=linear --out runs/linear",
        _train,
    ),
    "transplant": Command(
        commands.transplant,
        "put another connector between the encoder and the LLM of a trained model, and align it",
        "vlmzoo transplant llava-hf/llava-1.5-7b-hf --connector qformer --data captions.json --out runs/transplant",
        _transplant,
    ),
    "eval": Command(commands.evaluate, "evaluate a trained model", "vlmzoo eval runs/quick --task world", _eval),
    "sweep": Command(
        commands.sweep,
        "compare connectors: every combination of a study, a table and a report",
        "vlmzoo sweep experiments/connectors.yaml seeds=[0,1,2] --out runs/three-seeds",
        _sweep,
    ),
    "report": Command(
        commands.report, "write a sweep's summary and report again", "vlmzoo report runs/connectors", _report
    ),
    "inspect": Command(
        commands.inspect,
        "show a record as the model sees it",
        "vlmzoo inspect experiments/quick.yaml --stage finetune --index 3 --html runs/record.html",
        _inspect,
    ),
    "data": Command(
        commands.data,
        "check a data set, or fetch a published one",
        "vlmzoo data check train.json --llm world:llama --json runs/findings.json",
        _data,
    ),
    "synthesize": Command(
        commands.synthesize,
        "make visual instruction data from captions and boxes; the same command again continues",
        "vlmzoo synthesize world:conversations --limit 1000 --out runs/instruct.json",
        _synthesize,
    ),
    "world": Command(commands.world, "build or look at the embedded world", "vlmzoo world show --seed 7", _world),
}
