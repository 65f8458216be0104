"""A stack of equal blocks: one module whose parameters carry a leading layer axis, applied by `jax.lax.scan`.

The compiled program then holds one block whatever the depth: 40 layers trace, lower and compile as fast as two.

Kernels may lie in the memory of the host: then they come to the device layer by layer, and it holds those of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from wan_jax.parallel import whole


def init_stack(make: Callable[[nnx.Rngs], nnx.Module], num_layers: int, rngs: nnx.Rngs) -> nnx.Module:
    """Build ``num_layers`` blocks with ``make(rngs)`` and stack their parameters on a leading axis."""
    keys = jax.random.split(rngs.params(), num_layers)
    return jax.vmap(lambda key: make(nnx.Rngs(params=key)))(keys)


def apply_stack(
    stack: nnx.Module, x: Any, fn: Callable[..., tuple[Any, Any]], *, beside: Any = None, remat: bool = False
) -> tuple[Any, Any]:
    """Run ``x, out = fn(block, x)`` over the blocks; return the last ``x`` and the ``out`` of all, stacked.

    Inside the scan, parameters in the memory of the host are moved to the device, and shared ones gathered.

    Args:
        beside: arrays that belong to the blocks and are no parameters, with the same leading axis: a third argument.
        remat: recompute each block in the backward pass instead of keeping its activations.
    """

    def body(x, layer):
        block, *beside = layer
        return fn(whole(jax.tree.map(_on_device, block)), x, *beside)

    layers = (stack,) if beside is None else (stack, beside)
    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, layers)


def _on_device(x: jax.Array) -> jax.Array:
    host = jax.typeof(x).memory_space == jax.memory.Space.Host
    return jax.device_put(x, jax.memory.Space.Device) if host else x


def is_streamed(path: str) -> bool:
    """Whether a parameter lies in the memory of the host where a network streams: the kernels of its stacks."""
    return re.fullmatch(r"(.*\.)?(blocks|layers)\..*\.kernel(\.values)?", path) is not None


def in_host_memory(place: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """The same place, on the host's side of the devices: pinned memory, from which they copy by themselves."""
    return place.with_memory_kind("pinned_host")
