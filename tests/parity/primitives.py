"""Single operations: rotary table, sinusoid, masks, size rules, resize, and the parameter-free parts of the VAEs."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx

from tests.parity.common import to_last
from wan_jax.conditions import frame_mask
from wan_jax.models import vae
from wan_jax.nn.layers import timestep_embedding
from wan_jax.nn.resize import bicubic_resize
from wan_jax.nn.rope import rope_table, rotate
from wan_jax.request import i2v_size, ti2v_size
from wan_jax.sampling.guidance import expert_steps
from wan_jax.sampling.schedule import make_schedule


def close(ours, expected: np.ndarray, name: str) -> None:
    np.testing.assert_allclose(np.asarray(ours), expected, atol=1e-5, rtol=0, err_msg=name)


def check_primitives(config: dict, tensors: dict[str, np.ndarray]) -> None:
    table = rope_table(tuple(int(n) for n in tensors["in/rope_grid"]), config["head_dim"], theta=config["theta"])
    close(rotate(jnp.asarray(tensors["in/rope_x"]), table), tensors["out/rope"], "rope")
    sinusoid = timestep_embedding(jnp.asarray(tensors["in/t"], jnp.float32), config["freq_dim"])
    close(sinusoid, tensors["out/sinusoid"], "sinusoid")

    frames = config["frame_num"]
    for name, known in (("mask_i2v", {0}), ("mask_flf2v", {0, frames - 1})):
        expected = tensors[f"out_int/{name}"]  # [4, t, h, w]
        ours = frame_mask(known, frames, expected.shape[0]).T[:, :, None, None]
        np.testing.assert_array_equal(np.broadcast_to(ours, expected.shape), expected)

    stride, patch = config["i2v_vae_stride"], config["i2v_patch"]
    for (w, h, area), latent_hw, ti2v in zip(
        tensors["in/sizes_w_h_area"], tensors["out_int/i2v_latent_h_w"], tensors["out_int/ti2v_out_w_h"], strict=True
    ):
        height, width = i2v_size(int(h), int(w), int(area), stride, patch)
        assert (height // stride, width // stride) == tuple(latent_hw)
        assert ti2v_size(int(w), int(h), int(area), config["ti2v_multiple"]) == tuple(ti2v)

    for size in config["resize_outputs"]:
        expected = tensors["out/bicubic_{}x{}".format(*size)]
        picture = jnp.asarray(np.moveaxis(tensors["in/resize"][0], 0, -1))
        close(np.moveaxis(np.asarray(bicubic_resize(picture, tuple(size))), -1, 0), expected[0], f"resize {size}")

    for case in config["expert_switch"]:
        solver = {"dpmpp": "dpm++"}.get(case["solver"], case["solver"])
        schedule = make_schedule(solver, case["steps"], case["shift"])
        assert expert_steps(schedule.timesteps, case["boundary"]) == case["num_high_noise_steps"], case

    x = jnp.asarray(to_last(tensors["in/avgdown_x"]))
    for name, expected in tensors.items():
        kind, *factors = name.removeprefix("out/").split("_")
        if kind not in ("avgdown", "dupup"):
            continue
        ft, fs, channels = int(factors[0][1:]), int(factors[1][1:]), int(factors[2][2:])
        expected = to_last(expected)
        if kind == "avgdown":
            close(vae.AvgDown(channels, ft, fs)(x, vae.Past()), expected, name)
        elif name.endswith("first_chunk"):
            close(vae.DupUp(channels, ft, fs)(x[:, :1], vae.Past()), expected, name)
        else:
            close(vae.DupUp(channels, ft, fs)(x, vae.Past(())), expected, name)
    patches = vae.patchify(jnp.asarray(to_last(tensors["in/patchify_x"])), 2)
    close(patches, to_last(tensors["out/patchify2"]), "patchify")
    x, gamma = to_last(tensors["in/rms_x"]), tensors["in/rms_gamma"].reshape(-1)
    norm = vae.ChannelNorm(len(gamma), rngs=nnx.Rngs(0))
    norm.gamma = nnx.Param(jnp.asarray(gamma))
    close(norm(jnp.asarray(x)), to_last(tensors["out/vae_rms_norm"]), "rms norm")


RUNNERS = {"primitives_": check_primitives}
