"""Rotary position embedding over a 3-D grid. Source: ``rope_params`` / ``rope_apply`` in wan/modules/model.py."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.nn.kernels import platform_and_kind
from wan_jax.nn.layers import matmul_precision

Array = jax.Array
Rope = tuple[Array, Array]  # what the components of a token and their neighbours are multiplied by, [L, head_dim] each


def rope_table(
    grid: tuple[int, int, int], head_dim: int, *, times: Sequence[float] | None = None, theta: float = 10000.0
) -> Rope:
    """Cosines and signed sines of every token of a (frames, rows, columns) grid, for `rotate`.

    The head is split in three parts, for time, height and width: height and width take ``2 * (head_dim // 6)``
    components each, time the rest; each part has its own ladder of frequencies, normalised by its own width.

    Args:
        times: position of each frame, default 0, 1, 2... Sound is a grid of one row and one column, whose position 0
            leaves the parts for height and width unrotated.
    Returns:
        Two float32 arrays [L, head_dim], L = frames * rows * columns, frames slowest; components 2j and 2j+1 share a
        cosine, and have minus and plus a sine. Angles are computed in float64 on the host, one small table per axis,
        and broadcast in the program: the full table of a long clip never becomes a constant of the compiled code.
    """
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)

    def table(function, signs: tuple[int, int]) -> Array:
        parts = []
        for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
            positions = np.arange(length) if axis or times is None else np.asarray(times, np.float64)
            angles = np.outer(positions, theta ** (-np.arange(0, width, 2) / width))
            shape = [1, 1, 1, width]
            shape[axis] = length
            values = jnp.asarray(function(angles)[..., None] * signs, jnp.float32).reshape(shape)
            parts.append(jnp.broadcast_to(values, (*grid, width)))
        return jnp.concatenate(parts, axis=-1).reshape(-1, head_dim)

    return table(np.cos, (1, 1)), table(np.sin, (-1, 1))


def rotate(x_BLNK: Array, rope: Rope) -> Array:
    """Rotate components (2j, 2j+1) of every head by the angle of its token, in float32; float32 out."""
    cos, sin = (table[None, :, None, :] for table in rope)
    return x_BLNK.astype(jnp.float32) * cos + _neighbours(x_BLNK).astype(jnp.float32) * sin


def _neighbours(x_BLNK: Array) -> Array:
    """Components 2j and 2j+1 in each other's place.

    On a TPU a product with a permutation, exact: its vector unit has no cheap access to every other lane.
    """
    K = x_BLNK.shape[-1]
    if platform_and_kind()[0] == "tpu":
        exchange = np.eye(K)[np.arange(K) ^ 1]
        return jnp.dot(x_BLNK, jnp.asarray(exchange, x_BLNK.dtype), precision=matmul_precision(x_BLNK.dtype))
    return x_BLNK.reshape(*x_BLNK.shape[:-1], K // 2, 2)[..., ::-1].reshape(x_BLNK.shape)
