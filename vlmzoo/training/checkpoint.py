"""Where a run stands, on disk: written whole, verified when read, the one before kept until then."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from vlmzoo.files import damage, staging, whole_folder
from vlmzoo.training.processes import Processes

KEPT = 2
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Progress:
    """The next step to take: `step` of the stage with this index; `total` steps lie behind in all."""

    stage: int = 0
    step: int = 0
    total: int = 0


class TornError(OSError):
    """One process could not write while all took steps together: it ends, and with it those that wait for it."""


def save(
    folder: Path, progress: Progress, config_hash: str, write: Callable[[Path], None], processes: Processes
) -> None:
    """Every process writes its share of `folder/<total>/` with `write`; all but the last two are removed.

    Raises:
        OSError: one of them could not write (a full disk); the checkpoints before this one are still there.
    """
    with _whole(folder / f"{progress.total:08}", processes) as place:
        error: OSError | None = None
        try:
            write(place)
            if processes.first:
                state = {**asdict(progress), "config_hash": config_hash, "processes": processes.world}
                (place / "state.json").write_text(json.dumps(state))
        except TornError:
            raise
        except (OSError, SafetensorError) as raised:
            error = raised if isinstance(raised, OSError) else OSError(errno.EIO, f"cannot be written ({raised})")
        (failed,) = processes.total(error is not None)
        if failed:
            raise error or OSError(errno.EIO, "another process could not write its share of it")
    if processes.first:
        for old in _found(folder)[:-KEPT]:
            shutil.rmtree(old)


@contextmanager
def _whole(path: Path, processes: Processes) -> Iterator[Path]:
    """As `whole_folder`, which the first process makes, for all of them."""
    if processes.first:
        with whole_folder(path) as place:
            processes.wait()
            yield place
    else:
        processes.wait()
        yield staging(path)
    processes.wait()


def write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)


def write_state(state: dict[str, Any], file: Path) -> None:
    """An optimizer's state, as `torch.load` reads it with `weights_only`."""
    try:
        torch.save(state, file)
    except RuntimeError as error:  # what torch makes of a full disk
        raise OSError(errno.EIO, f"cannot be written ({str(error).partition(chr(10))[0]})") from None


def find(folder: Path, config_hash: str, processes: Processes) -> tuple[Progress, Path] | None:
    """The newest whole checkpoint and where it is; None: there is none. All processes find the same one.

    A damaged one is passed over with a message.

    Raises:
        ValueError: a checkpoint of another configuration, or of another number of processes.
    """
    found = None
    if processes.first:
        found = next((place for place in reversed(_found(folder)) if _is_whole(place)), None)
    if processes.world > 1:
        (total,) = processes.total(int(found.name) if found else -1.0 if processes.first else 0.0)
        found = folder / f"{int(total):08}" if total >= 0 else None
    if found is None:
        return None
    state = json.loads((found / "state.json").read_text())
    if state.pop("config_hash") != config_hash:
        raise ValueError(f"{found}: is of another configuration; choose another --out or delete it")
    _check_processes(found, state.pop("processes", 1), processes.world)
    return Progress(**state), found


def refuse_other_processes(folder: Path, processes: Processes) -> None:
    """Raises a ValueError where the run was begun by another number of processes: it could not go on bit by bit."""
    for place in _found(folder):
        with suppress(OSError, ValueError):  # damaged, which is said when it is its turn
            begun = json.loads((place / "state.json").read_text()).get("processes", 1)
            break
    else:
        return
    _check_processes(place, begun, processes.world)


def _check_processes(place: Path, begun: int, world: int) -> None:
    if begun != world:
        raise ValueError(
            f"{place}: was written by {begun} processes, {world} would go on; expected as many, or another --out"
        )


def _is_whole(place: Path) -> bool:
    if (fault := damage(place)) is not None:
        print(f"checkpoint passed over: {fault}", file=sys.stderr)
    return fault is None


def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies a checkpoint's weights into the parts of the model that it holds."""
    copy_into({**dict(model.named_parameters()), **dict(model.named_buffers())}, weights)


def copy_into(own: dict[str, Tensor], weights: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in weights.items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(f"checkpoint weight {name} of shape {tuple(value.shape)} has no place in the model")
            own[name].copy_(value)


def _found(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("*") if place.is_dir() and place.name.isdigit())
