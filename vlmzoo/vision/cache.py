"""Features of a frozen encoder, computed once for a set of images and shared by every run that reads them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from vlmzoo.config import Features
from vlmzoo.connector import FeatureRequest, Layer
from vlmzoo.files import StoredBytes, content_hashes, held
from vlmzoo.vision.encoder import VisionEncoder
from vlmzoo.vision.shards import DamageError, Error, Shard, StoredFeatures, narrowed, write_shard

SHARD = 256  # images a file: what one process computes at a time, and holds in memory for it
FORMAT = 2
NOT_VALUES = ("_name_or_path", "transformers_version")  # of a configuration: where it came from

ImageFile = Path | StoredBytes
Pixels = Callable[[Iterable[Sequence[ImageFile]]], Iterator[Tensor]]


class FeatureCache:
    """Features by image file, in safetensors that are read row by row.

    A folder holds one layer of one encoder for one set of images. Its name is a hash of all that decides the values:
    the encoder's weights and configuration, the layer, how images become pixels, the images' own bytes, and the type
    that is stored. CLS is stored wherever the encoder has one, so that a connector that asks for it later computes
    nothing. Any number of processes compute what is missing, each other files; a file is there whole or not at all.

    Args:
        encoder: frozen; its `chunk_size` makes the features equal, bit for bit, to those of a run without a cache.
        images: files, or stored bytes; those with equal bytes are stored once.
        to_pixels: pixel values (images, 3, height, width) of each of some groups of files, all images of one size.
        preprocessing: names everything that decides what `to_pixels` does.
        folder: where caches stand; made if it is not there.
        features: how they are stored; `compute` as the encoder gives them.

    Raises:
        OSError: an image that is not there, or files that cannot be written; those that are written stay.
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        images: Sequence[ImageFile],
        to_pixels: Pixels,
        preprocessing: dict,
        request: FeatureRequest,
        folder: Path,
        features: Features = "compute",
    ) -> None:
        exact = features == "bfloat16" and encoder.model.dtype == torch.bfloat16
        self._features: Features = "compute" if exact else features
        content = content_hashes(images, folder / "images")
        files = {digest: path for path, digest in content.items()}
        in_blocks = any(isinstance(path, StoredBytes) and path.in_block for path in content)
        row = {digest: row for row, digest in enumerate(files if in_blocks else sorted(files))}
        self._row = {path: row[digest] for path, digest in content.items()}
        self._files = [files[digest] for digest in row]
        self._encoder, self._to_pixels, self._request = encoder, to_pixels, request
        deciding = {
            "format": FORMAT,
            "weights": fingerprint(encoder),
            "config": {key: value for key, value in encoder.model.config.to_dict().items() if key not in NOT_VALUES},
            "chunk_size": encoder.chunk_size,
            "preprocessing": preprocessing,
            "images": list(row),
            "attention": request.cls_attention,
            "features": self._features,
        }
        indices: list[Layer] = [encoder.index(layer) for layer in request.layers or (encoder.layer,)]
        layers = {index: _Layer(index, folder, deciding, len(self._files)) for index in indices}
        self._layers = [layers[index] for index in indices]
        if self._fill() and self.error is not None:
            stored = f"{len(self._files)} images in {self._features}"
            print(f"feature cache: {stored}, relative error {100 * self.error:.3g} %", file=sys.stderr)

    @property
    def error(self) -> float | None:
        """Norm of what narrowing changed, relative to the norm of the features; None: stored as they are."""
        if self._features == "compute":
            return None
        shards = (shard for layer in self._layers for shard in layer.shards.values())
        return reduce(Error.__add__, (shard.error for shard in shards)).relative

    def read(self, images: Sequence[ImageFile], *, pinned: bool = False) -> tuple[StoredFeatures, ...]:
        """The features of these images in this order, one item a requested layer. Any thread may read.

        Args:
            pinned: into memory that a GPU copies from without waiting.

        Raises:
            DamageError: stored features are not what was written; their file is removed, so that the next cache that
                is opened computes it again. Here the encoder may be sharded or in use by another thread.
            OSError: a file that was there can no longer be read.
        """
        names = ["values", *(["scale"] if self._features == "float8" else [])]
        names += [name for name in ("cls", "cls_attention") if getattr(self._request, name)]
        dtype = None if self._features == "compute" else self._encoder.model.dtype
        found = []
        for layer in self._layers:
            first = layer.shards[0]
            parts = {name: first.empty(name, len(images), pinned=pinned) for name in names}
            bytes_of = {name: raw.numpy() for name, (_, raw) in parts.items()}
            for place, path in enumerate(images):
                number, row = divmod(self._row[path], SHARD)
                shard = layer.shards[number]
                try:
                    shard.read(row, {name: raw[place].data for name, raw in bytes_of.items()})
                except DamageError as error:
                    shard.remove()
                    raise DamageError(
                        f"{error} (image {path}); remove the file if it is still there: it is computed again when the "
                        "same command starts"
                    ) from None
            tensors = {name: tensor for name, (tensor, _) in parts.items()}
            found.append(StoredFeatures(first.grid, **tensors, dtype=dtype))
        return tuple(found)

    def _fill(self) -> bool:
        """Computes the files that are not there, and waits for those that others compute; whether there were any."""
        numbers = range(-(-len(self._files) // SHARD))
        missing = [number for number in numbers if not all(layer.open(number) for layer in self._layers)]
        counts = {number: len(self._files[number * SHARD : (number + 1) * SHARD]) for number in missing}
        layers = sorted(set(self._layers), key=lambda layer: layer.place)  # locked in one order by all
        bar = tqdm(
            total=sum(counts.values()), desc="features", unit="image", file=sys.stderr, disable=not sys.stderr.isatty()
        )
        with bar:
            for wait in (False, True):  # first what nobody computes, then what those left behind who were killed
                for number in [number for number in missing if number in counts]:
                    with ExitStack() as locks:
                        if not all(locks.enter_context(held(layer.lock(number), wait=wait)) for layer in layers):
                            continue
                        if mine := [layer for layer in layers if not layer.open(number, say=True)]:
                            self._compute(number, mine)
                        bar.update(counts.pop(number))
        return bool(missing)

    @torch.no_grad()
    def _compute(self, number: int, layers: Sequence[_Layer]) -> None:
        files = self._files[number * SHARD : (number + 1) * SHARD]
        device = next(self._encoder.parameters()).device
        indices: tuple[Layer, ...] = tuple(layer.index for layer in layers)
        want = FeatureRequest(indices, self._encoder.spec.has_cls, self._request.cls_attention)
        size = self._encoder.chunk_size or len(files)
        groups = [files[start : start + size] for start in range(0, len(files), size)]
        tensors: list[dict[str, Tensor]] = [{} for _ in layers]
        errors = [Error() for _ in layers]
        grid, start = (0, 0), 0
        for pixels in self._to_pixels(groups):
            for layer_tensors, error, found in zip(
                tensors, errors, self._encoder.encode(pixels.to(device), want), strict=True
            ):
                stored = narrowed(found, self._features)
                grid = stored.grid
                if stored.dtype is not None:
                    error.add(stored.on(device).values, found.values)
                for name in (field.name for field in fields(stored)):
                    if isinstance(part := getattr(stored, name), Tensor):
                        whole = layer_tensors.setdefault(
                            name, part.new_empty(len(files), *part.shape[1:], device="cpu")
                        )
                        whole[start : start + len(part)] = part
            start += len(pixels)
        for layer, layer_tensors, error in zip(layers, tensors, errors, strict=True):
            write_shard(layer.file(number), layer_tensors, grid, error)
            layer.open(number, say=True)


class _Layer:
    """The folder of one layer: files of `SHARD` rows in order, and a lock for each."""

    def __init__(self, index: Layer, folder: Path, deciding: dict, num_rows: int) -> None:
        key = hashlib.sha256(json.dumps({**deciding, "layer": index}, sort_keys=True).encode()).hexdigest()[:16]
        self.index: Layer = index
        self.place, self._num_rows = folder / key, num_rows
        self.shards: dict[int, Shard] = {}

    def file(self, number: int) -> Path:
        return self.place / f"{number:05}.safetensors"

    def lock(self, number: int) -> Path:
        return self.place / f".{number:05}.lock"

    def open(self, number: int, *, say: bool = False) -> bool:
        """Whether the file is there and whole; one that is damaged is told of, where its lock is held."""
        if number in self.shards:
            return True
        file, expected = self.file(number), min(SHARD, self._num_rows - number * SHARD)
        try:
            shard = Shard(file)
            if shard.num_rows != expected:
                raise DamageError(f"{file}: damaged ({shard.num_rows} rows, expected {expected})")
        except FileNotFoundError:
            return False
        except DamageError as error:
            if say:
                print(f"feature cache: {error}; computing it again", file=sys.stderr)
            return False
        self.shards[number] = shard
        return True


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's weights: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
