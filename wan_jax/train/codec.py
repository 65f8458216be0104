"""Training of the small codecs: the causal video VAE, the audio VAE and the vocoder, and a linear code to compare with.

Their examples are dictionaries: "video" float32 [B, T, H, W, 3] in [-1, 1] with "pixel_weight" [B, T, H, W], "audio"
float32 [B, n]. All are trained on whole clips: what a causal network keeps of the past is only right at lengths that it
has seen.

Axes: ``B`` clips, ``T H W C`` frames, rows, columns, channels, ``n`` samples, ``M`` mel bins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.config import MelConfig
from wan_jax.models.audio_vae import AudioVAE
from wan_jax.models.vae import VAE, Past, fold, unfold
from wan_jax.nn.mel import frames, hann_window, mel_spectrogram

Array = jax.Array

KL_VIDEO, KL_AUDIO = 1e-5, 1e-4  # shares of the divergence in the losses
SQUARED = 0.5  # share of the squared error of pixels beside the absolute one
RESOLUTIONS = (1024, 512, 256, 128)  # samples of the windows that the vocoder is judged by
MIN_MAGNITUDE = 1e-3  # of a bin of such a spectrum, before the logarithm


# ---- video -------------------------------------------------------------------------------------------------


def prepare_vae(vae: VAE) -> VAE:
    """A fresh VAE as training begins with it: convolutions see the present alone, residual branches are silent.

    Taps of the past that start at random wreck the frames that they were never trained on; from zero they grow only
    where data moves them.
    """

    def begin(path: str, kernel: Array) -> Array:
        if path.endswith("conv2.kernel") and ".block" in path:
            return jnp.zeros_like(kernel)
        if kernel.ndim == 5 and kernel.shape[:2] == (3, 3):
            return kernel.at[:2].set(0).at[2].multiply(3**0.5)
        return kernel

    return unflatten_like(vae, {path: begin(path, x) for path, x in flatten_params(vae).items()})


def vae_loss(networks: Mapping[str, Any], example: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Absolute and squared error of the pixels, weighted, and the divergence of the latents from N(0, 1).

    Args:
        networks: "vae".
        example: "video" and "pixel_weight", see above; "picture" [B, H, W, 3], a clip of one frame; and standard
            normal "noise" [B, t, h, w, z] and "picture_noise" [B, 1, h, w, z].
    """
    vae = networks["vae"]

    def error(video: Array, noise: Array, weight: Array) -> tuple[Array, Array, Array]:
        mean, logvar = jnp.split(vae.conv1(vae.encoder(video, Past())), 2, axis=-1)
        logvar = jnp.clip(logvar, -30, 20)
        divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
        ours = vae.decoder(vae.conv2(mean + jnp.exp(0.5 * logvar) * noise), Past())
        distance = jnp.abs(ours - video)
        each = (distance + SQUARED * jnp.square(distance)).mean(-1) * weight
        return each.sum((1, 2, 3)) / weight.sum((1, 2, 3)), divergence.mean((1, 2, 3, 4)), ours

    video, picture = example["video"], example["picture"][:, None]
    pixels, divergence, ours = error(video, example["noise"], example["pixel_weight"])
    alone, _, _ = error(picture, example["picture_noise"], jnp.ones(picture.shape[:-1]))
    squared = jnp.square(jnp.clip(ours, -1, 1) - video).mean((1, 2, 3, 4)) / 4
    loss = pixels + alone / video.shape[1] + KL_VIDEO * divergence
    return loss, {"pixels": pixels, "divergence": divergence, "psnr": -10 * jnp.log10(squared)}


def fold_statistics(vae: VAE, mean_C: Array, std_C: Array) -> VAE:
    """The same code with latents of mean 0 and deviation 1.

    The 1x1x1 convolutions around the latents take up the change, so the configuration keeps its constants.

    Args:
        mean_C, std_C: of the latents that ``vae.encode`` gives now.
    """
    given_mean, given_std = np.float32(vae.cfg.latents_mean), np.float32(vae.cfg.latents_std)
    # Latents before their normalisation: z = a x + b with x the new ones, a and b per channel; after it x itself.
    scale, shift = std_C, mean_C
    z = vae.cfg.z_dim
    first = jnp.concatenate([1 / scale, jnp.ones(z)])
    offset = jnp.concatenate([((given_mean - given_mean / scale) - given_std * shift / scale), jnp.zeros(z)])
    inside, outside = vae.conv1.kernel[...], vae.conv2.kernel[...]
    # conv2 is given x * std + mean, and gave what it should for (x * scale + shift) * std + mean.
    bias = vae.conv2.bias[...] + (given_mean + given_std * shift - scale * given_mean) @ outside[0, 0, 0]
    return unflatten_like(
        vae,
        flatten_params(vae)
        | {
            "conv1.kernel": inside * first,
            "conv1.bias": vae.conv1.bias[...] * first + offset,
            "conv2.kernel": outside * scale[:, None],
            "conv2.bias": bias,
        },
    )


class LinearCode(NamedTuple):
    """Principal components of cells of pixels: what a code of the same compression can do without a network.

    The first frame is coded alone, the others in fours, in cells of 8 x 8 pixels. Stands in for a trained VAE.
    """

    mean: tuple[Array, Array]  # of the pixels of a cell, [N] each: one frame, four frames
    basis: tuple[Array, Array]  # [N, z], orthonormal columns
    scale: tuple[Array, Array]  # [z], deviation of each component

    @classmethod
    def fit(cls, video_BTHWC: Array, weight_BTHW: Array, z: int = 16, mouth: float = 7.0) -> LinearCode:
        """Of float32 clips in [-1, 1]; cells that ``weight_BTHW`` raises above 1 count ``mouth`` times as much."""
        parts = []
        for frames_, count in ((slice(0, 1), 1), (slice(1, None), 4)):
            cells = _cells(video_BTHWC[:, frames_], count)
            marked = _cells(weight_BTHW[:, frames_, ..., None], count).max(-1) > 1
            share = jnp.where(marked, mouth, 1.0).reshape(-1)
            x = cells.reshape(-1, cells.shape[-1])
            mean = (share[:, None] * x).sum(0) / share.sum()
            x = x - mean
            _, vectors = jnp.linalg.eigh((share[:, None] * x).T @ x)
            basis = vectors[:, ::-1][:, :z]
            parts.append((mean, basis, (x @ basis).std(0)))
        return cls(*(tuple(pair) for pair in zip(*parts, strict=True)))

    def encode(self, video_BTHWC: Array) -> Array:
        """[B, 1 + 4 (t - 1), H, W, 3] to [B, t, H / 8, W / 8, z]."""
        parts = (_cells(video_BTHWC[:, :1], 1), _cells(video_BTHWC[:, 1:], 4))
        coded = [(x - m) @ b / s for x, m, b, s in zip(parts, *self, strict=True)]
        return jnp.concatenate(coded, axis=1)

    def decode(self, latents_BTHWC: Array) -> Array:
        parts = (latents_BTHWC[:, :1], latents_BTHWC[:, 1:])
        pixels = [(x * s) @ b.T + m for x, m, b, s in zip(parts, *self, strict=True)]
        video = [unfold(x.reshape(*x.shape[:-1], 3, count, 8, 8)) for x, count in zip(pixels, (1, 4), strict=True)]
        return jnp.concatenate(video, axis=1)


def _cells(video_BTHWC: Array, count: int) -> Array:
    """[B, T, H, W, C] -> [B, T / count, H / 8, W / 8, C * count * 64]."""
    x = fold(video_BTHWC, count, 8)
    return x.reshape(*x.shape[:4], math.prod(x.shape[4:]))  # no -1: a picture has no cells of four frames


# ---- sound -------------------------------------------------------------------------------------------------


def unit_filters(vae: AudioVAE) -> AudioVAE:
    """The VAE with filters of unit norm, as its layers expect them; training moves only their direction."""

    def one(path: str, x: Array) -> Array:
        return x / jnp.linalg.norm(x, axis=(0, 1)) if path.endswith(".kernel") else x

    return unflatten_like(vae, {path: one(path, x) for path, x in flatten_params(vae).items()})


def with_statistics(vae: AudioVAE, mel_BTM: Array) -> AudioVAE:
    """The VAE with the mean and the deviation of these spectrograms."""
    mean, std = mel_BTM.mean((0, 1)), mel_BTM.std((0, 1))
    return unflatten_like(vae, flatten_params(vae) | {"data_mean": mean, "data_std": std})


def unit_latents(vae: AudioVAE, mel_BTM: Array) -> AudioVAE:
    """The same code with latents of root mean square 1 on these spectrograms; the decoder does not feel the change."""
    size = jnp.sqrt(jnp.square(vae.encode(mel_BTM)).mean())
    gain = (1 + vae.encoder.learnable_gain[...]) / size - 1
    return unflatten_like(vae, flatten_params(vae) | {"encoder.learnable_gain": gain})


def audio_vae_loss(
    networks: Mapping[str, Any], example: Mapping[str, Array], *, mel: MelConfig
) -> tuple[Array, dict[str, Array]]:
    """Squared error of the normalised spectrogram, and the divergence of the latents from N(0, 1).

    Args:
        networks: "audio_vae". example: "audio", and standard normal "noise" [B, A, z].
    """
    vae = unit_filters(networks["audio_vae"])
    spectrum = mel_spectrogram(example["audio"], mel)
    mean, logvar = vae.encode_stats(spectrum)
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean((1, 2))
    ours = vae.decode(mean + jnp.exp(0.5 * logvar) * example["noise"])
    error = jnp.square((ours - spectrum[:, : ours.shape[1]]) / vae.data_std[...]).mean((1, 2))
    return error + KL_AUDIO * divergence, {"mel": error, "divergence": divergence}


def vocoder_loss(
    networks: Mapping[str, Any], example: Mapping[str, Array], *, mel: MelConfig
) -> tuple[Array, dict[str, Array]]:
    """Distance of magnitudes at several resolutions, and of the mel spectrogram. Phases are free.

    Args:
        networks: "vocoder", and "audio_vae", frozen: every other clip passes it first, as clips will in use.
        example: "audio".
    """
    audio = example["audio"]
    spectrum = mel_spectrogram(audio, mel)
    vae = networks["audio_vae"]
    coded = vae.decode(vae.encode(spectrum))
    heard = spectrum[:, : coded.shape[1]]
    passes = (jnp.arange(len(audio)) % 2 == 1)[:, None, None]
    ours = networks["vocoder"](jnp.where(passes, jax.lax.stop_gradient(coded), heard))
    theirs = audio[:, : ours.shape[1]]
    distances = [_spectral_distance(ours, theirs, size) for size in RESOLUTIONS]
    again = jnp.abs(mel_spectrogram(ours, mel) - heard).mean((1, 2))
    spectral = sum(distances) / len(distances)
    return spectral + again, {"spectral": spectral, "mel": again}


def _spectral_distance(a_Bn: Array, b_Bn: Array, size: int) -> Array:
    """Of log magnitudes, and of magnitudes relative to those of ``b``. Source: Yamamoto et al. 2020, section 2."""
    cfg = MelConfig(n_fft=size, hop=size // 4)

    def magnitude(wave: Array) -> Array:
        spectrum = jnp.fft.rfft(frames(wave, cfg) * hann_window(size))
        return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + MIN_MAGNITUDE**2)

    a, b = magnitude(a_Bn), magnitude(b_Bn)
    logarithm = jnp.abs(jnp.log(a) - jnp.log(b)).mean((1, 2))
    relative = jnp.sqrt(jnp.square(a - b).sum((1, 2)) / jnp.square(b).sum((1, 2)))
    return logarithm + relative
