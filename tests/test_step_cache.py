"""Steps that leave out the network's blocks: which ones, what they compute instead, and that one program serves."""

from __future__ import annotations

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wan_jax
from tests.test_dit import counting_compilations
from wan_jax import pipeline
from wan_jax.config import MODELS
from wan_jax.errors import InputError
from wan_jax.nn.reuse import Reuse
from wan_jax.request import from_settings, resolve
from wan_jax.resume import Resume
from wan_jax.sampling import step_cache
from wan_jax.sampling.guidance import expert_steps
from wan_jax.sampling.sampler import make_steps, sample, start
from wan_jax.sampling.step_cache import FIRST, MOST, Curve, find_curve, plan_skips

OPTIONS = dict(size=(32, 32), num_frames=1, num_steps=8, solver="euler", shift=1.0)
SIGMAS = np.linspace(1, 0.05, 20)


@pytest.fixture(scope="module")
def t2v(tiny_folder):
    return wan_jax.load(tiny_folder("t2v"), dtype="float32", offload=False)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("WAN_JAX_HOME", str(tmp_path))
    return tmp_path


def run(model: wan_jax.Model, skip: np.ndarray | None, **options) -> np.ndarray:
    """Latents with these steps left out."""
    how = {name: options.pop(name) for name in ("segment", "callback", "state", "first") if name in options}
    request = resolve(model.spec, "a cat", **OPTIONS | options)
    condition, schedule = pipeline.encode(model, request), request.schedule()
    velocity, guidance = pipeline.make_velocity(model.spec, request, condition, schedule.timesteps, schedule.num_steps)
    steps = make_steps(request.solver, schedule, guidance, skip=skip)
    state = how.pop("state", None) or start(pipeline.noise(model, request, 0), condition.pin)
    return jax.tree.map(np.asarray, sample(velocity, (model.dit, condition), state, steps, **how).sample)


# ---- which steps -------------------------------------------------------------------------------------------


def test_nothing_changes_then_most_steps_do_without():
    skips = plan_skips(Curve(SIGMAS, {"video": np.ones(20)}), SIGMAS, 0.01)
    first = round(FIRST * 20)
    assert not skips[:first].any()
    runs = "".join("s" if skip else "R" for skip in skips[first:])
    assert runs.startswith("s" * MOST + "R" + "s" * MOST + "R")


def test_the_threshold_is_a_sum_of_differences_of_any_stream():
    """2 % a step: one may go within 0.03, two (0.02 + 0.04) within 0.07. The stream that changes more rules."""
    steps = np.arange(20)
    curve = Curve(SIGMAS, {"video": 1 + 0.0 * steps, "audio": 1.02**steps})
    for threshold, pattern in ((0.0, "RRRRRR"), (0.03, "sRsRsR"), (0.07, "ssRssR")):
        skips = plan_skips(curve, SIGMAS, threshold)
        assert "".join("s" if skip else "R" for skip in skips[4:10]) == pattern
    assert not plan_skips(Curve(SIGMAS, {"video": 1.5**steps}), SIGMAS, 0.2).any()


def test_another_schedule_uses_the_same_curve():
    curve = Curve(SIGMAS, {"video": np.exp(-SIGMAS)})
    few, many = (plan_skips(curve, np.linspace(1, 0.05, n), 0.25).mean() for n in (10, 80))
    assert 0 < few < many


def test_what_starts_anew_runs():
    curve = Curve(SIGMAS, {"video": np.ones(20)})
    assert plan_skips(curve, SIGMAS, 0.1)[6] and not plan_skips(curve, SIGMAS, 0.1, starts=(0, 6))[6]


# ---- what they compute -------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", ["batch", "sequential", "none"])
def test_no_step_left_out_changes_nothing(t2v, guidance):
    options = dict(guidance="batch", guidance_scale=1.0) if guidance == "none" else dict(guidance=guidance)
    np.testing.assert_array_equal(run(t2v, np.zeros(8, bool), **options), run(t2v, None, **options))


def test_a_step_adds_what_the_blocks_added_before(t2v):
    """By hand: embedding, the sum of the step before, head."""
    dit, key = t2v.dit, jax.random.key(0)
    x = jax.random.normal(key, (2, 1, 4, 4, dit.cfg.in_dim))
    text = jax.random.normal(key, (2, dit.cfg.text_len, dit.cfg.text_dim))
    before, now = jnp.full(2, 600.0), jnp.full(2, 500.0)
    velocity, added = dit(x, before, text, reuse=Reuse(jnp.array(True)))
    np.testing.assert_array_equal(velocity, dit(x, before, text))  # nothing to reuse yet: all blocks ran
    ran, _ = dit(0.9 * x, now, text, reuse=Reuse(jnp.array(False), added))
    np.testing.assert_allclose(ran, dit(0.9 * x, now, text), atol=1e-6)
    reused, same = dit(0.9 * x, now, text, reuse=Reuse(jnp.array(True), added))
    np.testing.assert_array_equal(same, added)

    idle = jax.tree.map(jnp.zeros_like, dit.blocks)  # gates of zero: the blocks add nothing
    kept, dit.blocks = dit.blocks, idle
    try:
        direct, nothing = dit(0.9 * x, now, text, reuse=Reuse(jnp.array(True), jnp.zeros_like(added)))
        np.testing.assert_array_equal(nothing, jnp.zeros_like(added))
        np.testing.assert_allclose(direct, dit(0.9 * x, now, text), atol=1e-5)
    finally:
        dit.blocks = kept
    assert np.abs(reused - ran).max() > 1e-4 and np.abs(reused - direct).max() > 1e-3


@pytest.mark.parametrize("guidance", ["batch", "sequential"])
def test_segments_and_modes_agree(t2v, guidance):
    skip = np.array([0, 0, 1, 1, 0, 1, 0, 1], bool)
    whole = run(t2v, skip, segment="all", guidance=guidance)
    np.testing.assert_array_equal(run(t2v, skip, segment=3, guidance=guidance), whole)
    np.testing.assert_allclose(run(t2v, skip, guidance="batch"), whole, atol=2e-5)
    assert np.abs(run(t2v, None) - whole).max() > 1e-4


def test_other_steps_need_no_other_program(t2v):
    run(t2v, np.zeros(8, bool))
    with counting_compilations() as compiled:
        run(t2v, np.arange(8) % 2 == 1)
    assert not compiled


def test_streams_of_a_model_with_sound(tiny_folder, home):
    model = wan_jax.load(tiny_folder("ovi"), dtype="float32", offload=False)
    options = dict(size=(32, 32), num_steps=6, solver="euler", num_frames=5)
    skip = np.array([0, 0, 1, 0, 1, 1], bool)
    full, none, some = (run(model, skips, **options) for skips in (None, 0 * skip, skip))
    for stream in ("video", "audio"):
        np.testing.assert_allclose(none[stream], full[stream], atol=1e-6)
        assert 1e-4 < np.abs(some[stream] - full[stream]).max() < np.abs(full[stream]).max()


def test_an_interrupted_run_continues_bit_for_bit(t2v, tmp_path):
    """From the file, in the middle of steps that are left out."""
    skip, path, kept = np.array([0, 0, 1, 1, 1, 0, 1, 1], bool), tmp_path / "state.safetensors", {}

    def stop(progress):
        kept["state"] = jax.tree.map(jnp.copy, progress.state)
        if progress.step == 3:
            raise KeyboardInterrupt

    whole = run(t2v, skip)
    with pytest.raises(KeyboardInterrupt), Resume(path, [{}]) as resume:
        try:
            run(t2v, skip, callback=stop)
        finally:
            resume.update(0, 3, kept["state"])
    with Resume(path, [{}]) as resume:
        steps, state = resume.states[0]
        np.testing.assert_array_equal(run(t2v, skip, state=state, first=steps), whole)


# ---- as a user does it -------------------------------------------------------------------------------------


def test_the_first_clip_measures_and_the_next_leaves_steps_out(t2v, home, caplog):
    spec, options = t2v.spec, OPTIONS | dict(num_steps=16)
    clips = []
    with caplog.at_level(logging.INFO):
        for cache in (0.0, 0.3, 0.3):
            request = resolve(spec, "a cat", step_cache=cache, **options)
            noises = [pipeline.noise(t2v, request, 0)]
            (latents,) = pipeline.denoise(t2v, request, pipeline.encode(t2v, request), noises)
            clips.append(np.asarray(latents))
    np.testing.assert_array_equal(clips[0], clips[1])
    assert np.abs(clips[2] - clips[0]).max() > 1e-4
    assert "was never measured" in caplog.text and "of 16 steps leave out the blocks" in caplog.text
    curve = find_curve(spec.name)
    assert len(curve.sigmas) == 16 and (curve.sizes["video"] > 0).all()
    assert plan_skips(curve, request.schedule().sigmas[:-1], 0.3).any()


def test_two_experts_measure_one_curve_and_begin_anew(tiny_folder, home):
    model = wan_jax.load(tiny_folder("t2v-moe"), dtype="float32", offload=False)
    request = resolve(model.spec, "a cat", **OPTIONS | dict(num_steps=16, step_cache=1.0))
    condition, schedule = pipeline.encode(model, request), request.schedule()
    high = expert_steps(schedule.timesteps, model.spec.boundary)
    ran = []

    def callback(i, progress):
        ran.append(np.asarray(progress.state.added))

    for _ in range(2):
        ran.clear()
        pipeline.denoise(model, request, condition, [pipeline.noise(model, request, 0)], callback=callback)
    same = [np.array_equal(a, b) for a, b in zip(ran, ran[1:], strict=False)]  # from step to step
    assert any(same[high:]) and not same[high - 1]


def test_unusable_file_is_measured_anew(t2v, home, caplog):
    path = home / "step_cache" / f"{t2v.spec.name}.json"
    path.parent.mkdir()
    path.write_text("{")
    assert find_curve(t2v.spec.name) is None and "delete it" in caplog.text
    path.write_text(json.dumps({"sigmas": [1.0, 0.5], "sizes": {"video": [1.0, 2.0]}}))
    np.testing.assert_allclose(find_curve(t2v.spec.name).at(np.array([0.75])), [[1.5]])


def test_a_part_of_the_steps_is_no_measurement(home, caplog):
    measure = step_cache.Measure()
    measure.update(1.0, jnp.ones((1, 2, 3)))
    measure.keep("some", np.array([1.0, 0.5]))
    assert "was not measured" in caplog.text and not (home / "step_cache").exists()


def test_the_shipped_model_was_measured(home):
    curve = find_curve("wan2.6-nano")
    assert set(curve.sizes) == {"video", "audio"} and (np.diff(curve.sigmas) < 0).all()


def test_settings_and_bad_values(caplog):
    spec = MODELS["wan2.1-t2v-1.3b"]
    request = resolve(spec, "a cat", step_cache=0.1)
    again = resolve(spec, **from_settings(json.loads(json.dumps(request.settings(0)))))
    assert again.step_cache == 0.1
    with pytest.raises(InputError, match=r"step_cache=2: need 0 \(off\) to 1"):
        resolve(spec, "a cat", step_cache=2)
    resolve(spec, "a cat", solver="distilled", step_cache=0.1)
    assert "leave little to reuse" in caplog.text
