"""The loop that trains the base models: interrupted anywhere, the same call continues to the same weights."""

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from tqdm import tqdm

CHECKPOINT_SECONDS = 120


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    """Linear warm-up over 3 % of the steps, then a cosine to a twentieth of the peak."""
    warmup = max(1, num_steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup))))


def fit(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    *,
    num_steps: int,
    peak: float,
    recipe: dict[str, object],
    directory: Path,
) -> float:
    """Seconds of training in all; `model` is trained in place from the checkpoint in `directory`, if there is one.

    Forward passes run in bfloat16, weights and updates are float32.

    Args:
        loss_at: loss of a step; its batch must depend on the step's number alone.
        recipe: what the result depends on; a checkpoint of another recipe is refused.

    Raises:
        ValueError: the checkpoint comes from another recipe.
        FloatingPointError: the loss is not finite.
        OSError: a checkpoint cannot be written; the one before still stands.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    step, seconds = _load(model, optimizer, recipe, directory)
    model.train()
    device = next(model.parameters()).device.type
    started, saved = time.monotonic() - seconds, time.monotonic()
    with tqdm(total=num_steps, initial=step, desc=directory.name, mininterval=5) as bar:
        while step < num_steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, num_steps, peak)
            with torch.autocast(device, torch.bfloat16):
                loss = loss_at(step)
            if not torch.isfinite(loss):
                raise FloatingPointError(f"loss {loss.item()} at step {step} of {directory.name}, expected finite")
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            step += 1
            bar.update()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if step == num_steps or time.monotonic() - saved > CHECKPOINT_SECONDS:
                saved = time.monotonic()
                _save(model, optimizer, {"recipe": recipe, "step": step, "seconds": saved - started}, directory)
    return time.monotonic() - started


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, object], directory: Path) -> None:
    """Written aside and renamed; the one before is kept until the new one is whole."""
    aside, before = directory.with_suffix(".writing"), directory.with_suffix(".before")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        save_model(model, str(aside / "model.safetensors"))
        torch.save(optimizer.state_dict(), aside / "optimizer.pt")
        (aside / "state.json").write_text(json.dumps(state))
    except (OSError, RuntimeError, SafetensorError) as error:  # the latter two are what torch makes of a full disk
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        raise OSError(errno.EIO, f"cannot be written ({str(error).partition(chr(10))[0]})", str(directory)) from None
    shutil.rmtree(before, ignore_errors=True)
    if directory.exists():
        os.replace(directory, before)
    os.replace(aside, directory)
    shutil.rmtree(before, ignore_errors=True)


def _load(
    model: nn.Module, optimizer: torch.optim.Optimizer, recipe: dict[str, object], directory: Path
) -> tuple[int, float]:
    """Step and seconds of the checkpoint; (0, 0.0) where there is none."""
    before = directory.with_suffix(".before")
    source = directory if directory.exists() else before
    if not source.exists():
        return 0, 0.0
    state = json.loads((source / "state.json").read_text())
    if state["recipe"] != recipe:
        raise ValueError(f"checkpoint {source} has recipe {state['recipe']}, expected {recipe}; remove it")
    load_model(model, str(source / "model.safetensors"))
    optimizer.load_state_dict(torch.load(source / "optimizer.pt", weights_only=True))
    return state["step"], state["seconds"]
