"""Weights in one byte: what they are, where they lie, how far their products and a real model's velocity come out, and
who refuses them. Weights that stay on the host: the same clip."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wan_jax
from wan_jax import aot
from wan_jax.checkpoint import flatten_params
from wan_jax.cli import main
from wan_jax.cli.generate import KINDS as CHOICES
from wan_jax.config import MODELS, NANO
from wan_jax.conversion import export_folder, import_folder, tiny_spec
from wan_jax.errors import InputError
from wan_jax.model import build, num_bytes
from wan_jax.nn.layers import Linear
from wan_jax.nn.quant import KINDS, Quantized, quantize, rounded_product
from wan_jax.nn.stack import is_streamed
from wan_jax.parallel import make_mesh, param_sharding, use_mesh
from wan_jax.pipeline import settings
from wan_jax.plan import find_device, make_plan, weight_bytes
from wan_jax.request import resolve
from wan_jax.train.finetune import finetune

BITS = {"int8": 1 / 254, "fp8": 1 / 16}  # largest error: of a row's largest weight; of the weight itself
EXACT = jax.lax.Precision.HIGHEST
ASSET = Path(wan_jax.__file__).parent / "assets" / "wan2.6-nano"


def relative(x, y) -> float:
    return float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y))


def kernels(*shape, dtype=jnp.float32, seed=0):
    """Kernels with channels of very different size."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal(shape) * rng.uniform(0.01, 10, shape[-1]), dtype)


# ---- values and products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_values_are_near_the_weights(kind, dtype):
    kernel = kernels(3, 48, 32, dtype=dtype)
    values, scale = quantize(kernel, kind)
    assert values.shape == (3, 32, 48) and values.dtype == KINDS[kind].dtype and scale.dtype == dtype
    assert scale.shape == ((3, 32, 1) if kind == "int8" else (3, 1, 1))
    back = np.asarray(values, np.float64) * np.asarray(scale, np.float64)
    rows = np.asarray(kernel, np.float64).swapaxes(1, 2)
    error, largest = np.abs(back - rows), np.abs(rows).max(-1, keepdims=True)
    if kind == "int8":
        assert (error <= 1.01 * BITS[kind] * largest).all() and error.max() > 0
    else:  # but for what is smaller than the smallest that has three bits
        assert (error <= 1.01 * BITS[kind] * np.maximum(np.abs(rows), np.abs(rows).max() / 448 / 64)).all()
    np.testing.assert_array_equal(np.abs(np.asarray(values, np.float32)).max(), KINDS[kind].largest)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_kernels_stay_zero(kind):
    values, scale = quantize(jnp.zeros((1, 16, 16)), kind)
    out = Quantized(values[0], scale[0]).product(jnp.ones((2, 16)), EXACT)
    assert not np.asarray(out).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_layer_multiplies_what_is_held(kind):
    layer = Linear(48, 32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 5, 48))
    full = layer(x)
    layer.kernel = Quantized(*quantize(kernels(48, 32), kind))
    held = np.asarray(layer.kernel.values[...], np.float32) * np.asarray(layer.kernel.scale[...])
    np.testing.assert_allclose(layer(x), x @ held.T + layer.bias[...], rtol=1e-5, atol=1e-5)
    assert layer.kernel.dtype == jnp.float32 and layer(x).shape == full.shape


@pytest.mark.parametrize("size", [1e-6, 1.0, 3e4])
def test_inputs_are_rounded_by_their_own_magnitude(size):
    x = size * jax.random.normal(jax.random.key(1), (4, 64))
    values, scale = quantize(kernels(64, 32), "fp8")
    exact = Quantized(values, scale).product(x, EXACT)
    assert 0.005 < relative(rounded_product(x, values, scale, EXACT), exact) < 0.04
    assert not np.asarray(rounded_product(0 * x, values, scale, EXACT)).any()


def test_on_cuda_inputs_are_rounded_elsewhere_not():
    values, scale = quantize(kernels(64, 32, dtype=jnp.bfloat16), "fp8")
    traced = jax.jit(lambda x: Quantized(values, scale).product(x, None)).trace(jnp.ones((4, 64), jnp.bfloat16))
    text = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu", "cuda")}
    rounds = {name: "4x64xf8E4M3FN" in lowered for name, lowered in text.items()}
    assert rounds == {"cpu": False, "tpu": False, "cuda": True}
    traced = jax.jit(lambda x: Quantized(*quantize(kernels(64, 32), "int8")).product(x, None)).trace(jnp.ones((4, 64)))
    assert "f8E4M3FN" not in traced.lower(lowering_platforms=("cuda",)).as_text()


# ---- networks ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["wan2.1-t2v-14b", "wan2.6-r2av-11b"])
def test_blocks_take_half_the_memory_and_the_rest_stays(name):
    spec = MODELS[name]
    full, held = (build("dit", spec, jnp.bfloat16, kind) for kind in (None, "fp8"))
    ones = {path for path in flatten_params(held) if path.endswith(".values")}
    assert all("blocks." in path or "layers." in path for path in ones)
    whole = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "head.", "norm", "modulation")
    assert not any(part in path for path in ones for part in whole)
    assert num_bytes(held) / num_bytes(full) == pytest.approx(0.525, abs=0.015)
    mesh = make_mesh({"fsdp": 8})
    whole, shard = (weight_bytes(spec, "dit", "bfloat16", m, "int8") for m in (None, mesh))
    assert whole > num_bytes(held) and shard < whole / 6


def test_the_text_encoder_is_int8_and_the_autoencoder_whole():
    spec = MODELS["wan2.1-t2v-14b"]
    for kind in KINDS:
        text = flatten_params(build("text_encoder", spec, jnp.bfloat16, kind))
        assert text["blocks.ffn.gate.kernel.values"].dtype == jnp.int8
        assert text["token_embedding.embedding"].dtype == jnp.bfloat16
        vae = jax.tree.leaves(build("vae", spec, jnp.bfloat16, kind))
        assert {leaf.dtype for leaf in vae} == {jnp.dtype("float32")}


def test_scales_follow_the_output_of_their_kernel():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    for name, spec in (("fc1", (None, ("tensor", "fsdp"), None)), ("fc2", (None, "fsdp", "tensor"))):
        path = f"blocks.ffn.{name}.kernel"
        assert tuple(param_sharding("dit", f"{path}.values", (2, 64, 32), mesh).spec) == spec
        assert tuple(param_sharding("dit", f"{path}.scale", (2, 64, 1), mesh).spec) == (*spec[:2], None)
        assert tuple(param_sharding("dit", f"{path}.scale", (2, 1, 1), mesh).spec) == (None, None, None)


# ---- loading -----------------------------------------------------------------------------------------------


def parameters(model, part="dit"):
    return {path: np.asarray(x) for path, x in flatten_params(model.network(part)).items()}


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path, x in theirs.items():
        np.testing.assert_array_equal(ours[path], x, err_msg=path)


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_loading_gives_the_same(kind, tiny_folder, tmp_path):
    folder = tiny_folder("t2v")
    found = parameters(wan_jax.load(folder, quantize=kind))
    for path, x in parameters(wan_jax.load(folder)).items():
        if path in found:
            np.testing.assert_array_equal(found[path], x)
        else:
            values, scale = quantize(jnp.asarray(x), kind)
            np.testing.assert_array_equal(found[f"{path}.values"], values, err_msg=path)
            np.testing.assert_array_equal(found[f"{path}.scale"], scale, err_msg=path)
    sharded = wan_jax.load(folder, quantize=kind, mesh=make_mesh({"fsdp": 4, "tensor": 2}))
    assert_same(parameters(sharded), found)
    assert flatten_params(sharded.dit)["blocks.ffn.fc1.kernel.values"].sharding.spec[1] == ("tensor", "fsdp")
    import_folder(wan_jax.load(folder), tmp_path / "orbax", lambda text: None)
    assert_same(parameters(wan_jax.load(tmp_path / "orbax", quantize=kind)), found)


def test_adapters_are_merged_before(tiny_folder, tmp_path):
    from safetensors.numpy import save_file

    rng, cfg = np.random.default_rng(0), tiny_spec("t2v").dit
    factors = {
        "blocks.0.ffn.0.lora_up.weight": rng.standard_normal((cfg.ffn_dim, 2)).astype(np.float32),
        "blocks.0.ffn.0.lora_down.weight": rng.standard_normal((2, cfg.dim)).astype(np.float32),
    }
    save_file(factors, tmp_path / "lora.safetensors")
    loras = [str(tmp_path / "lora.safetensors")]
    full = parameters(wan_jax.load(tiny_folder("t2v"), loras=loras))
    found = parameters(wan_jax.load(tiny_folder("t2v"), loras=loras, quantize="int8"))
    values, _ = quantize(jnp.asarray(full["blocks.ffn.fc1.kernel"]), "int8")
    np.testing.assert_array_equal(found["blocks.ffn.fc1.kernel.values"], values)


# ---- a real model ------------------------------------------------------------------------------------------


def test_the_velocity_of_the_small_model_changes_little():
    """Of the stream of its sound alone: half the program to compile."""
    rng = np.random.default_rng(0)
    cfg = NANO.dit
    latents = {"audio": jnp.asarray(rng.standard_normal((1, 32, cfg.audio_dim)), jnp.float32)}
    text = {"audio": jnp.asarray(0.3 * rng.standard_normal((1, cfg.text_len, cfg.text_dim)), jnp.float32)}

    @jax.jit
    def velocity(network):
        return network(latents, jnp.full(1, 500.0), text)["audio"]

    full = velocity(wan_jax.load(ASSET, dtype="float32").dit)
    errors = {
        kind: relative(velocity(wan_jax.load(ASSET, dtype="float32", quantize=kind).dit), full) for kind in KINDS
    }
    assert 0 < errors["int8"] < 0.01 and errors["int8"] < errors["fp8"] < 0.06


# ---- users -------------------------------------------------------------------------------------------------


def test_unknown_kinds_are_refused(tiny_folder):
    with pytest.raises(InputError, match="quantize='int4': use int8 or fp8.*did you mean int8"):
        wan_jax.load(tiny_folder("t2v"), quantize="int4")
    spec = MODELS["wan2.1-t2v-14b"]
    with pytest.raises(InputError, match="did you mean fp8"):
        make_plan(spec, resolve(spec, "a plan"), find_device("h200"), quantize="f8")
    assert tuple(KINDS) == CHOICES


def test_clips_tell_how_they_were_made(tiny_folder, alone, monkeypatch):
    model = wan_jax.load(tiny_folder("t2v"), quantize="fp8")
    about = settings(model, resolve(model.spec, "a cat", size=(32, 32), num_frames=1), seed=0)
    assert about["quantize"] == "fp8" and "quantize" not in settings(
        wan_jax.load(tiny_folder("t2v")), resolve(model.spec, "a cat"), seed=0
    )
    loaded = {}

    def load(name, **options):
        loaded.update(options)
        raise InputError("enough")

    monkeypatch.setattr("wan_jax.model.load", load)
    monkeypatch.setattr("wan_jax.media.read_settings", lambda path: about)
    command = ["generate", "--model", str(tiny_folder("t2v")), "--quiet", "--output", "again.png"]
    assert main([*command, "--from", "clip.png"]) == 2
    assert loaded["quantize"] == "fp8"
    with pytest.raises(SystemExit):
        main([*command, "--quantize", "int4"])


def test_the_plan_knows_them(capsys):
    command = "plan --model wan2.1-t2v-14b --size 1280x720 --num-frames 81 --device rtx4090 --guidance sequential"
    said = {}
    for kind in (None, *KINDS):
        assert main([*command.split(), "--json", *(["--quantize", kind] if kind else [])]) == 0
        said[kind] = json.loads(capsys.readouterr().out)
    stages = {kind: next(s for s in plan["stages"] if s["name"] == "denoise") for kind, plan in said.items()}
    assert stages["fp8"]["weight_bytes"]["dit"] < stages["int8"]["weight_bytes"]["dit"] < 14.92e9
    assert stages["int8"]["activation_bytes"] == stages[None]["activation_bytes"] < stages["fp8"]["activation_bytes"]
    assert main([*command.split(), "--json", "--stream-weights"]) == 0
    streamed = json.loads(capsys.readouterr().out)
    assert streamed["stages"][1]["weight_bytes"]["dit"] < 1.8e9 and not streamed["offload"]
    assert said["fp8"]["least_seconds"] < 0.9 * said["int8"]["least_seconds"] == 0.9 * said[None]["least_seconds"]


def test_files_and_training_take_whole_weights(tiny_folder, tmp_path):
    model = wan_jax.load(tiny_folder("t2v"), quantize="int8")
    for refuse in (
        lambda: import_folder(model, tmp_path / "orbax"),
        lambda: export_folder(model, tmp_path / "official", "official"),
        lambda: finetune(model, {"recipe": {"steps": 1}}, tmp_path, tmp_path / "run"),
    ):
        with pytest.raises(InputError, match="load the model without quantize='int8'"):
            refuse()
    assert not any(tmp_path.iterdir())


# ---- streaming ---------------------------------------------------------------------------------------------


def forward(model):
    cfg = model.spec.dit
    latents = jax.random.normal(jax.random.key(0), (1, 2, 8, 8, cfg.in_dim))
    with use_mesh(model.mesh):
        run = jax.jit(lambda dit: dit(latents, jnp.full(1, 500.0), jnp.ones((1, cfg.text_len, cfg.text_dim))))
        return np.asarray(run(model.dit))


@pytest.mark.parametrize("options", [{}, {"quantize": "int8", "mesh": {"fsdp": 2}}])
def test_streamed_weights_compute_the_same(options, tiny_folder):
    if "mesh" in options:
        options = options | {"mesh": make_mesh(options["mesh"], jax.devices()[:2])}
    resident = wan_jax.load(tiny_folder("t2v"), **options)
    streamed = wan_jax.load(tiny_folder("t2v"), stream=True, **options)
    places = {path: x.sharding.memory_kind for path, x in flatten_params(streamed.dit).items()}
    assert {kind for path, kind in places.items() if is_streamed(path)} == {"pinned_host"}
    assert {kind for path, kind in places.items() if not is_streamed(path)} == {"device"}
    assert num_bytes(streamed.dit, stream=True) < num_bytes(streamed.dit)
    np.testing.assert_array_equal(forward(streamed), forward(resident))


def test_streamed_adapters_and_converted_folders(tiny_folder, tmp_path):
    import_folder(wan_jax.load(tiny_folder("t2v")), tmp_path / "orbax", lambda text: None)
    model = wan_jax.load(tmp_path / "orbax", stream=True)
    assert flatten_params(model.dit)["blocks.ffn.fc1.kernel"].sharding.memory_kind == "pinned_host"
    assert_same(parameters(model), parameters(wan_jax.load(tiny_folder("t2v"))))
    with pytest.raises(InputError, match="without stream=True"):
        model.need_full_weights("training")


# ---- the CUDA compiler -------------------------------------------------------------------------------------


def text_of(*program) -> str:
    return aot.compile_here(*program).as_text()


@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs jax[cuda13], no GPU")
def test_the_cuda_compiler_multiplies_in_eight_bits():
    """All products of a block but those of the text, which it joins to one of bfloat16: they have 512 rows. It does the
    GELU with its product where the number of tokens is a multiple of 16.
    """
    spec = MODELS["wan2.1-t2v-1.3b"]
    request = resolve(spec, "a plan", size=(832, 480), num_frames=77, guidance="sequential")
    text = aot.elsewhere(text_of, find_device("h200"), spec, request, None, "bfloat16", "fp8")
    assert text.count('"__cublas$lt$matmul$f8"') == 8 and text.count('"__cudnn$fmhaSoftmax"') == 2
    assert re.search(r'matmul\$f8".*"epilogue":"BIAS_GELU"', text) and "input_transpose" not in text
