"""What a stage trains, how long, and at which rates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from vlmzoo.config import Part, StageConfig

PARTS: tuple[Part, ...] = ("vision", "connector", "language")


def num_steps(stage: StageConfig, num_records: int) -> int:
    """The stage's steps; 0 skips it.

    Raises:
        ValueError: neither steps nor epochs are given, or both, or no part has a learning rate.
    """
    if (stage.steps is None) == (stage.epochs is None):
        raise ValueError(f"a stage needs either steps or epochs, got steps={stage.steps} and epochs={stage.epochs}")
    epochs = math.ceil((stage.epochs or 0) * num_records / stage.batch_size)
    steps = epochs if stage.steps is None else stage.steps
    if steps and not stage.lr:
        raise ValueError(f"a stage needs a learning rate for at least one of {', '.join(PARTS)}; steps: 0 skips it")
    return steps


def freeze(model: nn.Module, stage: StageConfig) -> None:
    """Freezes all that has no learning rate.

    Trained parts hold float32 weights whatever the run computes in; frozen ones keep the run's type and stay in eval
    mode, without gradients or optimizer state.

    Raises:
        ValueError: a part that has a learning rate has no parameter to train.
    """
    model.eval().requires_grad_(False)
    for part in PARTS:
        if part not in stage.lr:
            continue
        module = getattr(model, part).train().float()
        untrained = getattr(module, "without_gradient", frozenset())
        parameters = [parameter for name, parameter in module.named_parameters() if name not in untrained]
        for parameter in parameters:
            parameter.requires_grad_(True)
        if not parameters:
            raise ValueError(f"stage trains {part!r}, which has no parameter to train")


def make_optimizer(model: nn.Module, stage: StageConfig) -> torch.optim.AdamW:
    """AdamW over what `freeze` left to train, each part at its own rate."""
    groups: list[dict[str, Any]] = []
    for part in PARTS:
        if part in stage.lr:
            parameters = [parameter for parameter in getattr(model, part).parameters() if parameter.requires_grad]
            groups.append({"params": parameters, "lr": stage.lr[part], "peak": stage.lr[part], "part": part})
    return torch.optim.AdamW(groups, betas=stage.betas, weight_decay=stage.weight_decay, fused=True)


def rate(stage: StageConfig, step: int, total: int) -> float:
    """The share of the peak learning rate at a step: linear warm-up, then the stage's schedule down to 0."""
    warmup = math.ceil(stage.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if stage.schedule == "constant":
        return 1.0
    behind = (step - warmup) / max(1, total - warmup)
    return 1 - behind if stage.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * behind))
