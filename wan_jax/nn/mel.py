"""Log-mel spectrograms of speech.

Axes: ``B`` batch, ``n`` samples, ``T`` frames, ``M`` mel bins. Source: MMAudio ``mmaudio/ext/mel_converter.py``.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import MelConfig

Array = jax.Array

# Slaney's scale: even steps up to 1 kHz, then 27 steps to every factor of 6.4. Source: Auditory Toolbox, 1998.
HZ_PER_MEL = 200 / 3
KNEE_HZ = 1000.0
KNEE_MEL = KNEE_HZ / HZ_PER_MEL
MELS_PER_E = 27 / np.log(6.4)
GRIFFIN_LIM_STEPS = 32


def mel_spectrogram(wave_Bn: Array, cfg: MelConfig) -> Array:
    """Base-10 logarithm of the mel magnitudes.

    Args:
        wave_Bn: samples at ``cfg.sample_rate``, clamped to [-1, 1]; more than ``(n_fft - hop) / 2`` (24 ms) of them.
    Returns:
        [B, n // hop, M] float32, at least ``log10(cfg.floor)``. Frame ``i`` is centred on sample ``(i + 1/2) hop``.
    """
    wave = jnp.clip(wave_Bn.astype(jnp.float32), -1, 1)
    spectrum = jnp.fft.rfft(frames(wave, cfg) * hann_window(cfg.n_fft))
    magnitude = jnp.sqrt(jnp.square(spectrum.real) + jnp.square(spectrum.imag) + 1e-9)
    mel = jnp.dot(magnitude, mel_filters(cfg).T, precision=jax.lax.Precision.HIGHEST)
    return jnp.log10(jnp.maximum(mel, cfg.floor))


def frames(wave: Array, cfg: MelConfig) -> Array:
    """Windows [..., T, n_fft] of samples [..., n], one every ``hop``, reflected at the ends."""
    pad = (cfg.n_fft - cfg.hop) // 2
    wave = jnp.pad(wave, [(0, 0)] * (wave.ndim - 1) + [(pad, pad)], mode="reflect")
    starts = np.arange(0, wave.shape[-1] - cfg.n_fft + 1, cfg.hop)
    return wave[..., starts[:, None] + np.arange(cfg.n_fft)]


def hann_window(length: int) -> np.ndarray:
    """The periodic window: zero at the start, not at the end. [length] float32."""
    return (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)).astype(np.float32)


@functools.cache
def mel_filters(cfg: MelConfig) -> np.ndarray:
    """Triangles of equal area, evenly spaced on Slaney's scale: [M, n_fft // 2 + 1] float32.

    Equal to ``librosa.filters.mel``, which Slaney's toolbox is the source of, too.
    """
    edges = _mel_to_hz(np.linspace(_hz_to_mel(cfg.fmin), _hz_to_mel(cfg.fmax), cfg.num_bins + 2))
    left, centre, right = (edges[i : i + cfg.num_bins, None] for i in range(3))
    hz = np.arange(cfg.n_fft // 2 + 1) * cfg.sample_rate / cfg.n_fft
    triangles = np.minimum((hz - left) / (centre - left), (right - hz) / (right - centre))
    return (np.maximum(triangles, 0) * 2 / (right - left)).astype(np.float32)


def griffin_lim(mel_TM: np.ndarray, cfg: MelConfig) -> np.ndarray:
    """A waveform with about this spectrogram, on the host: float32 [T * hop].

    Magnitudes are those of least norm, phases are found by iteration. Source: Griffin and Lim, 1984; Perraudin et al.,
    2013, for the momentum.

    Args:
        mel_TM: as `mel_spectrogram` gives it.
    """
    import librosa

    magnitude = np.linalg.pinv(mel_filters(cfg)) @ (10.0 ** np.asarray(mel_TM, np.float64)).T
    wave = librosa.griffinlim(
        np.maximum(magnitude, 1e-8), n_iter=GRIFFIN_LIM_STEPS, n_fft=cfg.n_fft, hop_length=cfg.hop, center=False,
        momentum=0.99, random_state=0,
    )  # fmt: skip
    start = (cfg.n_fft - cfg.hop) // 2
    return wave[start : start + len(mel_TM) * cfg.hop].astype(np.float32)


def _hz_to_mel(hz: float) -> float:
    return hz / HZ_PER_MEL if hz < KNEE_HZ else KNEE_MEL + MELS_PER_E * np.log(hz / KNEE_HZ)


def _mel_to_hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < KNEE_MEL, mel * HZ_PER_MEL, KNEE_HZ * np.exp((mel - KNEE_MEL) / MELS_PER_E))
