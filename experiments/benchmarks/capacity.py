"""The capacity plan of docs/scale.md: writes all that stands between the page's markers.

python -m experiments.benchmarks.capacity docs/scale.md
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from experiments.benchmarks.capacity_model import (
    A100,
    ALIGN,
    CLUSTERS,
    CONNECTORS,
    DECODE_SECONDS,
    DRIVE,
    FITS,
    H100,
    H200,
    LEAST_TOKENS,
    LINK_SHARE,
    LLMS,
    LORA,
    MFU,
    MICRO_SAMPLES,
    MICRO_TOKENS,
    NODE,
    NUM_SEEDS,
    PATCHES,
    PUBLISHED,
    SHARED,
    STRATEGIES,
    TUNE,
    VISION_DIM,
    activations,
    connector,
    encoder,
    host_memory,
    memory,
    plan,
    run_hours,
    stage_hours,
    step,
    traffic,
    work,
)
from vlmzoo.files import write_whole


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, num_left: int = 1) -> str:
    marks = ["---"] * num_left + ["--:"] * (len(header) - num_left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, marks, *rows])


def gb(value: float) -> str:
    return f"{value / 1e9:,.0f}" if value >= 10e9 else f"{value / 1e9:.1f}"


def time(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1f} h" if value < 72 else f"{value / 24:.0f} days"


def percent(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.01 else f"{100 * value:.1f} %" if value >= 0.0005 else "0"


def samples_table() -> str:
    rows = []
    for name in CONNECTORS:
        row = [f"`{name}`", str(connector(name, LLMS[0], ALIGN.text)[1])]
        for llm in LLMS:
            row += [f"{work(stage, name, llm).flops / 1e12:.1f}" for stage in (ALIGN, TUNE)]
        rows.append(row)
    header = ["TFLOP a sample", "slots of an image"]
    return table([*header, *(f"{llm.name}, {stage.name}" for llm in LLMS for stage in (ALIGN, TUNE))], rows)


def published_table() -> str:
    rows = []
    for index, stage in enumerate((ALIGN, TUNE)):
        for llm in LLMS:
            published = PUBLISHED[llm.name, stage.name]
            needed = stage.samples * work(stage, "mlp", llm).flops
            planned = (stage_hours("mlp", llm, A100, NODE) or (None, None))[index]
            mfu = needed / (published * 3600 * 8 * A100.flops)
            rows.append(
                [f"{llm.name}, {stage.name}", f"{needed / 1e18:.1f}", time(published), percent(mfu), time(planned)]
            )
    return table(["8 × A100", "needed EFLOP", "published", "its MFU", f"at MFU {MFU}"], rows)


def runs_table() -> str:
    pairs = [(llm, gpu) for llm in LLMS for gpu in (A100, H100)]
    rows = []
    for name in CONNECTORS:
        row = [f"`{name}`"]
        for llm, gpu in pairs:
            parts = stage_hours(name, llm, gpu, NODE)
            row.append("–" if parts is None else " + ".join(f"{part:.1f}" for part in parts))
        rows.append(row)
    return table(["hours on 8 GPUs", *(f"{llm.name}, {gpu.name}" for llm, gpu in pairs)], rows)


def study_table() -> str:
    pairs = [(llm, gpu) for llm in LLMS for gpu in (A100, H100, H200)]
    rows = []
    for cluster in CLUSTERS:
        row = [str(cluster)]
        for llm, gpu in pairs:
            found = plan(llm, gpu, cluster)
            if found is None:
                large = [name for name in CONNECTORS if run_hours(name, llm, gpu, cluster, lora=True) is None]
                row.append(f"no room for {', '.join(f'`{name}`' for name in large)}")
                continue
            how = f"{found.at_once} × {found.gpus}{', LoRA' if found.lora else ''}"
            row.append(f"{time(found.hours)} ({how})")
        rows.append(row)
    return table(["GPUs", *(f"{llm.name}, {gpu.name}" for llm, gpu in pairs)], rows)


def scaling_table() -> str:
    rows = []
    for gpus in (8, 16, 32, 64, 128):
        row = [str(gpus), f"{TUNE.batch / gpus:.0f}"]
        for llm in LLMS:
            alone, here = (run_hours("mlp", llm, H100, count) or math.nan for count in (8, gpus))
            spent = step(TUNE, "mlp", llm, "fsdp2", H100, gpus)
            row += [time(here), f"{alone / here:.1f} ×", percent(spent.communication / spent.computing)]
        rows.append(row)
    columns = [title for llm in LLMS for title in (llm.name, "faster", "communication")]
    return table(["GPUs", "samples a GPU in stage 2", *columns], rows)


def memory_table() -> str:
    rows = []
    for strategy, gpus in ((LORA, 1), ("ddp", 8), ("zero2", 8), ("fsdp2", 8), ("fsdp2", 64), ("zero3", 8)):
        shown = f"`{strategy}`" if strategy != LORA else "`ddp`, LoRA"
        row = [shown, "any" if strategy in ("ddp", LORA) else str(gpus)]
        for llm in LLMS:
            found = memory(TUNE, "mlp", llm, strategy, gpus)
            parts = (found.weights, found.gradients, found.optimizer, found.activations)
            fits = [gpu.name for gpu in (A100, H200) if found.total <= FITS * gpu.memory]
            row += [
                " + ".join(map(gb, parts)),
                f"**{gb(found.total)}**",
                {2: "80, 141", 1: "141", 0: "none"}[len(fits)],
            ]
        rows.append(row)
    header = ["stage 2", "GPUs"]
    parts = "weights + gradients + moments + activations, GB"
    return table(
        [*header, *(title for llm in LLMS for title in (f"{llm.name}: {parts}", "sum", "fits"))], rows, num_left=2
    )


def activations_table() -> str:
    rows = []
    for stage in (ALIGN, TUNE):
        for llm in LLMS:
            rows.append(
                [f"{llm.name}, {stage.name}"]
                + [gb(activations(stage, "mlp", llm, checkpointing=checkpointing)) for checkpointing in (False, True)]
            )
    return table(["GB of activations", "kept", "with `gradient_checkpointing`"], rows)


def parts_table() -> str:
    llm, gpu, gpus = LLMS[0], H100, 8
    rows = []
    for stage in (ALIGN, TUNE):
        for name in ("mlp", "qformer", "gated_cross_attention"):
            found, spent = work(stage, name, llm), step(stage, name, llm, "fsdp2", gpu, gpus)
            shares = (found.encoder, found.connector, found.llm_forward, found.llm_backward, found.head)
            computing = [spent.computing * part / found.flops / spent.seconds for part in shares]
            waited = max(0.0, spent.communication - spent.computing)
            rest = (spent.optimizer / spent.seconds, waited / spent.seconds)
            hidden = percent(spent.communication / spent.computing)
            rows.append(
                [f"{stage.name}, `{name}`", f"{spent.seconds:.2f} s", *map(percent, (*computing, *rest)), hidden]
            )
    header = ["a step of 7B on 8 × H100", "", "encoder", "connector", "LLM forward", "LLM backward", "logits"]
    return table([*header, "optimizer", "waiting", "communication"], rows)


def traffic_table() -> str:
    rows = []
    for llm in LLMS:
        for strategy in STRATEGIES:
            for gpus in (8, 32):
                spent = step(TUNE, "mlp", llm, strategy, H100, gpus)
                where = "one node" if gpus <= NODE else f"{gpus // NODE} nodes"
                rows.append(
                    [
                        f"{llm.name}, `{strategy}`",
                        f"{gpus} ({where})",
                        gb(traffic(TUNE, "mlp", llm, strategy, gpus)),
                        f"{spent.communication:.2f} s",
                        f"{spent.computing:.2f} s",
                    ]
                )
    return table(["stage 2, H100", "GPUs", "GB a GPU and step", "on the wire", "computing"], rows)


def cache_table() -> str:
    llm = LLMS[0]
    rows = []
    for name in CONNECTORS:
        found = work(ALIGN, name, llm)
        read = read_rate(name)
        cores = NODE * MFU * H100.flops / found.flops * DECODE_SECONDS
        rows.append(
            [
                f"`{name}`",
                percent(found.encoder / found.flops),
                f"{read / feature_bytes():.0f}",
                f"{read / 1e6:,.0f} MB/s",
                f"{NODE * read / 1e9:.1f} GB/s",
                f"{cores:.0f}",
            ]
        )
    header = ["stage 1, 7B, H100", "encoder's share", "samples/s a GPU", "cache read a GPU", "a node of 8"]
    return table([*header, "cores a node without it"], rows)


def read_rate(name: str) -> float:
    """Bytes of cached features that an H100 takes in a second of stage 1 with the 7B."""
    found = work(ALIGN, name, LLMS[0])
    return feature_bytes() * MFU * H100.flops / (found.flops - found.encoder)


def feature_bytes() -> int:
    """Of one image in bf16."""
    return PATCHES * VISION_DIM * 2


def assumptions_table() -> str:
    gpus = (A100, H100, H200)
    rows = [
        (
            "MFU",
            f"{percent(MFU)} of the maker's peak",
            "what LLaVA-1.5 reached at 13B in stage 1 (above); torchtitan reports 52 to 58 % for Llama 3 on 64 A100; "
            "our own goal is 50 % of the measured rate of matrix products, which lies below the peak. Hours are "
            "inversely proportional to it: put in the one that `metrics.jsonl` shows",
        ),
        ("bf16, dense", ", ".join(f"{g.name} {g.flops / 1e12:.0f} TFLOP/s" for g in gpus), "data sheets (SXM)"),
        (
            "memory",
            ", ".join(f"{g.name} {g.memory / 1e9:.0f} GB at {g.bandwidth / 1e12:g} TB/s" for g in gpus),
            f"data sheets; {percent(FITS)} of the bytes and {percent(LINK_SHARE)} of the rate can be used",
        ),
        (
            "links",
            ", ".join(f"{g.name} {g.link / 1e9:.0f} GB/s, a node {g.network / 1e9:.0f} GB/s" for g in (A100, H100)),
            "a direction, data sheets of DGX A100 and H100 (a card of 200 or 400 Gb/s a GPU); "
            f"{percent(LINK_SHARE)} is reached",
        ),
        (
            "disks",
            f"a node reads {DRIVE / 1e9:.0f} GB/s from NVMe, {SHARED / 1e9:.0f} GB/s from a network file system",
            "estimated; measure yours",
        ),
        (
            "text beside an image",
            f"{ALIGN.text} tokens in stage 1, {percent(ALIGN.targets)} supervised; "
            f"{TUNE.text} in stage 2, {percent(TUNE.targets)} supervised",
            "estimated from what the mixtures consist of. With `mlp` an image's 576 tokens outweigh them; with the "
            "others stage 2's hours follow this number",
        ),
        (
            "text alone",
            f"{TUNE.samples - TUNE.images:,} of {TUNE.samples:,} samples, {TUNE.text_alone:,} tokens",
            "LLaVA's issue 657; the length is estimated (cut at 2,048)",
        ),
        ("micro-batch", f"{MICRO_TOKENS:,} tokens or {MICRO_SAMPLES} samples, whichever is less", "chosen"),
        ("few tokens", f"a GPU takes as long for fewer than {LEAST_TOKENS} as for {LEAST_TOKENS}", "estimated"),
        ("reading an image", f"{1e3 * DECODE_SECONDS:.0f} ms of a core", "estimated"),
        ("communication", "runs beside the computing as long as it is shorter", "the best case"),
        ("not in it", "start, checkpoints, evaluation, failures, latency of collectives", ""),
    ]
    return table(["", "value", "from"], rows, num_left=3)


def size_text() -> str:
    once = ALIGN.samples * encoder().forward / (MFU * H100.flops)
    runs = NUM_SEEDS * len(CONNECTORS)
    total = NUM_SEEDS * NODE * sum(run_hours(name, LLMS[0], H100, NODE) or math.nan for name in CONNECTORS)
    first, second = (stage.images * feature_bytes() / 1e9 for stage in (ALIGN, TUNE))
    return (
        f"The features of stage 1's {ALIGN.images:,} images × {PATCHES} patches × {VISION_DIM} in bf16 are "
        f"**{first:.0f} GB**, in fp8 half as much; stage 2's would be another {second:.0f} GB. Computing stage 1's "
        f"takes one H100 {once / 60:.0f} minutes. All {runs} first stages together spend {runs * once / 3600:.1f} "
        f"GPU-hours in the encoder, of {total:,.0f} GPU-hours of the whole study with the 7B: a cache saves at most "
        f"{percent(runs * once / 3600 / total)} of it."
    )


def disk_text() -> str:
    needs = {name: NODE * read_rate(name) for name in CONNECTORS}
    slow = " and ".join(f"`{name}`" for name, need in needs.items() if need <= SHARED)
    fast = "all of them" if max(needs.values()) <= DRIVE else "not all of them"
    share = ALIGN.images * feature_bytes() / 8e9
    return (
        f"A local NVMe drive ({DRIVE / 1e9:.0f} GB/s) keeps up with {fast}; a network file system that gives a node "
        f"{SHARED / 1e9:.0f} GB/s does so only for {slow}, which gain least. On several nodes each drive needs "
        f"only the samples of its own ranks: over eight nodes {share:.0f} GB each."
    )


def host_text() -> str:
    sizes = " and ".join(f"{gb(host_memory(llm))} GB ({llm.name})" for llm in LLMS)
    return (
        "With `zero2`, `fsdp2` and `zero3` every process also keeps the whole model in the machine's own memory: "
        f"eight of a node {sizes}, and once more while they share it out."
    )


def largest_text() -> str:
    runs = NUM_SEEDS * len(CONNECTORS)
    slowest = [(llm.name, max(run_hours(name, llm, H100, 32) or math.nan for name in CONNECTORS)) for llm in LLMS]
    return (
        f"All {runs} at once on 32 H100 each, which leaves {512 - 32 * runs} of 512 idle, take "
        + " and ".join(f"{time(found)} ({llm})" for llm, found in slowest)
        + ", as long as the slowest of them."
    )


MADE: dict[str, Callable[[], str]] = {
    "samples": samples_table,
    "published": published_table,
    "runs": runs_table,
    "study": study_table,
    "scaling": scaling_table,
    "memory": memory_table,
    "host": host_text,
    "activations": activations_table,
    "parts": parts_table,
    "traffic": traffic_table,
    "size": size_text,
    "cache": cache_table,
    "disk": disk_text,
    "largest": largest_text,
    "assumed": assumptions_table,
}


def render(page: str) -> str:
    """The page with all that stands between its markers written anew.

    Raises:
        ValueError: a marker that names none of them, or one of them without a marker.
    """
    marked = re.findall(r"^<!-- capacity: (\w+) -->$", page, flags=re.MULTILINE)
    if sorted(marked) != sorted(MADE):
        raise ValueError(f"markers {', '.join(sorted(marked))}: expected {', '.join(sorted(MADE))}")
    return re.sub(
        r"(^<!-- capacity: (\w+) -->\n).*?(^<!-- end -->$)",
        lambda found: f"{found[1]}{MADE[found[2]]()}\n{found[3]}",
        page,
        flags=re.MULTILINE | re.DOTALL,
    )


def main(page: Path) -> None:
    write_whole(page, render(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
