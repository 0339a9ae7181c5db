"""What the Triton kernels share: where they run, tiles of rows, and products."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# Inside a kernel the language is Triton's, whose types no checker knows.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmzoo.kernels._device import INTERPRETED

UPCAST = tl.constexpr(INTERPRETED)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b, in float32 or wider."""
    if UPCAST and a.dtype == tl.bfloat16:  # the interpreter multiplies it wrongly
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def load_rows(pointer, rows, stride, there, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a matrix, 0 where they are not there."""
    dims = tl.arange(0, BLOCK_D)
    at = pointer + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(at, mask=there[:, None], other=0.0)
    return tl.load(at, mask=there[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def store_rows(pointer, rows, stride, values, there, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows written in the matrix' own type, where they are there."""
    dims = tl.arange(0, BLOCK_D)
    at = pointer + rows.to(tl.int64)[:, None] * stride + dims[None, :]
    tl.store(at, values.to(pointer.dtype.element_ty), mask=there[:, None] & (dims < HEAD_DIM)[None, :])


def dense(tensor: Tensor) -> Tensor:
    """The same, with its last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def accumulator(tensor: Tensor) -> torch.dtype:
    """The type that sums are kept in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def precision() -> str:
    """Of float32 products: as `torch.set_float32_matmul_precision` says for all others."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
