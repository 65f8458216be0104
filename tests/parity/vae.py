"""VAE goldens: encode and decode of a clip, in one pass and streamed."""

from __future__ import annotations

import jax
import numpy as np
from flax import nnx

from tests.parity.common import params, to_last
from wan_jax.checkpoint import abstract
from wan_jax.config import VAEConfig
from wan_jax.models.vae import VAE, Past
from wan_jax.weights.engine import fill
from wan_jax.weights.maps import vae as vae_map

ENCODE_ATOL, DECODE_ATOL = 2e-5, 5e-5


def vae_config(config: dict, tensors: dict[str, np.ndarray]) -> VAEConfig:
    return VAEConfig(
        version=config["version"],
        dim=config["dim"],
        dec_dim=config.get("dec_dim", config["dim"]),
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temporal_downsample"]),
        latents_mean=tuple(tensors["in/latents_mean"].tolist()),
        latents_std=tuple(tensors["in/latents_std"].tolist()),
    )


def check_vae(config: dict, tensors: dict[str, np.ndarray]) -> None:
    cfg, weights = vae_config(config, tensors), params(tensors)
    vae = fill(abstract(lambda: VAE(cfg, rngs=nnx.Rngs(0))), vae_map.rows(cfg), weights, network="vae", what="golden")
    video, z = to_last(tensors["in/video"]), to_last(tensors["in/z"])

    def check(ours: jax.Array, name: str, atol: float, label: str) -> None:
        np.testing.assert_allclose(np.asarray(ours), to_last(tensors[name]), atol=atol, rtol=0, err_msg=label)

    frames = 1 + (video.shape[1] - 1) // cfg.temporal_stride * cfg.temporal_stride
    encode = jax.jit(lambda vae, video: (vae.encode(video), vae.encoder(video[:, :frames], Past())))
    latents, features = encode(vae, video)
    for k in range(features.shape[1]):  # our one pass against their chunks
        check(features[:, k : k + 1], f"mid/encoder_chunk_{k}", ENCODE_ATOL, f"encoder chunk {k}")
    check(latents, "out/latents", ENCODE_ATOL, "encode")
    check(jax.jit(VAE.encode_stream)(vae, video), "out/latents", ENCODE_ATOL, "encode_stream")
    check(jax.jit(VAE.decode)(vae, z), "out/video", DECODE_ATOL, "decode")
    check(jax.jit(VAE.decode_stream)(vae, z), "out/video", DECODE_ATOL, "decode_stream")

    inferred = vae_map.infer_config({name: value.shape for name, value in weights.items()})
    assert vae_map.rows(inferred) == vae_map.rows(cfg)


RUNNERS = {"vae21_": check_vae, "vae22_": check_vae}
