"""What puppets say: syllables, when they are said, and what the mouth does meanwhile.

A script is up to four syllables of an optional consonant and a vowel. The slack of the clip is split at random over
the pauses before, between and after them, so that the text does not tell the timing: picture and sound have to agree
on it. A mouth opens with the loudness, in the shape of the vowel, and is shut during consonants.

Axes: ``S`` syllables (slots, the last ones may be off), ``K`` control frames of `voices.speak`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.train.puppets.voices import BANDS, CONTROL_RATE, FORMANTS, VOWELS, Controls

Array = jax.Array

SLOTS = 4
CONSONANTS = ("", "b", "d", "g", "k", "m", "n", "s", "t")
SYLLABLES = tuple(consonant + vowel for consonant in CONSONANTS for vowel in VOWELS)  # all that can be said

_LEAD, _MARGIN = 0.09, 0.04  # seconds before the vowel, for its consonant; seconds of silence around a script
_SHORTEST, _LONGEST = 0.19, 0.28  # seconds, of a vowel
_RISE, _FALL = 0.04, 0.07  # seconds, inside the vowel
# Band of the noise (see BANDS), its loudness and seconds, and the loudness of the murmur that goes with it.
_NOISE = np.int32([0, 0, 3, 1, 1, 0, 0, 3, 2])
_BURST = np.float32([0, 0.25, 0.25, 0.25, 0.35, 0, 0, 0.30, 0.35])
_SECONDS = np.float32([0.02, 0.02, 0.02, 0.025, 0.03, 0.02, 0.02, 0.075, 0.025])
_MURMUR = np.float32([0, 0.05, 0.05, 0.05, 0, 0.16, 0.16, 0, 0])
_NASAL = np.float32([250, 1100, 2400, 3500])  # Hz, formants of the murmur
_LOUDNESS = np.float32([1.0, 0.88, 0.78, 0.92, 0.78])  # of the vowels: open ones are louder
_HEIGHT = np.float32([0.062, 0.042, 0.026, 0.050, 0.030])  # half-height of the mouth, in sides of the picture
_WIDTH = np.float32([0.066, 0.076, 0.082, 0.048, 0.036])  # half-width
SHUT_WIDTH = 0.054  # of a shut mouth


class Script(NamedTuple):
    """Syllables in the order in which they are heard. Each field is [S]."""

    consonant: Array  # index into CONSONANTS
    vowel: Array  # index into VOWELS
    start: Array  # seconds at which the vowel begins
    length: Array  # seconds of the vowel
    stress: Array  # loudness, 0.7 to 1
    speaker: Array  # 0 or 1
    on: Array  # bool: said at all


class Mouth(NamedTuple):
    """[K] each; zero height is shut."""

    height: Array
    width: Array


def draw_script(key: Array, seconds: float, *, speakers: int = 1, most: int = SLOTS) -> Script:
    """Two to ``most`` syllables within ``seconds``. Of two speakers, either may begin, and one may say it all."""
    u = jax.random.uniform(key, (6, SLOTS + 1))
    slot = jnp.arange(SLOTS)
    count = 2 + one_of(most - 1, u[0, 0])
    on = slot < count
    length = _SHORTEST + (_LONGEST - _SHORTEST) * u[1, :SLOTS]
    spans = (_LEAD + length) * on
    pauses = -jnp.log1p(-u[2]) * (jnp.arange(SLOTS + 1) <= count)  # in proportion: uniform on the simplex
    pauses = pauses / pauses.sum() * (seconds - 2 * _MARGIN - spans.sum())
    start = _MARGIN + jnp.cumsum(pauses[:-1]) + jnp.cumsum(spans) - spans + _LEAD
    first, turn = one_of(speakers, u[0, 1]), 1 + one_of(count, u[0, 2])
    return Script(
        consonant=one_of(len(CONSONANTS), u[3, :SLOTS]),
        vowel=one_of(len(VOWELS), u[4, :SLOTS]),
        start=start,
        length=length,
        stress=0.7 + 0.3 * u[5, :SLOTS],
        speaker=jnp.where(slot < turn, first, speakers - 1 - first),
        on=on,
    )


def spell(script: Script, which: np.ndarray) -> str:
    """The syllables of some slots as text: ``ba do mi``. ``which`` is a bool mask [S]."""
    said = zip(script.consonant[which], script.vowel[which], strict=True)
    return " ".join(CONSONANTS[consonant] + VOWELS[vowel] for consonant, vowel in said)


def perform(script: Script, frames: int) -> tuple[Controls, Mouth, Array]:
    """A script as curves: what the voice does, what the mouth does, and who speaks.

    Returns:
        controls, mouth, and the speaker of every control frame, [K] int32: the one of the nearest vowel.
    """
    time = ((jnp.arange(frames) + 0.5) / CONTROL_RATE)[:, None]
    since = time - script.start  # [K, S]
    left = script.length - since
    inside = (since >= 0) & (left >= 0) & script.on
    shape = _ease(since / _RISE) * _ease(left / _FALL) * inside
    loudness = shape * script.stress * _look(_LOUDNESS, script.vowel)

    until = -since  # seconds until the vowel
    consonant = script.consonant
    murmur = (until > 0.005) & (until < _LEAD - 0.01) & script.on
    burst = _ease(until / 0.01) * (until < _look(_SECONDS, consonant)) * _look(_BURST, consonant) * script.on
    band = jax.nn.one_hot(_look(_NOISE, consonant), len(BANDS))

    formants = inside @ _look(FORMANTS, script.vowel) + (1 - inside.sum(1, keepdims=True)) * _NASAL
    controls = Controls((loudness + murmur * _look(_MURMUR, consonant)).sum(1), formants, burst @ band)

    opening = (loudness * _look(_HEIGHT, script.vowel)).sum(1)
    width = SHUT_WIDTH + (shape * (_look(_WIDTH, script.vowel) - SHUT_WIDTH)).sum(1)
    middle = jnp.where(script.on, jnp.abs(since - script.length / 2), jnp.inf)
    return controls, Mouth(opening, width), script.speaker[jnp.argmin(middle, axis=1)]


def one_of(count: int | Array, u: Array) -> Array:
    """A number below 1 -> one of 0 ... count - 1, all as likely."""
    return jnp.floor(u * count).astype(jnp.int32)


def _look(table: np.ndarray, index: Array) -> Array:
    return jnp.asarray(table)[index]


def _ease(x: Array) -> Array:
    """0 below 0, 1 above 1, smooth between."""
    x = jnp.clip(x, 0, 1)
    return x * x * (3 - 2 * x)
