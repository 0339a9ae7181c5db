"""How much memory the index of a million records takes, and how long the first batch of them: each kind of source.

    python -m experiments.benchmarks.sources --out experiments/results/data/sources.md

Data is written into a temporary folder and removed. Each figure is of a process of its own, which opens the source and
reads a batch in the order of training, images decoded: cold, with neither an index nor the system's cache of the files,
then warm. Memory is how far the process's peak rose above what it held once `vlmzoo.build` was imported.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

BATCH = 32
TALKS = 997  # different ones, in turn
SHARDS = 10
ROW_GROUP = 1000
WORDS = [
    "a",
    "the",
    '"red"',
    "cube",
    "of",
    "on",
    "in",
    "is",
    "left",
    "and",
    "small",
    "sphere",
    "behind",
    "why",
    "because\n",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--folder", type=Path, help="where the data is written; default: a temporary one")
    parser.add_argument("--out", type=Path, help="a Markdown file for the table; default: it is printed")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure)))
        return
    lines = [HEADER]
    for kind in options.kinds:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = KINDS[kind](Path(folder), options.records)
            size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
            cold, warm = (ask(path, Path(folder), cold=cold) for cold in (True, False))
            lines.append(
                f"| {kind} | {size / 1e9:.2f} | {cold['peak']:.0f} | {cold['seconds']:.2f} | {cold['cpu']:.2f} "
                f"| {warm['peak']:.0f} | {warm['seconds']:.2f} | {warm['cpu']:.2f} |"
            )
            print(lines[-1], file=sys.stderr)
    table = "\n".join(lines) + "\n"
    if options.out is None:
        print(table)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    command = f"python -m experiments.benchmarks.sources --records {options.records}"
    options.out.write_text(TEXT.format(records=options.records, batch=BATCH, command=command, table=table))


HEADER = """| source | GB | cold: MB | cold: s | of CPU | warm: MB | warm: s | of CPU |
|---|---:|---:|---:|---:|---:|---:|---:|"""
TEXT = """# Sources of a million records

Memory above what the process held before, at its peak, and seconds from opening the source to a first batch of {batch}
records with their images decoded, of {records:,} records. Cold: no index in the cache, and none of the files in the
system's. Goals: at most 200 MB and 5 s.

{table}
`{command} --out experiments/results/data/sources.md`, on two shared cores.
"""


def ask(path: str, folder: Path, *, cold: bool) -> dict[str, float]:
    """What a process of its own measures."""
    cache = folder / ".cache"
    if cold:
        shutil.rmtree(cache, ignore_errors=True)
        for file in folder.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    command = [sys.executable, "-m", "experiments.benchmarks.sources", "--measure", path]
    found = subprocess.run(command, env={**os.environ, "VLMZOO_CACHE": str(cache)}, capture_output=True, text=True)
    if found.returncode:
        sys.exit(found.stderr)
    return json.loads(found.stdout)


def measured(path: str) -> dict[str, float]:
    from vlmzoo import build
    from vlmzoo.config import DataConfig
    from vlmzoo.data.images import load_image
    from vlmzoo.data.order import batches

    before, began, cpu = memory("VmRSS"), time.perf_counter(), time.process_time()
    source = build.source(DataConfig(path))
    batch = next(batches(len(source), BATCH, 0, blocks=source.blocks))
    for index in batch:
        record = source[index]
        for image in record.images:
            load_image(image, where=record.where)
    seconds = {"seconds": time.perf_counter() - began, "cpu": time.process_time() - cpu}
    return seconds | {"peak": memory("VmHWM") - before}


def memory(name: str) -> float:
    """MB of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e6


def records(count: int) -> Iterator[tuple[str, str, str, str]]:
    """Id, image, the human's text and the answer; a kilobyte in all."""
    draw = random.Random(0)
    answers = [" ".join(draw.choices(WORDS, k=200)) for _ in range(TALKS)]
    for number in range(count):
        yield f"{number:09}", f"{number % TALKS}.png", "<image>\nWhat is in the image?", answers[number % TALKS]


def value(identity: str, image: str, asked: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    return {"id": identity, "image": image, "conversations": turns}


def pictures() -> list[bytes]:
    found = []
    for number in range(TALKS):
        stream = io.BytesIO()
        pixels = np.random.default_rng(number).integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(stream, format="PNG")
        found.append(stream.getvalue())
    return found


def write_images(folder: Path) -> None:
    (folder / "images").mkdir(exist_ok=True)
    for number, data in enumerate(pictures()):
        (folder / "images" / f"{number}.png").write_bytes(data)


def write_json(folder: Path, count: int) -> str:
    write_images(folder)
    with (folder / "data.json").open("w") as stream:
        for number, record in enumerate(records(count)):
            stream.write(("," if number else "[") + "\n" + json.dumps(value(*record)))
        stream.write("\n]\n")
    return str(folder / "data.json")


def write_jsonl(folder: Path, count: int) -> str:
    write_images(folder)
    with (folder / "data.jsonl").open("w") as stream:
        stream.writelines(json.dumps(value(*record)) + "\n" for record in records(count))
    return str(folder / "data.jsonl")


def write_parquet(folder: Path, count: int) -> str:
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    data, stream, writer = pictures(), records(count), None
    for _ in range(-(-count // ROW_GROUP)):
        rows = []
        for number, record in zip(range(ROW_GROUP), stream, strict=False):
            rows.append(value(*record) | {"image": {"bytes": data[number % TALKS], "path": None}})
        table = pyarrow.Table.from_pylist(rows)
        writer = writer or ParquetWriter(folder / "data.parquet", table.schema)
        writer.write_table(table, row_group_size=ROW_GROUP)
    assert writer is not None
    writer.close()
    return str(folder / "data.parquet")


def write_tar(folder: Path, count: int) -> str:
    data, stream, share = pictures(), records(count), -(-count // SHARDS)
    for shard in range(SHARDS):
        with (folder / f"{shard:03}.tar").open("wb") as archive:
            for _, record in zip(range(share), stream, strict=False):
                _member(archive, f"{record[0]}.json", json.dumps(value(*record)).encode())
                _member(archive, f"{record[0]}.png", data[int(record[0]) % TALKS])
            archive.write(bytes(2 * tarfile.BLOCKSIZE))
    return str(folder / f"{{000..{SHARDS - 1:03}}}.tar")


def _member(archive: io.BufferedWriter, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    archive.write(info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE))


def write_mixture(folder: Path, count: int) -> str:
    """Half of a JSON file, twice a quarter of another, and a quarter in tar shards."""
    entries = [
        {"path": write_json(folder, count), "weight": 0.5},
        {"path": write_jsonl(folder, count // 8), "weight": 2.0},
        {"path": write_tar(folder, count // 4)},
    ]
    (folder / "mixture.yaml").write_text(json.dumps({"sources": entries}))
    return str(folder / "mixture.yaml")


KINDS = {
    "LLaVA JSON": write_json,
    "JSON lines": write_jsonl,
    "Parquet": write_parquet,
    "WebDataset": write_tar,
    "mixture": write_mixture,
}


if __name__ == "__main__":
    main()
