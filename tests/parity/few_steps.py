"""Few-step goldens: rCM in its stochastic and deterministic form, step-distilled Euler, one and two experts, all on a
formula in place of the network.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.sampling.guidance import expert_steps
from wan_jax.sampling.sampler import make_steps, start
from wan_jax.sampling.schedule import Schedule, make_schedule
from wan_jax.sampling.solvers import step

ATOL, TIMESTEP_ATOL = 2e-5, 1e-4


def trajectory(
    solver: str, schedule: Schedule, noise: np.ndarray, high: int, renoise: np.ndarray | None = None
) -> list[np.ndarray]:
    """The sample after every step under the goldens' ``toy_velocity``; from ``high`` on the second expert's."""
    steps, state, samples = make_steps(solver, schedule), start(jnp.asarray(noise), None, schedule.noise_scale), []
    for i, t in enumerate(steps.timestep):
        x = state.sample
        velocity = 0.7 * x - 0.4 * jnp.tanh(2 * x) + 0.3 * t / 1000 + 0.25 * (i >= high)
        now = jax.tree.map(lambda table, i=i: table[i], steps.solver)
        state = step(state, velocity, *now, None if renoise is None else renoise[i])
        samples.append(np.asarray(state.sample))
    return samples


def check_rcm(config: dict, tensors: dict[str, np.ndarray]) -> None:
    call = config["call"]
    solver = "rcm-ode" if call["ode"] else "rcm"
    schedule = make_schedule(solver, call["num_steps"], None, sigma_max=call["sigma_max"])
    np.testing.assert_allclose(schedule.sigmas, tensors["out/t_steps_f64"], atol=1e-8, rtol=0)
    np.testing.assert_allclose(schedule.timesteps, tensors["out/model_timesteps"], atol=TIMESTEP_ATOL, rtol=0)
    high = expert_steps(schedule.timesteps, call.get("boundary"))
    assert 0 < high < call["num_steps"] or "boundary" not in call  # both experts take part
    samples = trajectory(solver, schedule, tensors["in/noise"], high, tensors["in/renoise"])
    np.testing.assert_allclose(samples[-1], tensors["out/samples"], atol=ATOL, rtol=0)


def check_step_distill(config: dict, tensors: dict[str, np.ndarray]) -> None:
    call = config["call"]
    schedule = make_schedule("distilled", len(call["denoising_step_list"]), call["sample_shift"])
    np.testing.assert_allclose(schedule.sigmas[:-1], tensors["out/sigmas"], atol=1e-6, rtol=0)
    np.testing.assert_allclose(schedule.timesteps, tensors["out/timesteps"], atol=TIMESTEP_ATOL, rtol=0)
    high = call.get("boundary_step_index", schedule.num_steps)
    if call["two_experts"]:  # the releases count steps, we compare timesteps
        assert {expert_steps(schedule.timesteps, boundary) for boundary in (0.875, 0.9)} == {high}
    for i, ours in enumerate(trajectory("distilled", schedule, tensors["in/noise"], high)):
        np.testing.assert_allclose(ours, tensors["out/trajectory"][i], atol=ATOL, rtol=0, err_msg=f"step {i}")


RUNNERS = {"rcm_": check_rcm, "step_distill_": check_step_distill}
