"""Where a run stands, on disk: written whole, verified when read, the one before kept until then."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vlmzoo.files import damage, whole_folder

KEPT = 2


@dataclass(frozen=True)
class Progress:
    """The next step to take: `step` of the stage with this index; `total` steps lie behind in all."""

    stage: int = 0
    step: int = 0
    total: int = 0


def save(
    folder: Path, progress: Progress, config_hash: str, weights: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Writes `folder/<total>/` and removes all but the last two."""
    with whole_folder(folder / f"{progress.total:08}") as place:
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in weights.items()}, place / "model.safetensors"
        )
        try:
            torch.save(optimizer.state_dict(), place / "optimizer.pt")
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(errno.EIO, f"cannot be written ({str(error).partition(chr(10))[0]})") from None
        (place / "state.json").write_text(json.dumps({**asdict(progress), "config_hash": config_hash}))
    for old in _found(folder)[:-KEPT]:
        shutil.rmtree(old)


def load(folder: Path, config_hash: str) -> tuple[Progress, dict[str, Tensor], dict] | None:
    """Progress, weights and optimizer state of the newest whole checkpoint; None: there is none.

    A damaged one is passed over with a message.

    Raises:
        ValueError: a checkpoint of another configuration.
    """
    for place in reversed(_found(folder)):
        if (fault := damage(place)) is not None:
            print(f"checkpoint passed over: {fault}", file=sys.stderr)
            continue
        state = json.loads((place / "state.json").read_text())
        if state.pop("config_hash") != config_hash:
            raise ValueError(f"{place}: is of another configuration; choose another --out or delete it")
        optimizer = torch.load(place / "optimizer.pt", weights_only=True)
        return Progress(**state), load_file(place / "model.safetensors"), optimizer
    return None


def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copies a checkpoint's weights into the parts of the model that it holds."""
    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, value in weights.items():
            if name not in own or own[name].shape != value.shape:
                raise ValueError(f"checkpoint weight {name} of shape {tuple(value.shape)} has no place in the model")
            own[name].copy_(value)


def _found(folder: Path) -> list[Path]:
    return sorted(place for place in folder.glob("*") if place.is_dir() and place.name.isdigit())
