"""The Triton kernels of `splice_rows` compiled for GPUs that need not be there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="needs triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vlmzoo.kernels import _splice_triton  # noqa: E402

ROUND = ("dim", "embeds_batch", "embeds_row", "rows_batch", "rows_row", "gradient_batch", "gradient_row")
"""What is a multiple of 16 for the usual models. The other integers are not specialized."""


def compiled(kernel: Any, capability: int, types: dict[str, str], aligned: bool = True, **options: Any) -> Any:
    """A kernel as it is launched for rows of 4096 elements, bf16 where `types` says nothing else."""
    constants = {**_splice_triton.tile(4096), "block": 256}
    known = {"index": "*i64", "ends": "*i32", **dict.fromkeys(constants, "constexpr"), **types}
    tensors = ("embeds", "rows", "out", "gradient", "of_embeds", "of_rows")
    signature = {name: known.get(name, "*bf16" if name in tensors else "i32") for name in kernel.arg_names}
    divisible = {
        (place,): [["tt.divisibility", 16]]
        for place, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (aligned and name in ROUND)
    }
    values = {(place,): constants[name] for place, name in enumerate(signature) if name in constants}
    source = ASTSource(kernel, signature, values, divisible)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spills(kernel: Any) -> list[str]:
    return re.findall(r"\b(?:LDL|STL)\b|\.local\b", kernel.asm["sass"] + kernel.asm["ptx"])


def widths(kernel: Any) -> set[int]:
    """Bits that a thread moves by one load or store: of the index 64, of ends 32, of elements 128 or too few."""
    found = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", kernel.asm["ptx"])
    return {int(count or 1) * int(bits) for count, bits in found}


@pytest.fixture(autouse=True)
def compiled_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None from a cache."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("capability", "types"),
    [(80, {}), (90, {}), (90, {"rows": "*fp32", "of_rows": "*fp32"})],
    ids=["sm_80", "sm_90", "sm_90-fp32-rows"],
)
@pytest.mark.parametrize("name", ["splice_forward", "splice_backward"])
def test_elements_move_128_bits_at_a_time_and_nothing_spills(name: str, capability: int, types: dict[str, str]) -> None:
    kernel = compiled(getattr(_splice_triton, name), capability, types)
    assert spills(kernel) == []
    assert widths(kernel) == ({64, 128} if name == "splice_forward" else {32, 64, 128})
    assert "LDG.E.128" in kernel.asm["sass"]
    assert "STG.E.128" in kernel.asm["sass"]


def test_ends_compile() -> None:
    assert spills(compiled(_splice_triton.splice_ends, 90, {})) == []


def test_the_checks_see_narrow_loads_and_spills() -> None:
    odd = compiled(_splice_triton.splice_forward, 90, {}, aligned=False)
    assert 128 not in widths(odd)
    assert "LDG.E.128" not in odd.asm["sass"]
    tight = compiled(_splice_triton.splice_forward, 90, {}, maxnreg=24)
    assert spills(tight)
