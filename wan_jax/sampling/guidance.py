"""Guidance: one velocity out of several network passes, and the choice of expert.

Classifier-free guidance runs the network with the prompt and with the negative prompt,
``v = v_negative + scale * (v_prompt - v_negative)``: as one batch of two, or as two passes when memory asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import NUM_TRAIN_TIMESTEPS
from wan_jax.errors import InputError, nearest

Array = jax.Array
MODES = ("batch", "sequential", "none")


def guided(
    network: Callable[[Array, Array, Array], Array],
    sample: Array,
    timestep: Array,
    scale: Array,
    prompts: Any,
    mode: str,
) -> Array:
    """Velocity of ``sample`` [1, ...] under guidance.

    Args:
        network: ``(samples [G, ...], timesteps [G], prompts [G, ...]) -> velocities [G, ...]``.
        timestep, scale: float32 scalars, arrays of the program.
        prompts: pytree whose leaves carry a leading axis (prompt, negative prompt); one entry suffices for "none".
        mode: "batch", "sequential", or "none" (the prompt alone, ``scale`` unused).
    """
    if mode == "none":
        return network(sample, timestep[None], jax.tree.map(lambda p: p[:1], prompts))
    if mode == "batch":
        pair = network(jnp.concatenate([sample, sample]), jnp.stack([timestep, timestep]), prompts)
        prompt, negative = pair[:1], pair[1:]
    else:
        # A scan, so that the program holds the network once and one pass ends before the next begins.
        each = jax.tree.map(lambda p: p[:, None], prompts)
        prompt, negative = jax.lax.map(lambda p: network(sample, timestep[None], p), each)
    return negative + scale * (prompt - negative)


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"guidance mode {mode!r}: use {', '.join(MODES)}{nearest(mode, MODES)}")
    return mode


def expert_steps(timesteps: np.ndarray, boundary: float | None) -> int:
    """Number of leading steps that the high-noise expert takes: those with timestep >= boundary * 1000."""
    if boundary is None:
        return len(timesteps)
    return int((timesteps >= boundary * NUM_TRAIN_TIMESTEPS).sum())
