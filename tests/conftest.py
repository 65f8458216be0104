"""Eight virtual CPU devices for the sharding tests, set before JAX starts; tiny checkpoints for everyone."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """kind -> folder of a tiny random checkpoint in the official layout, written on first use. Not to be changed."""
    from wan_jax.weights.convert import random_folder, tiny_spec

    root = tmp_path_factory.mktemp("tiny")

    def get(kind: str) -> Path:
        if not (root / kind).exists():
            random_folder(tiny_spec(kind), root / kind, say=lambda text: None)
        return root / kind

    return get
