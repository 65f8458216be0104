"""Noise levels and timesteps of one sampling run, computed on the host in float64.

Convention, used everywhere in this package: ``x_sigma = (1 - sigma) * clean + sigma * noise``, the network predicts the
velocity ``noise - clean``, its timestep is ``1000 * sigma`` cut to an integer. Sigma falls from 1 to 0.
Source: ``wan/utils/fm_solvers_unipc.py`` and ``fm_solvers.py``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wan_jax.config import NUM_TRAIN_TIMESTEPS
from wan_jax.errors import InputError, nearest

SOLVERS = ("unipc", "dpm++", "euler")


class Schedule(NamedTuple):
    """``sigmas`` [N + 1] float64 ending in 0; ``timesteps`` [N] int32, what the network is given."""

    sigmas: np.ndarray
    timesteps: np.ndarray

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """``s * sigma / (1 + (s - 1) * sigma)``: more of the steps at high noise when ``s > 1``."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_schedule(solver: str, num_steps: int, shift: float) -> Schedule:
    """The official grid of each solver: UniPC starts at sigma 0.999, DPM-Solver++ and Euler at 1."""
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}: use {', '.join(SOLVERS)}{nearest(solver, SOLVERS)}")
    if num_steps < 1:
        raise InputError(f"num_steps={num_steps}: need at least 1")
    if not shift > 0:
        raise InputError(f"shift={shift}: need a positive number, released models use 3 to 16")
    first = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS)) if solver == "unipc" else 1.0
    sigmas = shift_sigmas(np.linspace(first, 0, num_steps + 1)[:-1], shift)
    # Truncated before sigma is rounded to float32: the rounded product can fall on the other side of an integer.
    timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int32)
    return Schedule(np.append(sigmas, 0.0), timesteps)
