"""The audio autoencoder of Ovi and DreamID-Omni: log-mel spectrogram to latents and back, 32 ms a latent.

Every layer keeps the magnitude of what passes it: filters have unit norm, activations are scaled back, sums are
weighted. Checkpoints store filters of any length, which only count by their direction; they are normalised once, when
a checkpoint is read (`wan_jax.weights.engine`), and kept that way here.

Axes: ``B`` batch, ``T`` mel frames, ``M`` mel bins, ``A`` latents, ``C`` channels, ``L`` either of T and A. Parameters
and arithmetic are float32. Source: MMAudio ``mmaudio/ext/autoencoder/{vae,vae_modules}.py``, ``VAE_16k``; parameter
names follow its checkpoint.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.config import AudioVAEConfig
from wan_jax.nn.attention import attention
from wan_jax.nn.conv import Conv1d
from wan_jax.nn.layers import param

Array = jax.Array

SILU_MAGNITUDE = 0.596  # root mean square of SiLU on a standard normal input
MIX = 0.3  # share of the branch in a residual sum
MAX_LOGVAR = 20.0
MIN_LOGVAR = -30.0


def unit(x: Array) -> Array:
    """Scale the channels of every position to a root mean square of one."""
    return x / (1e-4 + jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)))


def activate(x: Array) -> Array:
    return jax.nn.silu(x) / SILU_MAGNITUDE


def mix(x: Array, branch: Array) -> Array:
    """Weighted sum that keeps the magnitude of two independent terms."""
    return ((1 - MIX) * x + MIX * branch) / ((1 - MIX) ** 2 + MIX**2) ** 0.5


class UnitConv(Conv1d):
    """Convolution with filters of unit norm and without a bias."""

    def __init__(self, c_in: int, c_out: int, size: int = 3, *, rngs: nnx.Rngs):
        super().__init__(c_in, c_out, size, bias=False, rngs=rngs)
        self.kernel[...] /= jnp.linalg.norm(self.kernel[...], axis=(0, 1))


class ResidualBlock(nnx.Module):
    """Two activated convolutions beside the normalised input, which a convolution of size one widens if need be."""

    def __init__(self, d_in: int, d_out: int, *, rngs: nnx.Rngs):
        self.conv1 = UnitConv(d_in, d_out, rngs=rngs)
        self.conv2 = UnitConv(d_out, d_out, rngs=rngs)
        self.nin_shortcut = UnitConv(d_in, d_out, 1, rngs=rngs) if d_in != d_out else None

    def __call__(self, x: Array) -> Array:
        x = unit(x)
        h = self.conv2(activate(self.conv1(activate(x))))
        return mix(x if self.nin_shortcut is None else self.nin_shortcut(x), h)


class AttentionBlock(nnx.Module):
    """Single-head attention with normalised queries, keys and values, beside the input."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.qkv = UnitConv(dim, 3 * dim, 1, rngs=rngs)
        self.proj_out = UnitConv(dim, dim, 1, rngs=rngs)

    def __call__(self, x_BLC: Array) -> Array:
        qkv = self.qkv(x_BLC).reshape(*x_BLC.shape, 3)  # q, k and v lie side by side for every channel
        q, k, v = (unit(qkv[..., i])[:, :, None] for i in range(3))
        return mix(x_BLC, self.proj_out(attention(q, k, v)[:, :, 0]))


class Middle(nnx.Module):
    """The widest part of both halves."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.block_1 = ResidualBlock(dim, dim, rngs=rngs)
        self.attn_1 = AttentionBlock(dim, rngs=rngs)
        self.block_2 = ResidualBlock(dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nnx.Module):
    """Mean of two neighbours between two convolutions; a last odd position is dropped."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.conv1 = UnitConv(dim, dim, 1, rngs=rngs)
        self.conv2 = UnitConv(dim, dim, 1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.conv1(x)
        B, L, C = x.shape
        return self.conv2(x[:, : L // 2 * 2].reshape(B, L // 2, 2, C).mean(axis=2))


class Upsample(nnx.Module):
    """Every position twice, then a convolution."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.conv = UnitConv(dim, dim, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(jnp.repeat(x, 2, axis=1))


class Level(nnx.Module):
    """Residual blocks of one width, and last a change of resolution if there is one."""

    def __init__(
        self, d_in: int, d_out: int, blocks: int, resample: type[nnx.Module] | None, clip: float, *, rngs: nnx.Rngs
    ):
        widths = [d_in] + [d_out] * blocks
        self.block = nnx.List([ResidualBlock(widths[i], d_out, rngs=rngs) for i in range(blocks)])
        self.resample = resample and resample(d_out, rngs=rngs)
        self.clip = clip

    def __call__(self, x: Array) -> Array:
        for block in self.block:
            x = jnp.clip(block(x), -self.clip, self.clip)
        return x if self.resample is None else self.resample(x)


class Encoder(nnx.Module):
    """[B, T, M] to [B, A, 2 C]: mean and logarithm of the variance."""

    def __init__(self, cfg: AudioVAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        widths = [cfg.dim * m for m in (1, *cfg.dim_mult)]
        self.conv_in = UnitConv(cfg.num_bins, widths[0], rngs=rngs)
        levels = []
        for i in range(len(cfg.dim_mult)):
            down = Downsample if i in cfg.down_levels else None
            levels.append(Level(widths[i], widths[i + 1], cfg.num_res_blocks, down, cfg.clip, rngs=rngs))
        self.down = nnx.List(levels)
        self.mid = Middle(widths[-1], rngs=rngs)
        self.conv_out = UnitConv(widths[-1], 2 * cfg.z_dim, rngs=rngs)
        self.learnable_gain = param(rngs, ())

    def __call__(self, x_BTM: Array) -> Array:
        x = self.conv_in(x_BTM)
        for level in self.down:
            x = level(x)
        x = jnp.clip(self.mid(x), -self.cfg.clip, self.cfg.clip)
        return self.conv_out(activate(x)) * (1 + self.learnable_gain[...])


class Decoder(nnx.Module):
    """[B, A, C] to [B, T, M]. Levels are numbered as in the encoder and run from the last to the first."""

    def __init__(self, cfg: AudioVAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        widths = [cfg.dim * m for m in (*cfg.dim_mult, cfg.dim_mult[-1])]
        self.conv_in = UnitConv(cfg.z_dim, widths[-1], rngs=rngs)
        self.mid = Middle(widths[-1], rngs=rngs)
        levels = []
        for i in range(len(cfg.dim_mult)):
            up = Upsample if i - 1 in cfg.down_levels else None  # a level down ends in what the next level up undoes
            levels.append(Level(widths[i + 1], widths[i], cfg.num_res_blocks + 1, up, cfg.clip, rngs=rngs))
        self.up = nnx.List(levels)
        self.conv_out = UnitConv(widths[0], cfg.num_bins, rngs=rngs)
        self.learnable_gain = param(rngs, ())

    def __call__(self, z_BAC: Array) -> Array:
        x = jnp.clip(self.mid(self.conv_in(z_BAC)), -self.cfg.clip, self.cfg.clip)
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(activate(x)) * (1 + self.learnable_gain[...])


class AudioVAE(nnx.Module):
    """Mel-spectrogram autoencoder.

    A mel spectrogram is what `wan_jax.nn.mel.mel_spectrogram` gives, 62.5 frames a second; it is normalised inside, bin
    by bin. Latents have 31.25 steps a second and are used as they are.
    """

    def __init__(self, cfg: AudioVAEConfig, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.data_mean = param(rngs, (cfg.num_bins,))
        self.data_std = param(rngs, (cfg.num_bins,), fill=1.0)
        self.encoder = Encoder(cfg, rngs=rngs)
        self.decoder = Decoder(cfg, rngs=rngs)

    def normalise(self, mel_BTM: Array) -> Array:
        """Mean 0 and deviation 1 in every bin, over the training data."""
        return (mel_BTM - self.data_mean[...]) / self.data_std[...]

    def encode(self, mel_BTM: Array) -> Array:
        """[B, T, M] to the mean of the latents, which the pipelines use: [B, T // stride, C]."""
        return self.encode_stats(mel_BTM)[0]

    def encode_stats(self, mel_BTM: Array) -> tuple[Array, Array]:
        """Mean and logarithm of the variance of the latents, each [B, T // stride, C]."""
        mean, logvar = jnp.split(self.encoder(self.normalise(mel_BTM)), 2, axis=-1)
        return mean, jnp.clip(logvar, MIN_LOGVAR, MAX_LOGVAR)

    def decode(self, z_BAC: Array) -> Array:
        """Latents to a mel spectrogram: [B, stride * A, M]."""
        return self.decoder(z_BAC) * self.data_std[...] + self.data_mean[...]
