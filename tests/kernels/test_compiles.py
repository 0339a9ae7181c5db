"""Every attention kernel compiles for Hopper and Ampere: nothing spilled, tensor cores used, memory in bounds."""

from __future__ import annotations

from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs triton")

from tests.kernels.compiled import SHARED, Compiled, compiled  # noqa: E402
from vlmzoo.kernels import latent, media  # noqa: E402
from vlmzoo.kernels.latent import Blocks  # noqa: E402

WHOLE = pytest.mark.kernels
CAPABILITIES = [90, 80]
SIZES = {"bf16": 2, "fp16": 2, "fp32": 4}
FIRST = [("bf16", 64, 64), ("bf16", 128, 128)]
REST = [
    *(("bf16", dim, num_queries) for dim in (64, 80, 96, 128) for num_queries in (64, 128, 256)),
    *((dtype, dim, 64) for dtype in ("fp16", "fp32") for dim in (64, 128)),
]
CASES = [*FIRST, *(pytest.param(*case, marks=WHOLE) for case in REST if case not in FIRST)]


def pointers(kernel: Any, dtype: str, **others: str) -> dict[str, str]:
    names = {"q", "k", "v", "k2", "v2", "out", "slope", "dq", "dk", "dv", "dk2", "dv2"} & set(kernel.arg_names)
    integers = {"lens": "i32", "cu_seqlens": "i32", "image_of_token": "i64", "span": "i32", "mask": "i1"}
    rest = {"lse": "fp32", "slope_lse": "fp32", **integers, **others}
    return dict.fromkeys(names, dtype) | {name: kind for name, kind in rest.items() if name in kernel.arg_names}


def of_latent(
    kernel: Any, blocks: Blocks, capability: int, dtype: str, dim: int, plain: bool = False, **others: str
) -> Compiled:
    flags = {"HAS_LENS": True, "PACKED": False, "HAS_MASK": not plain, "HAS_SLOPE_LSE": not plain, "MORE": False}
    constants = {name: flag for name, flag in flags.items() if name in kernel.arg_names} | {
        "SCALE": 0.125,
        "PRECISION": "tf32",
        "CHUNK": blocks.chunk,
        "BLOCK_M": blocks.queries,
        "BLOCK_N": blocks.keys,
        "HEAD_DIM": dim,
        "BLOCK_D": triton.next_power_of_2(dim),
    }
    kinds = pointers(kernel, dtype, **others)
    return compiled(kernel, kinds, constants, capability, warps=blocks.warps, stages=blocks.stages)


def holds(result: Compiled, capability: int, tensor_cores: bool = True) -> None:
    assert result.spills == 0
    assert result.shared <= SHARED[capability]
    assert result.wide_loads > 0
    if tensor_cores:
        assert result.products > 0
        assert result.old_products == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(("dtype", "dim", "num_queries"), CASES)
def test_latent_attention(capability: int, dtype: str, dim: int, num_queries: int) -> None:
    tensor_cores = dtype != "fp32"
    forward = latent.forward_blocks(num_queries, dim, SIZES[dtype])
    holds(of_latent(latent.forward_kernel, forward, capability, dtype, dim, out="fp32"), capability, tensor_cores)
    for plain in (True, False):
        backward = latent.backward_blocks(num_queries, dim, SIZES[dtype], capability >= 90, plain)
        result = of_latent(latent.backward_kernel, backward, capability, dtype, dim, plain, dq="fp32")
        holds(result, capability, tensor_cores)


def test_the_gate_sees_spills() -> None:
    result = of_latent(latent.backward_kernel, Blocks(256, 128, 4, 2), 80, "bf16", 128, dq="fp32")
    with pytest.raises(AssertionError):
        holds(result, 80)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("dtype", ["bf16", pytest.param("fp16", marks=WHOLE), pytest.param("fp32", marks=WHOLE)])
def test_media_attention(capability: int, dtype: str, dim: int) -> None:
    constants = {"SCALE": 0.125, "HAS_MASK": True, "PRECISION": "tf32", "HEAD_DIM": dim}
    constants["BLOCK_D"] = triton.next_power_of_2(dim)
    for kernel, options in (
        (media.forward_kernel, media.forward_options(SIZES[dtype])),
        (media.backward_q_kernel, media.backward_options(SIZES[dtype])),
        (media.backward_kv_kernel, media.backward_options(SIZES[dtype])),
    ):
        tiles = {name: options[name] for name in ("BLOCK_M", "BLOCK_N")}
        warps, stages = options["num_warps"], options["num_stages"]
        kinds = pointers(kernel, dtype)
        result = compiled(kernel, kinds, constants | tiles, capability, warps=warps, stages=stages)
        holds(result, capability, dtype != "fp32")
