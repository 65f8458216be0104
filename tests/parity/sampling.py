"""Sampler goldens: toy trajectories of both solvers, and full guided sampling of tiny DiTs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from tests.parity.common import build_dit, pad_rows, to_last
from wan_jax.conditions import Condition, pin_first_frame
from wan_jax.pipeline import dit_velocity
from wan_jax.sampling.guidance import expert_steps
from wan_jax.sampling.sampler import make_steps, sample, start
from wan_jax.sampling.schedule import make_schedule
from wan_jax.sampling.solvers import coefficients, init_state, step

SOLVERS = {"unipc": "unipc", "dpmpp": "dpm++"}


def check_schedulers(config: dict, tensors: dict[str, np.ndarray]) -> None:
    a, b, w = config["a"], config["b"], config["w"]
    for case in config["cases"]:
        key, solver = case["key"], SOLVERS[case["solver"]]
        schedule = make_schedule(solver, case["steps"], case["shift"])
        np.testing.assert_array_equal(schedule.timesteps, tensors[f"out_int/{key}/timesteps"])
        np.testing.assert_allclose(schedule.sigmas, tensors[f"sched/{key}/sigmas"], atol=1e-6)
        table = coefficients(solver, schedule.sigmas)
        state = init_state(jnp.asarray(tensors["in/x0"]))
        for i, t in enumerate(schedule.timesteps):
            velocity = a * state.sample + b * np.sin(w * t / 1000) + tensors["in/c"]
            state = step(state, velocity, table.sigma[i], table.correct[i], table.predict[i])
            expected = tensors[f"out/{key}/trajectory"][i + 1]
            np.testing.assert_allclose(np.asarray(state.sample), expected, atol=1e-5, rtol=0, err_msg=f"{key} step {i}")


def check_e2e(config: dict, tensors: dict[str, np.ndarray]) -> None:
    text_len = config["dit"]["text_len"]
    text = np.stack([pad_rows(tensors[name], text_len) for name in ("in/context", "in/context_null")])
    condition = Condition(jnp.asarray(text))
    if "in/y" in tensors:
        condition = condition._replace(video_BTHWC=jnp.asarray(to_last(tensors["in/y"])[None]))
    noise = jnp.asarray(to_last(tensors["in/noise"])[None])
    if "in/z0" in tensors:
        first = jnp.asarray(to_last(tensors["in/z0"])[None])
        pin, token_time = pin_first_frame(first, noise.shape, tuple(config["dit"]["patch_size"]))
        condition = condition._replace(pin=pin, token_time=token_time)
    for name, solver in SOLVERS.items():
        expected = tensors.get(f"out/{name}/trajectory")
        if expected is None:
            continue
        schedule = make_schedule(solver, config["steps"], config["shift"])
        boundary = config.get("boundary")
        high = expert_steps(schedule.timesteps, boundary)
        if boundary is None:
            experts, scales = [(build_dit(config["dit"], tensors), high)], np.float32(config["guide_scale"])
        else:
            np.testing.assert_array_equal(
                np.arange(len(schedule.timesteps)) < high, tensors[f"out_int/{name}/high_noise_used"]
            )
            np.testing.assert_array_equal(schedule.timesteps, tensors[f"out_int/{name}/timesteps"])
            experts = [
                (build_dit(config["dit"], tensors, f"{part}_noise_model."), last)
                for part, last in (("high", high), ("low", schedule.num_steps))
            ]
            low_scale, high_scale = config["guide_scale_low_high"]
            scales = np.where(np.arange(schedule.num_steps) < high, high_scale, low_scale)
        steps = make_steps(solver, schedule, scales)
        for mode in ("batch", "sequential"):
            trajectory = []
            state, first = start(noise, condition.pin), 0
            for dit, last in experts:
                state = sample(
                    dit_velocity(mode), (dit, condition), state, steps, first=first, last=last, pin=condition.pin,
                    callback=lambda p, t=trajectory: t.append(np.asarray(p.state.sample[0])),
                )  # fmt: skip
                first = last
            assert len(trajectory) == schedule.num_steps
            for i, ours in enumerate(trajectory):
                reference = to_last(expected[i + 1])
                np.testing.assert_allclose(ours, reference, atol=2e-4, rtol=0, err_msg=f"{name} {mode} step {i}")


RUNNERS = {"schedulers_": check_schedulers, "e2e_": check_e2e}
