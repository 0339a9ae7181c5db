"""A copy of a LLaVA JSON without what is wrong in it: mended where there is one way to, left out otherwise."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmzoo.data.images import load_image
from vlmzoo.data.records import IMAGE_TOKEN
from vlmzoo.data.sources.llava import LlavaFile
from vlmzoo.files import whole_file, write_whole
from vlmzoo.inspection.check import Finding, Report, check
from vlmzoo.inspection.subject import Subject, wrong_suffix

CHANGES = "changes.jsonl"


@dataclass(frozen=True)
class Fixed:
    file: Path
    records: int
    mended: int
    left_out: int


def write_fixed(subject: Subject, report: Report, folder: Path, workers: int) -> Fixed:
    """The data set's good records, as they are, and those that could be mended, with their images, in a folder.

    `changes.jsonl` beside them names every record that was mended or left out. Images are linked, or copied where the
    file system cannot. A record that repeats another stays: it may be there to weigh more. The input is only read.

    Args:
        report: what `check` found in it.

    Raises:
        ValueError: it is no LLaVA JSON, or a copy stands there already.
    """
    source, images = subject.file, subject.image_folder
    target = folder / f"{source.stem}.json"
    if target.exists():
        raise ValueError(f"--fixed: {target} is there already; choose another folder")
    faults = {finding.index: finding for finding in report.findings if finding.severity == "error"}
    if None in faults:
        raise ValueError(f"--fixed: nothing can be mended ({faults[None].message})")
    rows = subject.file_records()
    renamed = {finding.index for finding in report.findings if finding.kind == "wrong-extension"}
    mended = _mended(subject, rows, faults, folder, workers)
    changes, kept = [], 0
    with whole_file(target) as aside, aside.open("w", encoding="utf-8") as out:
        for index in range(min(len(rows), subject.data.limit or len(rows))):
            if (fault := faults.get(index)) is not None and index not in mended:
                changes.append(_change(fault, "left out", fault.message))
                continue
            if fault is not None:
                value, what = mended[index]
                changes.append(_change(fault, "mended", what))
            else:
                value = rows.value(index)
            value, new_names = _placed(value, images, folder / "images", rename=index in renamed or index in mended)
            for old, new in new_names.items():
                finding = Finding("wrong-extension", index, f"{source.name}[{index}]", "", "warning")
                changes.append(_change(finding, "mended", f"image {old} is {new} now"))
            out.write("[\n" if not kept else ",\n")
            out.write(json.dumps(value))
            kept += 1
        out.write("\n]\n" if kept else "[]\n")
        write_whole(folder / CHANGES, "".join(f"{json.dumps(change)}\n" for change in changes))
    by_record = {index: {c["done"] for c in changes if c["index"] == index} for index in {c["index"] for c in changes}}
    left_out = sum("left out" in done for done in by_record.values())
    return Fixed(target, kept, len(by_record) - left_out, left_out)


def _mended(
    subject: Subject, rows: LlavaFile, faults: Mapping[int | None, Finding], folder: Path, workers: int
) -> dict[int, tuple[Any, str]]:
    """Records with a fault that there is one way to mend, and what was done; each one was checked again as mended."""
    found: dict[int, tuple[Any, str]] = {}
    for index, fault in faults.items():
        if index is not None and fault.kind == "image-count":
            mended = _with_placeholders(rows.value(index))
            if mended is not None:
                found[index] = mended
    if not found:
        return {}
    trial = folder / f".{subject.file.stem}.mended.json"
    write_whole(trial, json.dumps([value for value, _ in found.values()]))
    try:
        data = dataclasses.replace(subject.data, path=str(trial), images=str(subject.image_folder), limit=len(found))
        again = check(dataclasses.replace(subject, data=data), workers)
    finally:
        trial.unlink()
    still = {finding.index for finding in again.findings if finding.severity == "error"}
    return {} if None in still else {index: done for row, (index, done) in enumerate(found.items()) if row not in still}


def _with_placeholders(value: Any) -> tuple[Any, str] | None:
    """A record of one image with one `<image>`: the first that is there, or one before all; and what was done."""
    names = value.get("image")
    if not (isinstance(names, str) or (isinstance(names, list) and len(names) == 1)):
        return None
    value = copy.deepcopy(value)
    if not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in value["conversations"]):
        return None
    human = [turn for turn in value["conversations"] if turn.get("from") == "human"]
    if any(IMAGE_TOKEN in turn["value"] for turn in value["conversations"] if turn.get("from") != "human"):
        return None
    count = sum(turn["value"].count(IMAGE_TOKEN) for turn in human)
    if count == 0:
        human[0]["value"] = f"{IMAGE_TOKEN}\n{human[0]['value']}"
        return value, f"{IMAGE_TOKEN} was put before its first turn"
    seen = False
    for turn in human:
        before, token, after = turn["value"].partition(IMAGE_TOKEN)
        rest = after.replace(IMAGE_TOKEN, "")
        turn["value"] = f"{before}{token}{rest}" if not seen else f"{before}{rest}".strip()
        seen = seen or bool(token)
    return value, f"{count - 1} more {IMAGE_TOKEN} than images were taken out"


def _placed(value: Any, images: Path, place: Path, *, rename: bool) -> tuple[Any, dict[str, str]]:
    """The record with its images linked into `place`, under names that end as they should where `rename` says so."""
    names = value.get("image") or []
    new_names = {}
    for name in [names] if isinstance(names, str) else names:
        new = _right_name(name, images) if rename else name
        _link((images / name).resolve(), place / new)
        if new != name:
            new_names[name] = new
    if not new_names:
        return value, {}
    image = new_names.get(names, names) if isinstance(names, str) else [new_names.get(name, name) for name in names]
    return {**value, "image": image}, new_names


def _right_name(name: str, images: Path) -> str:
    suffix = wrong_suffix(name, load_image(images / name))
    right = name if suffix is None else str(Path(name).with_suffix(suffix))
    return name if (images / right).exists() else right  # another image has that name


def _link(file: Path, place: Path) -> None:
    if place.exists():
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(file, place)
    except OSError:  # another file system, or one without links
        with whole_file(place) as aside:
            shutil.copyfile(file, aside)


def _change(finding: Finding, done: str, what: str) -> dict[str, Any]:
    return {"index": finding.index, "record": finding.where, "kind": finding.kind, "done": done, "what": what}
