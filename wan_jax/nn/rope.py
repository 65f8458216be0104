"""Rotary position embedding over a 3-D grid. Source: ``rope_params`` / ``rope_apply`` in wan/modules/model.py."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Rope = tuple[Array, Array]  # cosines and sines, [L, head_dim // 2] each


def rope_table(
    grid: tuple[int, int, int], head_dim: int, *, times: Sequence[float] | None = None, theta: float = 10000.0
) -> Rope:
    """Cosines and sines of every token of a (frames, rows, columns) grid.

    The head is split in three parts, for time, height and width: height and width take ``2 * (head_dim // 6)``
    components each, time the rest; each part has its own ladder of frequencies, normalised by its own width.

    Args:
        times: position of each frame, default 0, 1, 2... Sound is a grid of one row and one column, whose position 0
            leaves the parts for height and width unrotated.
    Returns:
        Two float32 arrays [L, head_dim // 2], L = frames * rows * columns, frames slowest. Angles are computed in
        float64 on the host, one small table per axis, and broadcast in the program: the full table of a long
        clip never becomes a constant of the compiled code.
    """
    side = 2 * (head_dim // 6)
    widths = (head_dim - 2 * side, side, side)

    def table(function) -> Array:
        parts = []
        for axis, (length, width) in enumerate(zip(grid, widths, strict=True)):
            positions = np.arange(length) if axis or times is None else np.asarray(times, np.float64)
            angles = np.outer(positions, theta ** (-np.arange(0, width, 2) / width))
            shape = [1, 1, 1, width // 2]
            shape[axis] = length
            values = jnp.asarray(function(angles), jnp.float32).reshape(shape)
            parts.append(jnp.broadcast_to(values, (*grid, width // 2)))
        return jnp.concatenate(parts, axis=-1).reshape(-1, head_dim // 2)

    return table(np.cos), table(np.sin)


def rotate(x_BLNK: Array, rope: Rope) -> Array:
    """Rotate components (2j, 2j+1) of every head by the angle of its token; float32 in, float32 out."""
    cos, sin = (table[None, :, None, :] for table in rope)
    even, odd = x_BLNK[..., 0::2], x_BLNK[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x_BLNK.shape)
