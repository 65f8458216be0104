"""Compiled programs on disk: found by the next start; a bad folder costs one warning and no result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import jax, jax.numpy as jnp
from wan_jax.cache import keep_programs

print(keep_programs(*sys.argv[1:]))
for k in range(3):
    assert float(jax.jit(lambda x: (x * k).sum())(jnp.ones(8))) == 8 * k
"""


def run(*words: object, **variables: str) -> tuple[str, str]:
    """What the program prints, and what it warns of."""
    environment = {name: text for name, text in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    command = [sys.executable, "-c", PROGRAM, *map(str, words)]
    done = subprocess.run(command, env=environment | variables, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def entries(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*-cache")}


def test_programs_are_kept_and_damage_is_told_once(tmp_path):
    said, warned = run(WAN_JAX_HOME=str(tmp_path))
    made = entries(tmp_path)
    assert said.startswith(f"kept in {tmp_path}/xla/wan_jax-") and "-jax-" in said and len(made) >= 3 and not warned
    assert run(WAN_JAX_HOME=str(tmp_path)) == (said, "") and entries(tmp_path) == made
    moved = Path(shutil.copytree(said.removeprefix("kept in "), tmp_path / "moved"))
    assert run(moved)[0] == f"kept in {moved}" and len(entries(moved)) == len(made)
    for path in tmp_path.rglob("*-cache"):
        path.write_bytes(path.read_bytes()[:-20])
    _, warned = run(WAN_JAX_HOME=str(tmp_path))
    assert warned.count("damaged") == 1 and len(warned.strip().splitlines()) == 1


@pytest.mark.parametrize("variables", [{}, {"WAN_JAX_COMPILE_CACHE": "off"}])
def test_off(variables, tmp_path):
    words = [] if variables else ["off"]
    assert run(*words, WAN_JAX_HOME=str(tmp_path), **variables)[0] == "not kept" and not os.listdir(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    said, warned = run(tmp_path / "file" / "programs")
    assert "cannot be made" in said and warned.count("every start compiles") == 1 == len(warned.strip().splitlines())
