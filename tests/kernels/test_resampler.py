"""`resampler_attention` against layers written out in float64: values, gradients, cost, memory, planted faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import oracle
from vlmzoo.kernels import resampler
from vlmzoo.kernels.attention import latent_attention
from vlmzoo.kernels.resampler import explain_method, fold, normalize, resampler_attention

IMAGES, TOKENS, MEDIA_DIM, HEADS, DIM, QUERIES, LATENTS = 2, 13, 12, 3, 4, 5, 2
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 0.0, torch.bfloat16: 0.0}
"""Beside twice the error of the layers run one by one in the same type."""
WAYS = [("projected", False), ("projected", True), ("absorbed", False), ("absorbed", True)]
WAYS_AND_NORMS = [*((*way, False) for way in WAYS), *((*way, True) for way in WAYS if way[0] == "projected")]
Weights = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resampler, "CHUNK", 5)


def tensors(dtype: torch.dtype = torch.float64, layers: int = 1) -> list[Weights]:
    """For each layer its queries, latents and weights; the media are those of the first."""
    generator = torch.Generator().manual_seed(0)
    inner = HEADS * DIM
    sizes: dict[str, tuple[int, ...]] = {
        "q": (IMAGES, QUERIES, HEADS, DIM),
        "k2": (IMAGES, LATENTS, HEADS, DIM),
        "v2": (IMAGES, LATENTS, HEADS, DIM),
        "key": (inner, MEDIA_DIM),
        "value": (inner, MEDIA_DIM),
        "gamma": (MEDIA_DIM,),
        "beta": (MEDIA_DIM,),
        "key_gamma": (DIM,),
        "key_beta": (DIM,),
    }

    def draw(name: str) -> Tensor:
        value = torch.randn(sizes[name], generator=generator, dtype=torch.float64)
        return value / MEDIA_DIM**0.5 if name in ("key", "value") else value

    drawn = [{name: draw(name) for name in sizes} for _ in range(layers)]
    drawn[0]["media"] = 3 * torch.randn(IMAGES, TOKENS, MEDIA_DIM, generator=generator, dtype=torch.float64) + 1
    return [{name: value.to(dtype).requires_grad_() for name, value in layer.items()} for layer in drawn]


def mask() -> Tensor:
    real = torch.rand(IMAGES, TOKENS, generator=torch.Generator().manual_seed(1)) < 0.6
    real[0, :7] = False  # a whole chunk and a part of one
    return real


def ours(layers: list[Weights], real: Tensor | None, qk_norm: bool, recompute: bool, method: str) -> list[Tensor]:
    media = normalize(layers[0]["media"])
    return [
        resampler_attention(
            layer["q"],
            media,
            fold(layer["key"], (layer["gamma"], layer["beta"])),
            fold(layer["value"], (layer["gamma"], layer["beta"])),
            key_norm=(layer["key_gamma"], layer["key_beta"]) if qk_norm else None,
            k2=layer["k2"],
            v2=layer["v2"],
            mask=real,
            recompute=recompute,
            method=method,
        )
        for layer in layers
    ]


def written_out(
    layers: list[Weights], real: Tensor | None, qk_norm: bool, attend: Callable[..., Any] = oracle.attention
) -> list[Tensor]:
    """Each layer normalises the media with its own affine, projects them and attends."""
    outputs = []
    for layer in layers:
        seen = F.layer_norm(layers[0]["media"], (MEDIA_DIM,), layer["gamma"], layer["beta"])
        k, v = ((seen @ layer[part].T).unflatten(-1, (HEADS, DIM)) for part in ("key", "value"))
        if qk_norm:
            k = F.layer_norm(k, (DIM,), layer["key_gamma"], layer["key_beta"])
        visible = None if real is None else F.pad(real, (0, LATENTS), value=True)[:, None, None]
        read = attend(layer["q"], k, v, k2=layer["k2"], v2=layer["v2"], mask=visible)
        outputs.append(read[0] if isinstance(read, tuple) else read)
    return outputs


def results(outputs: list[Tensor], layers: list[Weights], qk_norm: bool = False) -> list[Tensor]:
    """The outputs, and the gradients of all that went in."""
    leaves = [value for layer in layers for name, value in layer.items() if qk_norm or not name.startswith("key_")]
    slopes = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin() for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, slopes)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    pairs = zip(got, want, strict=True)
    return max(float((a.detach().double() - b.detach()).norm() / b.detach().norm()) for a, b in pairs)


def check(dtype: torch.dtype, real: Tensor | None, qk_norm: bool, recompute: bool, method: str) -> None:
    layers = tensors(dtype, layers=3)
    wide = [{name: value.detach().double().requires_grad_() for name, value in layer.items()} for layer in layers]
    want = results(written_out(wide, real, qk_norm), wide, qk_norm)
    one_by_one = results(written_out(layers, real, qk_norm, latent_attention), layers, qk_norm)
    got = results(ours(layers, real, qk_norm, recompute, method), layers, qk_norm)
    assert {part.dtype for part in got} == {dtype}
    assert error(got, want) <= TOLERANCE[dtype] + 2 * error(one_by_one, want)


@pytest.mark.parametrize(("method", "recompute"), WAYS)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("real", [None, mask()], ids=["all", "masked"])
def test_equals_the_layers_written_out(method: str, recompute: bool, dtype: torch.dtype, real: Tensor | None) -> None:
    check(dtype, real, False, recompute, method)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_normalised_keys(recompute: bool, dtype: torch.dtype) -> None:
    check(dtype, mask(), True, recompute, "auto")


@pytest.mark.parametrize(("method", "recompute", "qk_norm"), WAYS_AND_NORMS)
def test_autocast_rounds_as_the_layers_do(method: str, recompute: bool, qk_norm: bool) -> None:
    layers = tensors(torch.float32, layers=3)
    want = results(written_out(layers, mask(), qk_norm), layers, qk_norm)

    def off(run: Callable[[list[Weights]], list[Tensor]]) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            given = [
                {name: value.bfloat16() if name in ("q", "k2", "v2") else value for name, value in layer.items()}
                for layer in layers
            ]
            outputs = run(given)
        assert {out.dtype for out in outputs} == {torch.bfloat16}
        return error(results([out.float() for out in outputs], layers, qk_norm), want)

    def one_by_one(given: list[Weights]) -> list[Tensor]:
        outputs = []
        for layer in given:
            seen = F.layer_norm(given[0]["media"], (MEDIA_DIM,), layer["gamma"], layer["beta"])
            k, v = (F.linear(seen, layer[part]).unflatten(-1, (HEADS, DIM)) for part in ("key", "value"))
            if qk_norm:
                k = F.layer_norm(k, (DIM,), layer["key_gamma"], layer["key_beta"]).type_as(v)
            visible = F.pad(mask(), (0, LATENTS), value=True)[:, None, None]
            outputs.append(latent_attention(layer["q"], k, v, k2=layer["k2"], v2=layer["v2"], mask=visible))
        return outputs

    assert off(lambda given: ours(given, mask(), qk_norm, recompute, method)) <= 2 * off(one_by_one)


@pytest.mark.parametrize(("method", "recompute", "qk_norm"), WAYS_AND_NORMS)
def test_gradcheck(method: str, recompute: bool, qk_norm: bool) -> None:
    (layer,) = tensors()
    names = list(layer)

    def run(*values: Tensor) -> Tensor:
        return ours([dict(zip(names, values, strict=True))], mask(), qk_norm, recompute, method)[0]

    torch.autograd.gradcheck(run, tuple(layer.values()), fast_mode=True)


@pytest.mark.parametrize(("method", "recompute"), WAYS)
def test_an_image_without_media_sees_its_latents(method: str, recompute: bool) -> None:
    layers = tensors()
    none = mask()
    none[1] = False
    got = results(ours(layers, none, False, recompute, method), layers)
    assert error(got, results(written_out(layers, none, False), layers)) <= 1e-12


@pytest.mark.parametrize("method", ["projected", "absorbed"])
@pytest.mark.parametrize("recompute", [False, True])
def test_without_latents(method: str, recompute: bool) -> None:
    layer = tensors()[0]
    media = normalize(layer["media"])
    key, value = (fold(layer[part], (layer["gamma"], layer["beta"])) for part in ("key", "value"))
    got = resampler_attention(layer["q"], media, key, value, method=method, recompute=recompute)
    seen = F.layer_norm(layer["media"], (MEDIA_DIM,), layer["gamma"], layer["beta"])
    k, v = ((seen @ layer[part].T).unflatten(-1, (HEADS, DIM)) for part in ("key", "value"))
    torch.testing.assert_close(got, oracle.attention(layer["q"], k, v)[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="k2 and v2 go together"):
        resampler_attention(layer["q"], media, key, value, k2=layer["k2"])


def test_auto_absorbs_few_queries_over_many_media() -> None:
    q, media = torch.zeros(1, 64, 8, 64), torch.zeros(1, 2048, 1024)
    assert explain_method(q, media) == (
        "absorbed: absorbing them takes 0.97 of the multiplications of keys and values, scores and outputs"
    )
    assert explain_method(q, media[:, :900]).startswith("projected: absorbing them takes 1.01 of")
    assert explain_method(torch.zeros(1, 1, 8, 64), media[:, :256]).startswith("absorbed: absorbing them takes 0.02 of")
    assert explain_method(torch.zeros(1, 72, 8, 64), media).startswith("projected: absorbing them takes 1.08 of")
    assert explain_method(q.bfloat16(), media).startswith("projected: scores of torch.bfloat16")
    assert explain_method(q, media, key_norm=(q, q)) == "projected: keys are normalised"
    assert explain_method(q, media, method="projected") == "projected: asked for by name"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"method": "folded"}, "unknown method of media attention 'folded'; valid: auto, projected, absorbed"),
        ({"method": "absorbed", "key_norm": (torch.ones(4), torch.zeros(4))}, "'absorbed' cannot normalise keys"),
        ({"media": torch.zeros(3, 7, 6)}, r"got \(2, 5, 2, 4\) and \(3, 7, 6\)"),
        ({"media": torch.zeros(2, 7, 6).half()}, "media must be torch.float32 as q is, got torch.float16"),
        ({"key": (torch.zeros(8, 5), torch.zeros(8))}, r"key must be a weight \(8, 6\) and a bias \(8\)"),
        ({"value": (torch.zeros(8, 6), torch.zeros(1))}, r"value must be .* got \(8, 6\) and \(1,\)"),
        ({"mask": torch.ones(2, 7)}, r"mask must be bool \(2, 7\), got torch.float32"),
        ({"mask": torch.ones(2, 6, dtype=torch.bool)}, r"mask must be bool \(2, 7\), got torch.bool \(2, 6\)"),
    ],
)
def test_refuses_in_one_line(change: dict[str, Any], says: str) -> None:
    affine = (torch.zeros(8, 6), torch.zeros(8))
    inputs: dict[str, Any] = {"q": torch.zeros(2, 5, 2, 4), "media": torch.zeros(2, 7, 6), "key": affine}
    inputs |= {"value": affine, "k2": torch.zeros(2, 1, 2, 4), "v2": torch.zeros(2, 1, 2, 4)}
    with pytest.raises(ValueError, match=says) as refusal:
        resampler_attention(**{**inputs, **change})
    assert "\n" not in str(refusal.value)


def gamma_not_folded(weight: Tensor, norm: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return weight, (weight * norm[1]).sum(-1)


def beta_dropped(weight: Tensor, norm: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return weight * norm[0], torch.zeros_like(weight[:, 0])


@pytest.mark.parametrize(("method", "recompute"), WAYS)
def test_the_comparison_sees_planted_faults(method: str, recompute: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = tensors(layers=2)

    def off(given: list[Weights] = layers, real: Tensor | None = None) -> float:
        got = results(ours(given, mask() if real is None else real, False, recompute, method), given)
        return error(got, results(written_out(layers, mask(), False), layers))

    assert off() <= 1e-12
    swapped = [
        {**layer, "gamma": other["gamma"], "beta": other["beta"]}
        for layer, other in zip(layers, reversed(layers), strict=True)
    ]
    assert off(swapped) > 1e-3
    assert off(real=torch.ones_like(mask())) > 1e-3
    for fault in (gamma_not_folded, beta_dropped):
        monkeypatch.setitem(globals(), "fold", fault)
        with pytest.raises((AssertionError, RuntimeError)):  # what is left out has no gradient
            assert off() <= 1e-3
    monkeypatch.undo()
    monkeypatch.setattr(resampler, "CHUNK", 5)
    outputs = ours(layers, mask(), False, recompute, method)
    slopes = [torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin() for out in outputs]
    want = torch.autograd.grad(written_out(layers, mask(), False), layers[0]["media"], slopes)
    whole = torch.autograd.grad(outputs, layers[0]["media"], slopes, retain_graph=True)
    lacks_a_layer = torch.autograd.grad(outputs[:1], layers[0]["media"], slopes[:1])
    assert error([*whole], [*want]) <= 1e-12 < 1e-3 < error([*lacks_a_layer], [*want])


class Products(TorchDispatchMode):
    """Multiply-adds of every matrix product that is run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            left = args[1] if func.overloadpacket is torch.ops.aten.addmm else args[0]
            self.total += out.numel() * left.shape[-1]
        return out


def forward(method: str, recompute: bool, trained: bool, many: int) -> Tensor:
    """Of two layers, over so many media that need a gradient or not."""
    layers = tensors(torch.float32, layers=2)
    layers[0]["media"] = torch.randn(IMAGES, many, MEDIA_DIM, requires_grad=trained)
    return torch.stack(ours(layers, None, False, recompute, method))


def products(method: str, recompute: bool, trained: bool) -> float:
    """Multiply-adds that a further token costs a layer, in projections of a token to one key a head."""
    totals = []
    for many in (40, 50):
        with Products() as counted:
            forward(method, recompute, trained, many).sum().backward()
        totals.append(counted.total)
    return (totals[1] - totals[0]) / (IMAGES * 10 * MEDIA_DIM * HEADS * DIM * 2)


def test_frozen_media_cost_no_product() -> None:
    few = QUERIES / DIM  # an absorbed query, in keys
    assert products("projected", False, False) == 4  # keys, values, and both weights' gradients
    assert products("projected", False, True) == 6
    assert products("absorbed", False, False) == 4 * few
    assert products("absorbed", False, True) == 6 * few
    assert products("absorbed", True, False) == 5 * few
    attention = 6 * QUERIES / MEDIA_DIM  # scores twice, output, and three gradients of them
    assert products("projected", True, True) - products("projected", True, False) == 2
    assert products("projected", True, False) == pytest.approx(6 + attention + QUERIES / MEDIA_DIM)


def saved(method: str, recompute: bool) -> float:
    """Numbers that a further token of an image has kept for the backward pass of two layers."""
    totals = []
    for many in (400, 500):
        storages: dict[int, Tensor] = {}

        def pack(tensor: Tensor, storages: dict[int, Tensor] = storages) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor  # keeps it alive: no address is used again
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(method, recompute, False, many)
        totals.append(sum(tensor.untyped_storage().nbytes() / 4 for tensor in storages.values()))
    return (totals[1] - totals[0]) / (IMAGES * 100)


def test_recomputing_keeps_the_media_alone() -> None:
    assert saved("projected", True) == saved("absorbed", True) == MEDIA_DIM
    assert saved("absorbed", False) == MEDIA_DIM + 2 * HEADS * QUERIES
    assert saved("projected", False) >= MEDIA_DIM + 2 * 2 * HEADS * DIM


@pytest.mark.parametrize("method", ["projected", "absorbed"])
def test_compiles_whole(method: str) -> None:
    inputs = (tensors(torch.float32), mask(), False, False, method)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert error(results(compiled(*inputs), inputs[0]), results(ours(*inputs), inputs[0])) <= 1e-6
