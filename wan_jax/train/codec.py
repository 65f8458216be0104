"""Training of the small codecs: the causal video VAE, which starts as a linear code, the audio VAE and the vocoder.

Their examples are dictionaries: "video" float32 [B, T, H, W, 3] in [-1, 1] with "pixel_weight" [B, T, H, W], "audio"
float32 [B, n]. All are trained on whole clips: what a causal network keeps of the past is only right at lengths that it
has seen.

Axes: ``B`` clips, ``T H W C`` frames, rows, columns, channels, ``n`` samples, ``M`` mel bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.config import MelConfig
from wan_jax.models.audio_vae import AudioVAE
from wan_jax.models.vae import VAE, Past, fold, patchify
from wan_jax.models.vocoder import BigVGAN
from wan_jax.nn.mel import frames, hann_window, mel_spectrogram

Array = jax.Array

KL_VIDEO, KL_AUDIO = 3e-5, 1e-4  # shares of the divergence in the losses
SQUARED = 0.5  # share of the squared error of pixels beside the absolute one
RESOLUTIONS = (1024, 512, 256, 128)  # samples of the windows that the vocoder is judged by
MIN_MAGNITUDE = 1e-3  # of a bin of such a spectrum, before the logarithm


# ---- video -------------------------------------------------------------------------------------------------


def linear_vae(vae: VAE, video_BTHWC: Array, weight_BTHW: Array) -> VAE:
    """The VAE as a linear code of principal components, in closed form: where its training starts.

    A cell of pixels of one frame becomes its first components; those of two cells in time the first of both together,
    and again those of two such pairs. The decoder goes the same way back. Convolutions see one position and no past,
    residual branches are silent, and a constant channel, much larger than all others, makes the norms before the last
    convolutions constant and leaves their activations in their linear part. What is left to training is all that a
    linear code cannot do.

    Args:
        vae: of version 2.2, of one width, with two temporal resamplings and no spatial ones.
        video_BTHWC: float32 clips in [-1, 1]. weight_BTHW: of their pixels; cells count by the largest weight in them.
    """
    cfg, width, z = vae.cfg, vae.cfg.dim, vae.cfg.z_dim

    def silent(path: str, x: Array) -> Array:
        """A branch is silent by its last kernel alone: with two of zeros it would learn nothing."""
        first = (".block" in path and path.endswith("conv1.kernel")) or path.endswith("to_qkv.kernel")
        return x if first else jnp.zeros_like(x)

    flat = {path: silent(path, x) for path, x in flatten_params(vae).items()}
    flat |= {path: jnp.ones_like(x) for path, x in flat.items() if path.endswith(".gamma")}
    n = width - 1  # components; the last channel is the constant

    def put(path: str, matrix: Array, bias: Array | None = None) -> None:
        """A linear map of the present position, as the middle of a kernel and the last of its frames."""
        kernel = flat[f"{path}.kernel"]
        middle = tuple(size // 2 for size in kernel.shape[-4:-2])
        at = middle if kernel.ndim == 4 else (kernel.shape[0] - 1, *middle)
        flat[f"{path}.kernel"] = kernel.at[at].set(matrix)
        if bias is not None:
            flat[f"{path}.bias"] = bias

    cells = patchify(video_BTHWC, cfg.patch_size)  # [B, T, h, w, pixels]
    share = fold(weight_BTHW[..., None], 1, cfg.patch_size).max((-1, -2, -3, -4))  # [B, T, h, w]
    mean = (share[..., None] * cells).sum((0, 1, 2, 3)) / share.sum()
    frames = _principal((cells - mean).reshape(-1, cells.shape[-1]), share.reshape(-1), n)  # [pixels, n]
    x, share = (cells - mean)[:, 1:] @ frames, share[:, 1:]
    pairs = []  # [2 n, n] each: how two neighbours in time become one
    for _ in range(2):
        x, share = jnp.concatenate([x[:, ::2], x[:, 1::2]], -1), jnp.maximum(share[:, ::2], share[:, 1::2])
        pairs.append(_principal(x.reshape(-1, 2 * n), share.reshape(-1), n))
        x = x @ pairs[-1]
    spread = x[..., :z].std((0, 1, 2, 3))
    unit = spread**0.7  # between latents of one size, which are mostly noise, and those of the pictures' own
    large = 100 * jnp.sqrt(jnp.square(x).sum(-1).mean())  # the constant

    def square(matrix: Array, constant: float) -> Array:
        """A map of components, and one of the constant, [rows + 1, columns + 1]."""
        return jnp.zeros((len(matrix) + 1, matrix.shape[1] + 1)).at[:-1, :-1].set(matrix).at[-1, -1].set(constant)

    one = jnp.eye(width)
    put("encoder.conv1", jnp.pad(frames, ((0, 0), (0, 1))), jnp.append(-mean @ frames, large))
    for k, basis in enumerate(pairs):
        put(f"encoder.downsamples.{k}.resample.conv", one)
        # Around it goes the mean of both frames, and half of the first one of all, which so grows by a half.
        down = [1.5 * square(half, 0.5) - one / 2 for half in (basis[:n], basis[n:])]
        flat[f"encoder.downsamples.{k}.resample.time_conv.kernel"] = jnp.stack([0 * one, *down])[:, None, None]
    # The norm leaves x sqrt(width) / large; half of it is what a small number keeps of SiLU.
    small = width**0.5 / large / 2
    logvar = jnp.zeros(2 * z).at[z:].set(-6.0)  # a deviation of 0.05
    put("encoder.head.conv", jnp.pad(jnp.diag(1 / unit / small), ((0, width - z), (0, z))), logvar)
    flat["conv1.kernel"] = jnp.eye(2 * z)[None, None, None]
    flat["conv2.kernel"] = jnp.eye(z)[None, None, None]

    put("decoder.conv1", jnp.pad(jnp.diag(unit), ((0, 0), (0, width - z))), jnp.zeros(width).at[-1].set(large))
    for k, basis in enumerate(reversed(pairs)):
        put(f"decoder.upsamples.{k}.resample.conv", one)
        # Around it go two copies, and one of the first frame of all, which so is doubled.
        up = [2 * square(half.T, 1.0) - one for half in (basis[:n], basis[n:])]
        put(f"decoder.upsamples.{k}.resample.time_conv", jnp.concatenate(up, axis=1))
    put("decoder.head.conv", jnp.pad(frames.T, ((0, 1), (0, 0))) / small, mean)
    return unflatten_like(vae, flat)


def _principal(x_NP: Array, share_N: Array, count: int) -> Array:
    """The first principal components of weighted rows about zero, orthonormal columns [P, count]."""
    _, vectors = jnp.linalg.eigh((share_N[:, None] * x_NP).T @ x_NP)
    return vectors[:, ::-1][:, :count]


def vae_loss(networks: Mapping[str, Any], example: Mapping[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Absolute and squared error of the pixels, weighted, and the divergence of the latents from N(0, 1).

    Args:
        networks: "vae".
        example: "video" and "pixel_weight", see above, and standard normal "noise" [B, t, h, w, z].
    """
    vae, video, weight = networks["vae"], example["video"], example["pixel_weight"]
    mean, logvar = jnp.split(vae.conv1(vae.encoder(video, Past())), 2, axis=-1)
    logvar = jnp.clip(logvar, -30, 20)
    divergence = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar).mean((1, 2, 3, 4))
    ours = vae.decoder(vae.conv2(mean + jnp.exp(0.5 * logvar) * example["noise"]), Past())
    distance = jnp.abs(ours - video)
    each = (distance + SQUARED * jnp.square(distance)).mean(-1) * weight
    pixels = each.sum((1, 2, 3)) / weight.sum((1, 2, 3))
    squared = jnp.square(jnp.clip(ours, -1, 1) - video).mean((1, 2, 3, 4)) / 4
    loss = pixels + KL_VIDEO * divergence
    return loss, {"pixels": pixels, "divergence": divergence, "psnr": -10 * jnp.log10(squared)}


def fold_statistics(vae: VAE, mean_C: Array, std_C: Array) -> VAE:
    """The same code with other latents ``x``: those now are ``x * std + mean``.

    The 1x1x1 convolutions around the latents take up the change, so the configuration keeps its constants.

    Args:
        mean_C: per channel. std_C: per channel, or one for all.
    """
    given_mean, given_std = np.float32(vae.cfg.latents_mean), np.float32(vae.cfg.latents_std)
    # Latents before their normalisation: z = a x + b with x the new ones, a and b per channel; after it x itself.
    z = vae.cfg.z_dim
    scale, shift = jnp.broadcast_to(std_C, z), mean_C
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


def quiet(vocoder: BigVGAN) -> BigVGAN:
    """A fresh vocoder whose sound is about as loud as speech, not as loud as can be."""
    flat = flatten_params(vocoder)
    return unflatten_like(vocoder, flat | {"conv_post.kernel": 0.05 * flat["conv_post.kernel"]})


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
    """Of log magnitudes, and of magnitudes relative to those of all ``b``. Source: Yamamoto et al. 2020, section 2.

    Relative to its own, a silent stretch would weigh without bound.
    """
    cfg = MelConfig(n_fft=size, hop=size // 4)

    def magnitude(wave: Array) -> Array:
        spectrum = jnp.fft.rfft(frames(wave, cfg) * hann_window(size))
        return jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + MIN_MAGNITUDE**2)

    a, b = magnitude(a_Bn), magnitude(b_Bn)
    logarithm = jnp.abs(jnp.log(a) - jnp.log(b)).mean((1, 2))
    relative = jnp.sqrt(jnp.square(a - b).sum((1, 2)) / jnp.square(b).sum((1, 2)).mean())
    return logarithm + relative
