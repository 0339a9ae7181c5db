"""Features of a frozen encoder, computed once for a set of images and shared by every run that reads them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from vlmzoo.connector import FeatureMap, FeatureRequest
from vlmzoo.files import computed_once, sha256
from vlmzoo.vision.encoder import VisionEncoder

SHARD = 1024  # images a file: what is held in memory while computing
FORMAT = 1
NOT_VALUES = ("_name_or_path", "transformers_version")  # of a configuration: where it came from

Pixels = Callable[[Path], Tensor]


class FeatureCache:
    """Features by image file, memory-mapped from safetensors.

    A folder holds one layer of one encoder for one set of images. Its name is a hash of all that decides the values:
    the encoder's weights and configuration, the layer, how images become pixels, and the images' own bytes. CLS is
    stored wherever the encoder has one, so that a connector that asks for it later computes nothing.

    Args:
        encoder: frozen; its `chunk_size` makes the features equal, bit for bit, to those of a run without a cache.
        images: files; those with equal bytes are stored once.
        to_pixels: a file's pixel values (3, height, width), all of one size.
        preprocessing: names everything that decides what `to_pixels` does.
        folder: where caches stand; made if it is not there.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        images: Sequence[Path],
        to_pixels: Pixels,
        preprocessing: dict,
        request: FeatureRequest,
        folder: Path,
    ) -> None:
        self.encoder = encoder
        self._content = {path: sha256(path) for path in dict.fromkeys(images)}
        files = {content: path for path, content in self._content.items()}
        contents = sorted(files)
        self._row = {content: row for row, content in enumerate(contents)}
        shared = {
            "format": FORMAT,
            "weights": fingerprint(encoder),
            "config": {key: value for key, value in encoder.model.config.to_dict().items() if key not in NOT_VALUES},
            "chunk_size": encoder.chunk_size,
            "preprocessing": preprocessing,
            "images": contents,
            "attention": request.cls_attention,
        }
        self._layers: list[dict[str, Tensor]] = []
        for layer in request.layers or (encoder.layer,):
            index = encoder.index(layer)
            key = hashlib.sha256(json.dumps({**shared, "layer": index}, sort_keys=True).encode()).hexdigest()[:16]
            want = FeatureRequest((index,), encoder.spec.has_cls, request.cls_attention)
            self._layers.append(
                _open(folder / key, lambda place, want=want: self._compute(place, files, to_pixels, want))
            )
        self._request = request

    def batch(self, images: Sequence[Path]) -> tuple[FeatureMap, ...]:
        """One feature map a requested layer, for these images in this order."""
        rows = torch.tensor([self._row[self._content[path]] for path in images])
        maps = []
        for stored in self._layers:
            cls = stored["cls"][rows] if self._request.cls else None
            attention = stored["cls_attention"][rows] if self._request.cls_attention else None
            height, width = stored["grid"].tolist()
            maps.append(FeatureMap.dense(stored["values"][rows], (height, width), cls, attention))
        return tuple(maps)

    @torch.no_grad()
    def _compute(self, place: Path, files: dict[str, Path], to_pixels: Pixels, want: FeatureRequest) -> None:
        device = next(self.encoder.parameters()).device
        paths = [files[content] for content in self._row]
        progress = tqdm(
            total=len(paths), desc="features", unit="image", file=sys.stderr, disable=not sys.stderr.isatty()
        )
        with progress:
            for start in range(0, len(paths), SHARD):
                pixels = torch.stack([to_pixels(path) for path in paths[start : start + SHARD]])
                chunks = pixels.split(self.encoder.chunk_size or len(pixels))
                found = []
                for chunk in chunks:
                    found += self.encoder.encode(chunk.to(device), want)
                    progress.update(len(chunk))
                tensors = {"values": torch.cat([item.values for item in found]).cpu().contiguous()}
                for name in ("cls", "cls_attention"):
                    parts = [getattr(item, name) for item in found]
                    if parts[0] is not None:
                        tensors[name] = torch.cat(parts).cpu().contiguous()
                tensors["grid"] = torch.tensor(found[0].grids[0])
                save_file(tensors, place / f"{start // SHARD:05}.safetensors")


def _open(place: Path, compute: Callable[[Path], None]) -> dict[str, Tensor]:
    """The stored tensors, computed first where they are not there; damaged ones are computed again, with a message."""
    computed_once(place, compute, "feature cache")
    shards = []
    for file in sorted(place.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            shards.append({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    grid = shards[0]["grid"]
    names = [name for name in shards[0] if name != "grid"]
    stored = {name: shards[0][name] if len(shards) == 1 else torch.cat([s[name] for s in shards]) for name in names}
    return {**stored, "grid": grid}


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's weights: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
