"""A resampler's training step, and attention, on a CPU.

All resamplers have 8 heads x 64, a feed-forward of 4 times the width, and the same number of latents and layers:

- vlmzoo's own, as it chooses; with `recompute`; and layer by layer, as with few media.
- flamingo-pytorch's `PerceiverResampler`, the same function. Its `media_pos_emb` is frozen, at 0: it would have the
  gradient reach media that are not trained.
- perceiver-pytorch's `Perceiver` with `self_per_cross_attn=0`, which is its least work: cross-attention without the
  latents among the keys, and a feed-forward (GEGLU, a half larger).

"frozen": media need no gradient, as behind an encoder that is not trained; "tuned": they do.
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from vlmzoo.connectors import perceiver
from vlmzoo.connectors._layers import MANY, BlockShape
from vlmzoo.kernels._bench_parts import loss, media, projections, segments, splice
from vlmzoo.kernels.attention import latent_attention

HEADS, HEAD_DIM = 8, 64
ATTENTION_KEYS = (576, 2880, 16384)
TOLERANCE = 1e-4
OURS, RECOMPUTE, LAYER_BY_LAYER = "vlmzoo", "vlmzoo, recompute", "vlmzoo, layer by layer"
FLAMINGO, PERCEIVER = "flamingo-pytorch", "perceiver-pytorch"
FLAMINGO_NAMES = {
    "0.norm_media": "media_norm",
    "0.norm_latents": "latent_norm",
    "0.to_q": "attention.query",
    "0.to_out": "attention.out",
    "1.0": "feed_forward_norm",
    "1.1": "feed_forward.up",
    "1.3": "feed_forward.down",
}
"""What a layer calls its parts, and what ours calls them; "0.to_kv" is our key above our value."""


@dataclass
class Case:
    """One way to a resampler's training step."""

    module: nn.Module
    media: Tensor
    many: int = MANY

    def clear(self) -> None:
        self.module.zero_grad()
        self.media.grad = None

    def __call__(self) -> Tensor:
        """The step; what came out."""
        self.clear()
        with mock.patch.object(perceiver, "MANY", self.many):
            out = self.module(self.media)
        out.backward(torch.linspace(-1, 1, out.numel()).view_as(out))
        return out.detach()

    def results(self) -> dict[str, Tensor]:
        """The output and every gradient of a step."""
        results = {"output": self()}
        sources = {"media": self.media, **dict(self.module.named_parameters())}
        return results | {name: source.grad for name, source in sources.items() if source.grad is not None}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Ratios and rows. Above 1 a step ratio says that ours is faster, below 1 a memory ratio that ours needs less.

    Raises:
        ImportError: a peer is asked for and not installed.
        ArithmeticError: two cases that are the same function give different results.
    """
    torch.manual_seed(0)
    ours = perceiver.PerceiverResampler(
        options.dim, options.latents, options.layers, BlockShape(HEADS, HEAD_DIM, 4, "gelu", qk_norm=False)
    )
    recomputing = copy.deepcopy(ours)
    recomputing.gradient_checkpointing = True
    peers = _peers(options, ours) if options.peers else {}
    ratios: dict[str, Any] = {"cpu_step_ratio": None, "cpu_memory_ratio": None}
    rows = []
    for kind in ("frozen", "tuned"):
        media = torch.randn(1, options.tokens, options.dim, requires_grad=kind == "tuned")
        cases = {
            OURS: Case(ours, media),
            RECOMPUTE: Case(recomputing, media),
            LAYER_BY_LAYER: Case(ours, media, options.tokens + 1),
        } | {name: Case(peer, media) for name, peer in peers.items()}
        _check(cases)
        peaks = {name: _peak(case) for name, case in cases.items()}
        times = _times(cases, options.rounds)
        rows += [
            {"part": "resampler step", "media": kind, "case": name}
            | _seconds(times[name])
            | {"peak_MB": round(peaks[name] / 1e6, 1)}
            for name in cases
        ]
        for case, suffix in ((OURS, ""), (RECOMPUTE, "_recompute")) if peers else ():
            prefix = ("cpu" if kind == "frozen" else "cpu_tuned") + suffix
            best = min(peers, key=lambda name: median(times[name]))
            of_rounds = [theirs / ours for theirs, ours in zip(times[best], times[case], strict=True)]
            ratios[f"{prefix}_step_ratio"] = median(times[best]) / median(times[case])
            ratios[f"{prefix}_step_ratio_spread"] = [min(of_rounds), max(of_rounds)]
            ratios[f"{prefix}_memory_ratio"] = peaks[case] / min(peaks[name] for name in peers)
    return ratios | {"rows": [*rows, *_attention(options), *_compared(options)]}


def _peers(options: argparse.Namespace, ours: nn.Module) -> dict[str, nn.Module]:
    flamingo = importlib.import_module("flamingo_pytorch").PerceiverResampler(
        dim=options.dim, depth=options.layers, dim_head=HEAD_DIM, heads=HEADS, num_latents=options.latents
    )
    weights = ours.state_dict()
    state = {name: weights[name] for name in ("latents", "norm.weight", "norm.bias")}
    state["media_pos_emb"] = torch.zeros_like(flamingo.media_pos_emb)
    for index in range(options.layers):
        layer = f"layers.{index}."
        for theirs, own in FLAMINGO_NAMES.items():
            for name in (name for name in weights if name.startswith(f"{layer}{own}.")):
                state[name.replace(own, theirs)] = weights[name]
        both = [weights[f"{layer}attention.{part}.weight"] for part in ("key", "value")]
        state[f"{layer}0.to_kv.weight"] = torch.cat(both)
    flamingo.load_state_dict(state)
    flamingo.media_pos_emb.requires_grad_(False)
    general = importlib.import_module("perceiver_pytorch").Perceiver(
        input_channels=options.dim,
        input_axis=1,
        fourier_encode_data=False,
        num_freq_bands=0,
        max_freq=1,
        depth=options.layers,
        num_latents=options.latents,
        latent_dim=options.dim,
        cross_heads=HEADS,
        cross_dim_head=HEAD_DIM,
        self_per_cross_attn=0,
        final_classifier_head=False,
    )
    return {FLAMINGO: flamingo, PERCEIVER: general}


def _check(cases: dict[str, Case]) -> None:
    """Compares what has the same name, which with flamingo-pytorch is the output, the media, latents and last norm."""
    want = cases[LAYER_BY_LAYER].results()
    for name in cases.keys() & {OURS, RECOMPUTE, FLAMINGO}:
        got = cases[name].results()
        for part in got.keys() & want.keys():
            error = float((got[part] - want[part]).norm() / want[part].norm())
            if not error <= TOLERANCE:
                raise ArithmeticError(f"{name}: {part} is off by {error:.2g} of what the layers give one by one")


def _peak(case: Case) -> int:
    """The most bytes allocated in a step beyond those before it.

    PyTorch's allocations and releases, added up in their order: the same in every run. What the libraries behind it
    take for themselves is left out.
    """
    case()
    case.clear()
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            case()
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = [event for event in json.loads(path.read_text())["traceEvents"] if event.get("name") == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        used += event["args"]["Bytes"]
        peak = max(peak, used)
    return peak


def _times(cases: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, in rounds in which every one runs once; a first round isn't counted."""
    times: dict[str, list[float]] = {name: [] for name in cases}
    gc.disable()
    try:
        for counted in [False] + [True] * rounds:
            for name, run in cases.items():
                began = time.perf_counter()
                run()
                if counted:
                    times[name].append(time.perf_counter() - began)
    finally:
        gc.enable()
    return times


def _seconds(times: list[float]) -> dict[str, Any]:
    return {"median_s": median(times), "spread_s": [min(times), max(times)]}


def _attention(options: argparse.Namespace) -> list[dict[str, Any]]:
    """`latent_attention` as it chooses, against PyTorch's."""
    rows = []
    for keys in sorted({min(keys, options.tokens) for keys in ATTENTION_KEYS}):
        inputs = [torch.randn(1, size, HEADS, HEAD_DIM, requires_grad=True) for size in (options.latents, keys, keys)]
        slope = torch.randn_like(inputs[0])

        def forward(attend: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> Tensor:
            with torch.no_grad():
                return attend(*inputs)

        def both(
            attend: Callable[..., Tensor], inputs: list[Tensor] = inputs, slope: Tensor = slope
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(attend(*inputs), inputs, slope)

        for passes, run in (("forward", forward), ("forward and backward", both)):
            torch.testing.assert_close(run(latent_attention), run(_sdpa), rtol=TOLERANCE, atol=TOLERANCE)
            times = _times({OURS: partial(run, latent_attention), "sdpa": partial(run, _sdpa)}, 3 * options.rounds)
            rows += [
                {"part": "attention", "queries": options.latents, "keys": keys, "passes": passes, "case": name}
                | _seconds(times[name])
                for name in times
            ]
    return rows


def _compared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The other kernels against the usual ways; `times` above 1 says that the row is faster than its part's first."""
    cpu, tokens = torch.device("cpu"), options.tokens
    small = tokens < 1024
    vocab, dim = (100, 16) if small else (32000, 512)
    parts = [
        *(segments(cpu, torch.float32, batch, options.latents, tokens // batch, 64, lengths)
          for batch in (1, 8) for lengths in (False, True)),
        media(cpu, torch.float32, 1, tokens // 16, 8, 64, ("sdpa", "chunked")),
        splice(cpu, torch.float32, 4, tokens // 16, tokens // 32, dim, ("torch",)),
        *(loss(cpu, torch.float32, 4, tokens // 32, dim, vocab, trained=trained) for trained in (False, True)),
        *(projections(cpu, queries, tokens, options.dim, HEADS, size)
          for queries, size in ((64, 64), (64, 128), (1, 64))),
    ]  # fmt: skip
    rows = []
    for part in parts:
        part.check(TOLERANCE)
        times = _times(part.ways, options.rounds)
        first = median(next(iter(times.values())))
        rows += [
            {"part": part.name, "shape": part.shape, "case": name}
            | _seconds(times[name])
            | {"times": first / median(times[name])}
            for name in times
        ]
    return rows


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
