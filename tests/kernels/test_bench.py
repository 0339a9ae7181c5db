"""The benchmark at a small size: its rows, its ratios, and that it neither times nor hides what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vlmzoo.connectors import _layers, perceiver
from vlmzoo.connectors._layers import BlockShape
from vlmzoo.kernels import _bench_cpu, _bench_gpu, attention, bench

SMALL = ["--tokens", "300", "--dim", "32", "--layers", "2", "--latents", "4", "--rounds", "2", "--threads", "1"]
OURS = ["vlmzoo", "vlmzoo, recompute", "vlmzoo, layer by layer"]


class Peer(nn.Module):
    """Stands in for a peer: linear layers one behind the other, over all media."""

    def __init__(self, dim: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))

    def forward(self, media: Tensor) -> Tensor:
        for layer in self.layers:
            media = layer(media).relu()
        return media[:, :4]


@pytest.fixture
def _two_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench_cpu, "_peers", lambda options, ours: {"small": Peer(32, 1), "large": Peer(32, 40)})


def run(folder: Path, *arguments: str) -> dict[str, Any]:
    path = folder / "of" / "bench.json"
    assert bench.main([*SMALL, "--json", str(path), *arguments]) == 0
    return json.loads(path.read_text())


def test_without_peers_there_are_rows_and_no_ratio(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(tmp_path)
    assert result["machine"] == bench.machine()
    assert result["cpu_step_ratio"] is result["cpu_memory_ratio"] is None
    steps = [row for row in result["rows"] if row["part"] == "resampler step"]
    assert [(row["media"], row["case"]) for row in steps] == [(m, case) for m in ("frozen", "tuned") for case in OURS]
    assert all(0 < row["spread_s"][0] <= row["median_s"] <= row["spread_s"][1] for row in result["rows"])
    assert [row["keys"] for row in result["rows"] if row["part"] == "attention"] == [300] * 4
    printed = capsys.readouterr().out
    assert "resampler step\nmedia   case" in printed
    assert len({line.index("vlmzoo") for line in printed.splitlines() if line.startswith(("frozen", "tuned"))}) == 1


@pytest.mark.usefixtures("_two_peers")
def test_ratios_are_to_the_best_peer(tmp_path: Path) -> None:
    result = run(tmp_path, "--peers")
    of = {(row["media"], row["case"]): row for row in result["rows"] if row["part"] == "resampler step"}
    for media, prefix in (("frozen", "cpu"), ("tuned", "cpu_tuned")):
        ours, peers = of[media, "vlmzoo"], [of[media, name] for name in ("small", "large")]
        fastest = min(row["median_s"] for row in peers)
        assert result[f"{prefix}_step_ratio"] == pytest.approx(fastest / ours["median_s"])
        least = min(row["peak_MB"] for row in peers)
        assert result[f"{prefix}_memory_ratio"] == pytest.approx(ours["peak_MB"] / least, rel=0.2)
        low, high = result[f"{prefix}_step_ratio_spread"]
        assert low <= high


def test_peak_counts_what_lives_at_once() -> None:
    class Forgetful(nn.Module):
        def forward(self, media: Tensor) -> Tensor:
            for _ in range(5):  # one at a time
                torch.ones(250_000)
            both = torch.ones(250_000), torch.ones(250_000)
            return media.sum() + both[0][0] + both[1][0]

    peak = _bench_cpu._peak(_bench_cpu.Case(Forgetful(), torch.ones(3, requires_grad=True)))
    assert 2_000_000 <= peak <= 2_010_000


def test_a_wrong_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = _layers.fold
    monkeypatch.setattr(_layers, "fold", lambda weight, norm: honest(weight, (1.001 * norm[0], norm[1])))
    with pytest.raises(ArithmeticError, match=r"vlmzoo.*: .* is off by"):
        bench.main(SMALL)


def test_a_wrong_copy_of_a_peer_is_seen() -> None:
    torch.manual_seed(0)
    ours = perceiver.PerceiverResampler(32, 4, 2, BlockShape(8, 64, 4, "gelu", qk_norm=False))
    other = perceiver.PerceiverResampler(32, 4, 2, BlockShape(8, 64, 4, "relu", qk_norm=False))
    other.load_state_dict(ours.state_dict())
    media = torch.randn(1, 20, 32)
    cases = {_bench_cpu.LAYER_BY_LAYER: _bench_cpu.Case(ours, media), _bench_cpu.FLAMINGO: _bench_cpu.Case(ours, media)}
    _bench_cpu._check(cases)
    with pytest.raises(ArithmeticError, match="flamingo-pytorch"):
        _bench_cpu._check(cases | {_bench_cpu.FLAMINGO: _bench_cpu.Case(other, media)})


def test_missing_peers_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "flamingo_pytorch", None)
    assert bench.main([*SMALL, "--peers"]) == 2
    assert capsys.readouterr().err == "bench: flamingo_pytorch is not installed; `make bench-env` installs the peers\n"


def test_every_option_says_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        bench.main(["--help"])
    said = capsys.readouterr().out
    assert all(option in said for option in ("--peers", "--json", "--rounds", "example: "))


def test_the_gpu_benchmark_runs_whole_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same program, at small sizes; what is Triton's is left out."""
    command = ["--gpu", "--device", "cpu", "--shapes", "2,5,300,128", "1,3,40,64", "--out", str(tmp_path)]
    assert bench.main(command) == 0
    result = json.loads((tmp_path / "results.json").read_text())
    assert {row["mode"] for row in result["rows"] if row["part"] == "attention"} == {"dense", "padded", "varlen"}
    timed = {row["case"] for row in result["rows"] if row["part"] == "attention" and "ms" in row}
    assert {"eager", "chunked", "sdpa"} <= timed
    assert "triton" not in timed
    parts = {row["part"] for row in result["rows"]}
    assert parts == {"attention", "media", "splice", "loss"}
    assert all(row["of_roofline"] > 0 for row in result["rows"] if "of_roofline" in row)
    loss = next(row for row in result["rows"] if row["case"] == "supervised rows")
    full = next(row for row in result["rows"] if row["case"] == "full logits")
    assert loss["ratio_to_best_peer"] == pytest.approx(full["ms"] / loss["ms"])
    table = capsys.readouterr().out
    assert "| B2 Lq5 Lkv300 d128 | padded | backward | chunked |" in table
    assert (tmp_path / "ratios.svg").read_text().startswith("<svg")


def test_a_wrong_backend_is_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    honest = attention.chunked_attention

    def wrong(*arguments: Any) -> Any:
        out, lse = honest(*arguments)
        return out * 1.1, lse

    monkeypatch.setattr(attention, "chunked_attention", wrong)
    shape, roofs = _bench_gpu.Shape(1, 3, 40, 64), {"bytes_per_s": 1e9, "flops_per_s": 1e9}
    rows = _bench_gpu._attention(shape, "padded", torch.device("cpu"), roofs)
    (refused,) = [row["refused"] for row in rows if row["case"] == "chunked"]
    assert refused == "off by 0.1"
    with pytest.raises(ArithmeticError, match=r"media, .*: chunked is off by 0\.1"):
        bench.main(["--gpu", "--device", "cpu", "--shapes", "1,3,40,64", "--out", str(tmp_path)])


def test_our_own_kernels_may_not_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer's refusal is a row; ours ends the run."""

    def refuses(*_: Any) -> Any:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(attention, "chunked_attention", refuses)
    shape, roofs = _bench_gpu.Shape(1, 3, 40, 64), {"bytes_per_s": 1e9, "flops_per_s": 1e9}
    rows = _bench_gpu._attention(shape, "padded", torch.device("cpu"), roofs)
    assert [row["refused"] for row in rows if row["case"] == "chunked"] == ["no kernel image"]
    monkeypatch.setattr(_bench_gpu, "OURS", "chunked")
    with pytest.raises(RuntimeError, match="no kernel image"):
        _bench_gpu._attention(shape, "padded", torch.device("cpu"), roofs)


def test_shards_are_all_other_shapes() -> None:
    everything = [shape for part in range(5) for shape in _bench_gpu.shard(f"{part}/5")]
    assert len(_bench_gpu.CORE) == len(set(_bench_gpu.CORE)) == 16
    assert set(everything) | set(_bench_gpu.CORE) == set(_bench_gpu.ALL)
    assert len(everything) == len(set(everything))
    for text in ("5/5", "1", "a/b"):
        with pytest.raises(ValueError, match="GPU_SHARD must be i/n"):
            _bench_gpu.shard(text)


def test_without_a_gpu_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["--gpu"]) == 2
    assert capsys.readouterr().err == "bench: --gpu needs a CUDA device, and PyTorch sees none here\n"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--gpu", "--shapes", "1,2,3"], "argument --shapes: expected batch,queries,keys,dim, got '1,2,3'"),
        (["--gpu", "--device", "cpu", "--tune"], "--tune needs --device cuda"),
        (["--gpu", "--shard", "3/2"], "GPU_SHARD must be i/n with 0 <= i < n, got '3/2'"),
        (["--rounds", "0"], "--rounds must be at least 1, got 0"),
        (["--rouns", "3"], "unknown option '--rouns'; did you mean '--rounds'?"),
    ],
)
def test_refuses_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench: {says}")
