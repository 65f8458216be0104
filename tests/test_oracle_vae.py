"""Our VAE against diffusers' on random weights, through the diffusers names."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from wan_jax.checkpoint import abstract
from wan_jax.config import MODELS, VAEConfig
from wan_jax.models.vae import VAE
from wan_jax.weights.engine import export, fill
from wan_jax.weights.maps import vae as vae_map

pytestmark = pytest.mark.oracle
torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

STATISTICS = dict(latents_mean=(0.1, -0.2, 0.3, 0.4), latents_std=(1.1, 0.9, 1.3, 0.7))
SMALL = VAEConfig(dim=4, dec_dim=4, z_dim=4, **STATISTICS)
CONFIGS = {
    "2.1": SMALL,
    "2.1 other depth": dataclasses.replace(
        SMALL, dim_mult=(1, 2, 4), num_res_blocks=1, temporal_downsample=(True, False)
    ),
    "2.2": dataclasses.replace(SMALL, version="2.2", dec_dim=8),
    "2.2 other depth": dataclasses.replace(
        SMALL, version="2.2", num_res_blocks=3, temporal_downsample=(True, False, True)
    ),
}


def their_model(cfg: VAEConfig):
    config = {name: value for name, value in vae_map.config_to_diffusers(cfg).items() if name != "_class_name"}
    return diffusers.AutoencoderKLWan(**config).eval()


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_encode_and_decode(cfg):
    """Largest differences measured: latents 5e-7, frames 3e-7."""
    torch.manual_seed(0)
    theirs = their_model(cfg)
    for p in theirs.parameters():
        p.copy_(torch.randn(p.shape) * (p[0].numel() ** -0.5 if p.ndim > 1 and p.shape[1] > 1 else 0.3))
    state = {name: value.numpy() for name, value in theirs.state_dict().items()}
    ours = fill(
        abstract(lambda: VAE(cfg, rngs=nnx.Rngs(0))), vae_map.rows(cfg), state, network="vae", layout="diffusers"
    )

    stride, frames = cfg.spatial_stride, 1 + 2 * cfg.temporal_stride
    video = torch.rand(2, 3, frames, 2 * stride, 3 * stride) * 2 - 1
    mean, std = np.asarray(cfg.latents_mean), np.asarray(cfg.latents_std)
    expected = (np.moveaxis(theirs.encode(video).latent_dist.mode().numpy(), 1, -1) - mean) / std
    latents = jax.jit(VAE.encode)(ours, np.moveaxis(video.numpy(), 1, -1))
    np.testing.assert_allclose(latents, expected, atol=5e-6)

    z = torch.randn(2, cfg.z_dim, 3, 2, 3)
    expected = np.moveaxis(theirs.decode(z).sample.numpy(), 1, -1)
    frames = jax.jit(VAE.decode_stream)(ours, (np.moveaxis(z.numpy(), 1, -1) - mean) / std)
    frames = np.clip(frames, -1, 1)  # their decoder clamps
    np.testing.assert_allclose(frames, expected, atol=5e-6)


@pytest.mark.parametrize("model", ("wan2.1-t2v-1.3b", "wan2.2-ti2v-5b"))
def test_names_and_shapes_of_the_released_configurations(model):
    cfg = MODELS[model].vae
    with torch.device("meta"):
        theirs = {name: tuple(value.shape) for name, value in their_model(cfg).state_dict().items()}
    ours = abstract(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    assert {name: shape for name, shape, *_ in export(ours, vae_map.rows(cfg), layout="diffusers")} == theirs
