"""What Triton's compiler makes of a kernel for a GPU that need not be there."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED = {90: 227 * 1024, 80: 163 * 1024}
"""Bytes of shared memory that one block may have, by compute capability (CUDA C Programming Guide, table 21)."""


@dataclass(frozen=True)
class Compiled:
    """Counts in the machine code."""

    spills: int  # loads and stores of local memory
    products: int  # of tensor cores, by the instructions of the newest that the capability has
    old_products: int  # on Hopper by those of Ampere
    wide_loads: int  # of 16 bytes
    shared: int  # bytes


def compiled(
    kernel: Any, pointers: dict[str, str], constants: dict[str, Any], capability: int, *, warps: int, stages: int
) -> Compiled:
    """A kernel compiled for a capability as for aligned tensors with strides that are multiples of 16.

    Args:
        pointers: what each tensor holds, as Triton writes it ("bf16", "fp32", "i32", "i1")
    """
    signature, aligned = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = f"*{pointers[name]}" if name in pointers else "i32"
        if name in pointers or not (name == "heads" or name.startswith("num_")):
            aligned[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    code = binary.asm["sass"]
    return Compiled(
        len(re.findall(r"\b(?:LDL|STL)\b", code)),
        len(re.findall(r"\bHGMMA\b" if capability >= 90 else r"\bHMMA\b", code)),
        len(re.findall(r"\bHMMA\b", code)) if capability >= 90 else 0,
        len(re.findall(r"\bLDG\S*\.128|LDGSTS\S*\.128", code)),
        binary.metadata.shared,
    )
