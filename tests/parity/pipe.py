"""Wan2.1 picture pipelines, from uint8 pictures to the decoded video, through our only pipeline's parts."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.parity.common import dit_config, pad_rows, params, to_last
from wan_jax.checkpoint import abstract
from wan_jax.conditions import Condition, encode_image, fit_picture, video_condition
from wan_jax.config import MODELS, CLIPConfig, VAEConfig
from wan_jax.models.clip import CLIPVision
from wan_jax.models.dit import DiT
from wan_jax.models.vae import VAE
from wan_jax.pipeline import dit_velocity
from wan_jax.request import resolve
from wan_jax.sampling.sampler import make_steps, sample, start
from wan_jax.sampling.schedule import make_schedule
from wan_jax.weights import layouts
from wan_jax.weights.engine import fill


def _build(part: str, make, cfg, tensors: dict[str, np.ndarray]):
    prefix = {"dit": "dit.", "vae": "vae.", "image_encoder": "clip."}[part]
    shape = abstract(lambda: make(cfg, rngs=nnx.Rngs(0)))
    ignore = layouts.ignored(part, cfg, "official")
    return fill(shape, layouts.table(part, cfg), params(tensors, prefix), network=part, ignore=ignore)


def check_pipe(config: dict, tensors: dict[str, np.ndarray]) -> None:
    dit_cfg = dit_config(config["dit"])
    vae = {key: tuple(value) if isinstance(value, list) else value for key, value in config["vae"].items()}
    vae_cfg = VAEConfig(**{"dec_dim": vae["dim"]} | vae)
    clip = dict(config["clip"])
    clip_cfg = CLIPConfig(
        **{key: clip[key] for key in ("image_size", "patch_size", "dim", "num_heads", "num_layers", "out_dim")},
        mlp_dim=clip["mlp_ratio"] * clip["dim"],
        eps=clip["norm_eps"],
    )
    dit = _build("dit", DiT, dit_cfg, tensors)
    vae = _build("vae", VAE, vae_cfg, tensors)
    encoder = _build("image_encoder", CLIPVision, clip_cfg, tensors)

    pictures = [tensors[name] for name in ("in/image_u8", "in/last_image_u8") if name in tensors]
    task = config["dit"]["model_type"]
    base = next(spec for spec in MODELS.values() if spec.task == task)
    spec = dataclasses.replace(base, dit=dit_cfg, vae=vae_cfg, clip=clip_cfg)
    side = int(np.sqrt(config["max_area"]))
    width = next(w for w in range(side, 0, -1) if config["max_area"] % w == 0)
    request = resolve(
        spec, "a golden", image=pictures[0], last_image=pictures[1] if len(pictures) > 1 else None,
        size=(width, config["max_area"] // width), num_frames=config["frame_num"], num_steps=config["steps"],
        shift=config["shift"], guidance_scale=config["guide_scale"],
    )  # fmt: skip
    height, width, frames = request.height, request.width, request.num_frames
    known = {0: fit_picture(pictures[0], height, width)}
    if len(pictures) > 1:
        known[frames - 1] = fit_picture(pictures[1], height, width)
    first = to_last(tensors["mid/cond_video_first"])[0]
    np.testing.assert_allclose(np.asarray(known[0]), first, atol=1e-5, rtol=0, err_msg="resized picture")

    video = video_condition(vae, known, frames, height, width)
    np.testing.assert_allclose(np.asarray(video[0]), to_last(tensors["mid/y"]), atol=5e-5, rtol=0, err_msg="y")
    image = encode_image(encoder, pictures)
    expected = tensors["mid/clip_fea"].reshape(image.shape)
    np.testing.assert_allclose(np.asarray(image), expected, atol=5e-5, rtol=0, err_msg="clip_fea")

    text = np.stack([pad_rows(tensors[name], dit_cfg.text_len) for name in ("in/context", "in/context_null")])
    condition = Condition(jnp.asarray(text), video_BTHWC=video, image_BIC=image)
    schedule = make_schedule("unipc", request.num_steps, request.shift)
    steps = make_steps("unipc", schedule, request.guidance_scale)
    trajectory: list[np.ndarray] = []
    state = sample(
        dit_velocity("batch"), (dit, condition), start(jnp.asarray(to_last(tensors["in/noise"])[None])), steps,
        callback=lambda p: trajectory.append(np.asarray(p.state.sample[0])),
    )  # fmt: skip
    for i, ours in enumerate(trajectory):
        reference = to_last(tensors["out/unipc/trajectory"][i + 1])
        np.testing.assert_allclose(ours, reference, atol=2e-4, rtol=0, err_msg=f"step {i}")
    decoded = jax.jit(lambda vae, z: vae.decode_stream(z, finish=lambda x: jnp.clip(x, -1, 1)))(vae, state.sample)
    np.testing.assert_allclose(
        np.asarray(decoded[0]), to_last(tensors["out/video"]), atol=5e-4, rtol=0, err_msg="video"
    )


RUNNERS = {"pipe_": check_pipe}
