"""Notebooks run from top to bottom, only use the package, and are committed without outputs."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MAX_CODE_LINES = 80

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_of(path: Path) -> str:
    notebook = nbformat.read(path, as_version=4)
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")


def faults(code: str) -> list[str]:
    """What in the code of a notebook is against the rules."""
    lines = [line for line in code.splitlines() if line.strip() and not line.strip().startswith("#")]
    found = [] if len(lines) <= MAX_CODE_LINES else [f"{len(lines)} lines of code, the limit is {MAX_CODE_LINES}"]
    for node in ast.walk(ast.parse(TransformerManager().transform_cell(code))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.append(f"defines {node.name}: a notebook shows the package, code belongs into it")
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [part for alias in node.names for part in f"{getattr(node, 'module', '')}.{alias.name}".split(".")]
        found += [f"uses the private name {name}" for name in names if name.startswith("_") and name != "__version__"]
    return found


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_faults_are_found():
    assert not faults("%pip install x\nif True:\n    !ls {y}\nimport a\na.b(lambda x: x)")
    assert faults("def f(): pass") and faults("class A: pass") and faults("a._b") and faults("from a import _b")
    assert faults("x = 1\n" * (MAX_CODE_LINES + 1))


@notebooks
def test_rules(path):
    assert not faults(code_of(path))
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells), "clear the outputs"
    assert "%pip install" in cells[0].source


@notebooks
def test_runs(path, tmp_path, monkeypatch):
    """In a folder of its own; it prints shapes and memory, and ends with a clip."""
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))  # for !wan-jax
    shutil.copy(path, tmp_path)
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.get("text", "") for output in outputs)
    shape = {"text_to_video": "(9, 48, 64, 3)", "photo_and_voice": "(17, 96, 96, 3)"}[path.stem]
    assert shape in printed and "memory" in printed
    assert "<video" in outputs[-1]["data"]["text/html"]
