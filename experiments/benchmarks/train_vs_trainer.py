"""Our trainer against transformers' `Trainer` with `LlavaForConditionalGeneration`, side by side in one run.

python experiments/benchmarks/train_vs_trainer.py [--rounds N] [--steps N] [--dtype bfloat16] [--json FILE]

A CLIP of ViT-B/16's size at 224 pixels, read at layer -2 (196 patches), LLaVA-1.5's `mlp` and a Llama of 58M with 32k
words, all random. Stage 1 trains the connector on captions; stage 2 connector and LLM on conversations whose lengths
spread as LLaVA-665K's do. Both sides have the same weights, records, batches, precision, AdamW, constant learning rate,
clipping and accumulation. The peer's batches come from our own data path, which reads, decodes and resizes each image
when it is needed, as its processor would: it costs both the same, but where our cache spares it. `packed` is with the
cache. A second peer is a training step of nanoVLM's kind: samples padded to the longest of the data, logits and plain
cross-entropy of every position, a plain loop.

Each arm has a process of its own, that stands still while another one takes a step. Every round is the same batches
again; in the first one FLOPs are counted and nothing is timed. A step is all that a trainer does from one step's end to
the next one's. A ratio is the peer's seconds over ours, in a round; the table has the median of rounds, and the least
and most of them. "of CPU time" is the same ratio of what the processes computed, which others on the machine disturb
less. "allowed" is the peer's counted FLOPs over ours. Memory is our process's peak over the peer's, whole and without
what it had when all was imported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from step_overhead import ModelClock, after_each_step
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from vlmzoo.config import ConnectorConfig, DataConfig, EncoderConfig, LLMConfig, RunConfig, StageConfig, Template
from vlmzoo.data.order import epoch_order
from vlmzoo.data.samples import IGNORE
from vlmzoo.interop import to_hf
from vlmzoo.samples import SampleSet
from vlmzoo.sweeps.trial import new_model, peak_memory_bytes
from vlmzoo.training.run import flop_counter, train

TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # between the losses of a step
LEARNING_RATE = {"stage1": 1e-3, "stage2": 2e-5}
CLIP = 1.0
SPECIAL = ("<unk>", "<s>", "</s>", "<image>")
TEXT_ONLY = 16  # every so manieth conversation has no image


@dataclass(frozen=True)
class Arm:
    stage: str
    trainer: Literal["ours", "transformers", "nanovlm"] = "ours"
    cached: bool = False
    packed: bool = False
    compiled: bool = False


ARMS = {
    "stage1_cached": Arm("stage1", cached=True),
    "stage1": Arm("stage1"),
    "stage1_transformers": Arm("stage1", "transformers"),
    "stage1_nanovlm": Arm("stage1", "nanovlm"),
    "stage2_cached": Arm("stage2", cached=True),
    "stage2": Arm("stage2"),
    "stage2_packed": Arm("stage2", cached=True, packed=True),
    "stage2_transformers": Arm("stage2", "transformers"),
    "stage2_nanovlm": Arm("stage2", "nanovlm"),
}


OURS = [name for name, arm in ARMS.items() if arm.trainer == "ours"]
CACHE = "cache"  # a process that fills it
Step = dict[str, float]  # what an arm says of one


@dataclass(frozen=True)
class Size:
    vocab: int
    image: int  # pixels a side of what the encoder takes
    vision: dict[str, int]
    text: dict[str, int]
    caption: tuple[int, int]  # words, from and to
    conversation: tuple[int, int, int]  # words: the least, half have fewer, the most


FULL = Size(
    vocab=32000,
    image=224,
    vision={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 16,
    },
    text={"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8},
    caption=(10, 40),
    conversation=(10, 100, 600),
)
TINY = Size(
    vocab=200,
    image=32,
    vision={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "patch_size": 8,
    },
    text={"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    caption=(3, 8),
    conversation=(4, 10, 40),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="timed passes over the batches")
    parser.add_argument("--steps", type=int, default=2, help="batches of a pass")
    parser.add_argument("--batch", type=int, default=8, help="samples of a batch")
    parser.add_argument("--accumulation", type=int, default=1, help="equal parts that a batch is computed in")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32", help="what is computed in")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--arms", nargs="+", choices=OURS, default=OURS, help="of ours; the peers run beside them")
    parser.add_argument("--no-nanovlm", action="store_true")
    parser.add_argument("--tiny", action="store_true", help="small models and texts, to see that everything works")
    parser.add_argument("--json", type=Path, help="a file for all results")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--arm", choices=[CACHE, *ARMS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.size, options.device = TINY if options.tiny else FULL, "cpu"
    if options.batch % options.accumulation:
        parser.error(f"--batch {options.batch} cannot be computed in {options.accumulation} equal parts")
    if options.arm == CACHE:
        fill_cache(options)
    elif options.arm:
        run_arm(options)
    else:
        compare(options)


# What drives the arms.


def compare(options: argparse.Namespace) -> None:
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        options.folder = Path(name)
        write_data(options)
        if any(ARMS[arm].cached for arm in options.arms):
            subprocess.run(command(options, CACHE), check=True, env=environment(options))
        for stage in LEARNING_RATE:
            ours = [name for name in options.arms if ARMS[name].stage == stage]
            if not ours:
                continue
            peer, nanovlm = f"{stage}_transformers", f"{stage}_nanovlm"
            found = measure(options, [*ours, peer])
            for name in ours:
                rows[name] = summary(found[name], found[peer]) | {"outside_model": outside(found[name])}
            if not options.no_nanovlm:  # apart: what stands still holds its memory too
                found = measure(options, [ours[0], nanovlm])
                rows[ours[0]]["nanovlm"] = summary(found[ours[0]], found[nanovlm])
    print(table(rows))
    if options.json:
        worst = {key: max(row[key] for row in rows.values()) for key in ("memory", "memory_beyond_imports")}
        asked = {key: getattr(options, key) for key in ("rounds", "steps", "batch", "accumulation", "dtype", "threads")}
        options.json.write_text(json.dumps(rows | worst | {"options": asked}, indent=1) + "\n")
    for name, row in rows.items():
        if not ARMS[name].packed and not row["loss_difference"] <= TOLERANCE[options.dtype]:
            raise ArithmeticError(f"{name}: a loss is off by {row['loss_difference']:.2g} of the peer's")


def measure(options: argparse.Namespace, names: list[str]) -> dict[str, list[list[Step]]]:
    """For each arm what it says of each step, round by round; the first round is the counted one."""
    found: dict[str, list[list[Step]]] = {name: [] for name in names}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(options, name)) for name in names}
        for worker in workers.values():
            worker.receive()  # it stands before its first step
        for number in range(1 + options.rounds):
            for name in names:
                found[name].append([])
            for _ in range(options.steps):
                for name in names if number % 2 else reversed(names):
                    found[name][-1].append(workers[name].step())
            print(f"{', '.join(names)}: round {number} of {options.rounds}", file=sys.stderr, flush=True)
    return found


class Worker:
    """A process that trains one arm, a step each time that it is told to."""

    def __init__(self, options: argparse.Namespace, arm: str) -> None:
        self._arm = arm
        self._log = Path(options.folder, f"{arm}.txt")
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                command(options, arm),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment(options),
            )

    def step(self) -> Step:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return self.receive()

    def receive(self) -> Step:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self._arm} ended: {self._log.read_text()[-2000:]}")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # without another line to read it ends


def command(options: argparse.Namespace, arm: str) -> list[str]:
    values = {name: getattr(options, name) for name in ("rounds", "steps", "batch", "accumulation", "dtype", "folder")}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    return [sys.executable, __file__, "--arm", arm, *words, *(["--tiny"] if options.tiny else [])]


def environment(options: argparse.Namespace) -> dict[str, str]:
    """Threads that spin while they wait would be slowed down, and counted, wherever others use the machine too."""
    return {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}


def summary(ours: list[list[Step]], peer: list[list[Step]]) -> dict[str, Any]:
    """Seconds are of a step."""
    own, theirs = ([fmean(step["seconds"] for step in one) for one in rounds[1:]] for rounds in (ours, peer))
    cpu, cpu_of_peer = (sum(step["cpu_seconds"] for step in chain(*rounds[1:])) for rounds in (ours, peer))
    ratios = [slow / fast for slow, fast in zip(theirs, own, strict=True)]
    last, last_of_peer = ours[-1][-1], peer[-1][-1]
    flops_ratio = last_of_peer["flops"] / last["flops"]
    pairs = zip(chain(*ours), chain(*peer), strict=True)
    return {
        "ratio": median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "cpu_ratio": cpu_of_peer / cpu,
        "flops_ratio": flops_ratio,
        "of_allowed": median(ratios) / flops_ratio,
        "flops_ours": last["flops"],
        "flops_peer": last_of_peer["flops"],
        "seconds_ours": median(own),
        "seconds_peer": median(theirs),
        "memory": last["peak"] / last_of_peer["peak"],
        "memory_beyond_imports": (last["peak"] - last["imports"])
        / max(1, last_of_peer["peak"] - last_of_peer["imports"]),  # tiny models take less than the imports did
        "peak_bytes_ours": last["peak"],
        "peak_bytes_peer": last_of_peer["peak"],
        "loss_difference": max(abs(one["loss"] - other["loss"]) for one, other in pairs),
    }


def outside(rounds: list[list[Step]]) -> float:
    """The share of our steps that is neither forward, backward, clipping nor the optimizer."""
    steps = list(chain(*rounds[1:]))
    return 1 - sum(step["inside"] for step in steps) / sum(step["seconds"] for step in steps)


def table(rows: dict[str, dict[str, Any]]) -> str:
    columns = (
        "arm",
        "seconds a step",
        "ratio",
        "spread",
        "of CPU time",
        "allowed",
        "ratio/allowed",
        "memory",
        "beyond imports",
    )
    columns += ("outside the model", "loss off by", "nanoVLM's: ratio", "allowed", "memory")
    lines = [columns, ("---",) * len(columns)]
    for name, row in rows.items():
        low, high = row["ratio_spread"]
        nano = row.get("nanovlm", {})
        lines.append(
            (
                name,
                f"{row['seconds_ours']:.2f}",
                f"{row['ratio']:.2f}",
                f"{low:.2f}–{high:.2f}",
                *(
                    f"{row[key]:.2f}"
                    for key in ("cpu_ratio", "flops_ratio", "of_allowed", "memory", "memory_beyond_imports")
                ),
                f"{100 * row['outside_model']:.1f} %",
                f"{row['loss_difference']:.0e}",
                *(f"{nano[key]:.2f}" if nano else "" for key in ("ratio", "flops_ratio", "memory")),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# What an arm's process does.


class Turns:
    """The arm's side: stands still until the driver says so, and tells it of each step."""

    def __init__(self, counted: int) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what others print stays out of the answers
        self._imports = peak_memory_bytes()
        self._counted, self._steps, self._inside = counted, 0, 0.0
        self._counting = ExitStack()
        self._counter = flop_counter()

    def start(self) -> None:
        """Before the first step."""
        self._counting.enter_context(self._counter)
        self._say({})
        self._wait()

    def done(self, loss: float, inside: float = 0.0) -> None:
        """After a step; `inside` are the seconds spent inside the model so far."""
        seconds, cpu_seconds = time.perf_counter() - self._began, time.process_time() - self._began_cpu
        self._steps += 1
        if self._steps == self._counted:
            self._counting.close()
        self._say(
            {
                "seconds": seconds,
                "cpu_seconds": cpu_seconds,
                "inside": inside - self._inside,
                "loss": loss,
                "flops": self._counter.get_total_flops(),
                "peak": peak_memory_bytes(),
                "imports": self._imports,
            }
        )
        self._inside = inside
        self._wait()

    def _say(self, answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=self._answers, flush=True)

    def _wait(self) -> None:
        if not sys.stdin.readline():
            raise SystemExit
        self._began, self._began_cpu = time.perf_counter(), time.process_time()


def run_arm(options: argparse.Namespace) -> None:
    turns, arm = Turns(options.steps), ARMS[options.arm]
    if arm.trainer == "ours":
        train_ours(options, arm, turns)
    elif arm.trainer == "transformers":
        train_with_transformers(options, arm, turns)
    else:
        train_as_nanovlm(options, arm, turns)


def train_ours(options: argparse.Namespace, arm: Arm, turns: Turns) -> None:
    run = run_of(options, arm, options.dtype)
    model, processor = new_model(run)
    clock = ModelClock(model)
    after_each_step(lambda line: turns.done(line["loss"], clock.seconds))
    turns.start()
    train(model, processor, run, options.folder / options.arm, options.folder / "cache" if arm.cached else None)


def train_with_transformers(options: argparse.Namespace, arm: Arm, turns: Turns) -> None:
    model, data, order = peer(options, arm)
    trainer = trainer_of(options, arm, model, order, partial(batch_of, data), turns.done)
    turns.start()
    trainer.train()


def trainer_of(
    options: argparse.Namespace,
    arm: Arm,
    model: Any,
    items: Sequence[Any],
    collate: Callable[[list[Any]], dict[str, Any]],
    tell: Callable[[float], None],
) -> Trainer:
    """transformers' trainer over these items in their order; `tell` is called with each step's loss, at its end.

    Args:
        collate: makes a batch of as many items as a part of a step has samples; of one, where an item is a batch.
    """

    class Told(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                tell(logs["loss"])

    class InOrder(Trainer):
        def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
            return SequentialSampler(items)

    steps = options.steps * (1 + options.rounds)
    trainer = InOrder(
        model,
        TrainingArguments(
            output_dir=str(options.folder / options.arm),
            per_device_train_batch_size=len(items) // (steps * options.accumulation),
            gradient_accumulation_steps=options.accumulation,
            max_steps=steps,
            learning_rate=LEARNING_RATE[arm.stage],
            lr_scheduler_type="constant",
            weight_decay=0.0,
            max_grad_norm=CLIP,
            bf16=options.dtype == "bfloat16",
            use_cpu=options.device == "cpu",
            dataloader_pin_memory=options.device != "cpu",
            remove_unused_columns=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        data_collator=collate,
        train_dataset=cast(Any, items),
        callbacks=[Told()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train_as_nanovlm(options: argparse.Namespace, arm: Arm, turns: Turns) -> None:
    model, data, order = peer(options, arm)
    longest = max(len(sample.input_ids) for sample in data.samples(range(len(data))))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE[arm.stage], weight_decay=0.0)
    size = options.batch // options.accumulation
    model.train()
    turns.start()
    for step in range(0, len(order), options.batch):
        total = 0.0
        for start in range(step, step + options.batch, size):
            batch = batch_of(data, order[start : start + size])
            for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORE)):
                batch[name] = F.pad(batch[name], (0, longest - batch[name].shape[1]), value=filler)
            labels = F.pad(batch.pop("labels")[:, 1:], (0, 1), value=IGNORE)
            with torch.autocast("cpu", torch.bfloat16, enabled=options.dtype == "bfloat16"):
                logits = model(**batch, use_cache=False).logits
                loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORE)
            loss = loss / options.accumulation
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        optimizer.zero_grad()
        turns.done(total)


def peer(options: argparse.Namespace, arm: Arm) -> tuple[Any, SampleSet, list[int]]:
    """transformers' model with our weights, of which the same ones learn; our records, and their order."""
    run = run_of(options, arm, "float32")
    model, processor = new_model(run)
    data = SampleSet(model, processor, run.stages[arm.stage].data)
    theirs: Any = to_hf(model)
    theirs.requires_grad_(False)
    for part in (theirs.model.multi_modal_projector, theirs.model.language_model, theirs.lm_head):
        part.requires_grad_(arm.stage == "stage2" or part is theirs.model.multi_modal_projector)
    return theirs, data, epoch_order(len(data), run.seed.data, 0)


def batch_of(data: SampleSet, indices: list[int]) -> dict[str, Any]:
    """What transformers' collators give, and nothing of what helps our model alone."""
    samples = data.samples(indices)
    batch = data.batch(samples)
    lengths = torch.tensor([len(sample.input_ids) for sample in samples])
    mask = torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]
    kept = {name: batch[name] for name in ("input_ids", "labels", "pixel_values") if name in batch}
    return kept | {"attention_mask": mask.long()}


# Models and data.


def run_of(options: argparse.Namespace, arm: Arm, dtype: Any) -> RunConfig:
    size, rate = options.size, LEARNING_RATE[arm.stage]
    stage = StageConfig(
        data=DataConfig(
            str(options.folder / f"{arm.stage}.json"),
            template=Template.plain if arm.stage == "stage1" else Template.vicuna_v1,
            image_mode="square" if arm.stage == "stage1" else "pad",
        ),
        lr={"connector": rate} if arm.stage == "stage1" else {"connector": rate, "language": rate},
        batch_size=options.batch,
        micro_batch_size=options.batch // options.accumulation,
        steps=options.steps * (1 + options.rounds),
        schedule="constant",
        warmup_ratio=0.0,
        clip=CLIP,
        packing=arm.packed,
        compile=arm.compiled,
    )
    text = {"model_type": "llama", "vocab_size": size.vocab, "max_position_embeddings": 2048, **size.text}
    ids = {
        f"{name}_token_id": SPECIAL.index(token) for name, token in zip(("pad", "bos", "eos"), SPECIAL, strict=False)
    }
    return RunConfig(
        EncoderConfig(config={"model_type": "clip_vision_model", "image_size": size.image, **size.vision}),
        ConnectorConfig("mlp"),
        LLMConfig(config=text | ids, tokenizer=str(options.folder / "tokenizer")),
        {arm.stage: stage},
        dtype=dtype,
        checkpoint_every=10**9,
    )


def fill_cache(options: argparse.Namespace) -> None:
    """Before any arm: what computing the features takes is no part of its memory."""
    for stage in {ARMS[name].stage for name in OURS}:
        run = run_of(options, Arm(stage), options.dtype)
        model, processor = new_model(run)
        SampleSet(model, processor, run.stages[stage].data, options.folder / "cache").open_cache()


def write_data(options: argparse.Namespace) -> None:
    """The tokenizer, both stages' records and their images.

    A round is all different records, in as many batches as it has steps. They lie in the file so that the order in
    which training sees one epoch is round after round.
    """
    size = options.size
    tokenizer(size.vocab).save_pretrained(options.folder / "tokenizer")
    rng = np.random.default_rng(0)
    period = options.steps * options.batch
    (options.folder / "images").mkdir()
    for index in range(period):
        write_image(options.folder / "images" / f"{index}.jpg", rng)
    for stage, record in (("stage1", caption), ("stage2", conversation)):
        different = [record(size, index, rng) for index in range(period)]
        order = epoch_order(period * (1 + options.rounds), 0, 0)
        records = [different[place % period] for place in np.argsort(order)]
        (options.folder / f"{stage}.json").write_text(json.dumps(records))


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One word, one token; what it does not know, such as the template's words, is one too."""
    words = [*SPECIAL, *(f"w{index}" for index in range(vocab - len(SPECIAL)))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=SPECIAL[0]))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single=f"{SPECIAL[1]} $A", special_tokens=[(SPECIAL[1], 1)])
    unknown, begin, end, image = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token=unknown,
        pad_token=unknown,
        bos_token=begin,
        eos_token=end,
        extra_special_tokens=[image],
    )


def write_image(path: Path, rng: np.random.Generator) -> None:
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    coarse.resize((320, 240), Image.Resampling.BICUBIC).save(path)


def caption(size: Size, index: int, rng: np.random.Generator) -> dict[str, Any]:
    turns = ["<image>", words(size, rng.integers(*size.caption, endpoint=True), rng)]
    return {"image": f"{index}.jpg", "conversations": as_turns(turns)}


def conversation(size: Size, index: int, rng: np.random.Generator) -> dict[str, Any]:
    """Lengths spread as widely as LLaVA-665K's, over one to four rounds of questions and longer answers."""
    least, half, most = size.conversation
    total = int(np.clip(half * np.exp(0.9 * rng.standard_normal()), least, most))
    rounds = int(rng.integers(1, 4, endpoint=True))
    turns = []
    for _ in range(rounds):
        turns += [words(size, max(1, total // rounds // 3), rng), words(size, max(1, 2 * total // rounds // 3), rng)]
    if index % TEXT_ONLY == TEXT_ONLY - 1:
        return {"conversations": as_turns(turns)}
    turns[0] = f"<image>\n{turns[0]}"
    return {"image": f"{index}.jpg", "conversations": as_turns(turns)}


def words(size: Size, count: int, rng: np.random.Generator) -> str:
    return " ".join(f"w{index}" for index in rng.integers(0, size.vocab - len(SPECIAL), count))


def as_turns(texts: list[str]) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(texts)]


if __name__ == "__main__":
    main()
