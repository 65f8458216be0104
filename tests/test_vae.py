"""The video autoencoders: equalities between their paths, and the shapes of the released ones."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params
from wan_jax.config import MODELS, VAEConfig
from wan_jax.errors import CheckpointError, InputError
from wan_jax.models import vae as vae_module
from wan_jax.models.vae import VAE, to_uint8
from wan_jax.nn import conv
from wan_jax.parallel import make_mesh, replicated, use_mesh
from wan_jax.weights.engine import check, export, fill
from wan_jax.weights.maps import vae as vae_map

MANIFEST = Path(__file__).parent / "goldens" / "core" / "checkpoint_manifest.json"
VERSIONS = ("2.1", "2.2")
# The programs are tiny and many: compiled without LLVM's optimisation they are ready three times sooner.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def config(version: str) -> VAEConfig:
    z = 4
    return VAEConfig(
        version=version, dim=4, dec_dim=4, z_dim=z, dim_mult=(1, 2, 2), num_res_blocks=1,
        temporal_downsample=(True, True), latents_mean=tuple(0.1 * i for i in range(z)),
        latents_std=tuple(1 + 0.2 * i for i in range(z)),
    )  # fmt: skip


def normal(*shape: int, std: float = 1.0) -> np.ndarray:
    return np.random.default_rng(shape).normal(0, std, shape).astype(np.float32)


@functools.cache
def build(version: str) -> VAE:
    """A network whose every parameter is random: fresh ones have zero biases and unit norms."""
    shape = abstract(lambda: VAE(config(version), rngs=nnx.Rngs(0)))
    return jax.tree.map(lambda x: jnp.asarray(normal(*x.shape, std=x.size**-0.25 if x.ndim > 1 else 0.5)), shape)


def clip(version: str, frames: int, batch: int = 1) -> np.ndarray:
    stride = config(version).spatial_stride
    return np.tanh(normal(batch, frames, 2 * stride, 3 * stride, 3))


encode, encode_stream = jit(VAE.encode), jit(VAE.encode_stream)
decode, decode_stream = jit(VAE.decode), jit(VAE.decode_stream)


@pytest.mark.parametrize("size, stride, frames", (((3, 3, 3), 1, 5), ((3, 1, 1), 2, 6), ((3, 1, 1), 1, 2)))
def test_both_forms_of_conv3d_agree(size, stride, frames):
    """The CPU's sum of 2-D convolutions and the native one of the other platforms; with too few frames, none."""
    x, kernel = normal(2, frames, 4, 5, 3), normal(*size, 3, 2)
    ours, native = (form(x, kernel, stride) for form in (conv._sum_of_2d, conv._native))
    assert ours.shape == native.shape == (2, max(0, (frames - 3) // stride + 1), 4, 5, 2)
    np.testing.assert_allclose(ours, native, atol=1e-5)


@pytest.mark.parametrize("version", VERSIONS)
def test_stream_equals_whole(version):
    """A short clip equals the start of a long one, too: nothing looks ahead. And frames beyond 4k + 1 are dropped."""
    vae, z, video = build(version), normal(2, 5, 2, 3, 4), clip(version, 19, batch=2)
    decoded, encoded = decode(vae, z), encode(vae, video)
    assert decoded.shape == video[:, :17].shape and encoded.shape == z.shape
    assert decoded.dtype == encoded.dtype == jnp.float32
    for latents, frames in ((1, 1), (2, 8), (5, 17)):
        np.testing.assert_allclose(decode_stream(vae, z[:, :latents]), decoded[:, : 4 * latents - 3], atol=1e-5)
        np.testing.assert_allclose(encode_stream(vae, video[:, :frames]), encoded[:, :latents], atol=1e-5)


def test_chunks_of_any_length():
    vae, z = build("2.2"), normal(2, 5, 2, 3, 4)
    cache, frames, step = None, [], jit(VAE.decode_chunk)
    for start, stop in ((0, 1), (1, 3), (3, 5)):
        part, cache = step(vae, z[:, start:stop], cache)
        frames.append(part)
    np.testing.assert_allclose(jnp.concatenate(frames, axis=1), decode(vae, z), atol=1e-5)


def test_finish_is_applied_to_every_chunk():
    vae, z = build("2.2"), normal(2, 2, 2, 3, 4)
    finished = jit(lambda vae, z: vae.decode_stream(z, finish=to_uint8))(vae, z)
    np.testing.assert_array_equal(finished, to_uint8(decode_stream(vae, z)))


def test_to_uint8_is_the_official_export():
    x = np.concatenate([np.linspace(-1.2, 1.2, 100_003), np.arange(256) / 127.5 - 1, [-9, 9]]).astype(np.float32)
    expected = ((np.clip(x, -1, 1) + np.float32(1)) / np.float32(2) * np.float32(255)).astype(np.uint8)
    np.testing.assert_array_equal(to_uint8(x), expected)
    np.testing.assert_array_equal(to_uint8(np.float32([-2, -1, 0, 0.999, 1, 2])), [0, 0, 127, 254, 255, 255])


def test_gradient_is_finite_and_reaches_every_parameter():
    vae = build("2.2")

    def loss(vae, video):
        latents = vae.encode(video)
        return jnp.square(vae.decode_stream(latents) - video).mean() + jnp.square(latents).mean()

    grads = flatten_params(jit(jax.grad(loss))(vae, clip("2.2", 5)))
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in grads.values())
    norm = vae.encoder.head.norm
    assert np.isfinite(jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, norm.gamma.size)))).all()


def test_vmap():
    vae, z = build("2.2"), normal(2, 2, 2, 3, 4)
    mapped = jit(lambda vae, z: jax.vmap(lambda z: vae.decode_stream(z[None])[0])(z))(vae, z)
    np.testing.assert_allclose(mapped, decode_stream(vae, z), atol=1e-5)


def test_weights_of_tiles_sum_to_one():
    for length, size, overlap in ((20, 8, 3), (21, 8, 3), (9, 8, 7), (8, 8, 2), (40, 12, 11)):
        starts, weights = vae_module._cut(length, size, overlap, scale=4)
        assert starts[0] == 0 and starts[-1] + size == length and np.all(np.diff(starts) <= size - overlap)
        total = np.zeros(4 * length)
        for start, weight in zip(np.asarray(starts) * 4, np.asarray(weights), strict=True):
            total[start : start + 4 * size] += weight
        np.testing.assert_allclose(total, 1, atol=1e-6)


def tiled(path, vae, x, tile, overlap):
    return jit(lambda vae, x: path(vae, x, tile, overlap))(vae, x)


def test_one_tile_is_exact():
    vae, z, video = build("2.2"), normal(2, 2, 2, 3, 4), clip("2.2", 8, batch=2)
    np.testing.assert_allclose(tiled(VAE.decode_tiled, vae, z, (2, 32), 1), decode_stream(vae, z), atol=1e-5)
    np.testing.assert_allclose(tiled(VAE.encode_tiled, vae, video, (8, 8), 2), encode_stream(vae, video), atol=1e-5)


def test_tiles_blend():
    """Measured on white latents and random weights, the hardest case: largest difference 0.036, root mean square 0.003,
    in frames of standard deviation 1."""
    vae, z = build("2.1"), normal(1, 2, 18, 20, 4)
    whole = decode(vae, z)
    difference = tiled(VAE.decode_tiled, vae, z, (12, 12), 8) - whole
    assert jnp.std(whole) > 0.9 and jnp.abs(difference).max() < 0.06 and jnp.std(difference) < 0.006


@pytest.mark.parametrize("tile, overlap", (((8, 8), 8), ((8, 8), 0), ((4, 16), 6)))
def test_impossible_tiles(tile, overlap):
    with pytest.raises(InputError, match="try overlap="):
        build("2.1").decode_tiled(normal(1, 1, 20, 20, 4), tile, overlap)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices: JAX_NUM_CPU_DEVICES=8")
def test_sharded_equals_unsharded():
    vae, z = build("2.2"), normal(2, 2, 8, 4, 4)
    expected = decode_stream(vae, z)
    mesh = make_mesh({"data": 2, "fsdp": 2, "seq": 2}, jax.devices()[:8])
    with use_mesh(mesh):
        copy = jax.device_put(vae, replicated(mesh))
        video = decode_stream(copy, z)
        latents = encode(copy, video)
    np.testing.assert_allclose(video, expected, atol=1e-5)
    np.testing.assert_allclose(latents, encode(vae, expected), atol=1e-5)


@pytest.mark.parametrize("name, model", (("Wan2.1_VAE.pth", "wan2.1-t2v-1.3b"), ("Wan2.2_VAE.pth", "wan2.2-ti2v-5b")))
def test_released_checkpoints_fit(name, model):
    entry = json.loads(MANIFEST.read_text())[name]
    cfg = MODELS[model].vae
    source = {key: jax.ShapeDtypeStruct(shape, jnp.float32) for key, shape in entry["shapes"].items()}
    vae = abstract(lambda: VAE(cfg, rngs=nnx.Rngs(0)))
    coverage = check(vae, vae_map.rows(cfg), source)
    assert not coverage.faults and len(coverage.used) == entry["num_tensors"]
    assert sum(leaf.size for leaf in jax.tree.leaves(vae)) == entry["num_params"]
    assert vae_map.infer_config({key: value.shape for key, value in source.items()}) == cfg


@pytest.mark.parametrize("layout", ("official", "diffusers"))
@pytest.mark.parametrize("version", VERSIONS)
def test_export_and_back(version, layout):
    vae, rows = build(version), vae_map.rows(config(version))
    tensors = {name: produce() for name, _, _, produce in export(vae, rows, layout=layout)}
    back = fill(abstract(lambda: vae), rows, tensors, network="vae", layout=layout)
    for path, value in flatten_params(vae).items():
        np.testing.assert_array_equal(flatten_params(back)[path], value, err_msg=path)
    if layout == "official":
        inferred = vae_map.infer_config({name: value.shape for name, value in tensors.items()})
        assert vae_map.rows(inferred) == rows
        with pytest.raises(CheckpointError, match="official Wan VAE"):
            vae_map.infer_config({"blocks.0.weight": (3, 3)})
    else:
        assert vae_map.config_from_diffusers(vae_map.config_to_diffusers(config(version))) == config(version)
