"""A stack of equal blocks: one module whose parameters carry a leading layer axis, applied by `jax.lax.scan`.

The compiled program then holds one block whatever the depth: 40 layers trace, lower and compile as fast as two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


def init_stack(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Build ``num_layers`` blocks with ``make(rngs)`` and stack their parameters on a leading axis."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def apply_stack(
    stack: nnx.Module, x: Any, fn: Callable[[nnx.Module, Any], tuple[Any, Any]], *, remat: bool = False
) -> tuple[Any, Any]:
    """Run ``x, out = fn(block, x)`` over the blocks; return the last ``x`` and the ``out`` of all, stacked.

    Args:
        remat: recompute each block in the backward pass instead of keeping its activations.
    """

    def body(x, block):
        return fn(block, x)

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, stack)
