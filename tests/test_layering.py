"""Imports run one way, downward."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    {"registry", "files", "page"},
    {"connector", "config"},
    {"connectors", "vision", "language", "data", "world", "kernels"},
    {"build", "instruct"},
    {"splice"},
    {"model"},
    {"processor", "interop"},
    {"samples"},
    {"training", "evaluation", "conformance", "inspection"},
    {"sweeps"},
    {"commands"},
    {"cli"},
    {"__main__", "bench"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
ALLOWED_SIDEWAYS = {("connectors", "kernels")}
BENCH = {"bench.py", "_bench_cpu.py", "_bench_gpu.py", "_bench_parts.py"}
"""Of `kernels`, the program that measures them in whole connectors; no kernel imports it."""


def imports(source: str) -> set[str]:
    """Modules that a source imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def faults(room: str, source: str) -> list[str]:
    """What a room's source imports although it stands no lower."""
    found = []
    for module in imports(source):
        parts = module.split(".")
        if parts[0] == "vlmzoo" and len(parts) > 1 and parts[1] in LEVEL:
            other = parts[1]
            if other != room and LEVEL[other] >= LEVEL[room] and (room, other) not in ALLOWED_SIDEWAYS:
                found.append(f"{room} imports {module}")
        if room == "world" and parts[0] == "vlmzoo" and parts[1:2] not in ([], ["world"], ["__version__"]):
            found.append(f"world imports {module}")
        if room == "connectors" and module.startswith("transformers"):
            found.append(f"connectors import {module}")
    return found


def sources() -> list[tuple[str, Path]]:
    found = [(path.stem, path) for path in (ROOT / "vlmzoo").glob("*.py") if path.stem != "__init__"]
    for folder in (ROOT / "vlmzoo").iterdir():
        if folder.is_dir() and not folder.name.startswith("_"):
            for path in folder.resolve().rglob("*.py"):
                found.append(("bench" if folder.name == "kernels" and path.name in BENCH else folder.name, path))
    return found


def test_every_room_has_its_level():
    assert {room for room, _ in sources()} <= set(LEVEL)


@pytest.mark.parametrize(("room", "path"), [pytest.param(r, p, id=f"{r}-{p.name}") for r, p in sources()])
def test_imports_run_downward(room: str, path: Path):
    assert faults(room, path.read_text()) == []


def test_kernels_stand_alone():
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name in BENCH:
            continue
        for module in imports(path.read_text()):
            assert f"{module.removeprefix('vlmzoo.kernels.')}.py" not in BENCH
            top = module.split(".")[0]
            alone = {"torch", "triton", "xformers"} | sys.stdlib_module_names  # the last two only where they are there
            assert top in alone or module.startswith("vlmzoo.kernels"), module
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would shadow the package `kernels` of transformers"


def test_an_upward_import_is_caught():
    assert "connectors imports vlmzoo.model" in faults("connectors", "from vlmzoo.model import VisionLanguageModel")
    assert faults("data", "def f():\n    import vlmzoo.build") == ["data imports vlmzoo.build"]
    assert faults("connectors", "from vlmzoo.kernels.attention import latent_attention") == []
