"""Twin-stream goldens: single passes, the state after block 0, and guided sampling of both streams."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.parity.common import pad_rows, params, to_last
from wan_jax.checkpoint import abstract
from wan_jax.conditions import pin_first_frame
from wan_jax.config import FusionConfig
from wan_jax.models.fusion import Fusion
from wan_jax.nn.positions import reference_positions
from wan_jax.sampling.sampler import make_steps, sample, start
from wan_jax.sampling.schedule import Schedule, make_schedule
from wan_jax.sound import SoundCondition, fusion_velocity, guidance_passes
from wan_jax.weights.engine import fill
from wan_jax.weights.maps import fusion as fusion_map

ATOL, LOOP_ATOL = 5e-5, 3e-4


def fusion_config(config: dict) -> FusionConfig:
    video, audio = config["video"], config["audio"]
    same = ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len", "freq_dim", "eps")
    assert all(video[name] == audio[name] for name in same)
    return FusionConfig(
        **{name: video[name] for name in (*same, "in_dim", "out_dim")},
        patch_size=tuple(video["patch_size"]),
        audio_dim=audio["in_dim"],
        audio_rope_scale=audio["temporal_rope_scaling_factor"],
    )


def build(config: dict, tensors: dict[str, np.ndarray]) -> Fusion:
    cfg, weights = fusion_config(config), params(tensors)
    stated = fusion_map.config_to_official(cfg)
    assert fusion_map.infer_config({name: x.shape for name, x in weights.items()}, stated) == cfg
    shape = abstract(lambda: Fusion(cfg, rngs=nnx.Rngs(0)))
    return fill(shape, fusion_map.rows(cfg), weights, network="dit", what="golden")


def check(ours: jax.Array, expected: np.ndarray, name: str, atol: float = ATOL) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, atol=atol, rtol=atol, err_msg=name)


def text(*rows: np.ndarray, length: int) -> jax.Array:
    return jnp.asarray(np.stack([pad_rows(row, length) for row in rows]))


def each_step(weights: dict[str, np.ndarray], schedule: Schedule) -> dict[str, np.ndarray]:
    return {stream: np.tile(w, (schedule.num_steps, 1)) for stream, w in weights.items()}


def check_ovi(config: dict, tensors: dict[str, np.ndarray]) -> None:
    model = build(config, tensors)
    latents = {"video": jnp.asarray(to_last(tensors["in/video"])), "audio": jnp.asarray(tensors["in/audio"])}
    t, context = jnp.asarray(tensors["in/t"]), jnp.asarray(tensors["in/context"])
    prompts = {"video": context, "audio": context}
    run = jax.jit(functools.partial(Fusion.__call__, capture=True))

    velocity, states = run(model, latents, t, prompts)
    check(velocity["video"], to_last(tensors["out/t2v/video"]), "t2v video")
    check(velocity["audio"], tensors["out/t2v/audio"], "t2v audio")
    check(states["video"][0], tensors["out/t2v/block0_video"], "block 0 video")
    check(states["audio"][0], tensors["out/t2v/block0_audio"], "block 0 audio")

    two = jnp.stack([t, jnp.zeros_like(t)], axis=-1)
    first = jnp.zeros_like(latents["video"][:1, :1])
    _, token_time = pin_first_frame(first, latents["video"][:1].shape, model.cfg.patch_size)
    skip = jnp.full(len(t), config["slg_layer"])
    for name, options in (("i2v", {}), ("i2v_slg", {"skip_B": skip})):
        velocity, _ = run(model, latents, two, prompts, token_time=token_time, **options)
        check(velocity["video"], to_last(tensors[f"out/{name}/video"]), f"{name} video")
        check(velocity["audio"], tensors[f"out/{name}/audio"], f"{name} audio")

    sampling = config["sampling"]
    schedule = make_schedule(sampling["solver"], sampling["steps"], sampling["shift"])
    np.testing.assert_array_equal(schedule.timesteps, tensors["out/loop/timesteps"])
    np.testing.assert_allclose(schedule.sigmas, tensors["out/loop/sigmas"], atol=1e-6)
    noise = {
        "video": jnp.asarray(to_last(tensors["in/loop/video_noise"])[None]),
        "audio": jnp.asarray(tensors["in/loop/audio_noise"][None]),
    }
    pin, token_time = pin_first_frame(
        jnp.asarray(to_last(tensors["in/loop/first_frame"])[None]), noise["video"].shape, model.cfg.patch_size
    )
    negative = {stream: tensors[f"in/loop/neg_{stream}_context"] for stream in noise}
    encoded = {s: text(tensors["in/context"][0], x, length=model.cfg.text_len) for s, x in negative.items()}
    scale = {stream: sampling[f"{stream}_guidance_scale"] for stream in noise}
    passes, weights = guidance_passes(encoded, scale, skip=config["slg_layer"])
    condition = SoundCondition(passes, weights, pin={"video": pin}, token_time=token_time)
    steps = make_steps(sampling["solver"], schedule, each_step(weights, schedule))
    for mode in ("batch", "sequential"):
        state = sample(
            fusion_velocity(mode), (model, condition), start(noise, condition.pin), steps, pin=condition.pin
        )
        check(state.sample["video"][0], to_last(tensors["out/loop/video"]), f"{mode} video", LOOP_ATOL)
        check(state.sample["audio"][0], tensors["out/loop/audio"], f"{mode} audio", LOOP_ATOL)


def check_dreamid(config: dict, tensors: dict[str, np.ndarray]) -> None:
    model = build(config, tensors)
    length = model.cfg.text_len
    frames, audio_length, sampling = config["video_latent_length"], config["audio_latent_length"], config["sampling"]
    schedule = make_schedule(sampling["solver"], sampling["steps"], sampling["shift"])
    np.testing.assert_array_equal(schedule.timesteps, tensors["out/loop/timesteps"])
    prompts = {
        stream: text(tensors["in/context"], tensors[f"in/neg_{stream}_context"], length=length)
        for stream in ("video", "audio")
    }
    scale = {stream: sampling[f"{stream}_cfg_scale"] for stream in prompts}
    passes, weights = guidance_passes(
        prompts, scale, image=sampling["video_ref_cfg_scale"], voice=sampling["audio_ref_cfg_scale"]
    )
    steps = make_steps(sampling["solver"], schedule, each_step(weights, schedule))
    for case, layout in config["cases"].items():

        def given(name: str, case: str = case) -> jax.Array:
            x = tensors[f"in/{case}/{name}"]
            return jnp.asarray((to_last(x) if x.ndim == 4 else x)[None])

        references = {"video": given("ref_image_latents"), "audio": given("ref_audio_latents")}
        video_times, audio_times, scale = reference_positions(
            frames, audio_length, layout["n_ref_images"], layout["ref_audio_lengths"],
            audio_offset=layout["audio_offset_base"], dtype=np.float32,
        )  # fmt: skip
        times = {"video": tuple(video_times.tolist()), "audio": tuple((audio_times * scale).tolist())}
        run = jax.jit(functools.partial(Fusion.__call__, capture=True, times=times))
        noise = {"video": given("video")[:, :frames], "audio": given("audio")[:, :audio_length]}
        condition = SoundCondition(passes, weights, references=references)
        # Single passes at one timestep, by the network alone.
        for i, name in enumerate(("pos", "neg", "noimg", "novoice")):
            kept = {stream: x * passes.keep[stream][i] for stream, x in references.items()}
            latents = {s: jnp.concatenate([noise[s], kept[s]], axis=1) for s in noise}
            one = {s: passes.text[s][i : i + 1] for s in noise}
            velocity, states = run(model, latents, jnp.asarray(tensors["in/t"]), one)
            for stream in ("video", "audio"):
                expected = tensors.get(f"out/{case}/{name}_{stream}")
                if expected is not None:
                    expected = to_last(expected) if stream == "video" else expected
                    check(velocity[stream][0], expected, f"{case} {name} {stream}")
                if name == "pos":
                    check(states[stream][0], tensors[f"out/{case}/block0_{stream}"], f"{case} block 0 {stream}")
        for mode in ("batch", "sequential"):
            velocity = fusion_velocity(mode, times["video"], times["audio"])
            state = sample(velocity, (model, condition), start(noise), steps)
            label = f"{case} {mode}"
            check(state.sample["video"][0], to_last(tensors[f"out/{case}/loop_video"]), f"{label} video", LOOP_ATOL)
            check(state.sample["audio"][0], tensors[f"out/{case}/loop_audio"], f"{label} audio", LOOP_ATOL)


RUNNERS = {"ovi_fusion": check_ovi, "dreamid_r2av": check_dreamid}
