"""Convolutions, channels last, float32 but for `Conv1d`, which has the dtype of its kernel.

Axes: ``B`` batch, ``T`` frames, ``H W`` rows and columns, ``C`` channels; ``...`` any leading axes.
Kernels are stored [frames, in, out], [rows, columns, in, out] and [frames, rows, columns, in, out]. Padding is zeros.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.nn.layers import matmul_precision, param

Array = jax.Array


def conv2d(x: Array, kernel: Array, stride: int = 1, padding: tuple[int, int] = (0, 0)) -> Array:
    """Convolve every image of x [..., H, W, C]; ``padding`` goes before and after both axes of the picture."""
    if kernel.shape[:2] == (1, 1) and stride == 1:
        return jnp.dot(x, kernel[0, 0], precision=matmul_precision(kernel.dtype))
    images = x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])  # no -1: there may be no frame at all
    y = jax.lax.conv_general_dilated(
        images, kernel, (stride, stride), (padding, padding), dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=matmul_precision(kernel.dtype),
    )  # fmt: skip
    return y.reshape(*x.shape[:-3], *y.shape[1:])


def conv3d(x_BTHWC: Array, kernel: Array, stride: int = 1) -> Array:
    """Convolve video: no padding and ``stride`` in time, padding to the same size in the picture.

    Fewer frames than the kernel has give none. On CPU the convolution is a sum of 2-D ones, one for each frame of the
    kernel: XLA's 3-D convolution takes 1.3 to 1.8 times as long there at Wan's shapes, twice in the gradient, and six
    times for three output channels.
    """
    if kernel.shape[:3] == (1, 1, 1) and stride == 1:
        return conv2d(x_BTHWC, kernel[0])
    return jax.lax.platform_dependent(
        x_BTHWC,
        kernel,
        cpu=functools.partial(_sum_of_2d, stride=stride),
        default=functools.partial(_native, stride=stride),
    )


def _sum_of_2d(x: Array, kernel: Array, stride: int) -> Array:
    size, pad = kernel.shape[0], kernel.shape[1] // 2
    frames = max(0, (x.shape[1] - size) // stride + 1)
    taken = [x[:, i:][:, ::stride][:, :frames] for i in range(size)]  # for every output the frame under the i-th tap
    return sum(conv2d(taken[i], kernel[i], padding=(pad, pad)) for i in range(size))


def _native(x: Array, kernel: Array, stride: int) -> Array:
    pads = [(0, 0)] + [(size // 2, size // 2) for size in kernel.shape[1:3]]
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, 1, 1), pads, dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
        precision=matmul_precision(kernel.dtype),
    )  # fmt: skip


def conv1d(x_BTC: Array, kernel: Array, *, dilation: int = 1) -> Array:
    """Convolve a sequence with kernel [size, in, out], odd size, zero padding to the same length.

    On CPU it is a sum of products, one for each tap: XLA runs the gradient of a dilated convolution as plain loops.
    """
    return jax.lax.platform_dependent(
        x_BTC.astype(kernel.dtype),
        kernel,
        cpu=functools.partial(_sum_of_products, dilation=dilation),
        default=functools.partial(_native_1d, dilation=dilation),
    )


def _native_1d(x: Array, kernel: Array, dilation: int) -> Array:
    pad = (kernel.shape[0] - 1) * dilation // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (1,), ((pad, pad),), rhs_dilation=(dilation,),
        dimension_numbers=("NWC", "WIO", "NWC"), precision=matmul_precision(kernel.dtype),
    )  # fmt: skip


def _sum_of_products(x: Array, kernel: Array, dilation: int) -> Array:
    pad, length = (kernel.shape[0] - 1) * dilation // 2, x.shape[1]
    x = jnp.pad(x, [(0, 0), (pad, pad), (0, 0)])
    taps = (x[:, i * dilation :][:, :length] for i in range(kernel.shape[0]))
    return sum(jnp.dot(tap, k, precision=matmul_precision(kernel.dtype)) for tap, k in zip(taps, kernel, strict=True))


def conv_transpose1d(x_BTC: Array, kernel: Array, stride: int) -> Array:
    """Sum of kernels, one for each frame of the input and ``stride`` apart: ``stride * T`` frames.

    What overhangs is cut, half at each end; if the kernel and the stride differ by an odd number, one frame stays over.
    """
    (B, T, _), (size, _, dim) = x_BTC.shape, kernel.shape
    parts = -(-size // stride)  # kernels that overlap in one place
    kernel = jnp.pad(kernel, [(0, parts * stride - size), (0, 0), (0, 0)])
    pieces = jnp.einsum("BTI,KIO->BTKO", x_BTC, kernel, precision=matmul_precision(kernel.dtype))
    pieces = pieces.reshape(B, T, parts, stride, dim)
    y = sum(jnp.pad(pieces[:, :, i], [(0, 0), (i, parts - 1 - i), (0, 0), (0, 0)]) for i in range(parts))
    y = y.reshape(B, -1, dim)
    start = (size - stride) // 2
    return y[:, start : start + stride * T + (size - stride) % 2]


class Conv1d(nnx.Module):
    """Convolution of [B, T, C] to the same length, in the dtype of its kernel."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int = 3,
        *,
        dilation: int = 1,
        bias: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.kernel = param(rngs, (size, c_in, c_out), dtype, std=(size * c_in) ** -0.5)
        self.bias = param(rngs, (c_out,), dtype) if bias else None
        self.dilation = dilation

    def __call__(self, x_BTC: Array) -> Array:
        y = conv1d(x_BTC, self.kernel[...], dilation=self.dilation)
        return y if self.bias is None else y + self.bias[...]


class ConvTranspose1d(nnx.Module):
    """Upsampling of [B, T, C], see `conv_transpose1d`."""

    def __init__(self, c_in: int, c_out: int, size: int, *, stride: int, rngs: nnx.Rngs):
        self.kernel = param(rngs, (size, c_in, c_out), std=(size * c_in / stride) ** -0.5)
        self.bias = param(rngs, (c_out,))
        self.stride = stride

    def __call__(self, x_BTC: Array) -> Array:
        return conv_transpose1d(x_BTC, self.kernel[...], self.stride) + self.bias[...]


class Conv2d(nnx.Module):
    """Convolution of every image of [..., H, W, C]; ``padding`` before and after, default half the kernel."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int = 3,
        *,
        stride: int = 1,
        padding: tuple[int, int] | None = None,
        rngs: nnx.Rngs,
    ):
        self.kernel = param(rngs, (size, size, c_in, c_out), std=(size * size * c_in) ** -0.5)
        self.bias = param(rngs, (c_out,))
        self.stride = stride
        self.padding = (size // 2, size // 2) if padding is None else padding

    def __call__(self, x: Array) -> Array:
        return conv2d(x, self.kernel[...], self.stride, self.padding) + self.bias[...]


class Conv3d(nnx.Module):
    """Convolution of [B, T, H, W, C], see `conv3d`: what comes before the first frame is the caller's business."""

    def __init__(self, c_in: int, c_out: int, size: Sequence[int] = (3, 3, 3), *, stride: int = 1, rngs: nnx.Rngs):
        self.kernel = param(rngs, (*size, c_in, c_out), std=(math.prod(size) * c_in) ** -0.5)
        self.bias = param(rngs, (c_out,))
        self.stride = stride

    def __call__(self, x_BTHWC: Array) -> Array:
        return conv3d(x_BTHWC, self.kernel[...], self.stride) + self.bias[...]
