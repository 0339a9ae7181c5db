"""What a run was computed with: versions, source, hardware and data, so that a figure can be traced."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vlmzoo import __version__, build
from vlmzoo.config import DataConfig, RunConfig, config_hash
from vlmzoo.files import sha256

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "pillow")


def manifest(run: RunConfig, processes: int = 1) -> dict[str, Any]:
    """All of it, of this process. The run is a resolved one.

    Args:
        processes: that share the run.

    Raises:
        ValueError: a data set that is not there.
    """
    used = [stage.data for stage in run.stages.values()] + [task.data for task in run.evaluation.values()]
    return {
        "config_hash": config_hash(run),
        "seed": vars(run.seed),
        "plugin": build.plugin_of(run.connector.name),
        "data": fingerprints(used),
        "versions": {"vlmzoo": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        "git": git(),
        "hardware": hardware(),
        "processes": processes,
    }


def fingerprints(data: Iterable[DataConfig]) -> dict[str, dict[str, str]]:
    """Each data set's file and its SHA-256, by the name that the run gives it."""
    files = {item.path: build.dataset(item)[0] for item in data}
    missing = next((file for file in files.values() if not file.is_file()), None)
    if missing is not None:
        raise ValueError(f"{missing}: no such file; expected LLaVA JSON")
    return {name: {"file": _portable(file), "sha256": sha256(file)} for name, file in files.items()}


def _portable(file: Path) -> str:
    """The path, one in the cache as everybody has it."""
    cache = build.cache_folder()
    return f"$VLMZOO_CACHE/{file.relative_to(cache).as_posix()}" if file.is_relative_to(cache) else str(file)


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
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    }
    if torch.cuda.is_available():
        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found
