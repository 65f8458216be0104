"""Parameters as a flat ``path -> array`` dictionary, and Orbax checkpoints that restore straight onto a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from wan_jax.errors import CheckpointError
from wan_jax.parallel import param_sharding

# Arrays are stored in chunks of at most this many bytes, so that a shard reads little more than its own part.
CHUNK_BYTES = 64 << 20
# Arrays restored at once: one, or small ones of this many bytes together. Orbax holds each up to three times.
GROUP_BYTES = 256 << 20


def _name(key: Any) -> str:
    return str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key))))


def _path(keys: tuple[Any, ...]) -> str:
    """Dotted path of a leaf; the trailing ``value`` of `nnx.Param` is dropped. Every table uses this form."""
    names = [_name(key) for key in keys]
    return ".".join(names[:-1] if names[-1] == "value" else names)


def flatten_params(tree: Any) -> dict[str, Any]:
    """``{"blocks.self_attn.q.kernel": array, ...}`` of a module, concrete or abstract."""
    return {_path(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def unflatten_like(tree: Any, flat: Mapping[str, Any]) -> Any:
    """The module ``tree`` with its leaves taken from ``flat``, which must hold exactly its paths."""
    paths = list(flatten_params(tree))
    missing, extra = sorted(set(paths) - set(flat)), sorted(set(flat) - set(paths))
    if missing or extra:
        raise CheckpointError(f"paths differ: missing {missing}, extra {extra}")
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[path] for path in paths])


def abstract(make: Callable[[], Any]) -> Any:
    """Abstract evaluation of a constructor: shapes and dtypes, no memory."""
    return jax.eval_shape(make)


def save_params(path: str | Path, tree: Any) -> None:
    """Write the parameters of a module as one Orbax checkpoint; complete or absent, never half-written.

    Uncompressed: weights shrink by a fifth, and reading them back would take twice the processor time.
    """
    import orbax.checkpoint as ocp

    flat = flatten_params(tree)
    chunks = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in flat}
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, save_concurrent_gb=_limit_gb(flat.values()))
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=ocp.args.PyTreeSave(flat, save_args=chunks), force=True)


def restore_params(path: str | Path, tree: Any, *, network: str, mesh: jax.sharding.Mesh | None = None) -> Any:
    """Restore a module; every array goes from disk to its shards, cast to the dtype of the abstract ``tree``.

    Args:
        tree: abstract evaluation of the module.
        network: key of `wan_jax.parallel.RULES`.
    Raises:
        CheckpointError: the checkpoint is damaged or holds other paths or shapes.
    """
    import orbax.checkpoint as ocp

    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    path, targets = Path(path).absolute(), {}
    for name, leaf in flatten_params(tree).items():
        sharding = single if mesh is None else param_sharding(network, name, leaf.shape, mesh)
        targets[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    try:
        with ocp.PyTreeCheckpointer() as checkpointer:
            stored = checkpointer.metadata(path).item_metadata.tree
        _compare(path, {name: tuple(meta.shape) for name, meta in stored.items()}, targets)
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=_limit_gb(stored.values()))
        restored: dict[str, jax.Array] = {}
        with ocp.Checkpointer(handler) as checkpointer:
            for group in _groups(targets):
                arguments = ocp.args.PyTreeRestore(
                    group, restore_args=ocp.checkpoint_utils.construct_restore_args(group), partial_restore=True
                )
                restored |= jax.block_until_ready(checkpointer.restore(path, args=arguments))
        return unflatten_like(tree, restored)
    except CheckpointError:
        raise
    except (ValueError, OSError, KeyError) as error:
        raise CheckpointError(f"{path}: cannot be restored: {str(error).splitlines()[0]}") from error


def _limit_gb(arrays: Iterable[Any]) -> int:
    """What Orbax may hold in flight: it refuses an array that does not lie below the limit."""
    return 1 + max(math.prod(array.shape) * array.dtype.itemsize for array in arrays) // 10**9


def _groups(targets: Mapping[str, jax.ShapeDtypeStruct]) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """Split what is to be restored, largest first: the copies in flight are large while little is placed yet."""
    group, total = {}, 0
    for name, leaf in sorted(targets.items(), key=lambda item: -item[1].size * item[1].dtype.itemsize):
        size = leaf.size * leaf.dtype.itemsize
        if group and total + size > GROUP_BYTES:
            yield group
            group, total = {}, 0
        group[name] = leaf
        total += size
    if group:
        yield group


def _compare(path: Path, stored: Mapping[str, tuple[int, ...]], targets: Mapping[str, Any]) -> None:
    faults = [f"{name}: missing" for name in targets.keys() - stored.keys()]
    faults += [f"{name}: unknown to the model" for name in stored.keys() - targets.keys()]
    faults += [
        f"{name}: shape {stored[name]}, the model has {tuple(targets[name].shape)}"
        for name in targets.keys() & stored.keys()
        if stored[name] != tuple(targets[name].shape)
    ]
    if faults:
        raise CheckpointError(f"{path} does not fit the model:\n  " + "\n  ".join(sorted(faults)))
