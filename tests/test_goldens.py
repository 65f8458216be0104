"""Numbers of the official code on tiny checkpoints.

Files come from ``WAN_JAX_GOLDENS`` (folders joined by the path separator, searched recursively), else from
``tests/goldens``. A file is recognised by the first words of its name; each is one test.
"""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path

import pytest
from safetensors import safe_open

import tests.parity

pytestmark = pytest.mark.goldens

HERE = Path(__file__).parent
MODULES = sorted(p.stem for p in (HERE / "parity").glob("*.py") if p.stem not in ("__init__", "common"))
RUNNERS = {
    prefix: check
    for module in MODULES
    for prefix, check in importlib.import_module(f"{tests.parity.__name__}.{module}").RUNNERS.items()
}
# Goldens of networks that live in other parts of the tree, or that only serve other files.
FOLDERS = [Path(p) for p in os.environ.get("WAN_JAX_GOLDENS", str(HERE / "goldens")).split(os.pathsep) if p]
FILES = sorted(p for folder in FOLDERS for p in folder.rglob("*") if p.suffix in (".safetensors", ".json"))


def runner(path: Path):
    """The check with the longest matching prefix."""
    fits = [prefix for prefix in RUNNERS if path.name.startswith(prefix)]
    return RUNNERS[max(fits, key=len)] if fits else None


def test_files_exist():
    assert any(runner(p) for p in FILES), f"no golden file was recognised in {[str(f) for f in FOLDERS]}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_golden(path: Path):
    check = runner(path)
    if check is None:
        pytest.skip(f"unrecognised golden {path.name}: known first words {', '.join(sorted(RUNNERS))}")
    if path.suffix == ".json":
        check(json.loads(path.read_text(encoding="utf-8")), {})
        return
    with safe_open(path, "numpy") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        config = json.loads(file.metadata()["config"])
    check({**config, "path": str(path)}, tensors)
