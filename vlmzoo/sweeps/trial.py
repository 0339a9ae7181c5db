"""One trial: build, train every stage, evaluate, record. Killed anywhere and called again, it continues."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmzoo import build, world
from vlmzoo.config import EvaluationConfig, RunConfig, Sight, config_hash, dump, load
from vlmzoo.connector import Connector
from vlmzoo.evaluation.evaluate import evaluate, write_predictions
from vlmzoo.evaluation.metrics import score
from vlmzoo.files import locked, whole_folder, write_json, write_whole
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import Layouts, VisionLanguageProcessor
from vlmzoo.samples import SampleSet
from vlmzoo.sweeps.manifest import manifest
from vlmzoo.sweeps.metrics import read_metrics
from vlmzoo.sweeps.plan import read_result
from vlmzoo.training import adapters, checkpoint, processes
from vlmzoo.training.check import check
from vlmzoo.training.measures import peak_memory_bytes
from vlmzoo.training.run import moves_vision, train
from vlmzoo.training.stages import num_steps

SCHEMA = 2


def run_trial(run: RunConfig, out: Path, cache: Path | None = None, track: Sequence[str] = ()) -> dict[str, Any]:
    """The run's result.json, written last; a run that has one already is not computed again.

    Of several processes that torchrun started, all train and the first one does the rest: the others return nothing.

    Args:
        cache: where features of the frozen encoder are kept and shared; None: nowhere.
        track: trackers of its training.

    Raises:
        ValueError: `out` holds a run of another configuration, another process works there, or these processes cannot
            share the run.
    """
    run = build.resolve(run)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    key, together = config_hash(run), processes.start()
    processes.check(run, together)
    with locked(out) if together.first else nullcontext():
        done, made_with = None, {}
        if together.first:
            refuse_other_run(run, out)
            checkpoint.refuse_other_processes(out / "checkpoints", together)
            done = read_result(out, key)
        (is_done,) = together.total(done is not None)
        if is_done:
            return done or {}
        check(run)
        if together.first:
            write_whole(out / "config.yaml", dump(run))
            made_with = manifest(run, together.world)
            write_json(out / "manifest.json", made_with)
        earlier = sum(step["seconds"] for step in read_metrics(out / "metrics.jsonl"))  # of a process that was stopped
        start = time.perf_counter()
        model, processor = new_model(run)
        check_data(run, model, processor)
        training = train(model, processor, run, out, cache, together, track)
        if not together.first:
            return {}
        if training.feature_error:
            write_json(out / "manifest.json", {**made_with, "feature_error": training.feature_error})
        to_device(model)
        adapters.finish(model.language, run, out / "adapter")
        to_dtype(model, getattr(torch, run.dtype))
        cache = None if moves_vision(run, len(run.stages) - 1) else cache
        evaluation, shuffled = {}, {}
        for task, config in run.evaluation.items():
            file = out / "predictions" / f"{task}.jsonl"
            evaluation[task] = evaluate_task(model, processor, config, file, cache, run.sees)
            if config.shuffled:
                other = out / "predictions" / f"{task}.shuffled.jsonl"
                shuffled[task] = evaluate_task(model, processor, config, other, cache, shuffled=True)
        save(model, processor, out / "model")
        result = {
            "schema": SCHEMA,
            "config_hash": key,
            "connector": run.connector.name,
            "encoder": run.encoder.name,
            "llm": run.llm.name,
            "seed": run.seed.init,
            "sees": run.sees,
            "world": world_version(run),
            "evaluation": evaluation,
            "shuffled": shuffled,
            "visual_tokens": num_visual_tokens(model),
            "trainable_parameters": num_trainable(model.connector),
            "train_flops": training.flops,
            "samples_per_second": training.samples_per_second,
            "seconds": earlier + time.perf_counter() - start,
            "peak_memory_bytes": peak_memory_bytes(),
            "final_loss": training.final_loss,
        }
        write_json(out / "result.json", result)
        return result


def refuse_other_run(run: RunConfig, out: Path) -> None:
    """Raises a ValueError where `out` holds a run whose configuration is not this one; names the first difference."""
    file = out / "config.yaml"
    if not file.is_file():
        return
    held = load(RunConfig, file)
    if config_hash(held) == config_hash(run):
        return
    lines = zip(dump(held).splitlines(), dump(run).splitlines(), strict=False)
    there, here = next(((a.strip(), b.strip()) for a, b in lines if a != b), ("fewer keys", "more keys"))
    raise ValueError(
        f"{out} holds a run of another configuration ({there!r} there, {here!r} here): choose another --out"
    )


def check_data(run: RunConfig, model: VisionLanguageModel, processor: VisionLanguageProcessor) -> None:
    """Raises a ValueError for data that a later stage or the evaluation would refuse, before the first stage starts."""
    for name, stage in run.stages.items():
        num_records = len(SampleSet(model, processor, stage.data, sees=run.sees))
        try:
            num_steps(stage, num_records)
        except ValueError as error:
            raise ValueError(f"stages.{name}: {error}") from None
    for name, task in run.evaluation.items():
        data = SampleSet(model, processor, task.data, sees=run.sees)
        try:
            if task.shuffled:
                data.shuffled(task.shuffled)
        except ValueError as error:
            raise ValueError(f"evaluation.{name}.shuffled: {error}") from None


def world_version(run: RunConfig) -> int | None:
    """The version of the embedded world, where the run uses any of it."""
    data = [stage.data for stage in run.stages.values()] + [task.data for task in run.evaluation.values()]
    names = [run.encoder.name, run.llm.name, *(item.path for item in data)]
    return world.VERSION if any(name and name.startswith("world:") for name in names) else None


def new_model(run: RunConfig) -> tuple[VisionLanguageModel, VisionLanguageProcessor]:
    """A run's untrained model, on the GPU where there is one, and its processor."""
    model = VisionLanguageModel.of_run(run)
    processor = VisionLanguageProcessor.of_run(run, model)
    if run.parallel == "ddp":
        to_device(model)
    else:  # each process gets its parts of the rest from host memory
        to_device(model.vision)
    return model, processor


def evaluate_task(
    model: VisionLanguageModel,
    processor: VisionLanguageProcessor,
    config: EvaluationConfig,
    predictions_file: Path | None = None,
    cache: Path | None = None,
    sees: Sight = "image",
    *,
    shuffled: bool = False,
) -> dict[str, Any]:
    """The scores of one task; the predictions are written where a file is given.

    Args:
        shuffled: ask the first `config.shuffled` questions, each with the images of another.
    """
    data = SampleSet(model, processor, config.data, cache, sees)
    predictions = evaluate(
        model,
        data.shuffled(config.shuffled) if shuffled else data.samples(range(len(data)), generation=True),
        partial(data.batch, padding_side="left"),
        tokenizer=processor.tokenizer,
        template=config.data.template,
        batch_size=config.batch_size,
        max_new_tokens=config.max_new_tokens,
    )
    if predictions_file is not None:
        write_predictions(predictions_file, predictions)
    return score(predictions)


def save(model: VisionLanguageModel, processor: VisionLanguageProcessor, folder: Path) -> None:
    """Writes model and processor as transformers reads them, whole or not at all."""
    with whole_folder(folder) as place, build.quiet_transformers():
        model.save_pretrained(place)
        processor.save_pretrained(place)


def to_device(model: nn.Module) -> None:
    """Moves a model to the GPU, where there is one."""
    if torch.cuda.is_available():
        nn.Module.to(model, "cuda")  # in place; transformers' own `to` has an annotation that checkers cannot follow


def to_dtype(model: VisionLanguageModel, dtype: torch.dtype) -> None:
    """All weights in this type, in place, as a saved model is read: what is evaluated is what is saved.

    Training leaves float32 in the parts it trained. The connector's buffers follow, as when it was made; the encoder's
    and the LLM's (positions, rotary frequencies) are transformers' own, which keeps them in float32.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    nn.Module.to(model.connector, dtype)


def num_trainable(connector: Connector) -> int:
    """How many numbers of the connector training may change."""
    untrained = connector.without_gradient
    return sum(parameter.numel() for name, parameter in connector.named_parameters() if name not in untrained)


def num_visual_tokens(model: VisionLanguageModel) -> int:
    """The places in the LLM's input that one image of the encoder's own size takes."""
    size = model.vision.image_size
    return model.num_tokens(Layouts.of(model).of_image((size, size)))
