"""What is seen in a clip of puppets: wall, motion, mouth opening, looks of a face, noise. Array code, nothing learned.

A person is what differs from the wall. The silhouette is tracked, the head is cut out along the track, and the mouth
is where the aligned cut-out takes the colour that only the inside of a mouth has.

Axes: ``T`` frames, ``H W C``, ``N`` rows and columns of a cut-out. Pixels are float32 in [0, 1], lengths are in sides
of the picture; ``scale`` is that of the head, see `wan_jax.train.puppets.faces`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from wan_jax.train.puppets import world
from wan_jax.train.puppets.faces import MOUTH

_GRID = 48  # rows and columns of a cut-out
_WIDE, _TALL = 0.30, 0.62  # half-width and height of a cut-out, for a head of scale 1
_POOL = 4  # cut-out pixels that the looks are averaged over, each way
_MOVED, _NODDED = 0.055, 0.010  # shift from first to last frames; spread of the height; for scale 1
_MOUTH_REACH = 0.30  # distance in colour at which a pixel no longer counts as mouth
_MOUTH_HALF = np.float32([0.085, 0.10])  # rows, columns of the place of the mouth, for scale 1


@dataclass(frozen=True)
class Head:
    """One tracked person."""

    x: np.ndarray  # [T] middle of the head
    top: np.ndarray  # [T] top of the silhouette
    scale: float
    aligned: np.ndarray  # [T, N, N, 3] head along the track, the wall replaced by grey


def find_wall(video: np.ndarray) -> tuple[int, int]:
    """Colour and pattern, indices into `world.WALLS` and `world.PATTERNS`: the nearest render, at the upper sides."""
    size = video.shape[1]
    seen = np.median(video, axis=0)[: size // 2, _sides(size)]
    errors = [
        [np.square(wall_image(colour, pattern, size)[: size // 2, _sides(size)] - seen).mean() for pattern in range(3)]
        for colour in range(len(world.WALLS))
    ]
    best = np.unravel_index(np.argmin(errors), np.shape(errors))
    return int(best[0]), int(best[1])


@functools.lru_cache(maxsize=64)
def wall_image(colour: int, pattern: int, size: int) -> np.ndarray:
    """One background, [H, W, 3]."""
    return np.asarray(world.wall(colour, pattern, size))


def find_head(video: np.ndarray, wall_HWC: np.ndarray, scale: float, side: str = "") -> Head:
    """Track one person.

    Args:
        wall_HWC: what is behind.
        side: "left" or "right" half of the picture, or all of it.
    """
    size = video.shape[1]
    half = {"left": slice(0, size // 2), "right": slice(size // 2, size), "": slice(0, size)}[side]
    differs = np.clip((np.abs(_smooth(video - wall_HWC)).max(axis=-1) - 0.06) / 0.08, 0, 1)
    person = np.zeros_like(differs)
    person[:, :, half] = differs[:, :, half]
    rightwards, leftwards = np.maximum.accumulate(person, 2), np.maximum.accumulate(person[:, :, ::-1], 2)[:, :, ::-1]
    person = np.minimum(rightwards, leftwards)  # what lies between two outer edges belongs to the person

    grid = (np.arange(size) + 0.5) / size
    heights = np.maximum.accumulate(person, axis=1).sum(axis=1) / size  # [T, W]; below the topmost point all is person
    top = 1 - np.sort(heights, axis=1)[:, -max(size // 12, 1) :].mean(axis=1)
    head = person * (grid[:, None] < top[:, None, None] + 0.32 * scale)
    x = (head.sum(axis=1) * grid).sum(axis=1) / np.maximum(head.sum(axis=(1, 2)), 1e-6)

    lit = person[..., None] * video + (1 - person[..., None]) * 0.5
    rows = top[:, None] + np.linspace(-0.02, _TALL, _GRID) * scale
    columns = x[:, None] + np.linspace(-_WIDE, _WIDE, _GRID) * scale
    return Head(x, top, scale, _sample(lit, rows * size - 0.5, columns * size - 0.5))


def motion(head: Head) -> int:
    """Index into `world.MOTIONS`."""
    shift = (np.median(head.x[-5:]) - np.median(head.x[:5])) / head.scale
    if abs(shift) > _MOVED:
        return world.RIGHT if shift > 0 else world.LEFT
    return world.NODS if head.top.std() / head.scale > _NODDED else world.STILL


def mouth_opening(head: Head) -> np.ndarray:
    """Area of the open mouth per frame, [T], in squared sides of the picture for a head of scale 1.

    The mouth is where the amount of its colour varies most within the clip. There each pixel counts by how far it
    went from its colour at rest (the clip's brighter frames; scripts leave pauses) towards that of an open mouth.
    """
    rows, columns = np.linspace(-0.02, _TALL, _GRID), np.linspace(-_WIDE, _WIDE, _GRID)
    middle = head.aligned[:, :, np.abs(columns) < _MOUTH_HALF[1]]
    near = np.clip(1 - np.linalg.norm(middle - MOUTH, axis=-1) / _MOUTH_REACH, 0, 1)
    varies = np.square(near.sum(axis=2).std(axis=0)) * (rows > 0.2)
    place = (varies * rows).sum() / max(varies.sum(), 1e-9)
    window = middle[:, np.abs(rows - place) < _MOUTH_HALF[0]]
    rest = np.quantile(window, 0.7, axis=0)
    way = MOUTH - rest
    went = ((window - rest) * way).sum(-1) / np.maximum(np.square(way).sum(-1), 0.05)
    return np.clip((went - 0.15) / 0.85, 0, 1).sum(axis=(1, 2)) * (rows[1] - rows[0]) * (columns[1] - columns[0])


def looks(head: Head) -> np.ndarray:
    """A vector that tells people apart: the cut-out, median over time, averaged in small squares."""
    still = np.median(head.aligned, axis=0)
    cells = _GRID // _POOL
    return still.reshape(cells, _POOL, cells, _POOL, 3).mean(axis=(1, 3)).reshape(-1)


def spread(video: np.ndarray) -> float:
    """Noise of a plain wall: standard deviation within a frame in the upper corners, mean over frames and channels."""
    size = video.shape[1]
    corners = video[:, : size // 8, _sides(size)]
    return float(corners.std(axis=(1, 2)).mean())


def flicker(video: np.ndarray) -> float:
    """Mean change between neighbouring frames in the upper corners."""
    size = video.shape[1]
    return float(np.abs(np.diff(video[:, : size // 8, _sides(size)], axis=0)).mean())


def _sides(size: int) -> np.ndarray:
    """Columns where nobody stands."""
    return np.r_[0 : size // 10, size - size // 10 : size]


def _smooth(x_THWC: np.ndarray) -> np.ndarray:
    """Mean over 3 x 3 pixels, edges repeated: a threshold then stands noise."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        padded = np.pad(x_THWC, pad, mode="edge")
        parts = [np.take(padded, np.arange(k, k + x_THWC.shape[axis]), axis) for k in range(3)]
        x_THWC = (parts[0] + parts[1] + parts[2]) / 3
    return x_THWC


def _sample(video: np.ndarray, rows_TN: np.ndarray, columns_TN: np.ndarray) -> np.ndarray:
    """Bilinear, edges clamped: [T, N, N, C]."""
    frames = np.arange(len(video))[:, None]

    def along(x: np.ndarray, at: np.ndarray) -> np.ndarray:  # [T, L, ...] at [T, N]
        at = np.clip(at, 0, x.shape[1] - 1)
        low = np.minimum(at.astype(int), x.shape[1] - 2)
        part = (at - low)[:, :, None, None]
        return x[frames, low] * (1 - part) + x[frames, low + 1] * part

    return along(along(video, rows_TN).swapaxes(1, 2), columns_TN).swapaxes(1, 2)
