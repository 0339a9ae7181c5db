"""Attention, splice and loss on a GPU: every way to the same result, checked, then timed.

Roofs are measured first, by a large copy and a large matrix product. A time is the median of many runs by device
events, with the L2 cache cleared before each (`triton.testing.do_bench`). "padded": lengths are drawn between a quarter
and all of the keys; "varlen": the same lengths, packed. Only keys that are real count as work.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmzoo.kernels._bench_parts import Part, loss, media, splice
from vlmzoo.kernels.attention import BACKENDS, explain_backend, latent_attention

WIDTH = 1024
"""heads * dim of all attention shapes."""
EAGER_BYTES = 4 * 2**30
"""The most that the eager backend's scores may take."""
TOLERANCE = 3e-2
"""Of bfloat16 results against those of the plain operations in float32."""
OURS = "triton"


@dataclass(frozen=True)
class Shape:
    batch: int
    queries: int
    keys: int
    dim: int

    @property
    def heads(self) -> int:
        return max(1, WIDTH // self.dim)

    @property
    def score_bytes(self) -> int:
        return 4 * self.batch * self.heads * self.queries * self.keys

    def __str__(self) -> str:
        return f"B{self.batch} Lq{self.queries} Lkv{self.keys} d{self.dim}"


ALL = [
    Shape(batch, queries, keys, dim)
    for dim in (64, 128)
    for keys in (576, 2880, 16384, 65536, 262144)
    for queries in (32, 64, 128, 256)
    for batch in (1, 8, 32)
    if batch * keys <= 8 * 262144
]
CORE = [
    *(Shape(8, 64, keys, 64) for keys in (576, 2880, 16384, 65536)),
    *(Shape(1, 64, keys, 64) for keys in (16384, 65536, 262144)),
    *(Shape(8, 64, keys, 128) for keys in (2880, 16384, 65536)),
    *(Shape(8, queries, 16384, 64) for queries in (32, 128, 256)),
    *(Shape(8, queries, 16384, 128) for queries in (128, 256)),
    Shape(32, 64, 16384, 64),
]
MODES = ("dense", "padded", "varlen")


def shard(text: str | None) -> list[Shape]:
    """The core shapes, or with "i/n" every n-th of all others from the i-th (from 0) on."""
    if text is None:
        return CORE
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdigit() for part in parts) or not int(parts[0]) < int(parts[1]):
        raise ValueError(f"GPU_SHARD must be i/n with 0 <= i < n, got {text!r}")
    return [shape for shape in ALL if shape not in CORE][int(parts[0]) :: int(parts[1])]


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Roofs, rows and what they come to.

    Raises:
        ArithmeticError: a way gives another result than the plain operations.
    """
    device = torch.device(options.device)
    began = time.monotonic()
    roofs = _roofs(device)
    rows: list[dict[str, Any]] = []
    left: list[str] = []
    for number, shape in enumerate(options.shapes):
        if time.monotonic() - began > options.seconds:
            left = [str(shape) for shape in options.shapes[number:]]
            break
        for mode in MODES:
            rows += _attention(shape, mode, device, roofs)
    for part in _parts(device):
        rows += _compared(part, device)
    for row in rows:
        _rate(row, rows)
    return {
        "card": card(device),
        "roofs": roofs,
        "rows": rows,
        "not_reached": left,
        "seconds": round(time.monotonic() - began),
    }


def card(device: torch.device) -> dict[str, Any]:
    card = {"torch": torch.__version__, "device": device.type}
    if importlib.util.find_spec("triton"):
        card["triton"] = importlib.import_module("triton").__version__
    if device.type == "cuda":
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        name, driver = (
            subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].split(", ")
        )
        card |= {"name": name, "driver": driver, "cuda": torch.version.cuda}
    return card


def _milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Median."""
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(run, warmup=10, rep=40, return_mode="median"))  # pyright: ignore[reportArgumentType]
    times = []
    for _ in range(3):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return sorted(times)[1] * 1e3


def _roofs(device: torch.device) -> dict[str, float]:
    """Bytes a second of a copy, read and written, and operations a second of a bfloat16 matrix product."""
    side, size = (8192, 2**31) if device.type == "cuda" else (256, 2**20)
    source = torch.randn(size // 2, device=device).to(torch.bfloat16)
    target = torch.empty_like(source)
    copy = _milliseconds(lambda: target.copy_(source), device)
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    product = _milliseconds(lambda: a @ b, device)
    return {"bytes_per_s": 2 * source.nbytes / copy * 1e3, "flops_per_s": 2 * side**3 / product * 1e3}


def _inputs(shape: Shape, mode: str, device: torch.device) -> tuple[list[Tensor], dict[str, Any], list[int]]:
    """q, k and v, the other arguments, and how many keys each sample really has."""
    generator = torch.Generator(device).manual_seed(shape.keys + shape.queries)

    def draw(*sizes: int) -> Tensor:
        made = torch.randn(*sizes, shape.heads, shape.dim, generator=generator, device=device, dtype=torch.bfloat16)
        return made.requires_grad_()

    lengths = [shape.keys] * shape.batch
    if mode != "dense":
        low = max(1, shape.keys // 4)
        picked = torch.randint(low, shape.keys + 1, (shape.batch,), generator=torch.Generator().manual_seed(shape.keys))
        lengths = picked.tolist()
    q = draw(shape.batch, shape.queries)
    if mode == "varlen":
        bounds = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(device)
        k, v = (draw(sum(lengths)) for _ in range(2))
        return [q, k, v], {"cu_seqlens_k": bounds, "max_seqlen_k": max(lengths)}, lengths
    k, v = (draw(shape.batch, shape.keys) for _ in range(2))
    more = {} if mode == "dense" else {"kv_lens": torch.tensor(lengths, dtype=torch.int32, device=device)}
    return [q, k, v], more, lengths


def _ways(
    shape: Shape, mode: str, inputs: list[Tensor], more: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """All backends that can, and other packages' attention."""
    q, k, v = inputs
    why = dict(line.split(": ", 1) for line in explain_backend(q, k, v, backend="eager", **more).splitlines())
    for name in BACKENDS:
        if name == "eager" and shape.score_bytes > EAGER_BYTES:
            continue
        if name == "sdpa" and q.is_cuda:  # it picks one of those that are pinned
            continue
        if name == "flex" and (shape not in CORE[::4] or mode == "varlen"):  # it compiles for seconds a shape
            continue
        if name == "eager" or why[name] == "could do it":
            yield name, lambda name=name: latent_attention(q, k, v, backend=name, **more)
    if not q.is_cuda:
        return
    if mode == "varlen" and importlib.util.find_spec("torch.nn.attention.varlen"):
        varlen = importlib.import_module("torch.nn.attention.varlen").varlen_attn
        starts = torch.arange(len(q) + 1, dtype=torch.int32, device=q.device) * shape.queries

        def flash() -> Tensor:
            bounds = more["cu_seqlens_k"]
            return varlen(q.flatten(0, 1), k, v, starts, bounds, shape.queries, more["max_seqlen_k"]).view_as(q)

        yield "flash varlen", flash
    if mode == "dense" and importlib.util.find_spec("flash_attn") and importlib.util.find_spec("flash_attn.cute"):
        yield "flash-attention 4", lambda: importlib.import_module("flash_attn.cute").flash_attn_func(q, k, v)[0]


def _attention(shape: Shape, mode: str, device: torch.device, roofs: dict[str, float]) -> list[dict[str, Any]]:
    inputs, more, lengths = _inputs(shape, mode, device)
    slope = torch.randn_like(inputs[0])
    want = _exact(shape, mode, inputs, lengths, slope)
    tokens = sum(lengths)
    work = 4 * tokens * shape.queries * WIDTH
    moved = 2 * 2 * tokens * WIDTH + 2 * inputs[0].nbytes
    rows = []
    for name, run in _ways(shape, mode, inputs, more):
        row = {"part": "attention", "shape": str(shape), "mode": mode, "case": name}
        try:
            out = run()
            backward = partial(torch.autograd.grad, out, inputs, slope, retain_graph=True)
            error = _error(mode, lengths, (out, *backward()), want)
        except (RuntimeError, ValueError) as refusal:  # a peer that cannot do the shape; ours has to
            if name == OURS:
                raise
            rows.append(row | {"passes": "forward", "refused": str(refusal).splitlines()[0][:160]})
            continue
        if not error <= TOLERANCE:
            if name == OURS:
                raise ArithmeticError(f"{shape}, {mode}: {name} is off by {error:.2g}, at most {TOLERANCE} is expected")
            rows.append(row | {"passes": "forward", "refused": f"off by {error:.2g}"})
            continue
        for passes, factor, traffic, call in (
            ("forward", 1.0, moved, partial(_without_grad, run)),
            ("backward", 2.5, 2 * moved, backward),
        ):
            peak, kernel = _once(call, device)
            ms = _milliseconds(call, device)
            floor = max(traffic / roofs["bytes_per_s"], factor * work / roofs["flops_per_s"]) * 1e3
            rows.append(
                row
                | {
                    "passes": passes,
                    "ms": ms,
                    "ns_per_token": ms * 1e6 / tokens,
                    "GB_per_s": traffic / ms / 1e6,
                    "TFLOP_per_s": factor * work / ms / 1e9,
                    "of_roofline": floor / ms,
                    "peak_MB": peak / 1e6,
                    "kernel": kernel,
                    "error": error,
                }
            )
    return rows


def _once(call: Callable[[], Any], device: torch.device) -> tuple[int, str]:
    """The most bytes that a call allocates, and the kernel that it spends most time in."""
    if device.type != "cuda":
        call()
        return 0, ""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda event: event.self_device_time_total)
    return torch.cuda.max_memory_allocated() - before, kernels[-1].key[:80] if kernels else ""


def _without_grad(run: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return run()


def _samples(mode: str, tensor: Tensor, lengths: list[int], row: int) -> Tensor:
    """A sample's real keys."""
    if mode != "varlen":
        return tensor[row, : lengths[row]]
    start = sum(lengths[:row])
    return tensor[start : start + lengths[row]]


def _exact(shape: Shape, mode: str, inputs: list[Tensor], lengths: list[int], slope: Tensor) -> list[Tensor]:
    """The first sample's output and gradients by plain operations in float32, a head at a time where they are many."""
    q, k, v = (
        part.detach().float().transpose(0, 1).requires_grad_()
        for part in (inputs[0][0], *(_samples(mode, part, lengths, 0) for part in inputs[1:]))
    )
    outs, gradients = [], []
    for head in range(shape.heads):
        mine = q[head], k[head], v[head]
        out = (mine[0] @ mine[1].T / math.sqrt(shape.dim)).softmax(-1) @ mine[2]
        gradients.append(torch.autograd.grad(out, mine, slope[0, :, head].float()))
        outs.append(out.detach())
    return [torch.stack(outs, 1), *(torch.stack(part, 1) for part in zip(*gradients, strict=True))]


def _error(mode: str, lengths: list[int], got: tuple[Tensor, ...], want: list[Tensor]) -> float:
    first = [got[0][0], got[1][0], *(_samples(mode, part, lengths, 0) for part in got[2:])]
    errors = [float((a.detach().float() - b).norm() / b.norm()) for a, b in zip(first, want, strict=True)]
    return max(errors) if all(part.isfinite().all() for part in got) else math.nan


def _compared(part: Part, device: torch.device) -> list[dict[str, Any]]:
    """Rows of ways to the same output and gradients, each timed whole."""
    part.check(TOLERANCE)
    row = {"part": part.name, "shape": part.shape, "mode": "", "passes": "both"}
    return [row | {"case": name, "ms": _milliseconds(run, device)} for name, run in part.ways.items()]


def _parts(device: torch.device) -> list[Part]:
    """2048 tokens of text over 8 images; a tiled image spliced in; a quarter of the positions supervised."""
    if device.type != "cuda":
        sizes = {"media": (2, 32, 2, 8), "splice": (2, 64, 32, 16), "loss": (4, 32, 16, 50)}
        names = {"media": ("sdpa", "chunked"), "splice": ("torch",)}
    else:
        sizes = {"media": (4, 2048, 8, 64), "splice": (8, 4096, 2880, 4096), "loss": (4, 2048, 4096, 32000)}
        names = {"media": ("sdpa-efficient", OURS), "splice": ("torch", OURS)}
    return [
        media(device, torch.bfloat16, *sizes["media"], names["media"]),
        splice(device, torch.bfloat16, *sizes["splice"], names["splice"]),
        *(loss(device, torch.bfloat16, *sizes["loss"], trained=trained) for trained in (False, True)),
    ]


def tune(device: torch.device) -> dict[str, list[int]]:
    """The fastest tiles and chunks of the latent kernels, among few, at 8 x 16,384 keys: for `kernels/tuned.json`."""
    from vlmzoo.kernels import latent

    found: dict[str, list[int]] = {}
    for dim in (64, 128):
        for queries in (64, 128):
            inputs, _, _ = _inputs(Shape(8, queries, 16384, dim), "dense", device)
            slope = torch.randn_like(inputs[0])
            for direction in ("forward", "backward"):
                start = getattr(latent, f"{direction}_blocks")
                first = start(queries, dim, 2) if direction == "forward" else start(queries, dim, 2, True, True)
                best, fastest = first, math.inf
                for change in ({}, {"stages": 2}, {"stages": 4}, {"keys": 64}, {"chunk": 512}, {"chunk": 2048}):
                    blocks = replace(best, **change)
                    if blocks == best and change:
                        continue
                    with mock.patch.object(
                        latent, "tuned", lambda asked, *_, b=blocks, d=direction: b if asked == d else None
                    ):
                        try:
                            out = latent_attention(*inputs, backend=OURS)
                            run = partial(torch.autograd.grad, out, inputs, slope, retain_graph=True)
                            if direction == "forward":
                                run = partial(_without_grad, partial(latent_attention, *inputs, backend=OURS))
                            ms = _milliseconds(run, device)
                        except (RuntimeError, triton_errors()):  # more shared memory than there is
                            continue
                    if ms < fastest:
                        best, fastest = blocks, ms
                found[f"{direction} {queries} {dim}"] = list(astuple(best))
    return found


def triton_errors() -> type[Exception]:
    return importlib.import_module("triton.runtime.errors").OutOfResources


def table(result: dict[str, Any]) -> str:
    """Markdown."""
    card, roofs = result["card"], result["roofs"]
    lines = [
        f"# {card.get('name', card['device'])}",
        "",
        ", ".join(f"{name} {value}" for name, value in card.items() if name != "name") + ".",
        f"Roofs: copy {roofs['bytes_per_s'] / 1e9:.0f} GB/s, bfloat16 {roofs['flops_per_s'] / 1e12:.0f} TFLOP/s.",
        "Ratio: the fastest of the others on this card over ours, in this run.",
    ]
    if result["not_reached"]:
        lines += ["", "Not reached in the time given: " + "; ".join(result["not_reached"]) + "."]
    names = ("ms", "ns_per_token", "GB_per_s", "TFLOP_per_s", "of_roofline", "peak_MB", "ratio_to_best_peer")
    for part in dict.fromkeys(row["part"] for row in result["rows"]):
        lines += ["", f"## {part}", "", "| shape | mode | pass | case | " + " | ".join(names) + " |"]
        lines += ["|---|---|---|---|" + "--:|" * len(names)]
        for row in result["rows"]:
            if row["part"] == part:
                values = [
                    f"{row[name]:.3g}" if name in row else row.get("refused", "") if name == "ms" else ""
                    for name in names
                ]
                lines.append(" | ".join(["| " + row["shape"], row["mode"], row["passes"], row["case"], *values]) + " |")
    return "\n".join(lines) + "\n"


def plot(result: dict[str, Any]) -> str:
    """An SVG of bars: how many times as fast as the best other way each of ours is."""
    rows = [row for row in result["rows"] if "ratio_to_best_peer" in row]
    width, left, line = 950, 520, 18
    card = result["card"].get("name", "a CPU")
    scale = (width - left - 60) / max([2.0, *(row["ratio_to_best_peer"] for row in rows)])
    height = 56 + line * len(rows)
    one = left + scale
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="12" y="22" font-size="15">Times as fast as the best other way, {card}</text>',
    ]
    for number, row in enumerate(rows):
        y = 40 + line * number
        ratio = row["ratio_to_best_peer"]
        label = " ".join(part for part in (row["part"], row["shape"], row["mode"], row["passes"]) if part)
        colour = "#2a7f62" if ratio >= 1 else "#b5651d"
        parts += [
            f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{label}</text>',
            f'<rect x="{left}" y="{y + 2}" width="{ratio * scale:.1f}" height="{line - 5}" fill="{colour}"/>',
            f'<text x="{left + ratio * scale + 5:.1f}" y="{y + 12}">{ratio:.2f}</text>',
        ]
    parts += [
        f'<line x1="{one}" y1="34" x2="{one}" y2="{height - 12}" stroke="#333333" stroke-dasharray="3 3"/>',
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _rate(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Ours against the fastest of the others, above 1 where it is faster."""
    ours = {OURS, "supervised rows"}
    if "ms" not in row or row["case"] not in ours:
        return
    same = [
        other["ms"]
        for other in rows
        if "ms" in other
        and other["case"] not in ours
        and all(other[name] == row[name] for name in ("part", "shape", "mode", "passes"))
    ]
    if same:
        row["ratio_to_best_peer"] = min(same) / row["ms"]
