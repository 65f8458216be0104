"""Errors that are meant for users: their text alone must say what was got, what was expected and how to fix it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class WanError(Exception):
    """Base of every error that wan_jax raises on purpose. The command line prints its text without a traceback."""


class InputError(WanError, ValueError):
    """A value given by the user cannot be used: size, frame count, prompt, image, option."""


class CheckpointError(WanError):
    """A checkpoint is missing, incomplete, corrupt, hostile, or does not fit the model."""


class NonFiniteError(WanError, FloatingPointError):
    """Sampling or decoding produced NaN or infinity."""


class OutOfMemoryError(WanError, MemoryError):
    """The device or the host ran out of memory; the text names what to change."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``", did you mean a or b?"`` for the closest choices, or an empty string."""
    close = difflib.get_close_matches(name.lower(), list(choices), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(close)}?" if close else ""
