"""What the feature cache costs: files on disk, opening, random reads with and without checks, memory held.

python experiments/benchmarks/feature_cache.py [IMAGES]

Features of CLIP-L/14-336's shape (576 patches of 1024 numbers), random but for a few channels that outweigh the others
as CLIP's do, in a folder that is removed at the end: 1,024 images take 2.4 GB in float32. Each row of the table is a
process of its own. Files just written are read from memory: a disk adds its own time.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from vlmzoo.config import Features
from vlmzoo.connector import FeatureMap
from vlmzoo.files import SETTLED, content_hashes
from vlmzoo.vision.cache import SHARD
from vlmzoo.vision.shards import Error, Shard, narrowed, write_shard

PATCHES, DIM, BATCH = (24, 24), 1024, 32
STORED: tuple[Features, ...] = ("compute", "bfloat16", "float8")


def main(images: str = "1024") -> None:
    print("stored    checks      MB  write s  error %  open ms   GB/s  images/s  MB held", flush=True)
    for features in STORED:
        with tempfile.TemporaryDirectory() as folder:
            for checks in ("on", "off"):
                command = [sys.executable, __file__, "measure", features, checks, folder, images]
                subprocess.run(command, check=True)
    with tempfile.TemporaryDirectory() as folder:
        reopening(Path(folder), count=5000)


def measure(features: Features, checks: str, folder: str, images: str) -> None:
    """One row of the table; the files are written where they are not there yet."""
    torch.set_num_threads(1)
    files = [Path(folder, f"{number:05}.safetensors") for number in range(-(-int(images) // SHARD))]
    began = time.perf_counter()
    for file in files:
        if not file.exists():
            write(file, features)
    written = time.perf_counter() - began
    if checks == "off":
        Shard.read = unchecked
    base, began = held(), time.perf_counter()
    opened = [Shard(file) for file in files]
    opening = time.perf_counter() - began
    names = ["values", *(["scale"] if features == "float8" else [])]
    order = np.random.default_rng(0).permutation(len(files) * SHARD)
    began, count, most = time.perf_counter(), 0, 0
    for start in range(0, len(order) - BATCH + 1, BATCH):
        raw = {name: opened[0].empty(name, BATCH, pinned=False)[1].numpy() for name in names}
        for place, number in enumerate(order[start : start + BATCH]):
            opened[number // SHARD].read(int(number % SHARD), {name: rows[place].data for name, rows in raw.items()})
        count, most = count + BATCH, max(most, held() - base)
    seconds = time.perf_counter() - began
    size = sum(file.stat().st_size for file in files)
    error = sum((shard.error for shard in opened), Error()).relative
    print(
        f"{features:<10}{checks:<8}{size / 1e6:>7.0f}{written:>9.1f}{100 * error:>9.3f}{1e3 * opening:>9.2f}"
        f"{size * count / (len(files) * SHARD) / seconds / 1e9:>7.2f}{count / seconds:>10.0f}{most / 1e6:>9.0f}"
    )


def write(file: Path, features: Features) -> None:
    """One file, chunk by chunk as the encoder gives them."""
    generator = torch.Generator().manual_seed(int(file.stem))
    channels = torch.ones(DIM).index_fill(0, torch.arange(0, DIM, 200), 30.0)
    tensors, error, chunk = {}, Error(), 16
    for start in range(0, SHARD, chunk):
        values = torch.randn(chunk, PATCHES[0] * PATCHES[1], DIM, generator=generator) * channels
        stored = narrowed(FeatureMap.dense(values, PATCHES), features)
        if features != "compute":
            error.add(stored.on("cpu").values, values)
        for name in ("values", "scale"):
            if (part := getattr(stored, name)) is not None:
                whole = tensors.setdefault(name, part.new_empty(SHARD, *part.shape[1:]))
                whole[start : start + chunk] = part
    write_shard(file, tensors, PATCHES, error)


def unchecked(shard: Shard, row: int, into: dict[str, memoryview]) -> None:
    """`Shard.read` without its checksums."""
    descriptor = os.open(shard.file, os.O_RDONLY)
    for name, memory in into.items():
        part = shard._parts[name]
        os.preadv(descriptor, [memory], part.start + row * part.row_bytes)
    os.close(descriptor)


def held() -> int:
    """Bytes of memory that this process holds, mapped files among them."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reopening(folder: Path, count: int) -> None:
    """Hashes of image files of 50 KB, read and then known."""
    files = [folder / f"{number}.jpg" for number in range(count)]
    for file in files:
        file.write_bytes(np.random.default_rng(len(file.name)).bytes(50_000))
    time.sleep(SETTLED / 1e9)  # a file that has just changed is not believed
    for said in ("hashed", "known"):
        began = time.perf_counter()
        content_hashes(files, folder / "index")
        print(f"{count} images of 50 KB, {said}: {time.perf_counter() - began:.3f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["measure"]:
        measure(*sys.argv[2:])  # pyright: ignore
    else:
        main(*sys.argv[1:])
