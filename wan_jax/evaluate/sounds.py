"""What is heard in a clip of puppets: loudness, syllables, pitch, the size and roll-off of the voice, vowels.

Signal processing alone, no learned parts. Vowels and timbre come from one fit: the amplitudes of the harmonics of
each syllable against the spectral envelope that the synthesiser of `wan_jax.train.puppets.voices` would give them.

Axes: ``W`` analysis windows, 10 ms apart; ``A`` harmonics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from wan_jax.train.puppets import voices
from wan_jax.train.puppets.voices import RATE

_HOP = RATE // 100
_WINDOW = 1024  # samples: 64 ms, five periods of the lowest voice
_VOICE_BAND = (150, 3800)  # Hz, of loudness: without the hiss of consonants
_LOUD = 0.33  # of the loudest moment, in a vowel; the murmur of consonants stays below
_SHORTEST = 0.07  # seconds, of a vowel
_PITCHES = (70, 450)  # Hz
_PERIODIC = 0.4  # YIN's aperiodicity of a voiced window is below
_TOP = 4200  # Hz, highest harmonic of the fit
_RANGE = 100  # amplitudes below the strongest by this factor tell nothing
_SIZES = np.linspace(0.75, 1.35, 41, dtype=np.float32)
_ROLLOFFS = np.linspace(0.0, 1.8, 25, dtype=np.float32)


@dataclass(frozen=True)
class Syllable:
    """One vowel as it was heard."""

    start: float  # seconds
    end: float
    pitch: float  # Hz
    harmonics_A: np.ndarray  # log amplitudes


@dataclass(frozen=True)
class Timbre:
    """A voice beyond its pitch, and the vowels that go with that reading."""

    scale: float  # of the formants
    rolloff: float
    vowels: tuple[int, ...]  # indices into VOWELS, one per syllable


def loudness(audio: np.ndarray, frames: int) -> np.ndarray:
    """Root mean square of the voice band over each of ``frames`` equal parts of the sound, [frames]."""
    spectrum = np.fft.rfft(audio)
    hz = np.fft.rfftfreq(len(audio), 1 / RATE)
    voice = np.fft.irfft(spectrum * ((_VOICE_BAND[0] < hz) & (hz < _VOICE_BAND[1])), len(audio))
    voice = voice[: len(voice) // frames * frames].reshape(frames, -1)
    return np.sqrt(np.square(voice).mean(axis=1))


def syllables(audio: np.ndarray) -> list[Syllable]:
    """Vowels in the order in which they are heard: runs of loud windows that have a pitch."""
    level = loudness(audio, len(audio) // _HOP)
    level = np.convolve(level, np.ones(3) / 3, "same")
    if level.max() < 1e-3:
        return []
    edges = np.flatnonzero(np.diff(np.concatenate([[0], level > _LOUD * level.max(), [0]])))
    found = []
    for start, end in edges.reshape(-1, 2):
        if (end - start) * _HOP < _SHORTEST * RATE:
            continue
        windows = _windows(audio, np.arange(start, end))
        hz = pitch_track(windows)
        voiced = ~np.isnan(hz)
        if voiced.mean() > 0.3:
            amplitudes = _harmonics(windows[voiced], hz[voiced])
            found.append(Syllable(start * 0.01, end * 0.01, float(np.median(hz[voiced])), amplitudes))
    return found


def pitch_track(windows_WS: np.ndarray) -> np.ndarray:
    """YIN: Hz per window, NaN where there is no pitch. Source: de Cheveigne and Kawahara, 2002."""
    longest, shortest = RATE // _PITCHES[0], RATE // _PITCHES[1]
    base = windows_WS.shape[1] - longest - 1  # samples that are compared at every lag
    size = 2 * windows_WS.shape[1]
    spectrum = np.fft.rfft(windows_WS, size)
    product = np.fft.irfft(np.conj(np.fft.rfft(windows_WS[:, :base], size)) * spectrum)[:, : longest + 1]
    power = np.cumsum(np.pad(np.square(windows_WS), ((0, 0), (1, 0))), axis=1)
    energy = power[:, base : base + longest + 1] - power[:, : longest + 1]
    difference = energy[:, :1] + energy - 2 * product
    running = np.cumsum(difference[:, 1:], axis=1) / np.arange(1, longest + 1)
    ratio = difference[:, 1:] / np.maximum(running, 1e-12)  # ratio[:, i] is of lag i + 1

    inner = ratio[:, shortest:-1]
    dips = (inner <= ratio[:, shortest - 1 : -2]) & (inner <= ratio[:, shortest + 1 :])
    deep = dips & (inner < np.minimum(_PERIODIC, inner.min(axis=1, keepdims=True) + 0.05))
    first = deep.argmax(axis=1) + shortest
    rows = np.arange(len(ratio))
    left, here, right = ratio[rows, first - 1], ratio[rows, first], ratio[rows, first + 1]
    vertex = 0.5 * (left - right) / np.maximum(left - 2 * here + right, 1e-9)
    return np.where(deep.any(axis=1), RATE / (first + 1 + vertex), np.nan)


def timbre(heard: list[Syllable]) -> Timbre | None:
    """Size, roll-off and vowels of one speaker: the best common fit to all syllables; None when there are none."""
    if not heard:
        return None
    costs = np.stack([_fit(syllable) for syllable in heard])  # [syllables, vowels, sizes, roll-offs]
    total = costs.min(axis=1).sum(axis=0)
    size, fall = np.unravel_index(total.argmin(), total.shape)
    vowels = tuple(int(v) for v in costs[:, :, size, fall].argmin(axis=1))
    return Timbre(_refine(_SIZES, total[:, fall], size), _refine(_ROLLOFFS, total[size], fall), vowels)


def edit_distance(a: tuple, b: tuple) -> int:
    """Insertions, deletions and replacements that turn one sequence into the other."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def _windows(audio: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Windows of `_WINDOW` samples centred on steps of 10 ms, [W, samples]; silence beyond the ends."""
    padded = np.pad(audio.astype(np.float64), _WINDOW // 2)
    return padded[(at * _HOP + _HOP // 2)[:, None] + np.arange(_WINDOW)]


def _harmonics(windows_WS: np.ndarray, hz_W: np.ndarray) -> np.ndarray:
    """Log amplitude of each harmonic below `_TOP`, by the energy within half a pitch of it, mean over windows; [A]."""
    size = 4 * _WINDOW
    power = np.square(np.abs(np.fft.rfft(windows_WS * np.hanning(_WINDOW), size)))
    below = np.cumsum(power, axis=1) / power.sum(axis=1, keepdims=True)
    edges = np.arange(int(_TOP / np.median(hz_W)) + 1) + 0.5
    bins = np.arange(size // 2 + 1)
    share = [np.interp(edges * hz * size / RATE, bins, row) for hz, row in zip(hz_W, below, strict=True)]
    return 0.5 * np.log(np.diff(np.mean(share, axis=0)) + 1e-9)


def _fit(syllable: Syllable) -> np.ndarray:
    """Mean squared error of the log amplitudes against every template, gain free: [vowels, sizes, roll-offs]."""
    heard = syllable.harmonics_A
    hz = syllable.pitch * (1 + np.arange(len(heard)))
    weight = np.clip((heard - heard.max()) / np.log(_RANGE) + 1, 0, 1)
    weight = weight / weight.sum()
    templates = _templates(hz.astype(np.float32))
    error = heard - templates
    error = error - (error * weight).sum(-1, keepdims=True)
    return (np.square(error) * weight).sum(-1)


def _templates(hz_A: np.ndarray) -> np.ndarray:
    """Log envelopes at some frequencies, [vowels, sizes, roll-offs, A]."""
    formants = voices.FORMANTS[:, None] * _SIZES[:, None]  # [vowels, sizes, 4]
    flat = np.log(np.asarray(voices.envelope(hz_A, formants[..., None, :], np.float32(0))))
    return flat[:, :, None] - _ROLLOFFS[:, None] * np.log(hz_A / 500)


def _refine(grid: np.ndarray, cost: np.ndarray, best: int) -> float:
    """The minimum of a parabola through the best point and its neighbours."""
    if not 0 < best < len(grid) - 1:
        return float(grid[best])
    left, here, right = cost[best - 1 : best + 2]
    return float(grid[best] + 0.5 * (left - right) / max(left - 2 * here + right, 1e-12) * (grid[1] - grid[0]))
