"""Bicubic resize, equal to ``torch.nn.functional.interpolate(mode="bicubic")`` without its optional flags.

`jax.image.resize` uses another cubic (a = -0.5) and widens it when shrinking; Wan was trained on this one.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

_A = np.float32(-0.75)  # steepness of the cubic in PyTorch and OpenCV


def bicubic_resize(x_HWC: Array, size: tuple[int, int]) -> Array:
    """Resize the axes -3 and -2 with half-pixel centres and clamped edges; values may overshoot their range.

    Args:
        x_HWC: [..., H, W, C], any real dtype.
        size: static (height, width) in pixels.
    Returns:
        [..., height, width, C] float32.
    """
    height, width = size
    return _resize_axis(_resize_axis(jnp.asarray(x_HWC, jnp.float32), -2, width), -3, height)


def _resize_axis(x: Array, axis: int, size: int) -> Array:
    """Weighted sum of four gathered neighbours: cheaper than a dense matrix, and float32 on every backend."""
    source, weight = _taps(x.shape[axis], size)
    weight = weight.reshape(4, size, *[1] * (-1 - axis))
    return sum(jnp.take(x, source[tap], axis=axis) * weight[tap] for tap in range(4))


def _taps(size_in: int, size_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Source index and weight of the four neighbours of each output position, [4, size_out] each.

    The scale is float32 and the position rounded once, as PyTorch's fused multiply-add does: on large images
    this rounding decides the fourth digit of the result.
    """
    scale = np.float64(np.float32(size_in / size_out))
    position = (scale * (np.arange(size_out) + 0.5) - 0.5).astype(np.float32)
    first = np.floor(position)
    t = position - first
    distance = np.stack([t + 1, t, 1 - t, 2 - t])
    near = ((_A + 2) * distance - (_A + 3)) * distance * distance + 1
    far = ((_A * distance - 5 * _A) * distance + 8 * _A) * distance - 4 * _A
    weight = np.stack([far[0], near[1], near[2], far[3]])
    source = first.astype(np.int32) + np.arange(-1, 3, dtype=np.int32)[:, None]
    return source.clip(0, size_in - 1), weight
