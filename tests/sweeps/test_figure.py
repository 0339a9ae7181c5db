"""The picture shows what the summary says, at its place."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.sweeps.conftest import SKILL, make_study, write_sweep
from vlmzoo.sweeps import report
from vlmzoo.sweeps.figure import render
from vlmzoo.sweeps.summary import summarise
from vlmzoo.sweeps.table import accuracy

COLOURS = {name: index for index, name in enumerate(SKILL)}
SVG = "{http://www.w3.org/2000/svg}"


def test_every_row_stands_at_its_accuracy(tmp_path: Path) -> None:
    study = make_study(list(SKILL), [0, 1], baselines=["blind", "oracle"])
    summary = summarise(write_sweep(tmp_path, study))
    root = ElementTree.fromstring(render(summary, COLOURS))
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    ticks = [
        (float(text.get("x", 0)), float("".join(text.itertext()).removesuffix(" %")))
        for text in root.iter(f"{SVG}text")
        if "".join(text.itertext()).endswith(" %")
    ]
    (left, low), *_, (right, high) = ticks
    circles = [float(circle.get("cx", 0)) for circle in root.iter(f"{SVG}circle")]
    shown = [low + (x - left) / (right - left) * (high - low) for x in circles]
    assert shown == pytest.approx([100 * row["accuracy"] for row in summary["rows"]], abs=0.05)
    for row in summary["rows"]:
        assert row["connector"] in texts
        assert accuracy(row) in texts
    assert f"blind {100 * summary['blind']['accuracy']:.1f}" in texts
    assert f"text oracle {100 * summary['oracle']['accuracy']:.1f}" in texts


def test_one_seed_and_no_result_are_drawn_too(tmp_path: Path) -> None:
    one = summarise(write_sweep(tmp_path, make_study(["mlp"], [0])))
    assert render(one, COLOURS).count("<circle") == 1
    ElementTree.fromstring(render(summarise([]), {}))


def test_a_connector_has_one_colour_in_picture_and_page(tmp_path: Path) -> None:
    study = make_study(list(SKILL), [0, 1])
    trials = write_sweep(tmp_path, study)
    summary, number_of = summarise(trials), report.colours(trials)
    best = summary["rows"][0]["connector"]
    assert number_of[best] > 0, "else the order of the rows would do"
    circle = next(iter(ElementTree.fromstring(render(summary, number_of)).iter(f"{SVG}circle")))
    page = report.render("a sweep", study, trials, summary)
    assert circle.get("fill") == re.search(rf"--c{number_of[best]}: (#\w+)", page)[1]
    assert re.search(rf"var\(--c(\d)\)[^>]*></b>{best}<", page)[1] == str(number_of[best])
