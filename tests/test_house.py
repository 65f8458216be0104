"""The house: who may import whom, no copied function, a light import, a README that tells the truth, nothing private."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "wan_jax").rglob("*.py"))

# Layer -> what it may import of the package. A layer is a module or a folder under wan_jax; the longest name counts.
# Everything may import ``errors``, and itself.
MAY_IMPORT = {
    "errors": "",
    "config": "",
    "parallel": "config",
    "nn": "config parallel",
    "models": "config parallel nn",
    "checkpoint": "config parallel nn",
    "ffmpeg": "",
    "media": "config ffmpeg",
    "text": "config",
    "weights": "config parallel models checkpoint",
    "sampling": "config parallel nn.stack",  # given a velocity function; of nn only the compiler's options
    "sampling.resume": "sampling weights.readers weights.writers",  # the saved state is a safetensors file
    "request": "config sampling",
    "model": "config parallel models checkpoint text weights",
    "conditions": "config parallel nn models media sampling",
    "pipeline": "config parallel nn models model media request conditions sampling",
    "weights.convert": "config checkpoint model weights",  # whole models from layout to layout: above ``model``
    "cli": "config parallel media request model pipeline weights weights.convert",
}
FOREIGN = {"torch", "transformers", "diffusers", "tensorflow", "convert", "configs", "benchmarks", "tests"}
HEAVY = "torch transformers diffusers tensorflow gradio librosa orbax optax imageio PIL".split()
IMPORT_SECONDS = 1.5
MAX_MEGABYTES = 30
MIN_LINES = 8

PRIVATE = {
    "path of one machine": r"(?<![\w.:/-])/(?:work|root|home/\w+|Users/\w+|tmp/\w+)/",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}",
    "GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{40,})",
    "AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "Google key": r"\bAIza[\w-]{35}",
    "API key": r"\bsk-[\w-]{32,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY",
}


def module_name(path: Path) -> str:
    """``wan_jax/models/dit.py`` -> ``models.dit``; the package itself is empty."""
    parts = path.relative_to(ROOT / "wan_jax").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports, inside functions too; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node)


def layer(name: str) -> str:
    fits = [key for key in MAY_IMPORT if f"{name}.".startswith(f"{key}.")]
    return max(fits, key=len, default="")


def forbidden_import(importer: str, imported: str) -> bool:
    """Whether module ``importer`` of the package may not import ``imported``, both without ``wan_jax.``."""
    ours, theirs = layer(importer), layer(imported)
    if not theirs:  # the package itself, for its version
        return imported != "__version__"
    allowed = MAY_IMPORT[ours].split()
    return theirs not in ("errors", ours, *allowed) and not any(f"{imported}.".startswith(f"{a}.") for a in allowed)


def test_import_directions():
    faults = []
    for path in SOURCES:
        importer = module_name(path)
        if importer and not layer(importer):
            faults.append(f"{path.name}: a new module; give it a row in MAY_IMPORT")
        for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            first, _, rest = name.partition(".")
            if not first or first in FOREIGN:
                faults.append(f"{importer or 'wan_jax'} imports {name}: never inside wan_jax")
            elif first == "wan_jax" and importer and forbidden_import(importer, rest or "."):
                if rest != "__init__" and rest:
                    faults.append(f"{importer} imports {rest}; {layer(importer)} may import: {MAY_IMPORT[layer(importer)]}")
    assert not faults, "\n".join(faults)
