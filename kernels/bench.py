"""Measures the kernels against their peers, each result checked before it is timed.

python -m vlmzoo.kernels.bench --peers --json FILE      on this machine's CPU
python -m vlmzoo.kernels.bench --gpu --out DIR          on its GPU
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vlmzoo.cli import Parser
from vlmzoo.kernels import _bench_cpu, _bench_gpu


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        options = parse(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.gpu:
        return on_gpu(options)
    result: dict[str, Any] = {"machine": machine()}
    try:
        result |= _bench_cpu.measure(options)
    except ImportError as error:
        print(f"bench: {error.name} is not installed; `make bench-env` installs the peers", file=sys.stderr)
        return 2
    print(table(result))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


def on_gpu(options: argparse.Namespace) -> int:
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: --gpu needs a CUDA device, and PyTorch sees none here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    if options.tune:
        name = torch.cuda.get_device_name()
        path = Path(__file__).with_name("tuned.json")
        cards = json.loads(path.read_text()) if path.exists() else {}
        text = json.dumps(cards | {name: _bench_gpu.tune(torch.device(options.device))}, indent=1) + "\n"
        for target in (path, options.out / "tuned.json"):
            target.write_text(text)
    result = _bench_gpu.measure(options)
    (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    (options.out / "README.md").write_text(_bench_gpu.table(result))
    (options.out / "ratios.svg").write_text(_bench_gpu.plot(result))
    print(_bench_gpu.table(result))
    return 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Raises:
    ValueError: anything that the command does not take.
    """
    parser = Parser(
        prog="python -m vlmzoo.kernels.bench",
        description="Time and memory of a resampler's training step, and of attention, on this machine's CPU; or with "
        "--gpu of the kernels on its GPU.",
        epilog="example: python -m vlmzoo.kernels.bench --peers --json bench.json",
    )
    gpu = parser.add_argument_group("on a GPU")
    gpu.add_argument("--gpu", action="store_true", help="measure there, and nothing on the CPU")
    gpu.add_argument("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="for results, table and plot")
    gpu.add_argument("--tune", action="store_true", help="first look for the fastest tiles, and keep them")
    gpu.add_argument("--seconds", type=float, default=300, metavar="N", help="begin no shape later (default: 300)")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial of the program")
    gpu.add_argument(
        "--shapes", nargs="*", type=shape, default=[], metavar="B,Lq,Lkv,d", help="these, not the sixteen core shapes"
    )
    gpu.add_argument(
        "--shard",
        default=os.environ.get("GPU_SHARD"),
        metavar="i/n",
        help="every n-th of all other shapes, from the i-th on (default: GPU_SHARD)",
    )
    parser.add_argument("--peers", action="store_true", help="also flamingo-pytorch and perceiver-pytorch")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write machine, ratios and rows to this file")
    for name, default, says in (
        ("tokens", 16384, "media the resampler reads"),
        ("dim", 1024, "width of media and latents"),
        ("layers", 6, "layers of the resampler"),
        ("latents", 64, "latents of the resampler, and queries of the attention rows"),
        ("rounds", 5, "timed rounds; in each every case runs once"),
        ("threads", 0, "threads of PyTorch; 0: as many as it takes by itself"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{says} (default: {default})")
    options = parser.parse(arguments)
    options.shapes = options.shapes or _bench_gpu.shard(options.shard)
    if options.tune and options.device != "cuda":
        parser.error("--tune needs --device cuda")
    for name in ("tokens", "dim", "layers", "latents", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


def shape(text: str) -> _bench_gpu.Shape:
    sizes = text.split(",")
    if len(sizes) != 4 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"expected batch,queries,keys,dim, got {text!r}")
    return _bench_gpu.Shape(*map(int, sizes))


def machine() -> dict[str, Any]:
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def table(result: dict[str, Any]) -> str:
    """Machine, rows and ratios as aligned text."""
    lines = [", ".join(f"{name} {value}" for name, value in result["machine"].items()), ""]
    for part in dict.fromkeys(row["part"] for row in result["rows"]):
        rows = [
            {name: _shown(name, value) for name, value in row.items() if name != "part"}
            for row in result["rows"]
            if row["part"] == part
        ]
        cells = [list(rows[0])] + [list(row.values()) for row in rows]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines += [part, *("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells), ""]
    lines += [f"{name} {_shown(name, value)}" for name, value in result.items() if name not in ("machine", "rows")]
    return "\n".join(lines)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(_shown(name, part) for part in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.exit(main())
