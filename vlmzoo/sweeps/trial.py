"""One trial: build, train every stage, evaluate, record. Killed anywhere and called again, it continues."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

from vlmzoo import build
from vlmzoo.config import RunConfig, config_hash, dump, load
from vlmzoo.connector import ImageLayout
from vlmzoo.evaluation.evaluate import evaluate
from vlmzoo.model import VisionLanguageModel
from vlmzoo.sweeps.directory import locked, read_result, write_json, write_whole
from vlmzoo.training.run import train

SCHEMA = 1


def run_trial(run: RunConfig, out: Path, cache_dir: Path | None = None) -> dict[str, Any]:
    """The run's result.json, written last; a run that has one already is not computed again.

    Raises:
        ValueError: `out` holds a run of another configuration, or another process works there.
    """
    run = build.resolve(run)
    with locked(out):
        refuse_other_run(run, out)
        if (done := read_result(out, config_hash(run))) is not None:
            return done
        write_whole(out / "config.yaml", dump(run))
        resumed = (out / "metrics.jsonl").exists()
        start = time.perf_counter()
        model = build.model(run)
        processor = build.processor(model)
        training = train(model, processor, run, out, cache_dir)
        evaluation = {
            task: evaluate(model, processor, config, out / "predictions" / f"{task}.jsonl")
            for task, config in run.evaluation.items()
        }
        model.save_pretrained(out / "model")
        processor.save_pretrained(out / "model")
        result = {
            "schema": SCHEMA,
            "config_hash": config_hash(run),
            "connector": run.connector.name,
            "encoder": run.encoder.name,
            "llm": run.llm.name,
            "seed": run.seed.init,
            "evaluation": evaluation,
            "visual_tokens": num_visual_tokens(model),
            "trainable_parameters": sum(parameter.numel() for parameter in model.connector.parameters()),
            "samples_per_second": training.samples_per_second,
            "seconds": None if resumed else time.perf_counter() - start,  # what an earlier process took is not known
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


def num_visual_tokens(model: VisionLanguageModel) -> int:
    """The places in the LLM's input that one image of the encoder's own size takes."""
    size = model.vision.image_size
    return model.num_tokens(ImageLayout((model.vision.grid(size, size),), (size, size)))


def peak_memory_bytes() -> int:
    """The most memory this process has held: on the GPU where there is one, resident otherwise."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
