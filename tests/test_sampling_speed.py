"""Fewer passes for a clip: few-step solvers with fresh noise, distilled adapters, guidance on a part of the steps.

The numbers of the few-step solvers are checked in tests/parity/few_steps.py; here is what surrounds them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import wan_jax
from tests.test_dit import counting_compilations
from wan_jax import pipeline
from wan_jax.cli import main
from wan_jax.config import MODELS, UMT5Config
from wan_jax.conversion import random_folder, tiny_spec
from wan_jax.errors import InputError
from wan_jax.media import read_settings
from wan_jax.parallel import use_mesh
from wan_jax.request import from_settings, resolve
from wan_jax.sampling.guidance import Phase, expert_steps, guided, phases
from wan_jax.sampling.sampler import compiled_segment, make_steps, sample, start
from wan_jax.sampling.schedule import FEW_STEPS, make_schedule
from wan_jax.weights.writers import write_safetensors

VARIANTS = Path(__file__).parent / "goldens" / "variants"
PICTURE = np.zeros((480, 832, 3), np.uint8)
OPTIONS = dict(size=(32, 32), num_frames=1)


@pytest.fixture(scope="module")
def t2v(tiny_folder):
    return wan_jax.load(tiny_folder("t2v"), dtype="float32", offload=False)


def latents(model: wan_jax.Model, **options) -> np.ndarray:
    request = resolve(model.spec, "a cat", **OPTIONS | options)
    noises = [pipeline.noise(model, request, seed) for seed in request.seeds]
    (result,) = pipeline.denoise(model, request, pipeline.encode(model, request), noises)
    return np.asarray(result)


# ---- few steps ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", FEW_STEPS)
@pytest.mark.parametrize("name", ["wan2.1-t2v-1.3b", "wan2.1-i2v-14b-480p", "wan2.2-i2v-a14b"])
def test_defaults(solver, name):
    spec = MODELS[name]
    picture = {} if spec.task == "t2v" else {"image": PICTURE}
    request = resolve(spec, "a cat", solver=solver, **picture)
    assert request.num_steps == 4 and request.guidance == "none"
    if solver == "distilled":
        assert (request.shift, request.sigma_max) == (5.0, None)
    else:
        assert (request.shift, request.sigma_max) == (None, 200.0 if picture else 80.0)
    high = expert_steps(request.schedule().timesteps, spec.boundary)
    assert high == (2 if spec.num_experts == 2 else 4)
    again = resolve(spec, **picture, **from_settings(json.loads(json.dumps(request.settings(0)))))
    assert again.settings(0) == request.settings(0)


def test_defaults_with_sound():
    """No pass beside the prompt's: every scale is off."""
    sound = resolve(MODELS["ovi-5s"], "a cat", solver="distilled").sound
    assert (sound.audio_guidance_scale, sound.image_guidance, sound.voice_guidance) == (1.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "rcm", "num_steps": 5}, "num_steps=5: rCM models take 1 to 4"),
        ({"solver": "rcm", "shift": 5}, "shift=5: rcm has none; where it starts is sigma_max"),
        ({"solver": "rcm-ode", "sigma_max": 10}, "sigma_max=10: need above 14.2"),
        ({"solver": "distilled", "sigma_max": 80}, "sigma_max=80: belongs to rcm and rcm-ode; distilled takes shift"),
        ({"solver": "lcm"}, "unknown solver 'lcm': use unipc, dpm++, euler, distilled, rcm, rcm-ode"),
        ({"guidance_interval": (0.9, 0.2)}, "guidance_interval=(0.9, 0.2): need two noise levels"),
        ({"guidance_interval": 0.5}, "guidance_interval=0.5: need two noise levels, 0 <= low < high <= 1"),
        ({"guidance_interval": (0, 900)}, "need two noise levels, 0 <= low < high <= 1"),
    ],
)
def test_wrong_values_are_named(options, message):
    with pytest.raises(InputError) as error:
        resolve(MODELS["wan2.1-t2v-1.3b"], "a cat", **options)
    assert message in str(error.value)


def test_guidance_with_a_distilled_model_is_done_and_said(caplog):
    with caplog.at_level(logging.WARNING):
        request = resolve(MODELS["wan2.1-t2v-1.3b"], "a cat", solver="distilled", guidance_scale=4)
    assert request.guidance == "batch" and "solver distilled need no guidance" in caplog.text


def towards_zero(args, x, timestep, guidance):
    """The velocity of noise over a clip that is zero everywhere."""
    return x / (timestep / 1000)


def test_fresh_noise():
    """Each level is reached by new noise of exactly that strength, unlike any other of the clip."""
    schedule = make_schedule("rcm", 4, None)
    noise, seen = jax.random.normal(jax.random.key(0), (1, 2, 32, 32, 16)), []
    first = start(noise, None, schedule.noise_scale)
    assert float(jnp.std(first.sample)) == pytest.approx(80 / 81, abs=0.01)

    def keep(progress):
        seen.append(np.asarray(progress.state.sample).ravel())

    sample(towards_zero, None, first, make_steps("rcm", schedule, seed=0), callback=keep)
    np.testing.assert_allclose([x.std() for x in seen], schedule.sigmas[1:], atol=0.01)
    correlation = np.corrcoef([np.asarray(noise).ravel(), *seen[:-1]])
    np.testing.assert_allclose(correlation, np.eye(4), atol=0.03)


def test_fresh_noise_is_the_same_on_a_mesh():
    noise, mesh = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 16)), wan_jax.make_mesh({"fsdp": 8})
    steps = make_steps("rcm", make_schedule("rcm", 4, None), seed=5).part(0, 2)
    alone = sample(towards_zero, None, start(noise), steps).sample
    cut = jax.device_put(noise, jax.NamedSharding(mesh, jax.P(None, None, "fsdp")))
    with use_mesh(mesh):
        on_mesh = sample(towards_zero, None, start(cut), steps).sample
    assert len(on_mesh.sharding.device_set) == 8
    np.testing.assert_allclose(on_mesh, alone, atol=1e-6)


def test_every_stream_has_its_own_noise():
    noise = {"audio": jnp.zeros((1, 64, 8)), "video": jnp.zeros((1, 64, 8))}
    steps = make_steps("rcm", make_schedule("rcm", 2, None), seed=1).part(0, 1)
    after = sample(lambda args, x, t, g: jax.tree.map(jnp.zeros_like, x), None, start(noise), steps).sample
    assert not np.allclose(after["audio"], after["video"]) and jnp.std(after["audio"]) > 0.5


def test_a_seed_decides_fresh_noise_and_resuming_repeats_it(t2v, tmp_path):
    options = dict(**OPTIONS, solver="rcm", progress=False, watermark=False)
    whole = wan_jax.generate(t2v, "a cat", seed=[3, 4], **options)
    assert [clip.settings["sigma_max"] for clip in whole] == [80.0, 80.0]
    assert not np.array_equal(whole[0].video, whole[1].video)

    def stop(progress):
        if progress.step == 2:
            raise KeyboardInterrupt

    state, steps = tmp_path / "state.safetensors", []
    with pytest.raises(KeyboardInterrupt):
        wan_jax.generate(t2v, "a cat", seed=4, callback=stop, resume_file=state, **options)
    again = wan_jax.generate(
        t2v, "a cat", seed=4, callback=lambda p: steps.append(p.step), resume_file=state, **options
    )
    assert steps == [3, 4]
    np.testing.assert_array_equal(again.video, whole[1].video)

    # One first noise under two seeds: what differs is the noise on the way.
    request = resolve(t2v.spec, "a cat", **OPTIONS)
    given = [pipeline.noise(t2v, request, 3)]
    condition = pipeline.encode(t2v, request)

    def end(seed: int, solver: str) -> np.ndarray:
        now = resolve(t2v.spec, "a cat", seed=seed, solver=solver, **OPTIONS)
        return np.asarray(pipeline.denoise(t2v, now, condition, given)[0])

    assert np.abs(end(3, "rcm") - end(4, "rcm")).max() > 0.1
    np.testing.assert_array_equal(end(3, "rcm-ode"), end(4, "rcm-ode"))


def test_distilled_adapters_of_two_experts(tmp_path, capsys):
    """The released form: one file of changes per expert, four steps, from Python and from the command line."""
    with safe_open(VARIANTS / "lora_s4_distill_down_up_alpha_diff_diffb_diffm.safetensors", "numpy") as file:
        adapter = {k.removeprefix("in/lora/"): file.get_tensor(k) for k in file.keys() if k.startswith("in/lora/")}
        widths = json.loads(file.metadata()["config"])["model"]
    spec, lora, folder = tiny_spec("t2v-moe"), tmp_path / "distill.safetensors", tmp_path / "model"
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "freq_dim")
    dit = dataclasses.replace(spec.dit, **{name: widths[name] for name in names})
    text = UMT5Config(vocab_size=384, dim=12, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1)
    random_folder(dataclasses.replace(spec, dit=dit, text=text), folder, say=lambda text: None)
    write_safetensors(lora, adapter)

    def run(*loras: str) -> np.ndarray:
        return latents(wan_jax.load(folder, dtype="float32", loras=loras), solver="distilled")

    both = [f"{part}={lora}" for part in ("high", "low")]
    plain, high, high_and_low = run(), run(both[0]), run(*both)
    assert np.abs(high - plain).max() > 1e-3 and np.abs(high_and_low - high).max() > 1e-3

    words = ["generate", "--model", folder, "--prompt", "a cat", "--size", "32x32", "--num-frames", 1, "--quiet"]
    words += ["--lora", both[0], "--lora", both[1], "--solver", "distilled", "--output", tmp_path / "clip.png"]
    assert main([*map(str, words)]) == 0, capsys.readouterr().err
    settings = read_settings(tmp_path / "clip.png")
    assert (settings["solver"], settings["num_steps"], settings["guidance"]) == ("distilled", 4, "none")
    assert [used["name"] for used in settings["loras"]] == [lora.name] * 2


# ---- guidance on a part of the steps -----------------------------------------------------------------------


def test_phases():
    schedule = make_schedule("distilled", 4, 5.0)  # 1, 0.9375, 0.8333, 0.625
    assert phases(schedule, None, "batch", (0, 1)) == [Phase(True, "batch", 0, 4)]
    assert phases(schedule, 0.9, "none", (0.7, 0.95)) == [Phase(True, "none", 0, 2), Phase(False, "none", 2, 4)]
    assert phases(schedule, 0.9, "sequential", (0.7, 0.95)) == [
        Phase(True, "none", 0, 1), Phase(True, "sequential", 1, 2), Phase(False, "sequential", 2, 3),
        Phase(False, "none", 3, 4),
    ]  # fmt: skip
    # The interval is open below and closed above.
    assert [p.stop for p in phases(schedule, None, "batch", (0.625, 0.9375))] == [1, 3, 4]


def test_guidance_interval_is_a_scale_of_one_outside(t2v):
    """One pass outside the interval gives what two passes with scale 1 would give."""
    options = dict(num_steps=4, solver="euler", shift=1.0)
    ours = latents(t2v, guidance_interval=(0.3, 0.8), **options)
    request = resolve(t2v.spec, "a cat", **OPTIONS | options)
    condition, noise = pipeline.encode(t2v, request), pipeline.noise(t2v, request, 0)
    schedule = request.schedule()
    scales = np.where((schedule.sigmas[:-1] > 0.3) & (schedule.sigmas[:-1] <= 0.8), request.guidance_scale, 1.0)
    assert sorted(set(scales)) == [1.0, request.guidance_scale]
    steps = make_steps("euler", schedule, scales)
    theirs = sample(pipeline.dit_velocity("batch"), (t2v.dit, condition), start(noise), steps).sample
    np.testing.assert_allclose(ours, np.asarray(theirs), atol=1e-4)
    assert np.abs(ours - latents(t2v, **options)).max() > 1e-3


def test_without_guidance_a_pass_of_the_prompt_remains():
    """Of any number of passes and for every stream, whatever their weights."""
    batches = []

    def network(latents, timesteps, passes, memory):
        batches.append(len(timesteps))
        return {stream: x + passes for stream, x in latents.items()}, memory

    latents = {"video": jnp.zeros((1, 2)), "audio": jnp.zeros((1, 5))}
    weights = {"video": jnp.array([4.0, -3.0]), "audio": jnp.array([3.0, -2.0])}
    velocity, _ = guided(network, latents, jnp.float32(500), weights, jnp.array([[7.0], [1.0]]), "none")
    assert batches == [1]
    assert {stream: x.tolist() for stream, x in velocity.items()} == {"video": [[7.0] * 2], "audio": [[7.0] * 5]}


def test_steps_outside_the_interval_cost_half(t2v):
    """Operations of the program that a step of each mode runs, and no more programs than modes."""
    request = resolve(t2v.spec, "a cat", num_steps=4, solver="euler", shift=1.0, **OPTIONS)
    condition, noise = pipeline.encode(t2v, request), pipeline.noise(t2v, request, 0)
    steps = make_steps("euler", request.schedule(), 5.0).part(0, 1)

    def operations(mode: str) -> float:
        program = compiled_segment(pipeline.dit_velocity(mode))
        return program.lower((t2v.dit, condition), start(noise), steps, None).compile().cost_analysis()["flops"]

    assert operations("none") < 0.55 * operations("batch")

    ran = []
    interval = dict(num_steps=8, solver="euler", shift=1.0)
    with counting_compilations() as compiled:
        for low, high in ((0.4, 0.8), (0.2, 0.5)):
            latents(t2v, guidance_interval=(low, high), **interval)
            ran.append(len(compiled))
    assert ran[1] == ran[0]
