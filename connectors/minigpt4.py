"""A Q-Former that stays as it is, and a linear layer that learns."""

from __future__ import annotations

from torch import nn

from vlmzoo.connector import Connector, ImageLayout, TextSpec, VisionSpec, VisualInput, VisualTokens, register
from vlmzoo.connectors.qformer import QFormer


@register("minigpt4")
class MiniGPT4(Connector):
    """The tokens of BLIP-2's Q-Former, which is frozen, through one linear layer, the only thing that is trained.

    Source: Zhu et al., MiniGPT-4 (2023), section 3.
    Differs: starts from random weights where none are loaded; then it shows what a random Q-Former leaves of an image.
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
    ) -> None:
        super().__init__()
        self.qformer = QFormer(
            vision, text, num_queries=num_queries, num_layers=num_layers, hidden_size=hidden_size, num_heads=num_heads
        )
        self.qformer.project = nn.Identity()
        self.project = nn.Linear(hidden_size, text.hidden_size)
        self.qformer.requires_grad_(False)
        self.requires = self.qformer.requires
        self.without_gradient = frozenset(name for name, _ in self.named_parameters() if name.startswith("qformer."))

    def num_tokens(self, image: ImageLayout) -> int:
        return self.qformer.num_tokens(image)

    def forward(self, visual: VisualInput) -> VisualTokens:
        found = self.qformer(visual)
        return VisualTokens(self.project(found.tokens), found.mask)
