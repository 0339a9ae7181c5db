"""Damaged data sets by number, and what must become of each: read in accord with the contract, or refused by name.

A batch runs in a process of its own, which may crash or hang.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import random
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LIMIT = 60.0  # seconds a case may take, the first one with all imports; others take hundredths
RECORDS = 4
QUESTION, ANSWER = "<image>\nWhat is it?", "A red cube, naïve 😀."


@dataclass(frozen=True)
class Case:
    what: str  # of SUBJECTS
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What became of a case; `failure` says what ought not to have."""

    case: Case
    how: str  # it was damaged
    records_read: int = 0
    records_refused: int = 0
    opened: bool = True
    failure: str | None = None

    @property
    def refused(self) -> bool:
        return not self.opened or self.records_refused > 0


class BrokenContractError(AssertionError):
    """A record that was given out although it breaks the contract."""


# -- what is damaged


def _noise(size: tuple[int, int] = (48, 40)) -> Image.Image:
    rng = np.random.default_rng(0)
    smooth = np.linspace(0, 200, size[0])[None, :, None] + rng.integers(0, 55, (size[1], size[0], 3))
    return Image.fromarray(smooth.astype(np.uint8))


def _saved(format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image = _noise()
    if options.pop("palette", False):
        image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    if options.pop("animated", False):
        frames = [image.rotate(20 * turn) for turn in range(1, 4)]
        options |= {"save_all": True, "append_images": frames, "duration": 50}
    image.save(buffer, format=format_, **options)
    return buffer.getvalue()


IMAGES: dict[str, tuple[str, Callable[[], bytes]]] = {
    "jpeg": ("jpg", lambda: _saved("JPEG")),
    "jpeg, progressive": ("jpg", lambda: _saved("JPEG", progressive=True)),
    "png": ("png", lambda: _saved("PNG")),
    "png, palette": ("png", lambda: _saved("PNG", palette=True)),
    "webp": ("webp", lambda: _saved("WEBP")),
    "webp, lossless": ("webp", lambda: _saved("WEBP", lossless=True)),
    "webp, animated": ("webp", lambda: _saved("WEBP", animated=True)),
    "gif": ("gif", lambda: _saved("GIF")),
    "gif, animated": ("gif", lambda: _saved("GIF", animated=True)),
}
HUGE = {"jpeg": b"\xff\xc0", "jpeg, progressive": b"\xff\xc2", "png": b"IHDR", "gif": b"GIF8", "webp": b"VP8X"}


def good_records(suffix: str = "png") -> list[dict[str, Any]]:
    """Records of one image and two turns each, the last one of text alone."""
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    talk = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi."}]
    records = [{"id": f"record-{n}", "image": f"{n}.{suffix}", "conversations": turns} for n in range(RECORDS - 1)]
    return [*records, {"id": "text", "conversations": talk}]


# -- how


def _truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _bits(content: bytes, rng: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _header(content: bytes, rng: random.Random) -> bytes:
    """Bits where formats keep sizes, offsets and tables."""
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 2, 6))):
        damaged[rng.randrange(min(len(damaged), 96))] = rng.randrange(256)
    return bytes(damaged)


def _spliced(content: bytes, rng: random.Random) -> bytes:
    """A piece of it once more somewhere else, or in the place of another."""
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    at = rng.randrange(len(content))
    return content[:at] + content[start:end] + content[at + rng.choice((0, end - start)) :]


def _zeros(content: bytes, rng: random.Random) -> bytes:
    start, end = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    return content[:start] + rng.choice((b"\0", b"\xff")) * (end - start) + content[end:]


def _magic(content: bytes, rng: random.Random) -> bytes:
    """The first bytes of another format, some of which hold lengths and counts."""
    known = [make()[:size] for _, make in IMAGES.values() for size in (4, 8, 16)]
    others = [b"BM", b"II*\0", b"MM\0*", b"\0\0\1\0", b"%!PS-Adobe", b"P6 9 9 255\n", b"SIMPLE  =", b"PK\3\4", b"icns"]
    first = rng.choice([*known, *others])
    return first + content[len(first) :]


def _noise_bytes(content: bytes, rng: random.Random) -> bytes:
    return rng.randbytes(rng.randrange(1, 2 * len(content)))


DAMAGE: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut off": _truncated,
    "bits flipped": _bits,
    "header overwritten": _header,
    "pieces spliced": _spliced,
    "a stretch blanked": _zeros,
    "another format's first bytes": _magic,
    "noise": _noise_bytes,
}


def huge(what: str, content: bytes, rng: random.Random) -> bytes | None:
    """The image with a declared size of up to 65,535 a side, its checksum put right; None: it is not found there."""
    width, height = (rng.choice((8001, 20_000, 65_535)) for _ in range(2))
    kind = what.partition(",")[0]
    at = content.find(HUGE.get(what, HUGE[kind]))
    if at < 0:
        return None
    damaged = bytearray(content)
    if kind == "png":
        damaged[at + 4 : at + 12] = struct.pack(">II", width, height)
        damaged[at + 17 : at + 21] = struct.pack(">I", zlib.crc32(damaged[at : at + 17]))
    elif kind == "jpeg":
        damaged[at + 5 : at + 9] = struct.pack(">HH", height, width)
    elif kind == "gif":
        damaged[at + 6 : at + 10] = struct.pack("<HH", width, height)
    else:
        damaged[at + 12 : at + 18] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(damaged)


ODD: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e308, float("nan"), 10**4000, "", " ", "\0", "\ud800", "\udcff", "<image>", "<image>" * 3,
    "</s>", "<|im_end|>", "..", "/", "/etc/passwd", "../train.json", "a" * 300, "x\0y.png", "https://example.org/a.png",
    "human", "gpt", "system", [], {}, [[]], [None], {"from": "human"}, ["0.png", "1.png"], ["0.png", 7], "\u2028 ﷽ 👩",
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*path, key))


def odd_record(rng: random.Random, seed: int) -> tuple[str, Any]:
    """A record with an odd value in one place, all of them in turn; then with several faults by chance."""
    value: Any = json.loads(json.dumps(good_records()[0])) | {"description": "a cube", "capability": "color"}
    turns = [path for path in _places(value) if path]
    if seed < len(turns) * len(ODD):
        (*parents, last), odd = turns[seed % len(turns)], ODD[seed // len(turns)]
        place = value
        for key in parents:
            place = place[key]
        place[last] = odd
        return "an odd value in one place", value
    how = ""
    for _ in range(rng.choice((1, 1, 2, 3))):
        *parents, last = rng.choice([path for path in _places(value) if path] or [("id",)])
        place = value
        for key in parents:
            place = place[key]
        how = rng.choice(("another value", "another value", "taken out", "repeated", "nested"))
        if how == "another value":
            place[last] = rng.choice(ODD)
        elif how == "taken out":
            del place[last]
        elif how == "repeated" and isinstance(place, list):
            place.insert(rng.randrange(len(place) + 1), place[last])
        else:
            place[last] = {"value": [place[last]]}
        if not isinstance(value, dict) or not value:
            break
    return how, value


def _json_text(records: Any, rng: random.Random) -> tuple[str, bytes]:
    text = json.dumps(records, ensure_ascii=False, indent=rng.choice((None, 1))).encode("utf-8", "surrogatepass")
    how = rng.choice(("cut off", "bits flipped", "pieces spliced", "a stretch blanked", "deeply nested", "odd bytes"))
    if how == "deeply nested":
        opened = rng.choice((b"[", b'{"a":'))
        return how, rng.choice((text[:-1] + b"," + opened * 100_000, opened * 100_000))
    if how == "odd bytes":
        odd = (b"\xef\xbb\xbf", b"\xff\xfe", b"9" * 5000, b"\0", b"\x80", b"NaN", b"//", b'"\\ud800"')
        at = rng.choice((0, rng.randrange(len(text))))
        return how, text[:at] + rng.choice(odd) + text[at:]
    return how, DAMAGE[how](text, rng)


# -- data sets with a damaged part, and their names


def _image_set(case: Case, folder: Path, rng: random.Random) -> tuple[str, str]:
    suffix, make = IMAGES[case.what]
    content = make()
    how = rng.choice([*DAMAGE, "a huge size declared"])
    damaged = huge(case.what, content, rng) if how not in DAMAGE else DAMAGE[how](content, rng)
    if damaged is None:
        how, damaged = "header overwritten", _header(content, rng)
    records = good_records(suffix)
    (folder / "images").mkdir()
    for number in range(RECORDS - 1):
        (folder / "images" / f"{number}.{suffix}").write_bytes(damaged if number == 1 else content)
    (folder / "train.json").write_text(json.dumps(records))
    return how, "train.json"


def _record_set(case: Case, folder: Path, rng: random.Random) -> tuple[str, str]:
    records: list[Any] = good_records()
    how, records[1] = odd_record(rng, case.seed)
    _write_images(folder)
    (folder / "train.json").write_text(json.dumps(records))
    return how, "train.json"


def _json_set(case: Case, folder: Path, rng: random.Random) -> tuple[str, str]:
    _write_images(folder)
    how, content = _json_text(good_records(), rng)
    (folder / "train.json").write_bytes(content)
    return how, "train.json"


def _lines_set(case: Case, folder: Path, rng: random.Random) -> tuple[str, str]:
    _write_images(folder)
    lines = b"".join(json.dumps(record).encode() + b"\n" for record in good_records())
    how = rng.choice(("cut off", "bits flipped", "pieces spliced", "a stretch blanked"))
    (folder / "train.jsonl").write_bytes(DAMAGE[how](lines, rng))
    return how, "train.jsonl"


def _parquet_set(case: Case, folder: Path, rng: random.Random) -> tuple[str, str]:
    import pyarrow
    import pyarrow.parquet

    content = IMAGES["png"][1]()
    rows = good_records()
    for row in rows:
        name = row.pop("image", None)
        row["images"] = [] if name is None else [{"bytes": content, "path": name}]
    buffer = io.BytesIO()
    compression = rng.choice(("NONE", "SNAPPY"))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), buffer, compression=compression, row_group_size=2)
    how = rng.choice(list(DAMAGE))
    (folder / "train.parquet").write_bytes(DAMAGE[how](buffer.getvalue(), rng))
    return how, "train.parquet"


def _tar_set(case: Case, folder: Path, rng: random.Random) -> tuple[str, str]:
    content, buffer = IMAGES["png"][1](), io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for record in good_records():
            image = record.pop("image", None)
            members = [("json", json.dumps(record).encode()), *([("png", content)] if image else [])]
            for suffix, part in members:
                member = tarfile.TarInfo(f"{record['id']}.{suffix}")
                member.size = len(part)
                archive.addfile(member, io.BytesIO(part))
    how = rng.choice([name for name in DAMAGE if name not in ("header overwritten", "another format's first bytes")])
    (folder / "train.tar").write_bytes(DAMAGE[how](buffer.getvalue(), rng))
    return how, "train.tar"


def _write_images(folder: Path) -> None:
    content = IMAGES["png"][1]()
    (folder / "images").mkdir()
    for number in range(RECORDS - 1):
        (folder / "images" / f"{number}.png").write_bytes(content)


Make = Callable[[Case, Path, random.Random], tuple[str, str]]
SUBJECTS: dict[str, Make] = {
    **dict.fromkeys(IMAGES, _image_set),
    "record": _record_set,
    "json file": _json_set,
}
ARCHIVES: dict[str, Make] = {"jsonl file": _lines_set, "parquet": _parquet_set, "webdataset tar": _tar_set}


# -- what must become of them


def judge(case: Case, folder: Path) -> Outcome:
    """What becomes of a case in an empty folder: whatever is no refusal by name is a failure."""
    make = (SUBJECTS | ARCHIVES)[case.what]
    how, name = make(case, folder, random.Random(f"{case.what} {case.seed}"))
    try:
        return _judged(case, how, folder / name)
    except Exception as error:
        return Outcome(case, how, failure=f"{type(error).__name__}: {error}"[:500])


def _judged(case: Case, how: str, file: Path) -> Outcome:
    """What becomes of a file.

    Raises:
        BrokenContractError: a record that breaks the contract, an error without the record's name, a record lost.
    """
    from vlmzoo import build
    from vlmzoo.config import DataConfig
    from vlmzoo.data.images import ImageError
    from vlmzoo.data.records import RecordError

    try:
        source = build.source(DataConfig(str(file)))
        size = len(source)
    except (RecordError, ImageError) as error:
        _check(file.name in str(error), f"the error does not name {file.name}: {error}")
        return Outcome(case, how, opened=False)
    read = refused = 0
    for index in range(size):
        try:
            check_record(source[index])
            read += 1
        except (RecordError, ImageError) as error:
            named = f"[{index}]" in str(error) if case.what in SUBJECTS else file.name in str(error)
            _check(named, f"the error does not name record {index}: {error}")
            _check(len(str(error)) < 2000, f"the error has {len(str(error))} characters")
            refused += 1
    _check_number(file, size, refused)
    return Outcome(case, how, read, refused)


def check_record(record: Any) -> None:
    """The contract of a record: its images can be decoded within the cap, and its sample trains on every answer."""
    from vlmzoo.data.images import MAX_PIXELS, load_image

    for image in record.images:
        pixels = load_image(image, where=record.where)
        _check(pixels.mode == "RGB" and max(pixels.size) ** 2 <= MAX_PIXELS, f"{pixels.mode} {pixels.size}")
    _check(len(record.turns) >= 2 and len(record.turns) % 2 == 0, "turns do not alternate")
    placed = sum(turn.text.count("<image>") for turn in record.turns)
    _check(placed == len(record.images), f"{placed} <image> for {len(record.images)} images")
    builder = _builder()
    (sample,) = builder.build([record])
    _check(sample.input_ids.count(builder.image_token_id) == 4 * len(record.images), "slots")
    targets = [token for token in sample.labels if token != -100]
    said = builder.tokenizer.decode(targets, clean_up_tokenization_spaces=False)
    expected = "".join(f" {turn.text}{builder.tokenizer.eos_token}" for turn in record.turns if turn.role == "gpt")
    _check(said == expected, f"targets {said!r}, expected {expected!r}")


def _check_number(file: Path, size: int, refused: int) -> None:
    """No record is lost in silence: as many come as stand in the file, and no damaged one is read without a word."""
    if file.suffix == ".json":
        try:
            expected = len(json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, RecursionError):  # of one record, or more
            _check(refused > 0, "the file is no JSON, and every record was read")
        else:
            _check(size == expected, f"{size} records of {expected}")
    elif file.suffix == ".jsonl":
        expected = sum(bool(line.strip()) for line in file.read_bytes().split(b"\n"))
        _check(size == expected, f"{size} records of {expected}")
    elif size < RECORDS:
        _check(file.suffix == ".tar" and _ends_in_zeros(file), f"{size} records of {RECORDS}")


def _ends_in_zeros(file: Path) -> bool:
    """Whether nothing tells a tar file from one that never held more: what its members leave is empty to the end."""
    with tarfile.open(file) as archive, file.open("rb") as opened:
        archive.getmembers()
        opened.seek(archive.offset)
        return not any(opened.read())


def _check(holds: bool, fault: str) -> None:
    if not holds:
        raise BrokenContractError(fault[:500])


_builders: list[Any] = []


def _builder() -> Any:
    if not _builders:
        from tests.data.conftest import bytelevel
        from vlmzoo.config import Template
        from vlmzoo.connector import ImageLayout
        from vlmzoo.data.samples import SampleBuilder

        tokenizer = bytelevel()
        one = ImageLayout(((2, 2),))
        _builders.append(
            SampleBuilder(
                tokenizer, tokenizer.get_vocab()["<image>"], lambda layout: 4, lambda image, where: one,
                Template.vicuna_v1, 10**6,
            )
        )  # fmt: skip
    return _builders[0]


# -- many of them, in a process that may crash or hang


Judge = Callable[[Case, Path], Outcome]


def run(cases: Sequence[Case], limit: float = LIMIT, judge: Judge = judge) -> list[Outcome]:
    """The outcomes in order. A crash or a case over the limit is a failure, and the rest goes on in a new process."""
    outcomes: list[Outcome] = []
    while len(outcomes) < len(cases):
        outcomes += _run_until_it_breaks(cases[len(outcomes) :], limit, judge)
    return outcomes


def _run_until_it_breaks(cases: Sequence[Case], limit: float, judge: Judge) -> list[Outcome]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, list(cases), judge), daemon=True)
    process.start()
    theirs.close()
    outcomes: list[Outcome] = []
    try:
        assert ours.poll(120), "the process did not start"
        ours.recv()
        while len(outcomes) < len(cases):
            case = cases[len(outcomes)]
            if not ours.poll(limit):
                return [*outcomes, Outcome(case, "?", failure=f"no end within {limit:g} s")]
            try:
                outcomes.append(ours.recv())
            except EOFError:
                return [*outcomes, Outcome(case, "?", failure="the process died")]
        return outcomes
    finally:
        process.kill()
        process.join()


def _work(connection: Connection, cases: Sequence[Case], judge: Judge) -> None:
    connection.send("ready")
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            try:
                outcome = judge(case, Path(folder))
            except Exception as error:
                outcome = Outcome(case, "?", failure=f"{type(error).__name__}: {error}"[:500])
        connection.send(outcome)


def cases_of(whats: Sequence[str], count: int, start: int = 0) -> list[Case]:
    """`count` cases of each kind."""
    return [Case(what, seed) for what in whats for seed in range(start, start + count)]
