"""Scores of talking puppets: is it the face of the reference, its voice, do the lips follow, does the text rule.

`score` takes what was asked for (plans, reference pictures) and what came out, whole batches of it, and knows nothing
of the model: the truth, a codec's reconstruction and a model's clips are scored alike, and belong side by side. Every
score that could be had by chance comes with its shuffled value.

Axes: ``B`` clips, ``T`` frames.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from numpy.typing import ArrayLike

from wan_jax.errors import InputError
from wan_jax.evaluate import looks, sounds
from wan_jax.train.puppets import voices, world
from wan_jax.train.puppets.world import Plan

_CHOICES = 8  # people, and soundtracks, that the right one is told from
_LAGS = range(-4, 5)  # frames by which the sound is shifted


@dataclass(frozen=True)
class Observed:
    """What the detectors say about one clip."""

    wall: tuple[int, int]
    heads: list[looks.Head]  # from left to right
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
    openings = [looks.mouth_opening(head) for head in heads]
    syllables = sounds.syllables(audio)
    return Observed(found, heads, openings, sounds.loudness(audio, len(video)), syllables, sounds.timbre(syllables))


def score(plans: Plan, pictures: np.ndarray, video: np.ndarray, audio: np.ndarray) -> dict[str, float]:
    """The table of one batch; see ``docs/nano.md`` for the thresholds.

    Args:
        plans: what was asked for, leaves NumPy [B, ...], all of one person or all of two.
        pictures: uint8 [B, P, H, W, 3], references. video: uint8 [B, T, H, W, 3]. audio: float [B, n].
    Raises:
        InputError: for fewer clips than the right one is to be told from.
    """
    if len(video) < _CHOICES:
        raise InputError(f"{len(video)} clips to score: need {_CHOICES} or more, each is told from the others")
    clips = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf)[k], plans) for k in range(len(video))]
    people = clips[0].motion.shape[0]
    seen = [observe(*clip, people) for clip in zip(video, audio, strict=True)]
    common = {
        "wall colour": _mean(o.wall[0] == p.wall for o, p in zip(seen, clips, strict=True)),
        "wall pattern": _mean(o.wall[1] == p.pattern for o, p in zip(seen, clips, strict=True)),
        "motion": _mean(
            looks.motion(o.heads[place]) == p.motion[k]
            for o, p in zip(seen, clips, strict=True)
            for k, place in enumerate(_places(p))
        ),
        **_identity(clips, seen, pictures),
    }
    if people == 2:
        return {**common, **_turns(clips, seen)}
    plain = [k for k, plan in enumerate(clips) if world.PATTERNS[plan.pattern] == "plain"]
    pixels = [video[k].astype(np.float32) / 255 for k in plain]
    noise = {
        "wall spread": float(np.mean([looks.spread(x) for x in pixels])) if plain else float("nan"),
        "wall flicker": float(np.mean([looks.flicker(x) for x in pixels])) if plain else float("nan"),
    }
    return {**common, **noise, **_voice(clips, seen), **_speech(clips, seen), **_sync(seen)}


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 videos in dB, over all pixels; 99 at most."""
    error = np.square(a.astype(np.float32) - b.astype(np.float32)).mean()
    return float(min(20 * np.log10(255) - 10 * np.log10(max(error, 1e-9)), 99))


# ---- rows of the table -------------------------------------------------------------------------------------


def _identity(clips: list[Plan], seen: list[Observed], pictures: np.ndarray) -> dict[str, float]:
    """How often a face is nearer to its own reference picture than to those of seven other clips."""
    people, others = pictures.shape[1], np.arange(_CHOICES)
    pixels = pictures.astype(np.float32) / 255
    size = pictures.shape[2]
    paper = np.broadcast_to(world.PAPER, (size, size, 3)).astype(np.float32)
    known = [[looks.looks(looks.find_head(p[None], paper, world.HEAD_SCALE[1])) for p in pair] for pair in pixels]
    right = []
    for b, (plan, observed) in enumerate(zip(clips, seen, strict=True)):
        for k, place in enumerate(_places(plan)):
            face = looks.looks(observed.heads[place])
            distances = [np.linalg.norm(face - known[(b + other) % len(clips)][k]) for other in others]
            right.append(np.argmin(distances) == 0)
    return {f"identity, first of {_CHOICES}" + (" (both)" if people == 2 else ""): _mean(right)}


def _voice(clips: list[Plan], seen: list[Observed]) -> dict[str, float]:
    """Pitch and timbre against the voice that was asked for."""
    voice = [jax.tree.map(lambda x: x[0], plan.people.voice) for plan in clips]
    asked = np.array([voices.pitch_hz(v) for v in voice])
    heard = np.array([np.median([s.pitch for s in o.syllables] or [1.0]) for o in seen])  # 1 Hz: nothing heard
    cents = np.abs(1200 * np.log2(heard / asked))
    shuffled = np.abs(1200 * np.log2(heard / np.roll(asked, 1)))
    fits = [(o.timbre, v) for o, v in zip(seen, voice, strict=True) if o.timbre]
    scales = [fit.scale for fit, _ in fits], [voices.formant_scale(v) for _, v in fits]
    falls = [fit.rolloff for fit, _ in fits], [voices.rolloff(v) for _, v in fits]
    return {
        "voice heard": _mean(o.syllables for o in seen),
        "pitch error, cents": float(np.median(cents)),
        "pitch error, shuffled": float(np.median(shuffled)),
        "pitch within 100 cents": _mean(cents < 100),
        "formant scale, correlation": _pearson(*scales),
        "roll-off, correlation": _pearson(*falls),
    }


def _speech(clips: list[Plan], seen: list[Observed]) -> dict[str, float]:
    """Vowels and number of syllables against the script."""
    asked = [tuple(plan.script.vowel[plan.script.on].tolist()) for plan in clips]
    heard = [o.timbre.vowels if o.timbre else () for o in seen]
    total = sum(map(len, asked))
    wrong = sum(map(sounds.edit_distance, asked, heard))
    shuffled = sum(map(sounds.edit_distance, asked, heard[1:] + heard[:1]))
    return {
        "vowel error rate": wrong / total,
        "vowel error rate, shuffled": shuffled / total,
        "syllable count": _mean(len(a) == len(b) for a, b in zip(asked, heard, strict=True)),
    }


def _sync(seen: list[Observed]) -> dict[str, float]:
    """Correlation of mouth opening and loudness, frame by frame; the shuffled value has the sounds of other clips.

    The best lag is the shift of the sound at which a clip correlates best.
    """
    mouths, sound = [o.openings[0] for o in seen], [o.loudness for o in seen]
    turned = [sound[b:] + sound[:b] for b in range(len(sound))]  # the own sound comes first
    table = np.array([[_pearson(mouth, s) for s in row] for mouth, row in zip(mouths, turned, strict=True)])
    profile = np.array([[_shifted(m, s, lag) for lag in _LAGS] for m, s in zip(mouths, sound, strict=True)])
    best = np.abs(np.array(_LAGS)[profile.argmax(axis=1)])
    return {
        "sync": float(table[:, 0].mean()),
        "sync, shuffled": float(table[:, 1:].mean()),
        "best lag 0": _mean(best == 0),
        "best lag within a frame": _mean(best <= 1),
        f"right sound of {_CHOICES}": _mean(table[:, :_CHOICES].argmax(axis=1) == 0),
    }


def _turns(clips: list[Plan], seen: list[Observed]) -> dict[str, float]:
    """Per syllable that is heard: whose voice is it, by pitch, and is it that person's mouth which opens?"""
    right, spoken = [], []
    for plan, observed in zip(clips, seen, strict=True):
        places = _places(plan)
        asked = np.log(np.asarray(voices.pitch_hz(plan.people.voice)))
        opening = np.stack([observed.openings[place] - observed.openings[place].min() for place in places])
        for syllable in observed.syllables:
            speaker = np.abs(asked - np.log(syllable.pitch)).argmin()
            first, last = int(syllable.start * world.FPS), int(np.ceil(syllable.end * world.FPS))
            right.append(opening[:, first:last].mean(axis=1).argmax() == speaker)
        spoken.append(len(observed.syllables) == plan.script.on.sum())
    return {"right face for the voice": _mean(right), "syllable count": _mean(spoken)}


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


def _mean(values) -> float:
    return float(np.mean([bool(value) for value in values]))
