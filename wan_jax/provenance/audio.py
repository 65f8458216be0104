"""The watermark in the sound: keyed changes of loudness in patches of time and frequency, repeated every 1.5 s.

A patch is 184 Hz by 23.4 ms, between 600 and 6,500 Hz. Its first half is made louder and its second softer, or the
reverse (Manchester code), so that the detector, which compares the halves, hears the mark and not the sound. Loud
patches are changed less than soft ones. All sizes are in seconds and hertz, so a mark survives another sample rate.

Axes: samples [n] or [n, channels]; spectra [frames, frequencies]; patches [slots, bands].
"""

from __future__ import annotations

import functools

import numpy as np

from wan_jax.provenance.payload import SMALL, Mark, carriers, evidence

PERIOD = 1.5  # seconds for all slots
SLOTS, BANDS = 64, 32
LOW, HIGH = 600.0, 6500.0  # Hz
MIN_RATE = 2 * HIGH

_HALF = PERIOD / SLOTS / 2  # seconds
_SNR = 25.4  # dB, a little over the 25 dB promised
_RMS_DB = 1.5  # root mean square of the change, if the SNR allows; the most is twice that
_WINDOW, _HEARING = 0.010, 0.016  # seconds: windows of the embedder and the detector
_STEPS = 4  # places per half slot where the detector tries a start


def embed(audio: np.ndarray, sample_rate: int, key: str, signs: np.ndarray) -> np.ndarray:
    """float32 [n] or [n, channels] with the mark, within [-1, 1]; ``signs`` is a `SMALL` payload. Channels change
    alike."""
    channels = audio.reshape(len(audio), -1).astype(np.float64)
    length = round(_WINDOW * sample_rate) // 4 * 4
    spectra = [_stft(channel, length) for channel in channels.T]
    seconds = (np.arange(len(spectra[0])) - 1.5) * length / 4 / sample_rate  # centres; the signal is padded by a window
    patches = np.clip(np.tensordot(signs, _carriers(key), 1) / np.sqrt(len(signs)), -2, 2)
    half = np.floor(seconds / _HALF).astype(int)
    band, inside = _bands(length, sample_rate)
    gain = patches[half // 2 % SLOTS][:, band] * np.where(half % 2, -1, 1)[:, None] * inside
    gain *= _softness(np.abs(np.mean(spectra, axis=0)) ** 2, inside)

    power = np.sum(channels**2)
    decibel = _RMS_DB
    for _ in range(6):  # the error is nearly proportional to the change: one or two corrections suffice
        factor = 10 ** (gain * decibel / 20)
        changed = np.stack([_istft(x * factor, length, len(audio)) for x in spectra], axis=1)
        noise = np.sum((changed - channels) ** 2)
        if noise <= power * 10 ** (-_SNR / 10):
            break
        decibel *= 0.99 * np.sqrt(power * 10 ** (-_SNR / 10) / noise)
    return np.clip(changed, -1, 1).astype(np.float32).reshape(audio.shape)


def detect(audio: np.ndarray, sample_rate: int, key: str) -> Mark:
    """The likeliest mark in float [n] or [n, channels], wherever the first repeat starts."""
    loudness = _loudness(audio.reshape(len(audio), -1).mean(1), sample_rate)
    halves = _moving_mean(loudness, _STEPS, axis=0)
    edges = halves[:-_STEPS] - halves[_STEPS:]
    # Onsets and vowels change neighbouring bands alike, the mark does not. Few edges are as steep as an onset.
    edges = np.clip(edges - _moving_mean(edges, 9, axis=1), -3, 3)
    spectra = np.fft.fft(_carriers(key), axis=1).conj()
    best = Mark(SMALL, np.zeros(SMALL.bits, np.float32), 0.0)
    for start in range(2 * _STEPS):
        slots = edges[start :: 2 * _STEPS]
        repeats = -(-len(slots) // SLOTS)
        slots = np.pad(slots, ((0, repeats * SLOTS - len(slots)), (0, 0)))
        folded = slots.reshape(repeats, SLOTS, BANDS).sum(0)
        folded -= folded.mean(0)
        dots = np.fft.ifft(np.sum(np.fft.fft(folded, axis=0) * spectra, axis=2), axis=1).real  # [bits, slots]
        share = np.sum(dots**2, axis=0) / (SLOTS * BANDS * max(np.sum(folded**2), 1e-12))
        shift = int(share.argmax())
        if (strength := evidence(share[shift], SMALL.bits, SLOTS * BANDS)) > best.evidence:
            best = Mark(SMALL, dots[:, shift].astype(np.float32), strength)
    return best


@functools.lru_cache(maxsize=8)
def _carriers(key: str) -> np.ndarray:
    return carriers(key, "sound", SMALL.bits, SLOTS * BANDS).reshape(-1, SLOTS, BANDS)


def _bands(length: int, sample_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Band of each frequency of a window, and whether it is in one at all."""
    band = np.floor((np.fft.rfftfreq(length, 1 / sample_rate) - LOW) / (HIGH - LOW) * BANDS).astype(int)
    return band.clip(0, BANDS - 1), (band >= 0) & (band < BANDS)


def _softness(power: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """Weights up to 1 that fall with the level of a patch: equal noise everywhere, where equal gain would put it all
    under the loudest vowels."""
    power = _moving_mean(_moving_mean(power, 5, axis=0), 5, axis=1)
    return np.sqrt(np.minimum(1, power[:, inside].mean() / np.maximum(power, 1e-20)))


def _loudness(audio: np.ndarray, sample_rate: int) -> np.ndarray:
    """Decibels [steps, BANDS] at `_STEPS` places per half slot."""
    length = round(_HEARING * sample_rate)
    step = _HALF / _STEPS * sample_rate
    padded = np.pad(audio.astype(np.float64), length)
    starts = np.round((np.arange(int(len(audio) / step)) + 0.5) * step + length / 2).astype(int)
    frames = padded[starts[:, None] + np.arange(length)] * np.hanning(length)
    power = np.abs(np.fft.rfft(frames, n=4 * length)) ** 2 / length
    band, inside = _bands(4 * length, sample_rate)
    edges = np.searchsorted(band[inside], np.arange(BANDS))
    return 10 * np.log10(np.add.reduceat(power[:, inside], edges, axis=1) + 1e-9)


def _moving_mean(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    from scipy.ndimage import uniform_filter1d

    return uniform_filter1d(x, size, axis=axis, mode="nearest")


def _stft(audio: np.ndarray, length: int) -> np.ndarray:
    """Frames of ``length`` at every quarter of it, under the root of a Hann window."""
    hop = length // 4
    padded = np.pad(audio, (length, length + hop))
    frames = np.lib.stride_tricks.sliding_window_view(padded, length)[::hop]
    return np.fft.rfft(frames * _window(length))


def _istft(spectra: np.ndarray, length: int, size: int) -> np.ndarray:
    hop = length // 4
    quarters = (np.fft.irfft(spectra, n=length) * _window(length)).reshape(-1, 4, hop)
    total = np.zeros((len(quarters) + 3, hop))
    for part in range(4):
        total[part : part + len(quarters)] += quarters[:, part]
    return total.ravel()[length : length + size] / 2  # four squared windows add up to 2


def _window(length: int) -> np.ndarray:
    return np.sin(np.pi * np.arange(length) / length)
