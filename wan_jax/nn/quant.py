"""Weights in one byte each: half the memory of bfloat16, and on GPUs products that are rated at twice its speed.

A matrix is held as ``values * scale``, one row per output channel. `Kind` says what the values are:

* int8: whole numbers, a scale for each row. They are widened where they are multiplied, everywhere. The scale goes
  into the widened weight, not behind the product: so nothing stands between the product and the activation function
  that follows, and a GPU computes both in one kernel.
* fp8: floats of 4 exponent and 3 mantissa bits (e4m3), a scale for the matrix. On NVIDIA GPUs what they multiply is
  rounded to them too, by its own largest magnitude: XLA makes a product of 8-bit floats of exactly that form, on
  cards that have it (Ada, Hopper and later). Elsewhere they are widened as int8 is.

Only matrices of repeated blocks are held so, 98 % of a 14B transformer. What comes before and after the blocks is
little, and every error in it reaches all tokens of all steps: embeddings of patches, text and time, and the head.

Axes: ``I`` input, ``O`` output width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


class Kind(NamedTuple):
    """``largest``: magnitude that the values reach. ``axes`` of a matrix [O, I] that share a scale."""

    dtype: Any
    largest: float
    axes: tuple[int, ...]


KINDS = {"int8": Kind(jnp.int8, 127.0, (-1,)), "fp8": Kind(jnp.float8_e4m3fn, 448.0, (-2, -1))}
TILE = 16  # products of 8-bit floats take widths that are multiples of it


class Quantized(nnx.Module):
    """The kernel of a `Linear`.

    Attributes:
        values: [..., O, I].
        scale: [..., O or 1, 1], in the dtype that the network computes in.
    """

    def __init__(self, values: Any, scale: Any):
        self.values = nnx.Param(values)
        self.scale = nnx.Param(scale)

    @property
    def dtype(self) -> Any:
        """Of products."""
        return self.scale.dtype

    def product(self, x: Array, precision: jax.lax.Precision) -> Array:
        """[..., I] in `dtype` -> [..., O]."""
        values, scale = self.values[...], self.scale[...]
        if values.dtype != KINDS["fp8"].dtype:
            return _widened(x, values, scale, precision)
        return jax.lax.platform_dependent(
            x, values, scale,
            cuda=lambda *given: rounded_product(*given, precision),
            default=lambda *given: _widened(*given, precision),
        )  # fmt: skip


def _widened(x: Array, values: Array, scale: Array, precision: jax.lax.Precision) -> Array:
    weight_OI = values.astype(x.dtype) * scale
    return jax.lax.dot_general(x, weight_OI, (((x.ndim - 1,), (1,)), ((), ())), precision=precision)


def rounded_product(x: Array, values: Array, scale: Array, precision: jax.lax.Precision) -> Array:
    """The product with ``x`` rounded to 8-bit floats too."""
    kind = KINDS["fp8"]
    factor = jnp.maximum(jnp.abs(x).max() / kind.largest, jnp.finfo(x.dtype).tiny).astype(x.dtype)
    x = jnp.clip(x / factor, -kind.largest, kind.largest).astype(kind.dtype).astype(x.dtype) * factor
    return _widened(x, values, scale, precision)


def quantize(kernel: Array, kind: str) -> tuple[Array, Array]:
    """Values [..., O, I] and scale [..., O or 1, 1] of kernels [..., I, O].

    The scale is rounded to the kernel's dtype first, so that it is exact where the values are widened.
    """
    dtype, largest, axes = KINDS[kind]
    rows = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32)
    scale = jnp.abs(rows).max(axes, keepdims=True) / largest
    scale = jnp.where(scale > 0, scale, 1.0).astype(kernel.dtype)
    rows = jnp.clip(rows / scale.astype(jnp.float32), -largest, largest)
    return (jnp.round(rows) if dtype == jnp.int8 else rows).astype(dtype), scale


def is_quantizable(kernel: Any) -> bool:
    """Whether the kernel of a `Linear` is held in one byte: those of blocks, [layer, I, O], but for tiny ones."""
    return kernel.ndim == 3 and not any(width % TILE for width in kernel.shape[1:])
