"""The one training loop: stages in order, from wherever a run stands to its end."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vlmzoo.config import RunConfig, config_hash
from vlmzoo.data.prefetch import prefetched
from vlmzoo.data.samples import IGNORE
from vlmzoo.language.layers import compiled
from vlmzoo.language.packing import packs
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import VisionLanguageProcessor
from vlmzoo.samples import READERS, HostBatch, SampleSet
from vlmzoo.training import adapters, checkpoint
from vlmzoo.training.checkpoint import Progress
from vlmzoo.training.engines import Engine, make_engine
from vlmzoo.training.log import Log
from vlmzoo.training.measures import Stopwatch, matmul_rate, peak_memory_bytes, rates
from vlmzoo.training.processes import Processes
from vlmzoo.training.stages import freeze, num_steps, rate
from vlmzoo.training.trackers import Trackers


@dataclass(frozen=True)
class TrainingResult:
    samples_per_second: float | None  # None: no stage takes a step
    final_loss: dict[str, float]  # stage -> mean over its last steps
    trainable_parameters: dict[str, int]  # stage -> how many its optimizer holds
    flops: int | None  # of all steps, by the first one of each stage; None: no stage takes a step
    feature_error: dict[str, float]  # stage -> how far features that were cached in a narrower type are off


def train(
    model: VisionLanguageModel,
    processor: VisionLanguageProcessor,
    run: RunConfig,
    out: Path,
    cache: Path | None = None,
    processes: Processes = Processes(),  # noqa: B008  # frozen
    track: Sequence[str] = (),
) -> TrainingResult:
    """Trains every stage of a run; called again after any end, it goes on to the same weights, bit for bit.

    Args:
        cache: where features of frozen encoders and token ids are kept and shared; None: computed at every step.
        processes: that call this together; the first one writes what there is one of.
        track: the trackers that are told every line of metrics.jsonl, of `trackers.TRACKERS`.

    Raises:
        ValueError: data, a configuration or a checkpoint that cannot be used, or a loss that is not finite.
    """
    key, folder = config_hash(run), out / "checkpoints"
    position, place = checkpoint.find(folder, key, processes) or (Progress(), None)
    trackers = Trackers(track, run, out, position.total)
    log = Log(out / "metrics.jsonl" if processes.first else None, position.total, trackers)
    trainable: dict[str, int] = {}
    stages = list(run.stages.values())
    feature_error: dict[str, float] = {}
    for index, (name, stage) in enumerate(run.stages.items()):
        moving = moves_vision(run, index)
        data = SampleSet(model, processor, stage.data, cache, run.sees, encoder_moves=moving, features=run.features)
        total = num_steps(stage, len(data))
        if total == 0:
            continue
        adapters.enter(model.language, stage, stages[:index], run.seed.init)
        freeze(model, stage)
        trainable[name] = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        if place is not None and index == (position.stage if position.step else position.stage - 1):
            checkpoint.restore(model, load_file(place / checkpoint.WEIGHTS))  # before a later stage merges adapters
        if index < position.stage:
            continue
        start = position.step if index == position.stage else 0
        before = position.total - start if index == position.stage else position.total
        model.checkpoint_activations(stage.gradient_checkpointing)
        data.open_cache()
        if data.feature_error is not None:
            feature_error[name] = data.feature_error
        log.stage(name, start, total)
        with ExitStack() as held:
            interrupted = held.enter_context(deferred_interrupt())
            held.enter_context(packs(model.language, stage.packing))
            engine = make_engine(model, stages[: index + 1], run, processes)
            held.enter_context(compiled(engine.model.language, stage.compile))
            if place is not None and start:
                engine.load(place)
            place = None
            order = islice(data.order(stage, run.seed.data, start), total - start)
            made = prefetched(order, partial(make_step, engine, data), data.ahead, workers=READERS)
            steps = held.enter_context(closing(made))
            for step in range(start, total):
                began = time.perf_counter()
                for group in engine.optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(stage, step, total)
                counter = flop_counter() if step == 0 else nullcontext()
                seeds = (run.seed.dropout, index, step, *([processes.rank] if processes.rank else []))
                waiting = Stopwatch()
                with waiting:
                    work = next(steps)
                with seeded(*seeds), counter:
                    figures = take_step(engine, data, work, f"stage {name}, step {step}: ")
                figures["data_seconds"] += waiting.seconds
                if isinstance(counter, FlopCounterMode):
                    figures["flops"] = int(processes.total(counter.get_total_flops())[0])
                line = {
                    "stage": name,
                    "step": step,
                    "num_steps": total,
                    "total": before + step,
                    **figures,
                    "lr": {group["part"]: group["lr"] for group in engine.optimizer.param_groups},
                    "seconds": time.perf_counter() - began,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
                if processes.first:
                    peak = processes.world * matmul_rate(str(processes.device), getattr(torch, run.dtype))
                    line["rates"] = rates(line, log.first.get(name, line), peak)
                log.write(line)
                (stop,) = processes.total(interrupted.is_set())
                position = Progress(index, step + 1, before + step + 1)
                if step + 1 == total:
                    engine.finish()
                    position = Progress(index + 1, 0, before + total)
                    checkpoint.save(folder, position, key, engine.save_finished, processes)
                elif stop or (step + 1) % run.checkpoint_every == 0:
                    checkpoint.save(folder, position, key, engine.save, processes)
                if stop:
                    raise KeyboardInterrupt
    log.close()
    model.eval().requires_grad_(False)
    return TrainingResult(log.samples_per_second, log.final_loss(), trainable, log.flops, feature_error)


@dataclass(frozen=True)
class Step:
    """What one process does in a step, made ahead of it."""

    indices: Sequence[int]  # of all processes
    batches: Sequence[HostBatch]
    num_targets: int
    num_tokens: int  # that the LLM reads, targets among them


def make_step(engine: Engine, data: SampleSet, indices: Sequence[int]) -> Step:
    """This process's share of a step; any thread may make it.

    Args:
        indices: of the whole step, which all processes are given.

    Raises:
        RecordError, ImageError, DamageError: a record that cannot be used.
    """
    parts = [data.samples(part) for part in engine.processes.micro_batches(indices, engine.stage.micro_batch_size)]
    num_targets = sum(label != IGNORE for part in parts for sample in part for label in sample.labels[1:])
    num_tokens = sum(len(sample.input_ids) for part in parts for sample in part)
    return Step(indices, [data.on_host(part) for part in parts], num_targets, num_tokens)


def take_step(engine: Engine, data: SampleSet, step: Step, where: str = "") -> dict[str, Any]:
    """One update: the loss summed over all targets, divided once by how many there are.

    Args:
        where: begins the message of what is raised.

    Raises:
        ValueError: the loss or its gradient is not finite; nothing has been written, and the message names the records.
    """
    processes, stage, waiting = engine.processes, engine.stage, Stopwatch()
    num_targets, num_tokens = processes.total(step.num_targets, step.num_tokens)
    engine.clear()
    losses = []
    for number, part in enumerate(step.batches):
        with waiting:
            batch = data.to_device(part, idle=processes.world > 1)
        if stage.packing:
            batch["packing"] = True
        losses.append(engine.backward(batch, num_targets, last=number + 1 == len(step.batches)))
    (loss,) = processes.total(float(torch.stack(losses).sum()))

    def check(norm: float) -> None:
        if not (math.isfinite(norm) and math.isfinite(loss)):
            names = ", ".join(data.records[index].where for index in step.indices)
            raise ValueError(f"{where}loss {loss} with gradient norm {norm}: expected finite ones; records: {names}")

    norm, norms = engine.update(check)
    return {
        "loss": loss,
        "grad_norm": norm,
        "grad_norms": norms,
        "tokens": int(num_targets),
        "all_tokens": int(num_tokens),
        "samples": len(step.indices),
        "data_seconds": waiting.seconds,
    }


def moves_vision(run: RunConfig, index: int) -> bool:
    """Whether the encoder's features change in this stage, or have changed in one before it."""
    return any("vision" in stage.lr and stage.steps != 0 for stage in list(run.stages.values())[: index + 1])


def flop_counter() -> FlopCounterMode:
    """Counts what passes forward and backward, attention on a CPU included, which torch leaves out."""
    aten = torch.ops.aten
    on_cpu: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu | adapters.flop_formulas())


@contextmanager
def seeded(*seeds: int) -> Iterator[None]:
    """torch's generators seeded from these numbers inside, and as they were outside."""
    seed = int.from_bytes(str(seeds).encode(), "little") % (2**63 - 1)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a traceback for each backend it lacks
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed)
        yield


@contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of stopping in the middle of an update; a second one stops at once.

    SIGTERM does the same: schedulers send it before they take a machine away.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def note(signum: int, frame: Any) -> None:
        event.set()
        for number in previous:
            signal.signal(number, signal.default_int_handler)

    for number in previous:
        signal.signal(number, note)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
