"""Measures the kernels against their peers, each result checked before it is timed.

python -m vlmzoo.kernels.bench --peers --json FILE
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

from vlmzoo.kernels import _bench_cpu


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
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


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m vlmzoo.kernels.bench",
        description="Time and memory of a resampler's training step, and of attention, on this machine's CPU.",
        epilog="example: python -m vlmzoo.kernels.bench --peers --json bench.json",
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
    options = parser.parse_args(arguments)
    for name in ("tokens", "dim", "layers", "latents", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(options, name)}")
    return options


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
