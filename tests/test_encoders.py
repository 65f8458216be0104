"""umT5, CLIP and the bicubic resize: sizes, equalities, memory. Their numbers: see test_goldens."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.parity.manifest import expand
from wan_jax.checkpoint import abstract, flatten_params, unflatten_like
from wan_jax.config import CLIPConfig, UMT5Config
from wan_jax.models.clip import CLIPVision, preprocess
from wan_jax.models.umt5 import UMT5, relative_buckets
from wan_jax.nn.resize import bicubic_resize
from wan_jax.parallel import compiler_options, make_mesh, param_sharding, use_mesh
from wan_jax.weights.engine import check, export, fill
from wan_jax.weights.maps import clip as clip_map
from wan_jax.weights.maps import umt5 as umt5_map

CORE = Path(__file__).parent / "goldens" / "core"
T5_TINY = UMT5Config(vocab_size=50, dim=24, dim_attn=32, dim_ffn=48, num_heads=4, num_layers=3)
CLIP_TINY = CLIPConfig(image_size=28, patch_size=7, dim=32, mlp_dim=48, num_heads=4, num_layers=3, out_dim=12)
NETWORKS = {
    "text_encoder": (UMT5, umt5_map, UMT5Config(), T5_TINY),
    "image_encoder": (CLIPVision, clip_map, CLIPConfig(), CLIP_TINY),
}
IDS = np.array([[7, 3, 49, 5, 2, 1, 0, 0], [9, 1, 0, 0, 0, 0, 0, 0]], np.int32)
MASK = np.array([[1] * 6 + [0] * 2, [1] * 2 + [0] * 6], np.int32)
PIXELS = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
INPUTS = {"text_encoder": (IDS, MASK), "image_encoder": (PIXELS,)}


@functools.cache
def weights(network: str) -> dict[str, np.ndarray]:
    """Every parameter random, norms too: constants would hide a swap."""
    make, _, _, tiny = NETWORKS[network]
    flat = sorted(flatten_params(abstract(lambda: make(tiny, rngs=nnx.Rngs(0)))).items())
    rng = np.random.default_rng(1)
    return {path: np.float32(0.2 * rng.normal(size=x.shape) + path.endswith(".weight")) for path, x in flat}


def build(network: str, dtype=jnp.float32):
    make, _, _, tiny = NETWORKS[network]
    shapes = abstract(lambda: make(tiny, dtype=dtype, rngs=nnx.Rngs(0)))
    dtypes = {path: x.dtype for path, x in flatten_params(shapes).items()}
    flat = {path: jnp.asarray(x, dtypes[path]) for path, x in weights(network).items()}
    return unflatten_like(shapes, flat)


@functools.cache
def encoder():
    return jax.jit(lambda model, *inputs: model(*inputs), compiler_options=compiler_options())


def run(model, *inputs):
    return encoder()(model, *inputs)


@pytest.mark.parametrize(
    ("network", "file"),
    [
        ("text_encoder", "models_t5_umt5-xxl-enc-bf16.pth"),
        ("image_encoder", "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"),
    ],
)
def test_published_size(network, file):
    make, table, cfg, _ = NETWORKS[network]
    entry = json.loads((CORE / "checkpoint_manifest.json").read_text())[file]
    source = expand(entry)
    model = abstract(lambda: make(cfg, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    coverage = check(model, table.rows(cfg), source, ignore=table.IGNORE["official"])
    assert not coverage.faults, coverage.faults[:5]
    assert all(name.startswith(("textual.", "log_scale")) for name in coverage.ignored)
    used = sum(int(np.prod(source[name].shape)) for name in coverage.used)
    assert sum(x.size for x in jax.tree.leaves(model)) == used
    if network == "text_encoder":
        assert used == entry["num_params"]
    assert table.infer_config({name: x.shape for name, x in source.items()}) == cfg
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    for path, leaf in flatten_params(model).items():
        param_sharding(network, path, leaf.shape, mesh)


@pytest.mark.parametrize("network", NETWORKS)
def test_diffusers_config_round_trip(network):
    _, table, cfg, tiny = NETWORKS[network]
    for one in (cfg, tiny):
        back = table.config_from_diffusers(table.config_to_diffusers(one))
        assert back == (one if network == "text_encoder" else type(one)(**{**vars(one), "out_dim": 0}))


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("network", NETWORKS)
def test_names_round_trip(network, layout):
    make, table, _, cfg = NETWORKS[network]
    shapes = abstract(lambda: make(cfg, rngs=nnx.Rngs(0)))
    model = unflatten_like(shapes, weights(network))
    source = {}
    for name, shape, _, produce in export(model, table.rows(cfg), layout=layout):
        source[name] = produce()
        assert source[name].shape == shape
    if layout == "diffusers":
        cfg = table.config_from_diffusers(table.config_to_diffusers(cfg))
        shapes = abstract(lambda: make(cfg, rngs=nnx.Rngs(0)))
    again = flatten_params(fill(shapes, table.rows(cfg), source, network=network, layout=layout))
    before = flatten_params(model)
    assert before.keys() - again.keys() == (
        {"head"} if make is CLIPVision and layout == "diffusers" else set()
    )
    for path, value in again.items():
        np.testing.assert_array_equal(value, before[path], err_msg=path)


@pytest.mark.parametrize("network", NETWORKS)
def test_sharded_equals_unsharded(network):
    model = build(network)
    expected = run(model, *INPUTS[network])
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    flat = flatten_params(model)
    flat = {path: jax.device_put(x, param_sharding(network, path, x.shape, mesh)) for path, x in flat.items()}
    assert any(not x.sharding.is_fully_replicated for x in flat.values())
    with use_mesh(mesh):
        out = run(unflatten_like(model, flat), *INPUTS[network])
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.parametrize("network", NETWORKS)
def test_bfloat16_is_near_float32(network):
    exact = np.asarray(run(build(network), *INPUTS[network]))
    out = run(build(network, dtype=jnp.bfloat16), *INPUTS[network])
    assert out.dtype == jnp.float32
    if network == "text_encoder":
        out, exact = out[MASK == 1], exact[MASK == 1]
    assert np.linalg.norm(out - exact) / np.linalg.norm(exact) < 0.05  # rounding the weights alone: 0.02


def test_umt5_ignores_what_is_masked():
    model = build("text_encoder")
    expected = np.asarray(run(model, IDS, MASK))
    other = np.where(MASK == 1, IDS, 17)
    np.testing.assert_allclose(run(model, other, MASK)[MASK == 1], expected[MASK == 1], atol=1e-6)
    cropped = run(model, IDS[1:, :2], MASK[1:, :2])
    np.testing.assert_allclose(cropped[0], expected[1, :2], atol=1e-6)
    assert np.abs(run(model, other, np.ones_like(MASK)) - expected)[MASK == 1].max() > 1e-2


def test_umt5_has_a_position_bias_per_layer():
    model = build("text_encoder")
    expected = run(model, IDS, MASK)
    for layer in range(T5_TINY.num_layers):
        changed = build("text_encoder")
        table = changed.blocks.pos_embedding.embedding
        table[...] = table[...].at[layer, 1].add(3.0)  # bucket 1: the key one before the query
        assert np.abs(run(changed, IDS, MASK) - expected)[MASK == 1].max() > 1e-3, layer


def test_umt5_without_any_token_is_finite():
    assert np.isfinite(run(build("text_encoder"), IDS, np.zeros_like(MASK))).all()


def test_relative_buckets():
    first = [0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91]
    for bucket, distance in enumerate(first):
        assert relative_buckets(np.array([-distance]), 32, 128) == bucket
        assert distance == 0 or relative_buckets(np.array([distance]), 32, 128) == bucket + 16
        if bucket > 8:
            assert relative_buckets(np.array([1 - distance]), 32, 128) == bucket - 1
    assert relative_buckets(np.array([-10_000, 10_000]), 32, 128).tolist() == [15, 31]
    assert np.unique(relative_buckets(np.arange(-60, 61), 16, 40)).tolist() == [*range(8), *range(9, 16)]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the CPU compiler")
def test_umt5_xxl_fits_beside_its_weights_on_cpu():
    """11.4 GB of bfloat16 weights: a float32 copy of all layers, or of the token table, would not fit."""
    model = abstract(lambda: UMT5(UMT5Config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    tokens = jax.ShapeDtypeStruct((2, 512), jnp.int32)
    memory = encoder().lower(model, tokens, tokens).compile().memory_analysis()
    assert memory.argument_size_in_bytes > 11e9
    assert memory.temp_size_in_bytes < 1.5e9


def test_clip_stops_before_the_last_block():
    expected = run(build("image_encoder"), PIXELS)
    changed = build("image_encoder")
    for leaf in (changed.post_norm.weight, changed.head):
        leaf[...] = leaf[...] + 1
    kernel = changed.transformer.attn.proj.kernel
    kernel[...] = kernel[...].at[-1].add(1.0)
    np.testing.assert_array_equal(run(changed, PIXELS), expected)
    kernel[...] = kernel[...].at[-2].add(1.0)
    assert np.abs(run(changed, PIXELS) - expected).max() > 1e-2


def test_clip_loop_equals_blocks_one_by_one():
    model = build("image_encoder")
    patches = PIXELS.reshape(2, 4, 7, 4, 7, 3).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, -1)
    cls = jnp.broadcast_to(model.cls_embedding[...], (2, 1, 32))
    x = jnp.concatenate([cls, model.patch_embedding(patches)], 1) + model.pos_embedding[...]
    x = model.pre_norm(x)
    for i in range(CLIP_TINY.num_layers - 1):
        x = jax.tree.map(lambda leaf, i=i: leaf[i], model.transformer)(x)
    np.testing.assert_allclose(run(model, PIXELS), x, atol=1e-5)


def test_clip_preprocess():
    pixels = preprocess(jnp.full((1, 30, 50, 3), -1.0), 28)
    assert pixels.shape == (1, 28, 28, 3)
    np.testing.assert_allclose(pixels[0, 0, 0], [-1.79226, -1.752097, -1.480218], atol=1e-5)  # black


def test_resize_properties():
    image = np.random.default_rng(0).normal(size=(2, 9, 13, 3)).astype(np.float32)
    np.testing.assert_array_equal(bicubic_resize(image, (9, 13)), image)
    np.testing.assert_allclose(bicubic_resize(np.full((5, 7, 1), 0.3), (17, 4)), 0.3, atol=1e-6)
    edge = np.repeat(np.arange(8) > 3, 5).reshape(1, 8, 5, 1).astype(np.uint8)
    out = np.asarray(bicubic_resize(edge, (32, 5)))
    assert out.dtype == np.float32 and out.min() < -0.05 and out.max() > 1.05, "overshoot is kept"
    one = jax.jit(lambda x: bicubic_resize(x, (5, 30)))(image[0])
    np.testing.assert_allclose(one, bicubic_resize(image, (5, 30))[0], atol=1e-6)
