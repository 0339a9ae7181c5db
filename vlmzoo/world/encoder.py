"""The world's image encoder: a small CLIP trained on pictures and captions, contrastively."""

import random
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast

from vlmzoo.world.fitting import fit
from vlmzoo.world.scenes import CELL, GRID, IMAGE_SIZE, Scene, alter, draw, sample_scene
from vlmzoo.world.text import caption, describe
from vlmzoo.world.tokenizer import BOS_ID, EOS_ID, PAD_ID, build_tokenizer

PATCH = 8
BATCH = 48
CAPTION_TOKENS = 24  # <s>, four objects of five words, </s>


def encoder_config(vocab_size: int) -> CLIPConfig:
    """About 1M parameters: vision of four layers, text of two, both 128 wide."""
    tower = {"hidden_size": 128, "num_attention_heads": 4, "projection_dim": 128}
    vision = {"intermediate_size": 512, "num_hidden_layers": 4, "image_size": IMAGE_SIZE, "patch_size": PATCH}
    text = {
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "vocab_size": vocab_size,
        "max_position_embeddings": CAPTION_TOKENS,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }
    return CLIPConfig(vision_config=tower | vision, text_config=tower | text, projection_dim=128)


def image_processor() -> CLIPImageProcessorPil:
    """Resizes and crops to the world's 72 pixels, normalised as CLIP does."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    )


class Reader(nn.Module):
    """A CLIPModel and the projection of its patch features that the regional objective needs in training only."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.clip = CLIPModel(encoder_config(len(tokenizer)))
        self.region = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 128, bias=False))
        processor = image_processor()
        self.mean = torch.tensor(processor.image_mean).view(3, 1, 1)
        self.std = torch.tensor(processor.image_std).view(3, 1, 1)

    def pixels(self, scenes: list[Scene]) -> Tensor:
        """Normalised pictures, equal to what the image processor makes of them."""
        images = torch.from_numpy(np.stack([draw(scene) for scene in scenes]))
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def texts(self, texts: list[str]) -> Tensor:
        """Unit embeddings of texts, (texts, 128)."""
        tokens = self.tokenizer([text + "</s>" for text in texts], return_tensors="pt", padding=True)
        pooled = self.clip.text_model(**tokens).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    def images(self, scenes: list[Scene]) -> tuple[Tensor, Tensor]:
        """Unit embeddings of pictures, (scenes, 128), and of their nine cells, (scenes, 9, 128)."""
        output = self.clip.vision_model(self.pixels(scenes), output_hidden_states=True)
        pooled = F.normalize(self.clip.visual_projection(output.pooler_output), dim=-1)
        # A cell is read where connectors read: one layer before the last.
        patches = output.hidden_states[-2][:, 1:].unflatten(1, (GRID, CELL // PATCH, GRID, CELL // PATCH))
        cells = patches.mean(dim=(2, 4)).flatten(1, 2)
        return pooled, F.normalize(self.region(cells), dim=-1)


def contrastive_loss(reader: Reader, scenes: list[Scene], changed: list[Scene]) -> Tensor:
    """Pictures against captions, each caption's altered twin among the wrong ones; cells against object phrases.

    The captions alone leave place and attribute tangled in the patches for a long time; the regional term asks
    each occupied cell for its own phrase.

    Source: Zhong et al., RegionCLIP (2022), section 3.2.
    Differs: the regions are known, not proposed.
    """
    scale = reader.clip.logit_scale.exp().clamp(max=100)
    phrases = [describe(item) for scene in scenes for item in scene.objects]
    index = {phrase: number for number, phrase in enumerate(dict.fromkeys(phrases))}
    pooled, cells = reader.images(scenes)
    captions = reader.texts([caption(scene) for scene in [*scenes, *changed]])
    targets = torch.arange(len(scenes))
    logits = scale * pooled @ captions.T
    whole = F.cross_entropy(logits, targets) + F.cross_entropy(logits[:, : len(scenes)].T, targets)
    occupied = [(row, item.cell) for row, scene in enumerate(scenes) for item in scene.objects]
    rows, columns = (list(axis) for axis in zip(*occupied, strict=True))
    regional = scale * cells[rows, columns] @ reader.texts(list(index)).T
    return whole / 2 + F.cross_entropy(regional, torch.tensor([index[phrase] for phrase in phrases]))


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
        right += int((similarity.argmax(dim=1) == torch.arange(64)).sum())
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


def train_encoder(checkpoint: Path, num_steps: int, seed: int, recipe: dict[str, object]) -> tuple[Reader, float]:
    """The trained model and the seconds of training."""
    torch.manual_seed(seed)
    reader = Reader(build_tokenizer())

    def loss_at(step: int) -> Tensor:
        return contrastive_loss(reader, *scene_batch(seed, step))

    return reader, fit(reader, loss_at, num_steps=num_steps, peak=1e-3, recipe=recipe, directory=checkpoint)
