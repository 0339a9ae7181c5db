"""The oracle: attention in plain operations, on any device and in any floating type."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Output (batch, queries, heads, dim) and log-sum-exp of the scores (batch, heads, queries).

    Computed in float32 or wider. A query that no key is left to gives 0 and -inf.

    Args:
        q: (batch, queries, heads, dim)
        k, v: (batch, keys, heads, dim)
        mask: bool, broadcastable to (batch, heads, queries, keys), True = attend
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (tensor.transpose(1, 2).to(dtype) for tensor in (q, k, v))
    scores = queries @ keys.mT * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()  # -inf - -inf would be NaN
    return (weights @ values).to(v.dtype).transpose(1, 2), lse
