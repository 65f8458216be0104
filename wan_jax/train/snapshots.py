"""Training states on disk: written while training goes on, whole or absent, and checked tensor by tensor when read."""

from __future__ import annotations

import errno
import logging
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.errors import CheckpointError, WanError

log = logging.getLogger(__name__)

SPARE = 1.1  # free space that a state asks for, in its own size


class Snapshots:
    """The states of one run, a folder each, named by the number of steps done.

    A state holds whatever is in its pytree, and a JSON-ready dictionary beside it; the latter is written last, so a
    folder without it is half-written and counts as absent.

    Args:
        keep: the last so many are kept.
    """

    def __init__(self, folder: str | Path, keep: int = 2):
        import orbax.checkpoint as ocp

        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Uncompressed: see `wan_jax.checkpoint.save_params`; and a flipped byte stays one wrong number of one tensor.
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(use_compression=False),
            "about": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Snapshots:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Steps whose states are whole."""
        found = sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())
        whole = [step for step in found if any((self.folder / str(step) / "about").glob("*"))]
        for step in set(found) - set(whole):
            log.warning("%s: half-written, ignored", self.folder / str(step))
        return whole

    def save(self, step: int, state: Any, about: dict[str, Any]) -> None:
        """Begin to write a state; its arrays may be donated as soon as this returns.

        Raises:
            WanError: the disk is full, now or while the state before was written.
        """
        import orbax.checkpoint as ocp

        flat = flatten_params(state)
        size = sum(x.size * x.dtype.itemsize for x in flat.values())
        free = shutil.disk_usage(self.folder).free
        if free < SPARE * size:
            raise self._full(f"step {step} takes {size / 1e9:.3f} GB, {free / 1e9:.3f} GB are free")
        sums = {path: int(x) for path, x in checksums(flat).items()}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(flat), about=ocp.args.JsonSave(about | {"checksums": sums})
        )
        self._guarded(lambda: self._manager.save(step, args=items, force=True))

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        self._guarded(self._manager.wait_until_finished)

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any, dict[str, Any]]:
        """The last whole state, or that of a step: its number, the pytree, and the dictionary beside it.

        Args:
            like: pytree of arrays or `jax.ShapeDtypeStruct`, with the shardings that the result is to have.
        Raises:
            CheckpointError: there is none; it holds other tensors, or other shapes; a tensor is damaged. Names them.
        """
        import orbax.checkpoint as ocp

        if step is None:
            if not (steps := self.steps()):
                raise CheckpointError(f"{self.folder}: no saved state to resume from")
            step = steps[-1]
        place = self.folder / str(step)
        targets = {
            path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
            for path, x in flatten_params(like).items()
        }
        try:
            about = self._manager.restore(step, args=ocp.args.Composite(about=ocp.args.JsonRestore()))["about"]
            self._compare(place, about["checksums"], targets)
            arguments = ocp.args.PyTreeRestore(
                targets, restore_args=ocp.checkpoint_utils.construct_restore_args(targets)
            )
            flat = self._manager.restore(step, args=ocp.args.Composite(state=arguments))["state"]
        except (ValueError, OSError, KeyError, TypeError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{place} cannot be read: {first}{self._advice(step)}") from error
        found, stored = checksums(flat), about.pop("checksums")
        wrong = sorted(path for path, value in found.items() if int(value) != stored[path])
        if wrong:
            raise CheckpointError(f"{place} is damaged in {', '.join(wrong)}{self._advice(step)}")
        return step, unflatten_like(like, flat), about

    def _advice(self, step: int) -> str:
        before = [other for other in self.steps() if other < step]
        return f": delete this folder to continue from step {before[-1]}" if before else ""

    @staticmethod
    def _compare(place: Path, stored: dict[str, int], targets: dict[str, Any]) -> None:
        missing, unknown = sorted(targets.keys() - stored.keys()), sorted(stored.keys() - targets.keys())
        if missing or unknown:
            lines = [f"{path}: missing" for path in missing] + [f"{path}: not in this run" for path in unknown]
            more = f"\n  ... and {len(lines) - 10} more" if len(lines) > 10 else ""
            raise CheckpointError(f"{place} belongs to another run:\n  " + "\n  ".join(lines[:10]) + more)

    def _guarded(self, write: Any) -> None:
        try:
            write()
        except Exception as error:  # Orbax passes on what its threads met: OSError, or ValueError with its text
            if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
                raise self._full("the disk is full") from error
            raise

    def _full(self, what: str) -> WanError:
        steps = self.steps()
        kept = f"the state of step {steps[-1]} is kept; --resume continues there" if steps else "no state is kept"
        return WanError(f"{self.folder}: {what}: make room; {kept}")


@jax.jit
def checksums(flat: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of every array a sum of its bits, each word times an odd number of its own: no single change leaves it alone."""

    def one(x: jax.Array) -> jax.Array:
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32).reshape(-1)
        return (words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1)).sum(dtype=jnp.uint32)

    return {path: one(x) for path, x in flat.items()}
