"""A batch without its padding: one row for the LLM, in which no sample sees another.

Attention runs sample by sample, so that no mask of all tokens by all tokens is made. Kernels that take lengths
(FlashAttention) get them in transformers' own keyword arguments.

Source: Krell et al., Efficient Sequence Packing without Cross-contamination (2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

SDPA = "vlmzoo_packed"
"""The attention of an LLM that packs and would otherwise have SDPA's: SDPA, sample by sample."""


@dataclass(frozen=True)
class Packing:
    """The tokens of a batch that are read."""

    index: Tensor  # (tokens,), their places in the flattened batch, in order
    shape: tuple[int, int]  # of the batch
    lengths: tuple[int, ...]  # tokens of each sample

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...], width: int, device: torch.device) -> Packing:
        """Of samples padded on the right."""
        places = torch.arange(len(lengths) * width).view(-1, width)
        real = torch.arange(width) < torch.tensor(lengths)[:, None]
        return cls(places[real].to(device, non_blocking=True), (len(lengths), width), lengths)

    @classmethod
    def of_mask(cls, attention_mask: Tensor) -> Packing:
        real = attention_mask.bool()
        rows, width = real.shape
        return cls(real.flatten().nonzero().squeeze(1), (rows, width), tuple(real.sum(1).tolist()))

    def pack(self, values: Tensor) -> Tensor:
        """(batch, length, ...) -> (1, tokens, ...)."""
        return values.flatten(0, 1).index_select(0, self.index)[None]

    def pack_positions(self, ids: Tensor) -> Tensor:
        """(batch, length), or (axes, batch, length) -> (1, tokens), or (axes, 1, tokens)."""
        return self.pack(ids) if ids.dim() == 2 else torch.stack([self.pack(axis) for axis in ids])

    def unpack(self, values: Tensor) -> Tensor:
        """(1, tokens, ...) -> (batch, length, ...), zeros elsewhere."""
        rows, width = self.shape
        empty = values.new_zeros(rows * width, *values.shape[2:])
        return empty.index_copy(0, self.index, values[0]).unflatten(0, self.shape)

    def places(self, flat: Tensor) -> Tensor:
        """Where these places of the flattened batch are in the row."""
        rows, width = self.shape
        place = torch.zeros(rows * width, dtype=torch.long, device=self.index.device)
        place[self.index] = torch.arange(len(self.index), device=self.index.device)
        return place[flat]

    def arguments(self) -> dict[str, Any]:
        """What transformers' attention functions take for it."""
        lengths = [length for length in self.lengths if length]
        ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        ends = ends.to(self.index.device, non_blocking=True)
        longest = max(lengths)
        return {
            "cu_seq_lens_q": ends,
            "cu_seq_lens_k": ends,
            "max_length_q": longest,
            "max_length_k": longest,
            "sample_lengths": lengths,
        }


@torch.compiler.disable  # another list of lengths in every batch
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    sample_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA of each sample alone.

    Args:
        query: (1, heads, tokens, head_dim), of `key` and `value` maybe fewer heads.

    Raises:
        ValueError: a call that is not packed, whose padding nothing would hide.
    """
    if sample_lengths is None:
        raise ValueError(f"{SDPA} attention: expected a packed call, got one of {tuple(query.shape)} without lengths")
    parts = []
    for q, k, v in zip(*(states.split(sample_lengths, 2) for states in (query, key, value)), strict=True):
        mask, length = None, q.shape[2]
        if sliding_window is not None and length > sliding_window:
            place = torch.arange(length, device=q.device)
            behind = place[:, None] - place
            mask = ((behind >= 0) & (behind < sliding_window))[None, None]
        parts.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(parts, 1), None


AttentionInterface.register(SDPA, packed_attention)  # transformers makes no mask for it, having none of this name


@contextmanager
def packs(language: PreTrainedModel, enabled: bool = True) -> Iterator[None]:
    """An LLM whose calls are packed ones inside.

    Raises:
        ValueError: samples of one row see one another in this LLM: a change of one of two changed the other.
    """
    own = language.config.get_text_config()._attn_implementation or "its own"
    if enabled and own == "sdpa":
        language.set_attn_implementation(SDPA)
    try:
        if enabled:
            _check_apart(language, own)
        yield
    finally:
        if enabled and own == "sdpa":
            language.set_attn_implementation(own)


@torch.no_grad()
def _check_apart(language: PreTrainedModel, attention: str) -> None:
    embedding: Any = language.get_input_embeddings()
    embeds = embedding(torch.tensor([[0, 1, 2, 0, 1, 2]], device=embedding.weight.device))
    packing = Packing.of_lengths((3, 3), 3, embeds.device)
    arguments = {"position_ids": torch.arange(3).repeat(2)[None].to(embeds.device), "use_cache": False}

    def logits(inputs: Tensor) -> Tensor:
        return language(inputs_embeds=inputs, **arguments, **packing.arguments()).logits

    training = language.training
    language.eval()  # dropout would differ too
    before = logits(embeds)
    for changed, other in ((slice(0, 3), slice(3, 6)), (slice(3, 6), slice(0, 3))):
        inputs = embeds.clone()
        inputs[:, changed] += 100 * embeds.std() * torch.arange(1, embeds.shape[-1] + 1, device=embeds.device).cos()
        if not torch.equal(logits(inputs)[:, other], before[:, other]):
            raise ValueError(
                f"packing: samples of one row see one another in {type(language).__name__} with {attention} attention; "
                f"expected packing: false"
            )
    language.train(training)
