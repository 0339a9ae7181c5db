"""Training at LLaVA-1.5-7B's size on one GPU, beside transformers' `Trainer`: tokens/s, MFU, memory.

python experiments/benchmarks/train_on_gpu.py --out experiments/results/gpu

CLIP-L/14 at 336 pixels, LLaVA-1.5's `mlp` and a Llama of 7B, all random, in bfloat16: stage 1 on captions, stage 2 on
conversations whose lengths spread as LLaVA-665K's do, with LLaVA's adapters (rank 128; no dropout, so that losses can
be compared) beside a connector that is trained whole. Both sides have the same weights, records, batches, optimizer and
rate; the peer's batches are made before it starts, and cost it nothing.

Arms run one after the other, each through the same batches round after round; the first round is not timed. A step is
all that a trainer does from one step's end to the next one's. MFU is what a step needs (4N FLOPs a token for frozen
weights that gradients pass, 6N for trained ones, 2N for the encoder unless cached; none for padding or attention) over
a matrix product measured on this card.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from step_overhead import after_each_step
from train_vs_trainer import TINY, TOLERANCE, Arm, Size, batch_of, run_of, trainer_of, write_data

from vlmzoo.config import LoRAConfig, RunConfig, StageConfig
from vlmzoo.data.order import epoch_order
from vlmzoo.interop import to_hf
from vlmzoo.kernels._bench_gpu import card
from vlmzoo.model import VisionLanguageModel
from vlmzoo.processor import VisionLanguageProcessor
from vlmzoo.samples import SampleSet
from vlmzoo.training import adapters
from vlmzoo.training.measures import matmul_rate, peak_memory_bytes
from vlmzoo.training.processes import Processes
from vlmzoo.training.run import train

LLAVA = Size(
    vocab=32000,
    image=336,
    vision={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
    text={"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    caption=(10, 40),
    conversation=(10, 100, 600),
)
ARMS = {
    "stage1_transformers": Arm("stage1", "transformers"),
    "stage1": Arm("stage1"),
    "stage1_cached": Arm("stage1", cached=True),
    "stage2_transformers": Arm("stage2", "transformers"),
    "stage2": Arm("stage2"),
    "stage2_cached": Arm("stage2", cached=True),
    "stage2_packed": Arm("stage2", cached=True, packed=True),
    "stage2_packed_compiled": Arm("stage2", cached=True, packed=True, compiled=True),
}


@dataclass(frozen=True)
class Work:
    """What a round of batches needs of a model."""

    tokens: int  # that the LLM reads, padding left out
    targets: int
    images: int

    def flops(self, model: VisionLanguageModel, *, cached: bool) -> float:
        """Adapters, where a stage has any, are in the model."""
        language, head = model.language, model.get_output_embeddings()
        assert head is not None
        trained = matrices(weight for name, weight in language.named_parameters() if adapters.LAYER in name)
        embeddings = matrices([*language.get_input_embeddings().parameters(), *head.parameters()])
        frozen = matrices(language.parameters()) - trained - embeddings
        patches = self.images * (model.vision.image_size // model.config.vision_config.patch_size) ** 2
        return (
            self.tokens * (4 * frozen + 6 * trained)
            + self.targets * 4 * matrices(head.parameters())
            + patches * (6 * matrices(model.connector.parameters()))
            + (0 if cached else patches * 2 * matrices(model.vision.parameters()))
        )


def matrices(weights: Any) -> int:
    return sum(weight.numel() for weight in weights if weight.ndim == 2)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("train_on_gpu: needs a CUDA device, and PyTorch sees none here", file=sys.stderr)
        return 2
    began, rows = time.monotonic(), {}
    found = {
        "card": card(device),
        "matmul_flops": matmul_rate(str(device), torch.bfloat16),
        "options": {name: getattr(options, name) for name in ("rounds", "steps", "batch", "micro_batch", "tiny")},
        "arms": rows,
    }
    lines: list[dict[str, Any]] = []
    after_each_step(lambda line: lines.append(line | {"at": time.perf_counter()}))
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        write_data(options)
        for options.arm, arm in ARMS.items():
            options.accumulation = options.batch // options.micro_batch[arm.stage == "stage2"]
            lines.clear()
            if time.monotonic() - began > options.seconds:
                rows[options.arm] = {"left_out": f"{options.seconds:.0f} seconds were over"}
            else:
                rows[options.arm] = attempted(options, arm, lines)
            relate(found)
            (options.out / "training.json").write_text(json.dumps(found, indent=1) + "\n")  # outlives what follows
            (options.out / "training.md").write_text(page(found))
    print(page(found))
    off = max((row.get("loss_difference", 0) for row in rows.values()), default=0)
    if not off <= TOLERANCE[options.dtype]:
        print(f"train_on_gpu: a loss is off by {off:.2g} of the peer's", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for training.json and training.md")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes over the batches")
    parser.add_argument("--steps", type=int, default=2, help="batches of a pass")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch")
    parser.add_argument("--micro-batch", type=int, nargs=2, default=[8, 4], help="samples at once, of each stage")
    parser.add_argument("--seconds", type=float, default=420, help="begin no arm later")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a trial of the program")
    parser.add_argument("--tiny", action="store_true", help="small models and texts, for a trial")
    options = parser.parse_args(arguments)
    options.size, options.dtype = TINY if options.tiny else LLAVA, "bfloat16"
    for size in options.micro_batch:
        if size < 1 or options.batch % size:
            parser.error(f"--batch {options.batch} cannot be computed in parts of {size}")
    return options


def attempted(options: argparse.Namespace, arm: Arm, lines: list[dict[str, Any]]) -> dict[str, Any]:
    try:
        return measured(options, arm, lines)
    except torch.OutOfMemoryError:
        return {"left_out": "out of memory"}
    finally:  # of what the arm held
        gc.collect()
        torch.cuda.empty_cache()


def measured(options: argparse.Namespace, arm: Arm, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Seconds a step of an arm's rounds, its losses and memory, and what its last round needed, where it is ours."""
    run, device = configuration(options, arm), torch.device(options.device)
    stage, cache = run.stages[arm.stage], options.folder / "cache" if arm.cached else None
    with device:  # 7B random numbers are soon drawn on a GPU
        model = VisionLanguageModel.of_run(run)
    processor = VisionLanguageProcessor.of_run(run, model)
    data = SampleSet(model, processor, stage.data, cache)
    if cache is not None:
        data.open_cache()
    needed = {}
    if arm.trainer == "ours":
        reset_peak(device)
        train(model, processor, run, options.folder / options.arm, cache, Processes(device=device))
        last = lines[-options.steps :]
        images = sum(len(record.images) for record in data.records) // (1 + options.rounds)
        work = Work(sum(line["all_tokens"] for line in last), sum(line["tokens"] for line in last), images)
        needed = {"tokens": work.tokens, "flops": work.flops(model, cached=arm.cached)}
    else:
        theirs = peer(model, stage, run.seed.init)
        order, size = epoch_order(len(data), run.seed.data, 0), options.batch // options.accumulation
        made = [batch_of(data, order[start : start + size]) for start in range(0, len(order), size)]
        batches = [{name: value.cpu() for name, value in batch.items()} for batch in made]
        del model, data, made  # the weights are the peer's now
        reset_peak(device)
        trainer_of(options, arm, theirs, batches, itemgetter(0), lambda loss: lines.append(told(loss))).train()
    ends = [line["at"] for line in lines[options.steps - 1 :]]  # from the first round's end on
    seconds = [after - before for before, after in pairwise(ends)]
    return {
        **needed,
        "seconds": [fmean(seconds[at : at + options.steps]) for at in range(0, len(seconds), options.steps)],
        "losses": [line["loss"] for line in lines],
        "peak_bytes": peak_memory_bytes(),
    }


def configuration(options: argparse.Namespace, arm: Arm) -> RunConfig:
    run = run_of(options, arm, options.dtype)
    if arm.stage == "stage1":
        return run
    return replace(run, stages={arm.stage: replace(run.stages[arm.stage], lora=LoRAConfig(dropout=0.0))})


def peer(model: VisionLanguageModel, stage: StageConfig, seed: int) -> Any:
    """transformers' model with our weights, of which the same ones learn, in the same type."""
    theirs: Any = to_hf(model)
    theirs.requires_grad_(False)
    adapters.enter(theirs.model.language_model, stage, [], seed)
    for name, weight in theirs.named_parameters():
        if adapters.LAYER in name or "multi_modal_projector" in name:
            weight.data = weight.data.float()
            weight.requires_grad_(True)
    return theirs


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def told(loss: float) -> dict[str, Any]:
    return {"loss": loss, "at": time.perf_counter()}


def relate(found: dict[str, Any]) -> None:
    """Completes each arm that was measured by what it comes to, beside its stage's peer where that was."""
    rows = found["arms"]
    for name, row in rows.items():
        stage = ARMS[name].stage
        theirs = rows.get(f"{stage}_transformers", {})
        # What one round of a stage's batches needs is the same for every arm; the peer's are those without a cache.
        ours = row if "flops" in row else rows.get(stage, {})
        if "seconds" not in row or "flops" not in ours:
            continue
        step = median(row["seconds"])
        row["tokens_per_second"] = ours["tokens"] / found["options"]["steps"] / step
        row["samples_per_second"] = found["options"]["batch"] / step
        row["mfu"] = ours["flops"] / found["options"]["steps"] / step / found["matmul_flops"]
        if "seconds" in theirs and row is not theirs:
            row["ratio"] = median(theirs["seconds"]) / step
            row["memory"] = row["peak_bytes"] / theirs["peak_bytes"]
            row["loss_difference"] = max(abs(a - b) for a, b in zip(row["losses"], theirs["losses"], strict=True))


def page(found: dict[str, Any]) -> str:
    options, size = found["options"], "a trial, tiny" if found["options"]["tiny"] else "CLIP-L/14-336, mlp, Llama 7B"
    columns = ("arm", "s a step", "spread", "samples/s", "tokens/s", "MFU", "peak GB", "ratio", "memory", "loss off by")
    lines = [columns, ("---", *["--:"] * (len(columns) - 1))]
    for name, row in found["arms"].items():
        if "left_out" in row:
            lines.append((name, row["left_out"], *[""] * (len(columns) - 2)))
            continue
        seconds = row["seconds"]
        shown = (
            f"{median(seconds):.3g}",
            f"{min(seconds):.3g}–{max(seconds):.3g}",
            *(f"{row[key]:,.0f}" if key in row else "" for key in ("samples_per_second", "tokens_per_second")),
            f"{100 * row['mfu']:.0f} %" if "mfu" in row else "",
            f"{row['peak_bytes'] / 1e9:.1f}",
            *(f"{row[key]:.2f}" if key in row else "" for key in ("ratio", "memory")),
            f"{row['loss_difference']:.0e}" if "loss_difference" in row else "",
        )
        lines.append((name, *shown))
    versions = ", ".join(f"{key} {value}" for key, value in found["card"].items())
    return "\n".join(
        [
            "# Training on a GPU, beside transformers' Trainer",
            "",
            f"`python experiments/benchmarks/train_on_gpu.py`: {size}, random weights, bfloat16; stage 2 with adapters "
            f"of rank 128. Batches of {options['batch']}, in parts of {options['micro_batch'][0]} and "
            f"{options['micro_batch'][1]}. {versions}. A matrix product in bfloat16 runs at "
            f"{found['matmul_flops'] / 1e12:.3g} TFLOP/s: MFU is a share of this, of needed FLOPs. `ratio` is the "
            "peer's seconds over ours, `memory` our peak over the peer's.",
            "",
            *(f"| {' | '.join(line)} |" for line in lines),
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
