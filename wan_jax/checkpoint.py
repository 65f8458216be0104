"""Parameters as a flat ``path -> array`` dictionary, and Orbax checkpoints that restore straight onto a mesh."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from wan_jax.errors import CheckpointError
from wan_jax.parallel import param_sharding


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
    if set(paths) != set(flat):
        raise CheckpointError(f"paths differ: missing {sorted(set(paths) - set(flat))}, extra {sorted(set(flat) - set(paths))}")
    return jax.tree.unflatten(jax.tree.structure(tree), [flat[path] for path in paths])


def abstract(make: Callable[[], Any]) -> Any:
    """Abstract evaluation of a constructor: shapes and dtypes, no memory."""
    return jax.eval_shape(make)
