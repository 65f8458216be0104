"""Guidance: one velocity out of several network passes, and the choice of expert.

Every kind of guidance is a weighted sum of passes. Classifier-free guidance runs the network with the prompt and with
the negative prompt, ``v = scale * v_prompt + (1 - scale) * v_negative``; guidance by references adds passes without
them. Passes run as one batch, or one after the other when memory asks for it; where guidance is off, the first alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.config import NUM_TRAIN_TIMESTEPS
from wan_jax.errors import InputError, nearest
from wan_jax.sampling.schedule import Schedule

Array = jax.Array
MODES = ("batch", "sequential", "none")


def guided(
    network: Callable[[Any, Array, Any, Any], tuple[Any, Any]],
    sample: Any,
    timestep: Array,
    weights: Any,
    passes: Any,
    mode: str,
    memory: Any = None,
) -> tuple[Any, Any]:
    """Velocity of ``sample`` under guidance: the weighted sum of the velocities of ``G`` passes.

    Args:
        network: ``(samples [G, ...], timesteps [G], passes [G, ...], memory [G, ...]) -> velocities, memory``.
        sample: [1, ...], or a pytree of such (one latent per stream).
        timestep: float32 scalar, an array of the program.
        weights: [G] for each array of ``sample``, arrays of the program; their sum is 1.
        passes: pytree whose leaves carry a leading axis G: what distinguishes the passes.
        mode: "batch" (all passes at once), "sequential" (the memory of one pass and of the sum), or "none": the first
            pass, which is the prompt's, with weight 1.
        memory: what the network keeps of each pass from step to step, a pytree as ``passes``; None is nothing.
    Returns:
        The velocity, and what the network keeps.
    """
    if mode == "none":
        return network(sample, timestep[None], jax.tree.map(lambda p: p[:1], passes), memory)
    num_passes = len(jax.tree.leaves(passes)[0])
    if mode == "sequential" and num_passes > 1:
        # A scan, so that the program holds the network once and one pass ends before the next begins.
        def add(total: Any, now: tuple[Any, Any, Any]) -> tuple[Any, Any]:
            weight, *each = now
            passes, memory = jax.tree.map(lambda p: p[None], each)
            velocity, memory = network(sample, timestep[None], passes, memory)
            memory = jax.tree.map(lambda m: m[0], memory)
            return jax.tree.map(lambda t, w, v: t + w * v, total, weight, velocity), memory

        return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, sample), (weights, passes, memory))
    samples = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_passes, *x.shape[1:])), sample)
    velocities, memory = network(samples, jnp.broadcast_to(timestep, num_passes), passes, memory)
    # Full precision: a matrix unit would round latents and weights.
    total = functools.partial(jnp.tensordot, axes=1, precision=jax.lax.Precision.HIGHEST)
    return jax.tree.map(lambda v, w: total(w, v)[None], velocities, weights), memory


def classifier_free(scale: Any) -> Any:
    """Weights of (prompt, negative prompt): [..., 2] for scales [...]."""
    return jnp.stack([scale, 1 - scale], axis=-1)


def check_mode(mode: str) -> str:
    if mode not in MODES:
        raise InputError(f"guidance mode {mode!r}: use {', '.join(MODES)}{nearest(mode, MODES)}")
    return mode


def expert_steps(timesteps: np.ndarray, boundary: float | None) -> int:
    """Number of leading steps that the high-noise expert takes: those with timestep >= boundary * 1000."""
    if boundary is None:
        return len(timesteps)
    return int((timesteps >= boundary * NUM_TRAIN_TIMESTEPS).sum())


class Phase(NamedTuple):
    """Steps in a row, from ``start`` up to ``stop``, that one expert takes under one mode of guidance."""

    high_noise: bool
    mode: str
    start: int
    stop: int


def phases(schedule: Schedule, boundary: float | None, mode: str, interval: tuple[float, float]) -> list[Phase]:
    """What runs when: each phase is a program of its own, so that steps without guidance pay for one pass alone.

    Args:
        boundary: see `expert_steps`.
        mode: of guidance inside the interval; outside it is "none".
        interval: noise levels, above the first and up to the second. Source: Kynkaanniemi et al., arXiv 2404.07724.
    """
    low, high = interval
    experts = expert_steps(schedule.timesteps, boundary)
    each = [(i < experts, mode if low < sigma <= high else "none") for i, sigma in enumerate(schedule.sigmas[:-1])]
    runs = [(key, len(list(steps))) for key, steps in itertools.groupby(each)]
    stops = itertools.accumulate(length for _, length in runs)
    return [Phase(*key, stop - length, stop) for (key, length), stop in zip(runs, stops, strict=True)]
