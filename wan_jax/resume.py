"""The sampler's state on disk: a run that did not reach its end continues where it stopped, bit for bit."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.errors import CheckpointError, NonFiniteError, WanError
from wan_jax.sampling.solvers import State
from wan_jax.weights.readers import open_checkpoint
from wan_jax.weights.writers import write_safetensors

log = logging.getLogger(__name__)

SAVE_SECONDS = 60  # between two writes while all goes well: what a kill or a power cut can cost


class Resume:
    """States of the clips of one run. As a context it reads the file of an earlier run with the same settings, writes
    it now and then, and on leaving deletes it after success, or writes it after Ctrl-C or an error.

    Args:
        path: the file; None keeps nothing.
        settings: of every clip, JSON-ready; a file made with others is refused.
    Attributes:
        states: index of the clip -> (steps done, solver state).
    """

    def __init__(self, path: str | Path | None, settings: Sequence[dict[str, Any]]):
        self.path = None if path is None else Path(path)
        self.settings = list(settings)
        self.states: dict[int, tuple[int, State]] = {}
        self._saved = time.monotonic()

    def update(self, i: int, steps: int, state: State) -> None:
        """Note how far clip ``i`` has come."""
        self.states[i] = steps, state
        if self.path and time.monotonic() - self._saved > SAVE_SECONDS:
            self._save(self.path)

    def __enter__(self) -> Resume:
        """
        Raises:
            CheckpointError: the file belongs to other settings, which are named, or is damaged.
        """
        if self.path and self.path.exists():
            self.states = self._read(self.path)
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.path is None:
            return
        if error is None or isinstance(error, NonFiniteError):
            self.path.unlink(missing_ok=True)
            return
        if self._save(self.path):
            log.warning("state saved in %s: repeat with the same settings to continue", self.path)

    def _save(self, path: Path) -> bool:
        """Write what there is to write; a failure is only logged: it must not stop a run, nor hide what stopped it."""
        self._saved = time.monotonic()
        # An interruption in mid-step leaves a state whose buffers were given to the program.
        kept = {i: run for i, run in self.states.items() if not any(x.is_deleted() for x in jax.tree.leaves(run[1]))}
        try:
            if kept:
                self._write(path, kept)
        except (OSError, WanError) as fault:
            log.warning("the state of the sampler could not be saved: %s", fault)
            return False
        return bool(kept)

    def _write(self, path: Path, states: dict[int, tuple[int, State]]) -> None:
        tensors = {
            f"{i}.{name}": np.asarray(x)
            for i, (_, s) in states.items()
            for name, x in _flatten(s._asdict()).items()
            if x is not None
        }
        done = {i: steps for i, (steps, _) in states.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, tensors, metadata={"settings": json.dumps(self.settings), "done": json.dumps(done)})

    def _read(self, path: Path) -> dict[int, tuple[int, State]]:
        try:
            with open_checkpoint(path) as file:
                self._compare(path, json.loads(file.metadata["settings"]))
                arrays = _unflatten({name: jnp.array(file[name].numpy()) for name in file})
                return {
                    int(i): (steps, State(**arrays[i])) for i, steps in json.loads(file.metadata["done"]).items()
                }
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path}: not the saved state of a run ({error}): delete it to start anew") from error

    def _compare(self, path: Path, theirs: list[dict[str, Any]]) -> None:
        ours = json.loads(json.dumps(self.settings))
        if ours == theirs:
            return
        pairs = list(zip(ours, theirs, strict=False))
        names = {name for a, b in pairs for name in a.keys() | b.keys() if a.get(name) != b.get(name)}
        what = ", ".join(sorted(names)) or "number of clips"
        raise CheckpointError(
            f"{path} is the saved state of a run with other settings ({what}): repeat those to continue it, delete it,"
            " or choose another output"
        )


def _flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries to one, names joined by dots."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    parts = (_flatten(value, f"{prefix}.{name}" if prefix else name) for name, value in tree.items())
    return {name: value for part in parts for name, value in part.items()}


def _unflatten(flat: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *folders, leaf = name.split(".")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        place[leaf] = value
    return tree
