"""Noise levels and timesteps of one sampling run, computed on the host in float64.

Convention, used everywhere in this package: ``x_sigma = (1 - sigma) * clean + sigma * noise``, the network predicts the
velocity ``noise - clean``, its timestep is ``1000 * sigma``, cut to an integer for all but the few-step solvers. Sigma
falls from 1 to 0. Source: ``wan/utils/fm_solvers_unipc.py`` and ``fm_solvers.py``; LightX2V
``schedulers/wan/step_distill``; TurboDiffusion ``turbodiffusion/inference``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from wan_jax.config import NUM_TRAIN_TIMESTEPS
from wan_jax.errors import InputError, nearest

RCM = ("rcm", "rcm-ode")
FEW_STEPS = ("distilled", *RCM)  # for models that were distilled to do with a few steps and without guidance
SOLVERS = ("unipc", "dpm++", "euler", *FEW_STEPS)
# Arctangents of noise over clean at which rCM models were trained to start a step, after the first.
RCM_ANGLES = (1.5, 1.4, 1.0)


class Schedule(NamedTuple):
    """``sigmas`` [N + 1] float64 ending in 0; ``timesteps`` [N], what the network is given.

    ``noise_scale`` times the noise is the first sample: rCM models start there, the others at the noise itself.
    """

    sigmas: np.ndarray
    timesteps: np.ndarray
    noise_scale: float = 1.0

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """``s * sigma / (1 + (s - 1) * sigma)``: more of the steps at high noise when ``s > 1``."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_schedule(solver: str, num_steps: int, shift: float | None, *, sigma_max: float = 80.0) -> Schedule:
    """The official grid of each solver.

    UniPC starts at sigma 0.999, DPM-Solver++ and Euler at 1. "distilled" takes Euler's grid with exact timesteps: four
    steps of shift 5 are the 1000, 937.5, 833.3 and 625 of the step-distilled releases.

    Args:
        shift: None for rCM, whose levels are a list.
        sigma_max: of rCM alone: noise over clean at the start, above 14.2.
    """
    if solver not in SOLVERS:
        raise InputError(f"unknown solver {solver!r}: use {', '.join(SOLVERS)}{nearest(solver, SOLVERS)}")
    if num_steps < 1:
        raise InputError(f"num_steps={num_steps}: need at least 1")
    if solver in RCM:
        return _rcm_schedule(num_steps, sigma_max)
    if shift is None or not shift > 0:
        raise InputError(f"shift={shift}: need a positive number, released models use 3 to 16")
    first = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS)) if solver == "unipc" else 1.0
    sigmas = shift_sigmas(np.linspace(first, 0, num_steps + 1)[:-1], shift)
    if solver == "distilled":
        return Schedule(np.append(sigmas, 0.0), sigmas * NUM_TRAIN_TIMESTEPS)
    # Truncated before sigma is rounded to float32: the rounded product can fall on the other side of an integer.
    timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int32)
    return Schedule(np.append(sigmas, 0.0), timesteps)


def _rcm_schedule(num_steps: int, sigma_max: float) -> Schedule:
    if num_steps > len(RCM_ANGLES) + 1:
        raise InputError(f"num_steps={num_steps}: rCM models take 1 to {len(RCM_ANGLES) + 1}")
    if not sigma_max > np.tan(RCM_ANGLES[0]):
        raise InputError(f"sigma_max={sigma_max:g}: need above 14.2; released models use 80 (text), 200 (pictures)")
    angles = np.array([np.arctan(sigma_max), *RCM_ANGLES])[:num_steps]
    sigmas = np.sin(angles) / (np.sin(angles) + np.cos(angles))
    return Schedule(np.append(sigmas, 0.0), sigmas * NUM_TRAIN_TIMESTEPS, float(sigmas[0]))
