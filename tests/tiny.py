"""Tiny parts, from configurations and seeds, for every test that needs a whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmzoo.connector import Connector, InLLMLayer, LayerContext, TextSpec, VisualInput, VisualTokens
from vlmzoo.model import VisionLanguageModel

IMAGE_SIZE = 24

CLIP: dict[str, Any] = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
}
SIGLIP: dict[str, Any] = {**CLIP, "model_type": "siglip_vision_model"}
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
QWEN: dict[str, Any] = {**LLAMA, "model_type": "qwen3", "head_dim": 12, "tie_word_embeddings": True}


class MemoryLayer(InLLMLayer):
    """Adds a projection of the mean of the memory that each token sees."""

    gradient_checkpointing = False

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, context: LayerContext) -> Tensor:
        if context.memory is None or context.memory_mask is None:
            return hidden + 0.0 * self.project(hidden)
        mean = (context.memory * context.memory_mask[..., None]).sum(2)
        index = context.image_of_token.clamp(min=0)[..., None].expand(-1, -1, mean.shape[-1])
        return hidden + self.project(mean.gather(1, index)) * (context.image_of_token >= 0)[..., None]


class MemoryConnector(Connector):
    """Interleaved: one slot an image, layers before the second decoder layer and before the final norm."""

    def __init__(self, vision_dim: int, text_dim: int, text: TextSpec) -> None:
        super().__init__()
        self.project = nn.Linear(vision_dim, text_dim)
        self.marker = nn.Parameter(torch.randn(text_dim))
        self.layers = nn.ModuleList(MemoryLayer(text_dim) for _ in range(2))
        self.last = text.num_layers

    def num_tokens(self, image: object) -> int:
        return 1

    def forward(self, visual: VisualInput) -> VisualTokens:
        tokens = self.marker.expand(visual.num_images, 1, -1)
        (features,) = visual.maps
        mask = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        return VisualTokens(tokens, mask, memory=self.project(features.values), memory_mask=features.mask)

    def llm_layers(self) -> dict[int, list[InLLMLayer]]:
        first, last = self.layers
        assert isinstance(first, InLLMLayer)
        assert isinstance(last, InLLMLayer)
        return {1: [first], self.last: [last]}


class HybridConnector(Connector):
    """Five slots an image of which three are filled, and additions to the first two layers."""

    def __init__(self, vision_dim: int, text_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(vision_dim, text_dim)

    def num_tokens(self, image: object) -> int:
        return 5

    def forward(self, visual: VisualInput) -> VisualTokens:
        tokens = self.project(visual.maps[0].values[:, :5])
        mask = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        mask[:, :3] = True
        return VisualTokens(tokens, mask, additions={0: tokens * 0.5, 1: tokens * 0.25})


def model(
    connector: str | type[Connector], llm: dict[str, Any] = LLAMA, encoder: dict[str, Any] = CLIP, **options: Any
):
    """A tiny model in eval mode, with weights large enough to tell computations apart."""
    if isinstance(connector, str):
        built = VisionLanguageModel.from_parts(
            {"config": encoder}, {"name": connector, "options": options}, {"config": llm}
        )
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            dims = {"vision_dim": encoder["hidden_size"], "text_dim": llm["hidden_size"]}
            extra = {"text": _spec(llm)} if connector is MemoryConnector else {}
            part = connector(**dims, **extra)
        built = VisionLanguageModel.from_parts({"config": encoder}, part, {"config": llm})
    with torch.no_grad():
        for name, parameter in built.language.named_parameters():
            if parameter.dim() == 2 and "embed" not in name:
                parameter.mul_(10)  # the default 0.02 hides what a layer does
            elif parameter.dim() == 2:
                parameter.mul_(30)
    return built.eval()


def _spec(llm: dict[str, Any]) -> TextSpec:
    return TextSpec(llm["hidden_size"], llm["num_hidden_layers"], 4, 1e-6, 64, llm["vocab_size"])


def left_pad(rows: list[list[int]], pad: int = 0) -> dict[str, Tensor]:
    """input_ids and attention_mask of rows of token ids."""
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def pixels(count: int, seed: int = 0, size: int = IMAGE_SIZE) -> Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))
