"""Contact sheet of a talking clip: the references, frames, and the mouth's opening over the loudness of the sound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from wan_jax.media import Clip, contact_sheet, resample
from wan_jax.references import letterbox

_GAP, _STRIP = 4, 56  # pixels
_GREY = np.uint8([190, 190, 190])
_LINES = np.uint8([[200, 30, 60], [30, 90, 200]])  # mouths, from left to right
_RATE = 16_000


def talking_sheet(
    clip: Clip, pictures: Sequence[np.ndarray], openings: Sequence[np.ndarray] = (), *, columns: int = 6, rows: int = 2
) -> np.ndarray:
    """References in the first column, evenly spaced frames beside them, and below both a strip of time.

    In the strip the loudness of the sound is a grey hill and every mouth's opening a line, both scaled to their largest
    value: a mouth that follows the sound draws the outline of the hill.

    Args:
        pictures: uint8 [h, w, 3], of any sizes; as many as there are rows are shown.
        openings: [T] each, in any unit; of one or two mouths.
    Returns:
        uint8 [H, W, 3].
    """
    frames = contact_sheet(clip, columns=columns, rows=rows, gap=_GAP)
    height, width = clip.video.shape[1:3]
    shown = pictures[: (len(frames) + _GAP) // (height + _GAP)]
    first = np.full((len(frames), width + _GAP if shown else 0, 3), 255, np.uint8)
    for k, picture in enumerate(shown):
        top = k * (height + _GAP)
        first[top : top + height, :width] = letterbox(picture, height, width)
    sheet = np.concatenate([first, frames], axis=1)
    if clip.audio is None and not openings:
        return sheet
    gap = np.full((_GAP, sheet.shape[1], 3), 255, np.uint8)
    return np.concatenate([sheet, gap, _strip(clip, openings, sheet.shape[1])])


def _strip(clip: Clip, openings: Sequence[np.ndarray], width: int) -> np.ndarray:
    """uint8 [_STRIP, width, 3]; time runs over the width."""
    strip = np.full((_STRIP, width, 3), 250, np.uint8)
    below = _STRIP - 1 - np.arange(_STRIP)[:, None]  # how far a pixel is from the bottom
    if clip.audio is not None:
        audio = resample(clip.audio, clip.sample_rate, _RATE)
        parts = np.array_split(audio, max(len(audio) // (_RATE // 50), 1))  # of 20 ms
        loudness = np.sqrt([np.square(part).mean() for part in parts])
        strip[below < _heights(loudness, width, loudness.max())] = _GREY
    for opening, colour in zip(openings, _LINES, strict=False):
        line = _heights(opening, width, np.max(openings))
        slope = np.abs(np.diff(line, prepend=line[0]))  # steep parts stay connected
        strip[np.abs(below - line) <= 1 + slope / 2] = colour
    return strip


def _heights(values: np.ndarray, width: int, top: float) -> np.ndarray:
    """Values at equal times as heights within the strip, [width]; ``top`` lies near its upper edge."""
    middles = (np.arange(len(values)) + 0.5) / len(values)
    curve = np.interp((np.arange(width) + 0.5) / width, middles, values)
    return (_STRIP - 4) * curve / max(top, 1e-9)
