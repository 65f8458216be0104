"""UniPC, DPM-Solver++ 2M, Euler and rCM as one pure step function over a table of coefficients.

All are linear multistep methods: each step combines the current sample, the sample and the clean predictions of the
steps before, with factors that depend on the noise levels alone. Those factors are computed on the host in float64,
with every limit (sigma 1, sigma 0) taken there, and enter the compiled program as arrays: a new schedule or shift never
recompiles, and no logarithm of zero ever reaches the device. Nor does a new solver, but that rCM adds fresh noise in
every step, which the others' program does not have.

Source: ``FlowUniPCMultistepScheduler`` (order 2, bh2, data prediction, lower_order_final) in
wan/utils/fm_solvers_unipc.py; ``FlowDPMSolverMultistepScheduler`` (2M, midpoint) in wan/utils/fm_solvers.py;
TurboDiffusion ``turbodiffusion/inference`` (rCM). Papers: arXiv 2302.04867, arXiv 2211.01095, arXiv 2510.08431.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


class Coefficients(NamedTuple):
    """Factors of every step, float32. Scanned over their leading axis together with the timesteps.

    sigma: [N] noise level of the sample given to the network.
    correct: [N, 5] factors of (sample, last corrected, clean, clean one step ago, clean two steps ago).
    predict: [N, 3] factors of (corrected, clean, clean one step ago).
    fresh: [N] factor of fresh normal noise; None for solvers that add none.
    """

    sigma: np.ndarray
    correct: np.ndarray
    predict: np.ndarray
    fresh: np.ndarray | None = None


class State(NamedTuple):
    """Solver state. Each entry is like the latents: one float32 array, or a dictionary of one per stream."""

    sample: Any  # what the network sees next; the result after the last step
    corrected: Any
    clean1: Any  # clean prediction one step ago
    clean2: Any  # two steps ago
    added: Any = None  # what the network's blocks added last, of a run that leaves some out (``step_cache.py``)


def init_state(noise: Any) -> State:
    """State before the first step. Every entry is a buffer of its own, so that the state can be donated."""

    def zeros() -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), noise)

    return State(jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), noise), zeros(), zeros(), zeros())


def step(
    state: State,
    velocity: Any,
    sigma: Array,
    correct: Array,
    predict: Array,
    fresh: Array | None = None,
    noise: Any = None,
) -> State:
    """One step of any solver: read the clean prediction off the velocity, correct this sample, predict the next.

    ``noise`` is like the sample, needed where the table has ``fresh``.
    """

    def combine(factors: Array, *terms: Any) -> Any:
        return jax.tree.map(lambda *xs: sum(f * x for f, x in zip(factors, xs, strict=True)), *terms)

    clean = jax.tree.map(lambda x, v: x - sigma * v.astype(jnp.float32), state.sample, velocity)
    corrected = combine(correct, state.sample, state.corrected, clean, state.clean1, state.clean2)
    sample = combine(predict, corrected, clean, state.clean1)
    if fresh is not None:
        sample = jax.tree.map(lambda x, n: x + fresh * n, sample, noise)
    return State(sample, corrected, clean, state.clean1)


def coefficients(solver: str, sigmas: np.ndarray) -> Coefficients:
    """Table for a schedule of N + 1 noise levels, float64, the last one 0."""
    # The official classes hold sigma in float32 and derive everything from it.
    sigmas = sigmas.astype(np.float32).astype(np.float64)
    num_steps = len(sigmas) - 1
    with np.errstate(divide="ignore"):
        lam = np.log(1 - sigmas) - np.log(sigmas)  # half log signal-to-noise ratio: -inf at sigma 1, +inf at 0
    correct = np.zeros((num_steps, 5))
    predict = np.zeros((num_steps, 3))
    correct[:, 0] = 1.0
    for i in range(num_steps):
        if solver == "unipc" and i > 0:
            correct[i] = _unipc_corrector(sigmas, lam, i, order=_unipc_order(i - 1, num_steps))
        predict[i, 0] = sigmas[i + 1] / sigmas[i]
        predict[i, 1] = 1 - predict[i, 0]  # first order: the straight line to the clean prediction
        second_order = {"dpm++": 0 < i < num_steps - 1, "unipc": _unipc_order(i, num_steps) == 2}
        if second_order.get(solver):
            # -alpha * expm1(-h) * 1/2 * (m_i - m_{i-1}) / r with r = (lam_i - lam_{i-1}) / h; r = inf at sigma 1.
            r = (lam[i] - lam[i - 1]) / (lam[i + 1] - lam[i])
            slope = -(1 - sigmas[i + 1]) * np.expm1(lam[i] - lam[i + 1]) * 0.5 / r
            predict[i, 1] += slope
            predict[i, 2] -= slope
    fresh = None
    if solver == "rcm":  # noise the clean prediction anew, to the next level
        fresh = sigmas[1:].astype(np.float32)
        predict[:] = np.stack([0 * sigmas[1:], 1 - sigmas[1:], 0 * sigmas[1:]], axis=1)
    return Coefficients(*(x.astype(np.float32) for x in (sigmas[:-1], correct, predict)), fresh)


def _unipc_order(i: int, num_steps: int) -> int:
    """Order 2, but 1 on the first and on the last step."""
    return min(2, num_steps - i, i + 1)


def _unipc_corrector(sigmas: np.ndarray, lam: np.ndarray, i: int, order: int) -> np.ndarray:
    """Factors of UniC: the sample at step i again, now that its own clean prediction is known."""
    h = lam[i] - lam[i - 1]
    B = np.expm1(-h)
    scale = -(1 - sigmas[i]) * B
    ratio = sigmas[i] / sigmas[i - 1]
    if order == 1:  # R = (m_i - m_{i-1}) / 2
        return np.array([0, ratio, scale / 2, scale / 2, 0])
    r = (lam[i - 2] - lam[i - 1]) / h
    phi1 = B / -h - 1
    phi2 = phi1 / -h - 0.5
    rho1, rho2 = np.linalg.solve([[1, 1], [r, 1]], [phi1 / B, 2 * phi2 / B])
    # R = rho1 (m_{i-2} - m_{i-1}) / r + rho2 (m_i - m_{i-1})
    return np.array([0, ratio, scale * rho2, scale * (1 - rho1 / r - rho2), scale * rho1 / r])
