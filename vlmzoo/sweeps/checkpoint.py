"""`vlmzoo eval`: a trained model on the tasks of its run, or on questions of one's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmzoo.config import DataConfig, EvaluationConfig, RunConfig, Template, load
from vlmzoo.files import damage
from vlmzoo.registry import unknown

WORLD = "world"


def evaluate_checkpoint(
    checkpoint: Path,
    tasks: Sequence[str],
    *,
    data: Path | None = None,
    images: Path | None = None,
    out: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The scores of every task.

    Args:
        checkpoint: a run's directory, or the `model/` in it.
        data: LLaVA JSON with the questions of the one task, instead of the run's own.
        images: its images; None: `images/` beside it.
        out: where predictions/<task>.jsonl are written; None: nowhere.

    Raises:
        ValueError: no trained model there, or a damaged one, or a task that the run does not have.
    """
    folder = checkpoint if (checkpoint / "result.json").is_file() else checkpoint.parent
    if not (folder / "result.json").is_file():
        raise ValueError(f"{checkpoint}: expected the directory of a run that has ended, or the model/ in it")
    if (fault := damage(folder / "model")) is not None:
        raise ValueError(fault)
    run = load(RunConfig, folder / "config.yaml")
    configs = {task: task_config(run, task, data, images) for task in tasks}

    import torch

    from vlmzoo import build
    from vlmzoo.model import VisionLanguageModel
    from vlmzoo.processor import VisionLanguageProcessor
    from vlmzoo.sweeps.trial import evaluate_task, to_device

    if run.threads is not None:
        torch.set_num_threads(run.threads)
    with build.quiet_transformers():
        model = VisionLanguageModel.from_pretrained(folder / "model")
    to_device(model)
    if run.llm.attention is not None:  # not kept in a saved model
        model.language.set_attn_implementation(run.llm.attention)
    processor = VisionLanguageProcessor.from_pretrained(folder / "model")
    return {
        task: evaluate_task(model, processor, config, out and out / "predictions" / f"{task}.jsonl", sees=run.sees)
        for task, config in configs.items()
    }


def task_config(run: RunConfig, task: str, data: Path | None = None, images: Path | None = None) -> EvaluationConfig:
    """How a task is evaluated: as the run says, or for others with the template of its last stage."""
    if data is None and task in run.evaluation:
        return run.evaluation[task]
    last = list(run.stages.values())[-1].data if run.stages else DataConfig("", template=Template.vicuna_v1)
    if data is not None:
        given = dataclasses.replace(last, path=str(data), images=None if images is None else str(images), limit=None)
        return EvaluationConfig(given)
    if task == WORLD:
        return EvaluationConfig(dataclasses.replace(last, path="world:questions", images=None, limit=None))
    raise unknown("task", task, [*run.evaluation, WORLD])
