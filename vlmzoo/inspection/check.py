"""Reads a data set once, as training would, and says what is wrong with it, record by record."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from array import array
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from tqdm import tqdm

from vlmzoo.data.images import ImageError, load_image
from vlmzoo.data.prefetch import prefetched
from vlmzoo.data.records import Record, RecordError
from vlmzoo.data.samples import IGNORE
from vlmzoo.data.sources.source import Source
from vlmzoo.inspection.subject import Subject, wrong_suffix
from vlmzoo.samples import READERS, seen

CHUNK = 64  # records a piece of work
ENDLESS = sys.maxsize
NAMED = 3  # files that a finding about a folder names

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. A record with an error stops training; one with a warning does not."""

    kind: str  # missing-image, broken-image, no-target, …
    index: int | None  # of the record; None: it is about the data set
    where: str  # names the record
    message: str
    severity: Severity = "error"


@dataclass
class Report:
    """What was found in a data set."""

    name: str
    records: int = 0
    images: int = 0  # names of images in records that can be read
    findings: list[Finding] = field(default_factory=list)
    words: array[int] = field(default_factory=lambda: array("q"))  # of each record
    tokens: array[int] = field(default_factory=lambda: array("q"))  # of each record before it is cut
    targets: array[int] = field(default_factory=lambda: array("q"))
    max_length: int | None = None  # None: no tokens were counted
    images_counted: bool = False  # among the tokens

    @property
    def faulty(self) -> bool:
        return any(finding.severity == "error" for finding in self.findings)


@dataclass(slots=True)
class _Looked:
    """What one record showed; texts are not kept, only hashes of them."""

    index: int
    findings: list[Finding]
    where: str = ""
    identity: bytes = b""
    content: bytes = b""
    images: tuple[bytes, ...] = ()
    words: int | None = None
    tokens: int | None = None
    targets: int = 0


def check(subject: Subject, workers: int = READERS) -> Report:
    """All that is wrong with a data set, in the order of its records, whatever the number of workers.

    Raises:
        ValueError: the data set is not there.
    """
    report = Report(subject.name)
    if subject.builder is not None:
        report.max_length, report.images_counted = subject.builder.max_length, subject.processor is not None
    try:
        source = subject.source()
    except RecordError as error:
        if error.kind == "unreadable":
            raise
        report.findings.append(Finding(error.kind, None, subject.data.path, str(error)))
        return report
    looker, used = _Looker(subject, source), set[bytes]()
    identities, contents = dict[bytes, int](), dict[bytes, int]()
    chunks = (range(start, min(start + CHUNK, len(source))) for start in range(0, len(source), CHUNK))
    bar = tqdm(total=len(source), desc=subject.name, unit="record", file=sys.stderr, disable=not sys.stderr.isatty())
    with bar, closing(prefetched(chunks, looker.look, 2 * workers, workers=workers)) as looked:
        for chunk in looked:
            for one in chunk:
                _add(report, one, identities, contents)
                used.update(one.images)
            bar.update(len(chunk))
    if not subject.data.limit and (unused := _unused(subject, used)):
        report.findings.append(unused)
    return report


def _add(report: Report, one: _Looked, identities: dict[bytes, int], contents: dict[bytes, int]) -> None:
    report.records += 1
    report.findings += one.findings
    if one.words is None:
        return
    report.images += len(one.images)
    report.words.append(one.words)
    if one.tokens is not None:
        report.tokens.append(one.tokens)
        report.targets.append(one.targets)
    for kind, what, key, known in (
        ("duplicate-record", "the same conversation about the same images as", one.content, contents),
        ("duplicate-id", "the same id as", one.identity, identities),
    ):
        first = known.setdefault(key, one.index)
        if first != one.index:
            message = f"{one.where}: {what} record {first}"
            report.findings.append(Finding(kind, one.index, one.where, message, "warning"))
            break  # a copy of a record has its id too


class _Looker:
    """Looks at records; several threads may at once. Decoders and tokenizers let other threads run meanwhile."""

    def __init__(self, subject: Subject, source: Source) -> None:
        self._subject, self._source, self._builder = subject, source, subject.builder
        self._whole = self._builder and dataclasses.replace(self._builder, max_length=ENDLESS)
        self._images: dict[bytes, Finding | None] = {}  # of files; what stands there for the next record that has one

    def look(self, indices: range) -> list[_Looked]:
        found, good = [], []
        for index in indices:
            try:
                record = seen(self._source[index], self._subject.sees)
            except (RecordError, ImageError) as error:
                where, _, _ = str(error).partition(": ")
                found.append(_Looked(index, [Finding(error.kind, index, where, str(error))]))
                continue
            one = self._read(index, record)
            found.append(one)
            if not any(finding.severity == "error" for finding in one.findings):
                good.append((one, record))
        if self._builder is not None and good:
            self._count(good)
        return found

    def _read(self, index: int, record: Record) -> _Looked:
        names = tuple(_digest(str(image)) for image in record.images)
        texts = [turn.text for turn in record.turns]
        one = _Looked(
            index,
            [],
            record.where,
            _digest(record.id),
            _digest(*texts, *(key.hex() for key in names)),
            names,
            sum(len(text.split()) for text in texts),
        )
        for image, key in zip(record.images, names, strict=True):
            if (finding := self._image(image, key)) is not None:
                message = f"{record.where}: {finding.message}"
                one.findings.append(dataclasses.replace(finding, index=index, where=record.where, message=message))
        return one

    def _image(self, image: Any, key: bytes) -> Finding | None:
        if not isinstance(image, Path):
            return _image_finding(image)
        if key not in self._images:
            self._images[key] = _image_finding(image)
        return self._images[key]

    def _count(self, good: Sequence[tuple[_Looked, Record]]) -> None:
        """Adds the numbers of tokens, and what is cut off."""
        assert self._builder is not None
        try:
            tokens = self._builder.tokens([record for _, record in good])
        except RecordError:
            if len(good) > 1:  # one of them: each alone
                for pair in good:
                    self._count([pair])
                return
            ((one, record),) = good
            self._refused(one, record)
            return
        for (one, record), ids in zip(good, tokens, strict=True):
            self._lay_out(one, record, ids)

    def _refused(self, one: _Looked, record: Record) -> None:
        assert self._builder is not None
        try:
            self._builder.build([record])
        except (RecordError, ImageError) as error:
            one.findings.append(Finding(error.kind, one.index, record.where, str(error)))

    def _lay_out(self, one: _Looked, record: Record, tokens: Any) -> None:
        assert self._builder is not None
        assert self._whole is not None
        try:
            (whole,) = self._whole.assemble([record], [tokens])
        except (RecordError, ImageError):  # it has no target however long it may be
            self._refused(one, record)
            return
        one.tokens, one.targets = len(whole.input_ids), _num_targets(whole.labels)
        length = self._builder.max_length
        if one.tokens <= length:
            return
        try:
            (kept,) = self._builder.assemble([record], [tokens])
        except RecordError as error:
            one.findings.append(Finding(error.kind, one.index, record.where, str(error)))
            return
        lost = one.targets - _num_targets(kept.labels)
        kind, what = ("cut-targets", f", {lost} of {one.targets} targets with the rest") if lost else ("truncated", "")
        message = f"{record.where}: its {one.tokens} tokens are cut to {length}{what}"
        one.findings.append(Finding(kind, one.index, record.where, message, "warning"))


def _image_finding(image: Any) -> Finding | None:
    """What is wrong with an image, which is decoded whole; the message begins with the image."""
    try:
        pixels = load_image(image)
    except ImageError as error:
        return Finding(error.kind, None, "", str(error))
    suffix = wrong_suffix(str(image), pixels)
    if suffix is None:
        return None
    message = f"image {image} is a {pixels.format}, which ends in {suffix}"
    return Finding("wrong-extension", None, "", message, "warning")


def _unused(subject: Subject, used: set[bytes]) -> Finding | None:
    """The images in the folder of a LLaVA JSON that no record names."""
    if Path(subject.data.path).suffix not in (".json", ".jsonl") or not used:
        return None
    folder = subject.image_folder
    suffixes = Image.registered_extensions()
    files = [file for file in folder.resolve().rglob("*") if file.suffix.lower() in suffixes]
    unused = sorted(str(file) for file in files if _digest(str(file)) not in used)
    if not unused:
        return None
    first = ", ".join(Path(file).name for file in unused[:NAMED]) + (", …" if len(unused) > NAMED else "")
    message = f"{folder}: {len(unused)} of {len(files)} images are in no record that can be read: {first}"
    return Finding("image-unused", None, str(folder), message, "warning")


def _num_targets(labels: Sequence[int]) -> int:
    return len(labels) - list(labels).count(IGNORE)


def _digest(*texts: str) -> bytes:
    digest = hashlib.blake2b(digest_size=12)
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "little"))
        digest.update(encoded)
    return digest.digest()
