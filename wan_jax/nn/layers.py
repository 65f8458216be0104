"""The shared layers. Declared as `flax.nnx` modules, run as plain pytrees.

Axes: ``B`` batch, ``L`` tokens, ``D`` width, ``F`` MLP width, ``T H W C`` frames, rows, columns, channels.
A `Linear` computes in the dtype of its own kernel; norms compute and return float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.nn.kernels import platform_and_kind
from wan_jax.nn.quant import Quantized, is_quantizable, quantize

Array = jax.Array


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], dtype=jnp.float32, *, std: float = 0.0, fill: float = 0.0
) -> nnx.Param:
    """A parameter drawn from N(fill, std^2); constant when ``std`` is 0."""
    if std == 0.0:
        return nnx.Param(jnp.full(shape, fill, dtype))
    return nnx.Param((fill + std * jax.random.normal(rngs.params(), shape)).astype(dtype))


def matmul_precision(dtype) -> jax.lax.Precision:
    """Full float32 products in float32 mode (TPU and GPU would round to bf16 or TF32), the fast path otherwise."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """``y = x @ kernel + bias`` with kernel [in, out], or `Quantized`; input and output in the kernel's dtype."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool = True, dtype=jnp.float32, rngs: nnx.Rngs):
        self.kernel = param(rngs, (d_in, d_out), dtype, std=d_in**-0.5)
        self.bias = param(rngs, (d_out,), dtype) if bias else None

    def __call__(self, x: Array) -> Array:
        y = dot(x, self.kernel)
        return y if self.bias is None else y + self.bias[...]

    def heads(self, x: Array, num_heads: int) -> Array:
        """``self(x)`` in heads, [..., N, K].

        With the kernel in heads the compiler of TPUs writes the product head by head; a split behind it is a copy. That
        of GPUs would no longer add the bias inside the product.
        """
        if isinstance(self.kernel, Quantized) or platform_and_kind()[0] == "cuda":
            y = self(x)
            return y.reshape(*y.shape[:-1], num_heads, -1)
        kernel = self.kernel[...]
        kernel = kernel.reshape(len(kernel), num_heads, -1)
        y = jnp.tensordot(x.astype(kernel.dtype), kernel, 1, precision=matmul_precision(kernel.dtype))
        return y if self.bias is None else y + self.bias[...].reshape(num_heads, -1)

    def from_heads(self, x: Array) -> Array:
        """``self`` of heads [..., N, K] side by side."""
        if isinstance(self.kernel, Quantized) or platform_and_kind()[0] == "cuda":
            return self(x.reshape(*x.shape[:-2], -1))
        kernel = self.kernel[...].reshape(*x.shape[-2:], -1)
        y = jnp.tensordot(x.astype(kernel.dtype), kernel, 2, precision=matmul_precision(kernel.dtype))
        return y if self.bias is None else y + self.bias[...]


def dot(x: Array, kernel: nnx.Param | Quantized) -> Array:
    """``x @ kernel`` in the kernel's dtype."""
    x, precision = x.astype(kernel.dtype), matmul_precision(kernel.dtype)
    if isinstance(kernel, Quantized):
        return kernel.product(x, precision)
    return jnp.dot(x, kernel[...], precision=precision)


def quantized(network: Any, kind: str) -> Any:
    """A network, by shape, with the kernels of its blocks as `Quantized` of ``kind``."""

    def convert(module: Any) -> Any:
        if not (isinstance(module, Linear) and is_quantizable(module.kernel)):
            return module
        module = jax.tree.map(lambda x: x, module)  # a copy
        module.kernel = Quantized(*jax.eval_shape(lambda kernel: quantize(kernel, kind), module.kernel.get_value()))
        return module

    return jax.tree.map(convert, network, is_leaf=lambda module: isinstance(module, Linear))


class MLP(nnx.Module):
    """``fc2(act(fc1(x)))``."""

    def __init__(self, d_in: int, d_hidden: int, d_out: int, *, act: Callable, dtype=jnp.float32, rngs: nnx.Rngs):
        self.fc1 = Linear(d_in, d_hidden, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(d_hidden, d_out, dtype=dtype, rngs=rngs)
        self.act = act

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.act(self.fc1(x)))


def gelu_tanh(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=True)


def gelu_erf(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


def layer_norm(x: Array, eps: float) -> Array:
    """LayerNorm over the last axis without parameters, in float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


class LayerNorm(nnx.Module):
    """LayerNorm with weight and bias, in float32."""

    def __init__(self, dim: int, *, eps: float, rngs: nnx.Rngs):
        self.weight = param(rngs, (dim,), fill=1.0)
        self.bias = param(rngs, (dim,))
        self.eps = eps

    def __call__(self, x: Array) -> Array:
        return layer_norm(x, self.eps) * self.weight[...] + self.bias[...]


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last axis, or the last ones together, in float32."""

    def __init__(self, dim: int, *, eps: float, rngs: nnx.Rngs):
        self.weight = param(rngs, (dim,), fill=1.0)
        self.eps = eps

    def __call__(self, x: Array, num_axes: int = 1) -> Array:
        x = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.square(x).mean(tuple(range(-num_axes, 0)), keepdims=True) + self.eps)
        return x * scale * self.weight[...].reshape(x.shape[-num_axes:])


def timestep_embedding(t: Array, dim: int) -> Array:
    """Sinusoid of the timestep, cosines first: ``[cos(t w_i), sin(t w_i)]`` with ``w_i = 10000^(-i / (dim/2))``.

    Args:
        t: [...] float32 in [0, 1000], any fraction.
    Returns:
        [..., dim] float32, within 1e-6 of the float64 formula that the official code evaluates. A float32 product
        ``t * w`` alone would be off by up to 6e-5; here the angle is kept in turns, its integer part is
        cut off exactly by the wrap-around of 32-bit integers.
    Source: ``sinusoidal_embedding_1d`` in wan/modules/model.py.
    """
    turns = 10000.0 ** (-np.arange(dim // 2) / (dim // 2)) / (2 * np.pi)
    fixed = np.round(turns * 2**32)
    rest = jnp.asarray(turns - fixed / 2**32, jnp.float32)
    whole = jnp.floor(t)[..., None]
    wrapped = whole.astype(jnp.uint32) * jnp.asarray(fixed.astype(np.uint32))
    signed = jax.lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32) * 2.0**-32
    angle = 2 * np.pi * (signed + whole * rest + (t[..., None] - whole) * jnp.asarray(turns, jnp.float32))
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def patchify(x_BTHWC: Array, patch: tuple[int, int, int]) -> tuple[Array, tuple[int, int, int]]:
    """Cut into patches: [B, L, pt*ph*pw*C] (channels fastest) and the grid of tokens."""
    B, T, H, W, C = x_BTHWC.shape
    pt, ph, pw = patch
    grid = (T // pt, H // ph, W // pw)
    x = x_BTHWC.reshape(B, grid[0], pt, grid[1], ph, grid[2], pw, C)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(B, grid[0] * grid[1] * grid[2], pt * ph * pw * C), grid


def unpatchify(x_BLC: Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> Array:
    """Inverse of `patchify`."""
    B = x_BLC.shape[0]
    (t, h, w), (pt, ph, pw) = grid, patch
    x = x_BLC.reshape(B, t, h, w, pt, ph, pw, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return x.reshape(B, t * pt, h * ph, w * pw, -1)
