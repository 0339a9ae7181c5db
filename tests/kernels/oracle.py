"""Attention once more, one sample at a time and without a maximum taken off, to be run in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    k2: Tensor | None = None,
    v2: Tensor | None = None,
    kv_lens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, heads, dim) and log-sum-exp (batch, heads, queries) of `latent_attention`.

    Keys that a sample does not have are left out by their index.
    """
    batch, num_queries, heads, dim = q.shape
    if scale is None:
        scale = 1 / math.sqrt(dim)
    outputs, lses = [], []
    for row in range(batch):
        if cu_seqlens_k is not None:
            segment = slice(int(cu_seqlens_k[row]), int(cu_seqlens_k[row + 1]))
            keys, values = k[segment], v[segment]
        else:
            keys, values = k[row], v[row]
        columns = list(range(len(keys) if kv_lens is None else int(kv_lens[row])))
        if k2 is not None and v2 is not None:
            columns += range(len(keys), len(keys) + k2.shape[1])
            keys, values = torch.cat([keys, k2[row]]), torch.cat([values, v2[row]])
        scores = torch.einsum("qhd,khd->hqk", q[row], keys[columns]) * scale
        keep = torch.ones_like(scores, dtype=torch.bool)
        if mask is not None:
            keep = mask.expand(batch, heads, num_queries, len(keys))[row][..., columns]
        powers = scores.exp() * keep  # no maximum taken off: in float64 scores up to 700 do not overflow
        total = powers.sum(-1, keepdim=True)
        weights = powers / total.masked_fill(total == 0, 1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values[columns]))
        lses.append(total[..., 0].log())
    return torch.stack(outputs), torch.stack(lses)


def media_attention(
    q: Tensor, k: Tensor, v: Tensor, image_of_token: Tensor, *, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Each token alone with the keys of its image."""
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    rows = []
    for row, images in enumerate(image_of_token.tolist()):
        read = []
        for token, image in enumerate(images):
            real = slice(0) if image < 0 else slice(None) if mask is None else mask[row, image]
            keys, values = k[row, image][real], v[row, image][real]
            powers = (torch.einsum("hd,khd->hk", q[row, token], keys) * scale).exp()
            total = powers.sum(-1, keepdim=True)
            read.append(torch.einsum("hk,khd->hd", powers / total.masked_fill(total == 0, 1), values))
        rows.append(torch.stack(read))
    return torch.stack(rows)


def splice_rows(embeds: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    """(batch, length, dim), as `kernels.splice.splice_rows`: one token at a time."""
    samples = [
        torch.stack([rows[b, int(slot)].to(embeds.dtype) if slot >= 0 else embeds[b, t] for t, slot in enumerate(line)])
        for b, line in enumerate(index)
    ]
    return torch.stack(samples)
