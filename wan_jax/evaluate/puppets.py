"""Scores of talking puppets: is it the face of the reference, its voice, do the lips follow, does the text rule.

`observe` runs the detectors on a clip, `measure` compares what they say of many clips with what was asked for, and
`score` does both. They know nothing of the model: the truth, a codec's reconstruction and a model's clips are measured
alike, and belong side by side. Sync, pitch and vowels come with their shuffled values.

Axes: ``B`` clips, ``T`` frames.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from wan_jax.errors import InputError
from wan_jax.evaluate import looks, sounds
from wan_jax.train.puppets import voices, world
from wan_jax.train.puppets.world import Plan

CHOICES = 8  # people, and soundtracks, that the right one is told from
_LAGS = range(-world.FPS // 4, world.FPS // 4 + 1)  # frames by which the sound is shifted, a quarter of a second
_RESAMPLES = 1000  # of the bootstrap


@dataclass(frozen=True)
class Observed:
    """What the detectors say about one clip; people from left to right."""

    wall: tuple[int, int]
    spread: float  # of the wall
    flicker: float
    motions: list[int]
    faces: list[np.ndarray]  # `looks.looks`
    openings: list[np.ndarray]  # [T] each
    loudness: np.ndarray  # [T]
    syllables: list[sounds.Syllable]
    timbre: sounds.Timbre | None  # of all syllables; None when there are none


def observe(video: np.ndarray, audio: np.ndarray, people: int = 1) -> Observed:
    """Run the detectors on one clip.

    Args:
        video: uint8 [T, H, W, 3]. audio: float [n] at 16 kHz, as long as the video.
    """
    pixels = video.astype(np.float32) / 255
    found = looks.find_wall(pixels)
    behind = looks.wall_image(*found, pixels.shape[1])
    sides = ("",) if people == 1 else ("left", "right")
    heads = [looks.find_head(pixels, behind, world.HEAD_SCALE[people], side) for side in sides]
    syllables = sounds.syllables(audio)
    return Observed(
        wall=found,
        spread=looks.spread(pixels),
        flicker=looks.flicker(pixels),
        motions=[looks.motion(head) for head in heads],
        faces=[looks.looks(head) for head in heads],
        openings=[looks.mouth_opening(head) for head in heads],
        loudness=sounds.loudness(audio, len(video)),
        syllables=syllables,
        timbre=sounds.timbre(syllables),
    )


def observe_pictures(pictures: np.ndarray) -> list[np.ndarray]:
    """`looks.looks` of reference pictures, uint8 [P, H, W, 3]."""
    size = pictures.shape[1]
    paper = np.broadcast_to(world.PAPER, (size, size, 3)).astype(np.float32)
    pixels = pictures.astype(np.float32) / 255
    return [looks.looks(looks.find_head(picture[None], paper, world.HEAD_SCALE[1])) for picture in pixels]


@dataclass(frozen=True)
class Row:
    """One row of a table.

    Args:
        samples: [n, ...], what every clip or person gave; bool for what is right or wrong.
        reduce: makes the score of them.
    """

    samples: np.ndarray
    reduce: Callable[[np.ndarray], float] = np.mean

    @property
    def value(self) -> float:
        """NaN without samples."""
        return float(self.reduce(self.samples)) if len(self.samples) else float("nan")

    def interval(self, share: float = 0.95) -> tuple[float, float]:
        """Where the score of endlessly many clips lies: Wilson's interval of a proportion, else the bootstrap's."""
        n, value = len(self.samples), self.value
        if n < 2:
            return float("nan"), float("nan")
        if self.samples.dtype == bool:
            z = NormalDist().inv_cdf(0.5 + share / 2)
            middle = (value + z * z / (2 * n)) / (1 + z * z / n)
            half = z * np.sqrt(value * (1 - value) / n + (z / (2 * n)) ** 2) / (1 + z * z / n)
            return float(max(middle - half, 0)), float(min(middle + half, 1))
        draws = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
        low, high = np.quantile([self.reduce(self.samples[draw]) for draw in draws], (0.5 - share / 2, 0.5 + share / 2))
        return float(low), float(high)


def score(plans: Plan, pictures: np.ndarray, video: np.ndarray, audio: np.ndarray) -> dict[str, float]:
    """The scores of one batch; see ``docs/nano.md`` for the thresholds.

    Args:
        plans: what was asked for, leaves NumPy [B, ...], all of one person or all of two.
        pictures: uint8 [B, P, H, W, 3], references. video: uint8 [B, T, H, W, 3]. audio: float [B, n].
    Raises:
        InputError: see `measure`.
    """
    clips = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf)[k], plans) for k in range(len(video))]
    seen = [observe(x, sound, len(plan.motion)) for x, sound, plan in zip(video, audio, clips, strict=True)]
    return {name: row.value for name, row in measure(clips, [observe_pictures(p) for p in pictures], seen).items()}


def measure(clips: Sequence[Plan], known: Sequence[list[np.ndarray]], seen: Sequence[Observed]) -> dict[str, Row]:
    """The table of some clips.

    Args:
        clips: what was asked for, all of one person or all of two.
        known: `observe_pictures` of the references of each. seen: `observe` of each.
    Raises:
        InputError: for fewer clips than the right one is to be told from.
    """
    if len(seen) < CHOICES:
        raise InputError(f"{len(seen)} clips to score: need {CHOICES} or more, each is told from the others")
    pairs = list(zip(seen, clips, strict=True))
    common = {
        "wall colour": _right(o.wall[0] == p.wall for o, p in pairs),
        "wall pattern": _right(o.wall[1] == p.pattern for o, p in pairs),
        "motion": _right(o.motions[place] == p.motion[k] for o, p in pairs for k, place in enumerate(_places(p))),
        **_identity(clips, seen, known),
    }
    if len(clips[0].motion) == 2:
        return {**common, **_turns(clips, seen)}
    plain = [o for o, p in pairs if world.PATTERNS[p.pattern] == "plain"]
    noise = {
        "wall spread": Row(np.array([o.spread for o in plain])),
        "wall flicker": Row(np.array([o.flicker for o in plain])),
    }
    return {**common, **noise, **_voice(clips, seen), **_speech(clips, seen), **_sync(seen)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 videos in dB, over all pixels; 99 at most."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
    return float(min(20 * np.log10(255) - 10 * np.log10(max(error, 1e-9)), 99))


# ---- rows of the table -------------------------------------------------------------------------------------


def _identity(clips: Sequence[Plan], seen: Sequence[Observed], known: Sequence[list[np.ndarray]]) -> dict[str, Row]:
    """How often a face is nearer to its own reference picture than to those of seven other clips."""
    right = []
    for b, (plan, observed) in enumerate(zip(clips, seen, strict=True)):
        for k, place in enumerate(_places(plan)):
            face = observed.faces[place]
            distances = [np.linalg.norm(face - known[(b + other) % len(clips)][k]) for other in range(CHOICES)]
            right.append(np.argmin(distances) == 0)
    return {f"identity, first of {CHOICES}" + (" (both)" if len(known[0]) == 2 else ""): _right(right)}


def _voice(clips: Sequence[Plan], seen: Sequence[Observed]) -> dict[str, Row]:
    """Pitch and timbre against the voice that was asked for."""
    voice = [jax.tree.map(lambda x: x[0], plan.people.voice) for plan in clips]
    asked = np.array([voices.pitch_hz(v) for v in voice])
    heard = np.array([np.median([s.pitch for s in o.syllables] or [1.0]) for o in seen])  # 1 Hz: nothing heard
    cents = np.abs(1200 * np.log2(heard / asked))
    shuffled = np.abs(1200 * np.log2(heard / np.roll(asked, 1)))
    fits = [(o.timbre, v) for o, v in zip(seen, voice, strict=True) if o.timbre]
    scales = np.array([(fit.scale, voices.formant_scale(v)) for fit, v in fits])
    falls = np.array([(fit.rolloff, voices.rolloff(v)) for fit, v in fits])
    return {
        "voice heard": _right(o.syllables for o in seen),
        "pitch error, cents": Row(cents, np.median),
        "pitch error, shuffled": Row(shuffled, np.median),
        "pitch within 100 cents": _right(cents < 100),
        "formant scale, correlation": Row(scales, _correlation),
        "roll-off, correlation": Row(falls, _correlation),
    }


def _speech(clips: Sequence[Plan], seen: Sequence[Observed]) -> dict[str, Row]:
    """Vowels and number of syllables against the script."""
    asked = [tuple(plan.script.vowel[plan.script.on].tolist()) for plan in clips]
    heard = [o.timbre.vowels if o.timbre else () for o in seen]

    def errors(heard: list[tuple[int, ...]]) -> Row:
        counts = [(sounds.edit_distance(a, b), len(a)) for a, b in zip(asked, heard, strict=True)]
        return Row(np.array(counts), _ratio)

    return {
        "vowel error rate": errors(heard),
        "vowel error rate, shuffled": errors(heard[1:] + heard[:1]),
        "syllable count": _right(len(a) == len(b) for a, b in zip(asked, heard, strict=True)),
    }


def _sync(seen: Sequence[Observed]) -> dict[str, Row]:
    """Correlation of mouth opening and loudness, frame by frame; the shuffled value has the sounds of other clips.

    The best lag is the shift of the sound at which a clip correlates best.
    """
    mouths, sound = [o.openings[0] for o in seen], [o.loudness for o in seen]
    turned = [sound[b:] + sound[:b] for b in range(len(sound))]  # the own sound comes first
    table = np.array([[_pearson(mouth, s) for s in row] for mouth, row in zip(mouths, turned, strict=True)])
    profile = np.array([[_shifted(m, s, lag) for lag in _LAGS] for m, s in zip(mouths, sound, strict=True)])
    best = np.abs(np.array(_LAGS)[profile.argmax(axis=1)])
    shuffled = table[:, 1:].mean(axis=1)
    return {
        "sync": Row(table[:, 0]),
        "sync, shuffled": Row(shuffled),
        "sync over shuffled": Row(table[:, 0] - shuffled),
        "best lag 0": _right(best == 0),
        "best lag within a frame": _right(best <= 1),
        f"right sound of {CHOICES}": _right(table[:, :CHOICES].argmax(axis=1) == 0),
    }


def _turns(clips: Sequence[Plan], seen: Sequence[Observed]) -> dict[str, Row]:
    """Per syllable that is heard: whose voice is it, by pitch, and is it that person's mouth which opens?"""
    counts, spoken = [], []
    for plan, observed in zip(clips, seen, strict=True):
        places = _places(plan)
        asked = np.log(np.asarray(voices.pitch_hz(plan.people.voice)))
        opening = np.stack([observed.openings[place] - observed.openings[place].min() for place in places])
        right = 0
        for syllable in observed.syllables:
            speaker = np.abs(asked - np.log(syllable.pitch)).argmin()
            first, last = int(syllable.start * world.FPS), int(np.ceil(syllable.end * world.FPS))
            right += opening[:, first:last].mean(axis=1).argmax() == speaker
        counts.append((right, len(observed.syllables)))
        spoken.append(len(observed.syllables) == plan.script.on.sum())
    return {"right face for the voice": Row(np.array(counts), _ratio), "syllable count": _right(spoken)}


def _places(plan: Plan) -> tuple[int, ...]:
    """Position from the left of each person."""
    return (0,) if len(plan.motion) == 1 else ((0, 1) if plan.left == 0 else (1, 0))


def _shifted(mouth: np.ndarray, sound: np.ndarray, lag: int) -> float:
    """Correlation with the sound delayed by ``lag`` frames."""
    frames = len(mouth)
    return _pearson(mouth[max(lag, 0) : frames + min(lag, 0)], sound[max(-lag, 0) : frames - max(lag, 0)])


def _pearson(a: ArrayLike, b: ArrayLike) -> float:
    """Correlation; 0 where one of the two does not vary."""
    if len(a) < 2:
        return 0.0
    a, b = a - np.mean(a), b - np.mean(b)
    size = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / size) if size > 1e-12 else 0.0


def _correlation(pairs_n2: np.ndarray) -> float:
    return _pearson(pairs_n2[:, 0], pairs_n2[:, 1])


def _ratio(counts_n2: np.ndarray) -> float:
    """Events of all clips over their chances."""
    return counts_n2[:, 0].sum() / max(counts_n2[:, 1].sum(), 1)


def _right(values: Iterable[Any]) -> Row:
    return Row(np.array([bool(value) for value in values]))
