"""What a run was computed with: versions, source, hardware and data, so that a figure can be traced."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlmzoo import __version__, build
from vlmzoo.config import DataConfig, RunConfig, config_hash

ADAPTING = ("peft", "bitsandbytes")  # for LoRA, and for weights quantized beneath it
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow")


def manifest(run: RunConfig, processes: int = 1) -> dict[str, Any]:
    """All of it, of this process. The run is a resolved one.

    Args:
        processes: that share the run.

    Raises:
        ValueError: a data set that is not there.
    """
    loras = [stage.lora for stage in run.stages.values() if stage.lora is not None]
    extras = ADAPTING[: 1 + any(lora.quantize is not None for lora in loras)] if loras else ()
    used = [stage.data for stage in run.stages.values()] + [task.data for task in run.evaluation.values()]
    return {
        "config_hash": config_hash(run),
        "seed": vars(run.seed),
        "plugin": build.plugin_of(run.connector.name),
        "data": fingerprints(used),
        "versions": {"vlmzoo": __version__, "python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, *extras)},
        "git": git(),
        "hardware": hardware(),
        "processes": processes,
    }


def fingerprints(data: Iterable[DataConfig]) -> dict[str, dict[str, Any]]:
    """What tells each data set from others, its file and SHA-256 among it, by the name that the run gives it."""
    return {item.path: _portable(build.source(item).fingerprint()) for item in data}


def _portable(value: Any) -> Any:
    """The fingerprint with paths in the cache as everybody has them."""
    if isinstance(value, list):
        return [_portable(item) for item in value]
    if not isinstance(value, dict):
        return value
    found = {key: _portable(item) for key, item in value.items()}
    cache = build.cache_folder()
    if "file" in found and (file := Path(found["file"])).is_relative_to(cache):
        found["file"] = f"$VLMZOO_CACHE/{file.relative_to(cache).as_posix()}"
    return found


def git() -> dict[str, Any] | None:
    """The commit of the source this package runs from, and whether files differ from it; None: it is installed."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def ask(*arguments: str) -> str:
        asked = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
        return asked.stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain"))}
    except (OSError, subprocess.CalledProcessError):  # no git here, or the checkout is another user's
        return None


def hardware() -> dict[str, Any]:
    """The machine: processor, cores this process may use, memory in bytes, and the GPU where there is one."""
    found = {
        "machine": platform.machine(),
        "processor": processor(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


def processor() -> str:
    """Make and model: another one may round in another order, so that a run is not the same to the last bit."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0].splitlines()
    except OSError:  # not Linux
        return platform.processor()
    said = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    numbers = ", ".join(f"{name} {said[name]}" for name in ("cpu family", "model", "stepping") if name in said)
    return f"{said.get('model name', platform.processor())} ({numbers}), {torch.backends.cpu.get_cpu_capability()}"
