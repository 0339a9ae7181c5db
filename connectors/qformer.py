"""Learned queries in a BERT that reads the image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmzoo.connector import (
    Connector,
    FeatureRequest,
    ImageLayout,
    Instruction,
    TextSpec,
    VisionSpec,
    VisualInput,
    VisualTokens,
    register,
)
from vlmzoo.connectors._layers import FeedForward, MultiHeadAttention, at_least_one, image_memory

NORM_EPS = 1e-12  # BERT's
NUM_POSITIONS = 512  # BERT's


class Attention(nn.Module):
    """norm(x + attention of x over a memory), as in BERT."""

    def __init__(self, hidden_size: int, memory_dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(
            hidden_size, memory_dim, num_heads=num_heads, head_dim=hidden_size // num_heads, bias=True
        )
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)

    def forward(self, hidden: Tensor, memory: Tensor, mask: Tensor | None) -> Tensor:
        read = self.attention(hidden, self.attention.keys_values(memory), mask=mask)
        return self.norm(hidden + self.dropout(read))


class Transform(nn.Module):
    """norm(x + feed-forward of x), as in BERT."""

    def __init__(self, hidden_size: int, intermediate_size: int, dropout: float) -> None:
        super().__init__()
        self.feed_forward = FeedForward(hidden_size, intermediate_size, "gelu", bias=True)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(hidden + self.dropout(self.feed_forward(hidden)))


class QFormerLayer(nn.Module):
    """Queries and text attend to one another; then the queries, in some layers, to the image."""

    def __init__(
        self,
        hidden_size: int,
        memory_dim: int,
        *,
        num_heads: int,
        intermediate_size: int,
        dropout: float,
        reads_image: bool,
        text: bool,
    ) -> None:
        super().__init__()
        self.self_attention = Attention(hidden_size, hidden_size, num_heads, dropout)
        self.cross_attention = Attention(hidden_size, memory_dim, num_heads, dropout) if reads_image else None
        self.query_transform = Transform(hidden_size, intermediate_size, dropout)
        self.text_transform = Transform(hidden_size, intermediate_size, dropout) if text else None

    def forward(
        self, hidden: Tensor, mask: Tensor | None, num_queries: int, memory: Tensor, memory_mask: Tensor
    ) -> Tensor:
        hidden = self.self_attention(hidden, hidden, mask)
        queries, text = hidden[:, :num_queries], hidden[:, num_queries:]
        if self.cross_attention is not None:
            queries = self.cross_attention(queries, memory, memory_mask)
        queries = self.query_transform(queries)
        return queries if self.text_transform is None else torch.cat([queries, self.text_transform(text)], 1)


class InstructionEmbedding(nn.Module):
    """Embeddings (images, length, hidden_size) of an instruction, and which of them are real.

    Ids that the LLM's embeddings do not have (an added `<image>`) and what comes after `NUM_POSITIONS` are masked.
    """

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.positions = nn.Embedding(NUM_POSITIONS, hidden_size)

    def forward(self, instruction: Instruction) -> tuple[Tensor, Tensor]:
        ids = instruction.input_ids
        position = (instruction.mask.cumsum(1) - 1).clamp(0)  # padding on the left shifts nothing
        mask = instruction.mask & (ids < self.tokens.num_embeddings) & (position < NUM_POSITIONS)
        embedded = self.tokens(ids.masked_fill(~mask, 0)) + self.positions(position.clamp(max=NUM_POSITIONS - 1))
        return embedded, mask


@register("qformer")
class QFormer(Connector):
    """`num_queries` tokens an image, whatever its size: BLIP-2's Q-Former and a projection to the LLM's width.

    It reads CLS where the encoder has one, and all crops of an image together. With `instruction` the tokens of the
    human turn stand beside the queries in self-attention, with a feed-forward of their own, and are dropped at the end;
    their ids are the LLM's, or those of another tokenizer with `instruction_vocab_size` of them.

    Source: Li et al., BLIP-2 (2023), section 3.1; Dai et al., InstructBLIP (2023), section 2.3. The norm of the memory
    is the trained `ln_vision` of their code.
    Differs: starts from random weights, not from BERT's, and has no stages of its own; no dropout by default (BERT's:
    0.1), and none on attention weights; instructions come in the LLM's tokenizer, cut at 512 tokens instead of 128.
    """

    def __init__(
        self,
        vision: VisionSpec,
        text: TextSpec,
        *,
        num_queries: int = 32,
        num_layers: int = 12,
        hidden_size: int = 768,
        num_heads: int = 12,
        ffn_multiplier: float = 4,
        cross_attention_every: int = 2,
        instruction: bool = False,
        instruction_vocab_size: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        at_least_one(
            "qformer",
            num_queries=num_queries,
            num_layers=num_layers,
            num_heads=num_heads,
            cross_attention_every=cross_attention_every,
        )
        if hidden_size % num_heads:
            raise ValueError(f"connector 'qformer': hidden_size {hidden_size} is no multiple of num_heads {num_heads}")
        self.requires = FeatureRequest(cls=vision.has_cls, instruction=instruction)
        self.memory_norm = nn.LayerNorm(vision.hidden_size, eps=vision.norm_eps)
        self.queries = nn.Parameter(torch.empty(num_queries, hidden_size).normal_(std=0.02))
        self.instruction = (
            InstructionEmbedding(instruction_vocab_size or text.vocab_size, hidden_size) if instruction else None
        )
        self.norm = nn.LayerNorm(hidden_size, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            QFormerLayer(
                hidden_size,
                vision.hidden_size,
                num_heads=num_heads,
                intermediate_size=int(ffn_multiplier * hidden_size),
                dropout=dropout,
                reads_image=layer % cross_attention_every == 0,
                text=instruction,
            )
            for layer in range(num_layers)
        )
        self.project: nn.Module = nn.Linear(hidden_size, text.hidden_size)
        self.apply(_initialise)
        # What the last layer makes of the text is dropped, in the source too.
        unused = f"layers.{num_layers - 1}.text_transform."
        self.without_gradient = frozenset(name for name, _ in self.named_parameters() if name.startswith(unused))

    def num_tokens(self, image: ImageLayout) -> int:
        return len(self.queries)

    def forward(self, visual: VisualInput) -> VisualTokens:
        tokens = self.project(self.read(visual))
        return VisualTokens(tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device))

    def read(self, visual: VisualInput) -> Tensor:
        """The queries (images, num_queries, hidden_size) after the last layer."""
        memory, memory_mask = image_memory(visual, cls=self.requires.cls)
        memory, memory_mask = self.memory_norm(memory), memory_mask[:, None, None]
        hidden, mask = self.queries.expand(visual.num_images, -1, -1), None
        num_queries = len(self.queries)
        if self.instruction is not None:
            assert visual.instruction is not None
            embedded, real = self.instruction(visual.instruction)
            hidden = torch.cat([hidden, embedded], 1)
            mask = F.pad(real, (num_queries, 0), value=True)[:, None, None]
        hidden = self.dropout(self.norm(hidden))
        for layer in self.layers:
            hidden = layer(hidden, mask, num_queries, memory, memory_mask)
        return hidden[:, :num_queries]


def _initialise(module: nn.Module) -> None:
    """BERT's initialisation."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
