"""Fused attention that others wrote: PyTorch's SDPA and FlexAttention, and xformers.

All take q (batch, queries, heads, dim), k and v (batch, keys, heads, dim), whose padding is finite, and a mask as
`reference.attention`, and give (batch, queries, heads, dim); 0 for a query that no key is left to.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, pinned: SDPBackend | None = None
) -> Tensor:
    """PyTorch's own, by one of its kernels, else by the one that it picks."""
    if pinned is not None:
        with sdpa_kernel(pinned):
            return sdpa(q, k, v, mask, scale)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
    # Without a key its softmax is NaN: such a query attends to everything, and its output is dropped.
    has_key = mask.any(-1, keepdim=True)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~has_key, scale=scale)
    return out.masked_fill(~has_key, 0).transpose(1, 2)


@cache
def _compiled(attend: Any) -> Any:
    return torch.compile(attend, dynamic=False)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """FlexAttention, compiled on a GPU; elsewhere its own plain version, which has no backward."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # takes a second to import

    run = _compiled(flex_attention) if q.is_cuda else flex_attention
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if mask is None:
        return run(q, k, v, scale=scale).transpose(1, 2)
    mask = mask.expand(*(size if size > 1 else -1 for size in mask.shape[:2]), q.shape[2], k.shape[2])
    batch, heads = mask.shape[:2]

    def counts(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask[row if batch > 1 else 0, head if heads > 1 else 0, query, key]

    blocks = create_block_mask(
        counts, batch if batch > 1 else None, heads if heads > 1 else None, q.shape[2], k.shape[2], device=str(q.device)
    )
    return run(q, k, v, block_mask=blocks, scale=scale).transpose(1, 2)


def has_xformers() -> bool:
    return importlib.util.find_spec("xformers") is not None


def xformers(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """xformers' memory-efficient attention."""
    from xformers.ops import memory_efficient_attention  # pyright: ignore[reportMissingImports]

    if mask is None:
        return memory_efficient_attention(q, k, v, scale=scale)
    has_key = mask.any(-1, keepdim=True)
    keys = k.shape[1]
    padded = q.new_zeros(*mask.shape[:-1], -(-keys // 8) * 8)  # it wants rows that begin at multiples of 8
    bias = padded[..., :keys].masked_fill_(~(mask | ~has_key), -torch.inf)
    bias = bias.expand(len(q), q.shape[2], q.shape[1], keys)
    out = memory_efficient_attention(q, k, v, attn_bias=bias, scale=scale)
    return out.masked_fill(~has_key.transpose(1, 2), 0)
