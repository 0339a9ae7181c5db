"""The wheel holds everything, and imports in an environment that has never seen this folder."""

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KINDS = ("conversation", "detailed_description", "complex_reasoning")
PROMPT_FILES = ("system.txt", "examples.yaml")

IMPORT_ALL = """
import importlib, json, pkgutil, sys, time
start = time.perf_counter()
import vlmzoo
loaded = "torch" in sys.modules
names = []
for module in pkgutil.walk_packages(vlmzoo.__path__, "vlmzoo."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
        names.append(module.name)
kernels = importlib.import_module("vlmzoo.kernels.attention")
print(json.dumps({"file": vlmzoo.__file__, "torch": loaded, "names": names, "kernels": kernels.__file__}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_wheel_holds_code_models_and_no_tests(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "vlmzoo/connectors/linear.py" in names
    assert "vlmzoo/kernels/attention.py" in names
    assert any(name.startswith("vlmzoo/world/models/") and name.endswith(".safetensors") for name in names)
    for folder, suffix in (("vlmzoo/data/published", ".yaml"), ("vlmzoo/inspection", ".html")):
        data = {f"{folder}/{path.name}" for path in (ROOT / folder).glob(f"*{suffix}")}
        assert data
        assert data <= set(names)
    assert {f"vlmzoo/instruct/prompts/{kind}/{file}" for kind in KINDS for file in PROMPT_FILES} <= set(names)
    assert "vlmzoo/instruct/report.html" in names
    assert not [name for name in names if name.startswith(("tests", "experiments", "connectors/", "kernels/"))]
    modules = {f"vlmzoo/{path.relative_to(ROOT / 'vlmzoo')}" for path in (ROOT / "vlmzoo").glob("*/**/*.py")}
    assert modules <= set(names), "a package is missing from pyproject's list"


def test_wheel_imports_in_an_empty_environment(wheel: Path, tmp_path: Path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True, capture_output=True)
    python = environment / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # What the wheel depends on is borrowed as a plain path: the .pth of an editable install there is not read.
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    ran = subprocess.run([str(python), "-c", IMPORT_ALL], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout.splitlines()[-1])
    assert Path(found["file"]).is_relative_to(environment)
    assert Path(found["kernels"]).is_relative_to(environment)
    assert not found["torch"], "import vlmzoo loads torch"
    assert "vlmzoo.connectors.linear" in found["names"]
