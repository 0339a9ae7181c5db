"""The world's image encoders: a small CLIP and a small SigLIP trained on pictures and captions, contrastively."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessorPil,
    SiglipModel,
)

from vlmzoo.world.fitting import fit
from vlmzoo.world.scenes import CELL, GRID, IMAGE_SIZE, Scene, alter, draw, sample_scene
from vlmzoo.world.text import caption, describe
from vlmzoo.world.tokenizer import BOS_ID, EOS_ID, PAD_ID, build_tokenizer

PATCH = 12
WIDTH = 128
BATCH = 64
CAPTION_TOKENS = 24  # <s>, four objects of five words, </s>
PEAK = 1e-3  # learning rate


def new_model(name: str, vocab_size: int) -> CLIPModel | SiglipModel:
    """About 1.2M parameters: vision of four layers, text of two, all 128 wide."""
    tower: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": 4}
    vision = tower | {"intermediate_size": 512, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    text = tower | {
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": CAPTION_TOKENS,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    # On a CPU attention written out is faster at these lengths than the fused one.
    if name == "siglip":
        model = SiglipModel._from_config(
            SiglipConfig(vision_config=vision, text_config=text | {"projection_size": WIDTH}),
            attn_implementation="eager",
        )
        # Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training (2023), section 3.2.
        nn.init.constant_(model.logit_scale, float(np.log(10)))
        nn.init.constant_(model.logit_bias, -10)
        return model
    projection: dict[str, Any] = {"projection_dim": WIDTH}
    config = CLIPConfig(vision_config=vision | projection, text_config=text | projection, **projection)
    return CLIPModel._from_config(config, attn_implementation="eager")


def image_processor(name: str) -> CLIPImageProcessorPil | SiglipImageProcessorPil:
    """Resizes to the world's 72 pixels and normalises as models of this name do."""
    if name == "siglip":
        return SiglipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    crop = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=crop)


class Reader(nn.Module):
    """A CLIP or SigLIP and the projection of its patch features that the regional objective needs in training only."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.model: Any = new_model(name, len(tokenizer))
        self.region = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH, bias=False))
        self.has_cls = name == "clip"
        processor = image_processor(name)
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(processor.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(processor.image_std).view(3, 1, 1), persistent=False)

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """Normalised pictures, equal to what the image processor makes of them."""
        images = torch.from_numpy(np.stack([draw(scene) for scene in scenes])).to(self.mean.device)
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def texts(self, texts: list[str]) -> Tensor:
        """Unit embeddings of texts, (texts, WIDTH)."""
        ended = [f"{text}</s>" for text in texts]
        # SigLIP reads the last place, padding or not, so all its texts are of one length.
        length: dict[str, Any] = {} if self.has_cls else {"max_length": CAPTION_TOKENS}
        padding = "longest" if self.has_cls else "max_length"
        tokens = self.tokenizer(ended, return_tensors="pt", padding=padding, **length)
        if self.has_cls:
            pooled = self.model.text_model(**tokens.to(self.mean.device)).pooler_output
            return F.normalize(self.model.text_projection(pooled).float(), dim=-1)
        pooled = self.model.text_model(input_ids=tokens["input_ids"].to(self.mean.device)).pooler_output
        return F.normalize(pooled.float(), dim=-1)

    def images(self, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of pictures, (scenes, WIDTH), and of their nine cells, (scenes, 9, WIDTH)."""
        output = self.model.vision_model(self.pixels(scenes), output_hidden_states=True)
        pooled = self.model.visual_projection(output.pooler_output) if self.has_cls else output.pooler_output
        # A cell is read where connectors read: one layer before the last.
        patches = output.hidden_states[-2][:, int(self.has_cls) :]
        cells = patches.unflatten(1, (GRID, CELL // PATCH, GRID, CELL // PATCH)).mean(dim=(2, 4)).flatten(1, 2)
        return F.normalize(pooled.float(), dim=-1), F.normalize(self.region(cells).float(), dim=-1)

    def match(self, images: Tensor, texts: Tensor, targets: Tensor) -> Tensor:
        """The loss of `images` (rows, WIDTH) whose texts among `texts` (columns, WIDTH) are `targets` (rows,).

        Source: CLIP: cross-entropy over the texts; SigLIP: Zhai et al. (2023), section 3.2, every pair by itself.
        """
        logits = self.model.logit_scale.exp().clamp(max=100) * images @ texts.T
        if self.has_cls:
            return F.cross_entropy(logits, targets)
        signs = 2 * F.one_hot(targets, len(texts)) - 1
        return -F.logsigmoid(signs * (logits + self.model.logit_bias)).sum(1).mean()


def contrastive_loss(reader: Reader, scenes: list[Scene], changed: list[Scene]) -> Tensor:
    """Pictures against captions, each caption's altered twin among the wrong ones; cells against object phrases.

    The captions alone leave place and attribute tangled in the patches for a long time; the regional term asks
    each occupied cell for its own phrase.

    Source: Zhong et al., RegionCLIP (2022), section 3.2.
    Differs: the regions are known, not proposed.
    """
    phrases = [describe(item) for scene in scenes for item in scene.objects]
    index = {phrase: number for number, phrase in enumerate(dict.fromkeys(phrases))}
    pooled, cells = reader.images(scenes)
    captions = reader.texts([caption(scene) for scene in [*scenes, *changed]])
    targets = torch.arange(len(scenes), device=pooled.device)
    whole = reader.match(pooled, captions, targets) + reader.match(captions[: len(scenes)], pooled, targets)
    occupied = [(row, item.cell) for row, scene in enumerate(scenes) for item in scene.objects]
    rows, columns = (list(axis) for axis in zip(*occupied, strict=True))
    regions = torch.tensor([index[phrase] for phrase in phrases], device=pooled.device)
    return whole / 2 + reader.match(cells[rows, columns], reader.texts(list(index)), regions)


@torch.no_grad()
def retrieval(reader: Reader, num_groups: int, seed: int) -> float:
    """Share of evaluation scenes whose own caption is the nearest of 64."""
    rng = random.Random(f"retrieval {seed}")
    reader.eval()
    right = 0
    for _ in range(num_groups):
        scenes: dict[str, Scene] = {}
        while len(scenes) < 64:
            scene = sample_scene(rng, "evaluation")
            scenes[scene.key] = scene
        group = list(scenes.values())
        similarity = reader.images(group)[0] @ reader.texts([caption(scene) for scene in group]).T
        right += int((similarity.argmax(dim=1).cpu() == torch.arange(64)).sum())
    return right / (64 * num_groups)


def scene_batch(seed: int, step: int) -> tuple[list[Scene], list[Scene]]:
    """Step `step`'s scenes, no two the same, and an altered twin of each that is no evaluation scene either."""
    rng = random.Random(f"encoder {seed} {step}")
    scenes: dict[str, Scene] = {}
    while len(scenes) < BATCH:
        scene = sample_scene(rng)
        scenes[scene.key] = scene
    changed = []
    for scene in scenes.values():
        twin = alter(scene, rng)
        while twin.split != "training":
            twin = alter(scene, rng)
        changed.append(twin)
    return list(scenes.values()), changed


def train_encoder(
    name: str, checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object], device: str = "cpu"
) -> tuple[Reader, float]:
    """The trained model and the seconds of training."""
    torch.manual_seed(seed)
    reader = Reader(name, build_tokenizer()).to(device)

    def loss_at(step: int) -> Tensor:
        return contrastive_loss(reader, *scene_batch(seed, step))

    return reader, fit(reader, loss_at, num_steps=num_steps, peak=PEAK, recipe=recipe, directory=checkpoint)
