"""Voices of puppets: a source-filter synthesiser with continuous attributes, as a pure function.

A voice is a sum of harmonics of its pitch, weighted by four formants and a roll-off, plus breath; consonants add
short bursts of band noise. The sum is scaled to a prescribed loudness, so loudness, pitch and formants of what is
heard are known exactly. Controls run at `CONTROL_RATE`; 50 samples apart, they are joined by straight lines.

Axes: ``K`` control frames, ``S`` samples of a frame, ``F`` formants, ``N`` noise bands, ``A`` harmonics.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

RATE = 16_000  # samples per second
STEP = 50  # samples per control frame
CONTROL_RATE = RATE // STEP
HARMONICS = 48
LEVEL = 0.1  # root mean square of the loudest vowel; the peak is then below 1
VOWELS = "aeiou"
# Hz, for a voice of size 1: averages of speakers (Peterson and Barney, 1952) spread a little for clearness.
FORMANTS = np.float32(
    [
        [800, 1250, 2600, 3600],
        [500, 1850, 2600, 3600],
        [280, 2350, 3050, 3700],
        [500, 880, 2500, 3500],
        [300, 720, 2250, 3400],
    ]
)
BANDS = ((250, 1000), (1000, 2600), (2600, 4200), (4200, 7600))  # Hz, of consonants; breath is in the last

_GAIN = np.float32([1.0, 0.63, 0.40, 0.20])
_HALF_WIDTH = np.float32([90, 110, 150, 200])  # Hz, of a formant
_FLOOR = 0.004  # of the spectral envelope, between formants
_BANK = 65_536  # samples of noise, drawn once; clips start at random places


class Voice(NamedTuple):
    """One voice, a point of the unit cube. Each field is [...] float32 in [0, 1]."""

    pitch: Array
    size: Array  # of the head: formants go up with it
    rolloff: Array
    vibrato: Array  # depth
    tempo: Array  # of the vibrato
    breath: Array


class Controls(NamedTuple):
    """What is said, frame by frame."""

    loudness_K: Array  # root mean square of the voice, 1 for `LEVEL`
    formants_KF: Array  # Hz, before the voice's size
    noise_KN: Array  # loudness of each band of consonants, likewise


def pitch_hz(voice: Voice) -> Array:
    return 90 * (320 / 90) ** voice.pitch


def formant_scale(voice: Voice) -> Array:
    return 0.85 + 0.40 * voice.size


def rolloff(voice: Voice) -> Array:
    """Exponent r of the fall of the amplitude with frequency, f^-r."""
    return 0.2 + voice.rolloff


def envelope(hz: Array, formants_F: Array, exponent: Array) -> Array:
    """Amplitude at a frequency: parallel resonances times the roll-off.

    Args:
        hz: [...]. formants_F: [..., 4] Hz, already scaled by the voice. exponent: broadcasts with hz.
    """
    off = (hz[..., None] - formants_F) / _HALF_WIDTH
    return ((_GAIN / (1 + jnp.square(off))).sum(-1) + _FLOOR) * (hz / 500) ** -exponent


def speak(key: Array, voice: Voice, controls: Controls) -> tuple[Array, Array]:
    """Synthesise one utterance.

    Args:
        key: of the noise and of the phase of the vibrato.
        voice: [K] each: the voice of whoever speaks in that control frame.
    Returns:
        float32 [K * STEP] sound at `RATE` in [-1, 1], and the pitch [K] in Hz.
    """
    key_phase, key_noise = jax.random.split(key)
    frames = controls.loudness_K.shape[0]
    time = (jnp.arange(frames) + 0.5) / CONTROL_RATE
    phase = time * (4 + 3 * voice.tempo) + jax.random.uniform(key_phase)
    f0 = pitch_hz(voice) * (1 + 0.02 * voice.vibrato * jnp.sin(2 * jnp.pi * phase))

    hz_KA = f0[:, None] * (1 + jnp.arange(HARMONICS))
    formants = controls.formants_KF * formant_scale(voice)[:, None]
    gain_KA = envelope(hz_KA, formants[:, None], rolloff(voice)[:, None])
    gain_KA = gain_KA * jnp.clip((7600 - hz_KA) / 400, 0, 1)  # nothing near the Nyquist frequency
    loudness = LEVEL * controls.loudness_K
    gain_KA = gain_KA * (loudness * jax.lax.rsqrt(jnp.square(gain_KA).sum(-1) / 2))[:, None]
    voiced = _harmonics(f0, gain_KA)

    noise_KN = LEVEL * controls.noise_KN
    noise_KN = noise_KN.at[:, 3].add(0.08 * voice.breath * loudness)
    starts = jax.random.randint(key_noise, (len(BANDS),), 0, _BANK - frames * STEP)
    bank = jnp.asarray(_noise_bank())
    for band in range(len(BANDS)):
        noise_S = jax.lax.dynamic_slice(bank[band], (starts[band],), (frames * STEP,)).reshape(frames, STEP)
        voiced = voiced + noise_S * _ramp(noise_KN[:, band])
    return jnp.clip(voiced.reshape(-1), -1, 1), f0


def _ramp(x_K: Array) -> Array:
    """[..., K] at the middles of frames -> [..., K, STEP], straight lines between them."""
    before = jnp.concatenate([x_K[..., :1], x_K[..., :-1]], -1)
    after = jnp.concatenate([x_K[..., 1:], x_K[..., -1:]], -1)
    offset = (jnp.arange(STEP, dtype=jnp.float32) + 0.5) / STEP - 0.5
    past, future = jnp.clip(-offset, 0, None), jnp.clip(offset, 0, None)
    return x_K[..., None] * (1 - past - future) + before[..., None] * past + after[..., None] * future


def _harmonics(f0_K: Array, gain_KA: Array) -> Array:
    """Sum of gain * sin(harmonic * phase), [K, STEP]; sin(n x) by the recurrence of Chebyshev, one sine in all."""
    cycles_KS = _ramp(f0_K) / RATE
    within = jnp.cumsum(cycles_KS, axis=1)
    start = jnp.cumsum(within[:, -1]) - within[:, -1]
    phase = 2 * jnp.pi * ((start - jnp.floor(start))[:, None] + within)
    sine, twice_cosine = jnp.sin(phase), 2 * jnp.cos(phase)

    def add(carry, gain_K):
        total, now, last = carry
        return (total + _ramp(gain_K) * now, twice_cosine * now - last, now), None

    silence = jnp.zeros_like(sine)
    (total, _, _), _ = jax.lax.scan(add, (silence, sine, silence), gain_KA.T)
    return total


@functools.lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    """White noise cut into bands, [N, samples] float32, each with root mean square 1."""
    white = np.fft.rfft(np.random.default_rng(0).normal(size=(len(BANDS), _BANK)))
    hz = np.fft.rfftfreq(_BANK, 1 / RATE)
    keep = [(low <= hz) & (hz < high) for low, high in BANDS]
    noise = np.fft.irfft(white * keep)
    return (noise / noise.std(axis=1, keepdims=True)).astype(np.float32)
