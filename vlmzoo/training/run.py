"""The one training loop: stages in order, from wherever a run stands to its end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from vlmzoo.config import RunConfig, StageConfig, config_hash
from vlmzoo.data.order import batches
from vlmzoo.data.samples import IGNORE
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import VisionLanguageProcessor
from vlmzoo.samples import SampleSet
from vlmzoo.training import checkpoint
from vlmzoo.training.checkpoint import Progress
from vlmzoo.training.log import Log
from vlmzoo.training.measures import Stopwatch, matmul_rate, part_norms, peak_memory_bytes, rates
from vlmzoo.training.stages import num_steps, prepare, rate
from vlmzoo.training.trackers import Trackers


@dataclass(frozen=True)
class TrainingResult:
    samples_per_second: float | None  # None: no stage takes a step
    final_loss: dict[str, float]  # stage -> mean over its last steps
    trainable_parameters: dict[str, int]  # stage -> how many its optimizer holds
    flops: int | None  # of all steps, by the first one of each stage; None: no stage takes a step


def train(
    model: VisionLanguageModel,
    processor: VisionLanguageProcessor,
    run: RunConfig,
    out: Path,
    cache: Path | None = None,
    track: Sequence[str] = (),
) -> TrainingResult:
    """Trains every stage of a run; called again after any end, it goes on to the same weights, bit for bit.

    Args:
        cache: where features of frozen encoders and token ids are kept and shared; None: computed at every step.
        track: the trackers that are told every line of metrics.jsonl, of `trackers.TRACKERS`.

    Raises:
        ValueError: data, a configuration or a checkpoint that cannot be used, or a loss that is not finite.
    """
    key, folder = config_hash(run), out / "checkpoints"
    position, weights, state = checkpoint.load(folder, key) or (Progress(), {}, None)
    log = Log(out / "metrics.jsonl", position.total, Trackers(track, run, out, position.total))
    trainable: dict[str, int] = {}
    for index, (name, stage) in enumerate(run.stages.items()):
        moving = moves_vision(run, index)
        data = SampleSet(model, processor, stage.data, cache, run.sees, encoder_moves=moving)
        total = num_steps(stage, len(data))
        if total == 0:
            continue
        optimizer = prepare(model, stage)
        trainable[name] = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        if index < position.stage:
            continue
        if weights:
            checkpoint.restore(model, weights)
            weights = {}
        start = position.step if index == position.stage else 0
        if start and state is not None:
            optimizer.load_state_dict(state)
        model.checkpoint_activations(stage.gradient_checkpointing)
        data.open_cache()
        log.stage(name, start, total)
        before = position.total - start if index == position.stage else position.total
        order = batches(len(data), stage.batch_size, run.seed.data, start)
        with deferred_interrupt() as interrupted:
            for step in range(start, total):
                began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * rate(stage, step, total)
                counter = flop_counter() if step == 0 else nullcontext()
                with seeded(run.seed.dropout, index, step), counter:
                    where = f"stage {name}, step {step}: "
                    figures = take_step(model, optimizer, data, next(order), stage, run.dtype, where)
                if isinstance(counter, FlopCounterMode):
                    figures["flops"] = counter.get_total_flops()
                position = Progress(index, step + 1, before + step + 1)
                line = {
                    "stage": name,
                    "step": step,
                    "num_steps": total,
                    "total": before + step,
                    **figures,
                    "lr": {group["part"]: group["lr"] for group in optimizer.param_groups},
                    "seconds": time.perf_counter() - began,
                    "peak_memory_bytes": peak_memory_bytes(),
                }
                peak = matmul_rate(str(model.device), getattr(torch, run.dtype))
                log.write(line | {"rates": rates(line, log.first.get(name, line), peak)})
                if step + 1 == total:
                    position = Progress(index + 1, 0, before + total)
                if step + 1 == total or (step + 1) % run.checkpoint_every == 0 or interrupted.is_set():
                    checkpoint.save(folder, position, key, trained_weights(model, run, index), optimizer)
                if interrupted.is_set():
                    raise KeyboardInterrupt
    if weights:
        checkpoint.restore(model, weights)  # every stage lies behind
    log.close()
    model.eval().requires_grad_(False)
    return TrainingResult(log.samples_per_second, log.final_loss(), trainable, log.flops)


def take_step(
    model: VisionLanguageModel,
    optimizer: torch.optim.Optimizer,
    data: SampleSet,
    indices: Sequence[int],
    stage: StageConfig,
    dtype: str,
    where: str = "",
) -> dict[str, Any]:
    """One update from these records: the loss summed over all their targets, divided once by how many there are.

    Args:
        where: begins the message of what is raised.

    Raises:
        ValueError: the loss or its gradient is not finite; nothing has been updated, and the message names the records.
    """
    waiting = Stopwatch()
    with waiting:
        samples = data.samples(indices)
    num_targets = sum(label != IGNORE for sample in samples for label in sample.labels[1:])
    optimizer.zero_grad(set_to_none=True)
    loss, size = 0.0, stage.micro_batch_size or len(samples)
    for start in range(0, len(samples), size):
        with waiting:
            batch = data.batch(samples[start : start + size])
        with torch.autocast(model.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            part = model(**batch, num_items_in_batch=num_targets).loss
        if part.requires_grad:  # not where all is frozen that text alone would reach
            part.backward()
        loss += part.item()
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = part_norms(optimizer)
    norm = nn.utils.clip_grad_norm_(parameters, stage.clip if stage.clip is not None else float("inf"))
    if not (torch.isfinite(norm) and torch.isfinite(torch.tensor(loss))):
        names = ", ".join(sample.record.where for sample in samples)
        raise ValueError(f"{where}loss {loss} with gradient norm {norm.item()}: expected finite ones; records: {names}")
    optimizer.step()
    total, *parts = torch.stack([norm, *norms.values()]).tolist()  # at once: each fetch waits for a GPU
    return {
        "loss": loss,
        "grad_norm": total,
        "grad_norms": dict(zip(norms, parts, strict=True)),
        "tokens": num_targets,
        "all_tokens": sum(len(sample.input_ids) for sample in samples),
        "samples": len(samples),
        "data_seconds": waiting.seconds,
    }


def moves_vision(run: RunConfig, index: int) -> bool:
    """Whether the encoder's features change in this stage, or have changed in one before it."""
    return any("vision" in stage.lr and stage.steps != 0 for stage in list(run.stages.values())[: index + 1])


def trained_weights(model: nn.Module, run: RunConfig, index: int) -> dict[str, Tensor]:
    """All weights that differ from the run's sources at the end of a stage; tied ones once."""
    parts = {part for stage in list(run.stages.values())[: index + 1] for part in stage.lr}
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = set(model.state_dict())
    return {name: value for name, value in named.items() if name.split(".")[0] in parts and name in kept}


def flop_counter() -> FlopCounterMode:
    """Counts what passes forward and backward, attention on a CPU included, which torch leaves out."""
    aten = torch.ops.aten
    on_cpu: dict[Any, Any] = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda *shapes, **_: sdpa_flop_count(*shapes[:3]),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda *shapes, **_: sdpa_backward_flop_count(*shapes[:4])
        ),
    }
    return FlopCounterMode(display=False, custom_mapping=on_cpu)


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
    """Ctrl-C sets the event instead of stopping in the middle of an update; a second one stops at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def note(signum: int, frame: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
