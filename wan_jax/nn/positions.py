"""Positions of references in time: Syn-RoPE, which gives the look and the voice of one person the same far-away place.

Source: DreamID-Omni, ``modules/model.py`` and ``dreamid_omni_engine.py``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import ml_dtypes
import numpy as np

MARGIN = 150  # latent frames from one identity to the next; generated clips stay below


def reference_positions(
    num_frames: int,
    num_audio: int,
    num_images: int,
    clip_lengths: Sequence[int],
    audio_offset: int | None = None,
    dtype: np.typing.DTypeLike = ml_dtypes.bfloat16,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Places of generated latents followed by those of the references, in both streams.

    Reference picture k = 1, 2, ... is at frame 150 k; voice k begins at k times the audio latents of 150 frames.

    Args:
        num_frames: F, of generated latent frames.
        num_audio: La, of generated audio latents.
        num_images: R, of reference pictures, one latent frame each.
        clip_lengths: of each voice, in audio latents.
        audio_offset: audio latents of 150 frames; None: floor(150 / scale).
        dtype: to which the scale is rounded. The released engine keeps it as bfloat16, and so was it trained.
    Returns:
        Frames int64 [F + R]; audio int64 [La + sum of clip_lengths], in audio latents; and the scale F / La, which
        turns the second into frames.
    """
    scale = float(np.asarray(num_frames / num_audio, dtype))
    offset = math.floor(MARGIN / scale) if audio_offset is None else audio_offset
    frames = [*range(num_frames), *(MARGIN * k for k in range(1, num_images + 1))]
    clips = [k * offset + np.arange(length) for k, length in enumerate(clip_lengths, 1)]
    return np.asarray(frames), np.concatenate([np.arange(num_audio), *clips]), scale
