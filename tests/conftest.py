"""Before JAX starts: eight virtual CPU devices for the sharding tests, and a folder in which programs that one worker
or subprocess has compiled are found by the others. Tiny checkpoints for everyone.
"""

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="wan_jax-programs-", ignore_cleanup_errors=True)  # until the end
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """In a folder of its own, without a network; `main` sets the level of the root logger, which is given back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    level = logging.getLogger().level
    yield
    logging.getLogger().setLevel(level)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> folder of a tiny random checkpoint in the official layout, written on first use. Not to be changed."""
    from wan_jax.conversion import random_folder, tiny_spec

    root = tmp_path_factory.mktemp("tiny")

    def get(kind: str) -> Path:
        if not (root / kind).exists():
            random_folder(tiny_spec(kind), root / kind, say=lambda text: None)
        return root / kind

    return get
