"""BigVGAN, mel spectrogram to waveform: convolutions that upsample, each followed by residual blocks in parallel.

Axes: ``B`` batch, ``T`` frames, ``M`` mel bins, ``C`` channels, ``n`` samples. Parameters and arithmetic are float32.
Source: MMAudio ``mmaudio/ext/bigvgan/{models,activations}.py`` and ``alias_free_torch/*``; parameter names follow its
checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.config import VocoderConfig
from wan_jax.nn.conv import Conv1d, ConvTranspose1d
from wan_jax.nn.layers import param

Array = jax.Array

END_SIZE = 7  # of the first and the last convolution


def lowpass() -> np.ndarray:
    """The filter of every activation, at twice its sampling rate: a sinc under a Kaiser window, sum 1. [12] float64.

    Half of the band passes, and the transition is 0.6 of it wide; the window follows by Kaiser's formulas.
    """
    taps, cutoff, transition = 12, 0.25, 0.6
    attenuation = 2.285 * (taps // 2 - 1) * np.pi * 2 * transition + 7.95  # dB
    times = np.arange(taps) - (taps - 1) / 2
    shape = np.kaiser(taps, 0.1102 * (attenuation - 8.7)) * np.sinc(2 * cutoff * times)
    return shape / shape.sum()


LOWPASS = lowpass()


def fir(x_BTC: Array, taps: Sequence[float]) -> Array:
    """``y[t] = sum_i taps[i] x[t + i]`` in every channel, without padding.

    Shifted sums: a convolution with one group for every channel takes 15 to 40 times as long on CPU.
    """
    length = x_BTC.shape[1] - len(taps) + 1
    return sum(float(tap) * x_BTC[:, i : i + length] for i, tap in enumerate(taps))


class Activation(nnx.Module):
    """``x + sin^2(e^alpha x) / e^beta`` at twice the sampling rate, so that the new overtones do not fold back.

    Even and odd samples of the doubled signal are kept apart: both come from ``x`` and are summed up again by half of
    the filter, and zeros are neither inserted nor multiplied. Source: ``Activation1d`` of ``SnakeBeta``.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.alpha = param(rngs, (dim,))
        self.beta = param(rngs, (dim,))

    def __call__(self, x_BTC: Array) -> Array:
        x = jnp.pad(x_BTC, [(0, 0), (3, 3), (0, 0)], mode="edge")
        even = self.snake(fir(x[:, :-1], 2 * LOWPASS[::-2]))
        odd = self.snake(fir(x[:, 1:], 2 * LOWPASS[-2::-2]))
        first, last = even[:, :1], odd[:, -1:]  # repeated beyond the ends of the doubled signal
        even = jnp.concatenate([first] * 2 + [even] + [last] * 3, axis=1)
        odd = jnp.concatenate([first] * 3 + [odd] + [last] * 2, axis=1)
        # Without the barrier XLA builds the ends into the sums below: seven times as long on CPU.
        even, odd = jax.lax.optimization_barrier((even, odd))
        return fir(even, LOWPASS[1::2]) + fir(odd, LOWPASS[::2])

    def snake(self, x: Array) -> Array:
        alpha, beta = jnp.exp(self.alpha[...]), jnp.exp(self.beta[...])
        return x + jnp.square(jnp.sin(alpha * x)) / (beta + 1e-9)


class ResidualBlock(nnx.Module):
    """Pairs of activated convolutions of one size, the first of each dilated, each pair beside its input."""

    def __init__(self, dim: int, size: int, dilations: Sequence[int], *, rngs: nnx.Rngs):
        self.convs1 = nnx.List([Conv1d(dim, dim, size, dilation=d, rngs=rngs) for d in dilations])
        self.convs2 = nnx.List([Conv1d(dim, dim, size, rngs=rngs) for _ in dilations])
        self.activations = nnx.List([Activation(dim, rngs=rngs) for _ in range(2 * len(dilations))])

    def __call__(self, x: Array) -> Array:
        pairs = zip(self.activations[::2], self.convs1, self.activations[1::2], self.convs2, strict=True)
        for act1, conv1, act2, conv2 in pairs:
            x = x + conv2(act2(conv1(act1(x))))
        return x


class BigVGAN(nnx.Module):
    """Vocoder of a log-mel spectrogram, see `wan_jax.nn.mel.mel_spectrogram`."""

    def __init__(self, cfg: VocoderConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        dim, ups, blocks = cfg.dim, [], []
        self.conv_pre = Conv1d(cfg.num_bins, dim, END_SIZE, rngs=rngs)
        for rate, size in zip(cfg.rates, cfg.kernels, strict=True):
            ups.append(ConvTranspose1d(dim, dim // 2, size, stride=rate, rngs=rngs))
            dim //= 2
            for kernel, dilations in zip(cfg.res_kernels, cfg.res_dilations, strict=True):
                blocks.append(ResidualBlock(dim, kernel, dilations, rngs=rngs))
        self.ups, self.resblocks = nnx.List(ups), nnx.List(blocks)
        self.activation_post = Activation(dim, rngs=rngs)
        self.conv_post = Conv1d(dim, 1, END_SIZE, rngs=rngs)

    def __call__(self, mel_BTM: Array) -> Array:
        """[B, T, M] to samples in [-1, 1]: [B, n], n the frames times the product of the rates."""
        x, count = self.conv_pre(mel_BTM), len(self.cfg.res_kernels)
        for s, up in enumerate(self.ups):
            x = up(x)
            x = sum(block(x) for block in self.resblocks[s * count : (s + 1) * count]) / count
        return jnp.tanh(self.conv_post(self.activation_post(x)))[..., 0]
