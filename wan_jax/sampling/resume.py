"""The sampler's state on disk: an interrupted run continues where it stopped, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from wan_jax.errors import CheckpointError
from wan_jax.sampling.solvers import State
from wan_jax.weights.readers import open_checkpoint
from wan_jax.weights.writers import write_safetensors


def save_states(path: Path, key: str, runs: Sequence[tuple[int, State]]) -> None:
    """Write steps done and solver state of every clip, atomically. ``key`` is the hash of the settings."""
    tensors = {f"{i}.{name}": np.asarray(x) for i, (_, state) in enumerate(runs) for name, x in state._asdict().items()}
    write_safetensors(path, tensors, metadata={"key": key, "done": json.dumps([done for done, _ in runs])})


def load_states(path: Path, key: str) -> list[tuple[int, State]]:
    """Read what `save_states` wrote.

    Raises:
        CheckpointError: the file belongs to other settings, or is damaged.
    """
    with open_checkpoint(path) as file:
        if file.metadata.get("key") != key:
            raise CheckpointError(f"{path}: saved by a run with other settings; delete it, or repeat that run's settings")
        done = json.loads(file.metadata["done"])
        return [
            (steps, State(*(jnp.array(file[f"{i}.{name}"].numpy()) for name in State._fields)))
            for i, steps in enumerate(done)
        ]
