"""The DiT as a pytree: what compiles, what does not recompile, gradients, and equal numbers on every mesh."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params, unflatten_like
from wan_jax.conditions import Condition
from wan_jax.config import MODELS, DiTConfig, ModelSpec, UMT5Config
from wan_jax.errors import NonFiniteError
from wan_jax.model import build, load
from wan_jax.models import dit as dit_module
from wan_jax.models.dit import READER, DiT
from wan_jax.models.identity import is_adapter
from wan_jax.models.umt5 import UMT5
from wan_jax.nn.context import chunk_of
from wan_jax.parallel import compiler_options, make_mesh, param_sharding, use_mesh
from wan_jax.pipeline import denoise, dit_velocity, encode, noise, settle
from wan_jax.request import resolve
from wan_jax.sampling.sampler import Steps, make_steps, run_segment, sample, start
from wan_jax.sampling.schedule import RCM, SOLVERS, make_schedule
from wan_jax.sampling.solvers import State
from wan_jax.weights.engine import export, fill
from wan_jax.weights.layouts import spec_parts, table

TINY = DiTConfig(dim=64, ffn_dim=96, num_heads=4, num_layers=3, text_dim=24, text_len=8, freq_dim=16)
# Every kind of condition at once: picture latents, CLIP tokens with positions, two timesteps per sample.
FULL = dataclasses.replace(TINY, in_dim=36, image_tokens=10, image_dim=40, image_positions=True)
CONFIGS = {"plain": TINY, "full": FULL}
MESHES = [{"fsdp": 8}, {"data": 2, "seq": 4}, {"tensor": 4, "fsdp": 2}]
COMPILE_CPU_SECONDS = 10
# For programs that take longer to compile than to run.
QUICK = {"xla_backend_optimization_level": "0"}


def randomised(make: Callable[[], Any]) -> Any:
    """The module that ``make`` builds with every parameter random: those that start at 0 or 1 too."""
    shape, rng = abstract(make), np.random.default_rng(0)

    def value(path: str, leaf: Any) -> jax.Array:
        x = rng.standard_normal(leaf.shape, np.float32)
        scale = leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.1
        return jnp.asarray(scale * x + path.endswith("weight"), leaf.dtype)

    return unflatten_like(shape, {path: value(path, leaf) for path, leaf in flatten_params(shape).items()})


def to_numpy(module: Any) -> Any:
    """The same module with host arrays: arithmetic outside of programs then compiles nothing."""
    return jax.tree.map(np.asarray, module)


@functools.cache
def make_dit(cfg: DiTConfig, dtype: Any = jnp.float32) -> DiT:
    return randomised(lambda: DiT(cfg, dtype=dtype, rngs=nnx.Rngs(0)))


def make_inputs(cfg: DiTConfig) -> dict[str, jax.Array]:
    """Arguments for a batch of two clips on a grid of 2 x 4 x 4 tokens."""
    rng = np.random.default_rng(1)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((2, *shape), np.float32))

    inputs = {
        "latents_BTHWC": normal(2, 8, 8, cfg.out_dim),
        "timesteps": jnp.float32([900, 20]),
        "text_BSC": normal(cfg.text_len, cfg.text_dim),
    }
    if cfg.in_dim > cfg.out_dim:
        inputs["condition_BTHWC"] = normal(2, 8, 8, cfg.in_dim - cfg.out_dim)
    if cfg.image_tokens:
        inputs["image_BIC"] = normal(cfg.image_tokens, cfg.image_dim)
        inputs["timesteps"] = jnp.float32([[900, 0], [20, 0]])
        inputs["token_time"] = jnp.asarray(rng.integers(0, 2, (2, 32)))
    return inputs


@jax.jit
def forward(dit: DiT, inputs: dict[str, jax.Array]) -> jax.Array:
    return dit(**inputs)


def captured(dit: DiT, inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
    return jax.jit(lambda dit, inputs: dit(**inputs, capture=True))(dit, inputs)


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_intermediates_and_loop(cfg, monkeypatch):
    """Scanning the blocks gives the numbers of a Python loop over them, in every named intermediate."""
    dit, inputs = make_dit(cfg), make_inputs(cfg)
    velocity, mid = captured(dit, inputs)
    np.testing.assert_allclose(velocity, forward(dit, inputs), atol=1e-6)
    for name in ("self_attn", "cross_attn", "block"):
        assert mid[name].shape == (cfg.num_layers, 2, 32, cfg.dim)
    assert mid["text_tokens"].shape == (2, cfg.text_len, cfg.dim)
    if cfg.image_tokens:
        assert mid["image_tokens"].shape == (2, cfg.image_tokens, cfg.dim)
    token_time = inputs.get("token_time")
    assert mid["time_embedding"].shape == (2, 1 if token_time is None else 2, cfg.dim)
    head = dit.head(mid["block"][-1], mid["time_embedding"], token_time)
    np.testing.assert_allclose(mid["head"], head, atol=1e-5)

    def loop(stack, x, fn, *, beside=None, remat=False):
        outs, layers = [], (stack,) if beside is None else (stack, beside)
        for i in range(cfg.num_layers):
            block, *others = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
            x, out = fn(block, x, *others)
            outs.append(out)
        return x, jax.tree.map(lambda *layers: jnp.stack(layers), *outs)

    monkeypatch.setattr(dit_module, "apply_stack", loop)
    looped = captured(dit, inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), looped, (velocity, mid))


@pytest.mark.parametrize("most", [16, 20, 31])
@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_chunks_of_tokens(cfg, most):
    """Blocks that run on a part of the tokens at a time give the same; 48 of 64 places, 16 of them padding."""
    latents = np.random.default_rng(2).standard_normal((2, 3, 8, 8, cfg.out_dim), np.float32)
    dit, inputs = make_dit(cfg), make_inputs(cfg) | {"latents_BTHWC": jnp.asarray(latents)}
    if cfg.image_tokens:
        inputs["condition_BTHWC"] = jnp.zeros((2, 3, 8, 8, cfg.in_dim - cfg.out_dim))
        inputs["token_time"] = jnp.asarray(np.random.default_rng(3).integers(0, 2, (2, 48)))
    chunked = jax.jit(lambda dit, inputs: dit(**inputs, chunk_tokens=most))
    np.testing.assert_allclose(chunked(dit, inputs), forward(dit, inputs), atol=2e-6)
    assert "dynamic_update_slice" in str(jax.make_jaxpr(chunked)(dit, inputs))  # it ran in chunks


@pytest.mark.parametrize("cfg", CONFIGS.values(), ids=CONFIGS)
def test_a_prompt_is_read_once(cfg):
    """Keys and values that were computed before give the same, and without the weights that they were computed with."""
    dit, inputs = make_dit(cfg), make_inputs(cfg)
    rest = {name: x for name, x in inputs.items() if name != "image_BIC"}
    context = jax.jit(DiT.read)(dit, inputs["text_BSC"], inputs.get("image_BIC"))
    lean = dit.without_reader()
    np.testing.assert_array_equal(forward(lean, rest | {"text_BSC": context}), forward(dit, inputs))
    gone = flatten_params(dit).keys() - flatten_params(lean).keys()
    assert gone == {path for path in flatten_params(dit) if path.startswith(tuple(f"{name}." for name in READER))}
    assert len(gone) == 9 + (14 if cfg.image_tokens else 0)  # and the network itself still has them


def test_length_of_chunks():
    assert chunk_of(75_600, 8192) == 7568 and chunk_of(75_600, 4096) == 3984
    assert chunk_of(32, 32) == chunk_of(32, 40) == chunk_of(32, 0) == 0 and chunk_of(33, 32) == 32
    with use_mesh(make_mesh({"seq": 8})):
        assert chunk_of(75_600, 4096) == 0  # their shares are chunks already


def loss(dit: DiT, inputs: dict[str, jax.Array], remat: bool) -> jax.Array:
    return jnp.square(dit(**inputs, remat=remat)).mean()


def test_gradients_and_remat():
    dit, inputs = make_dit(FULL), make_inputs(FULL)
    lowered = jax.jit(jax.value_and_grad(loss), static_argnums=2).lower
    plain, remat = (lowered(dit, inputs, remat).compile(QUICK) for remat in (False, True))
    value, gradient = plain(dit, inputs)
    again, same = remat(dit, inputs)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), same, gradient)
    assert remat.memory_analysis().temp_size_in_bytes < plain.memory_analysis().temp_size_in_bytes

    assert isinstance(gradient, DiT)
    dit, gradient = to_numpy(dit), to_numpy(gradient)
    for path, leaf in flatten_params(gradient).items():
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    # The slope along the gradient, by a central difference.
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    ahead, behind = (
        plain(jax.tree.map(lambda x, g, d=distance: x + d / norm * g, dit, gradient), inputs)[0]
        for distance in (np.float32(1e-2), np.float32(-1e-2))
    )
    np.testing.assert_allclose((ahead - behind) / 2e-2, norm, rtol=1e-2)


def test_vmap():
    dit, inputs = make_dit(FULL), make_inputs(FULL)
    expected = forward(dit, inputs)
    one = jax.vmap(lambda inputs: dit(**jax.tree.map(lambda x: x[None], inputs))[0])
    np.testing.assert_allclose(jax.jit(one)(inputs), expected, atol=2e-6)
    models = jax.tree.map(lambda x: np.stack([x, 2 * x]), to_numpy(dit))
    both = jax.jit(jax.vmap(lambda dit: dit(**inputs)))(models)
    np.testing.assert_allclose(both[0], expected, atol=2e-6)
    assert jnp.abs(both[1] - expected).max() > 0.01


def test_constructor():
    dit = jax.jit(lambda: DiT(TINY, rngs=nnx.Rngs(0)), compiler_options=QUICK)()
    leaves = flatten_params(to_numpy(dit))
    for path, leaf in leaves.items():
        if path.endswith(("weight", "bias")):
            assert (leaf == path.endswith("weight")).all(), path  # norms start at 1, biases at 0
        else:
            width = leaf.shape[-2] if path.endswith("kernel") else leaf.shape[-1]
            np.testing.assert_allclose(leaf.std(), width**-0.5, rtol=0.2, err_msg=path)
    assert (leaves["blocks.ffn.fc1.kernel"][0] != leaves["blocks.ffn.fc1.kernel"][1]).all()


def test_matrices_in_bfloat16():
    for path, leaf in flatten_params(make_dit(FULL, jnp.bfloat16)).items():
        matrix = re.fullmatch(r"(blocks|patch|text|img).*(kernel|bias)", path) and "norm" not in path
        assert leaf.dtype == (jnp.bfloat16 if matrix else jnp.float32), path
    inputs = make_inputs(FULL)
    velocity, expected = (forward(make_dit(FULL, dtype), inputs) for dtype in (jnp.bfloat16, jnp.float32))
    assert velocity.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(velocity - expected) / jnp.linalg.norm(expected) < 1e-2


def test_wrong_channels():
    with pytest.raises(ValueError, match="16 channels with the condition, this model takes 36"):
        make_dit(FULL)(**{k: v for k, v in make_inputs(FULL).items() if k != "condition_BTHWC"})


def lowered_step(spec: ModelSpec, num_layers: int):
    """One guided sampling step of a published model at its first size, by shapes alone."""
    cfg = dataclasses.replace(spec.dit, num_layers=num_layers)
    dit = build("dit", dataclasses.replace(spec, dit=cfg), jnp.bfloat16)
    vae, (width, height) = spec.vae, spec.sizes[0]
    frames = (spec.num_frames - 1) // vae.temporal_stride + 1
    rows, columns = height // vae.spatial_stride, width // vae.spatial_stride
    latents = jax.ShapeDtypeStruct((1, frames, rows, columns, vae.z_dim), jnp.float32)
    text = jax.ShapeDtypeStruct((2, cfg.text_len, cfg.text_dim), jnp.float32)
    steps = make_steps("unipc", make_schedule("unipc", 50, 5.0), 5.0).part(0, 1)

    def step(dit, condition, state, steps):
        return run_segment(dit_velocity("batch"), (dit, condition), state, steps, None)

    settled = jax.eval_shape(settle, dit, Condition(text))
    return jax.jit(step, compiler_options=compiler_options()).lower(*settled, State(*[latents] * 4), steps)


def test_depth_costs_no_compilation(record_property):
    """40 layers of width 5120 give the program of two, and compile in seconds (of CPU: machines are busy)."""
    programs = []
    for num_layers in (2, 40):
        begin = time.process_time()
        compiled = lowered_step(MODELS["wan2.1-t2v-14b"], num_layers).compile()
        seconds = time.process_time() - begin
        instructions = compiled.as_text().count(" = ")
        numbers = 4 * num_layers // 64 * 64  # of the layers
        programs.append((instructions, compiled.memory_analysis().temp_size_in_bytes - numbers))
        record_property(f"{num_layers} layers", f"{seconds:.1f} CPU seconds, {instructions} instructions")
    assert programs[0] == programs[1]
    assert instructions > 500  # the count sees the program
    assert seconds < COMPILE_CPU_SECONDS


def shapes_in(jaxpr) -> set[tuple[int, ...]]:
    """Shapes of all values of a program, those of its inner programs too."""
    return {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", str(jaxpr))}


def test_two_timesteps_are_not_spread_over_tokens():
    """Modulation is six vectors per timestep, never per token: that would be the largest array of all."""
    inputs = make_inputs(FULL)
    L, D = inputs["token_time"].shape[1], FULL.dim
    shapes = shapes_in(jax.make_jaxpr(forward)(make_dit(FULL), inputs))
    assert (2, L, D) in shapes and (2, 2, 6, D) in shapes  # the search sees the blocks
    assert not [shape for shape in shapes if L in shape and ({6, D} <= set(shape) or 6 * D in shape)]


@contextmanager
def counting_compilations() -> Iterator[list[str]]:
    """Fills a list with an entry for each program that is compiled."""
    compiled = []

    def listen(event: str, seconds: float, **kw) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_nothing_recompiles(tiny_folder):
    """Prompt, seed, guidance, shift, solver and pictures are arrays of the program."""
    model = load(tiny_folder("i2v"), dtype=jnp.float32)
    rng = np.random.default_rng(0)

    def clip(prompt: str = "a cat", num_steps: int = 2, **options) -> None:
        image = rng.integers(0, 256, (32, 48, 3), np.uint8)
        options |= {"image": image, "size": (48, 32), "num_frames": 1, "num_steps": num_steps}
        request = resolve(model.spec, prompt, **options)
        denoise(model, request, encode(model, request), [noise(model, request, request.seeds[0])])

    with counting_compilations() as compiled:
        clip()
        assert len(compiled) > 3  # the listener hears
        compiled.clear()
        clip(prompt="two boxers in a ring", negative_prompt="rain")
        clip(seed=7)
        clip(guidance_scale=3.5, shift=8.0)
        clip(solver="dpm++")
        clip(num_steps=4)
        assert not compiled


def small_run(solver: str) -> tuple[tuple[DiT, Condition], Steps, jax.Array]:
    text = make_inputs(TINY)["text_BSC"]
    steps = make_steps(solver, make_schedule(solver, 4, None if solver in RCM else 5.0), 4.0)
    return (make_dit(TINY), Condition(text)), steps, jax.random.normal(jax.random.key(0), (1, 2, 8, 8, 16))


@pytest.mark.parametrize("solver", SOLVERS)
def test_segments_are_bit_equal(solver):
    args, steps, latents = small_run(solver)
    velocity = dit_velocity("batch")
    states = [sample(velocity, args, start(latents), steps, segment=segment) for segment in (1, 2, "all")]
    for state in states[1:]:
        jax.tree.map(np.testing.assert_array_equal, state, states[0])
    assert jnp.abs(states[0].sample - latents).max() > 0.1


@pytest.mark.parametrize("segment", [1, "all"])
def test_not_a_number_names_the_step(segment):
    args, steps, latents = small_run("unipc")
    velocity = dit_velocity("batch")
    state = sample(velocity, args, start(latents), steps, last=2)
    flat = flatten_params(args[0])
    flat["blocks.ffn.fc1.kernel"] = flat["blocks.ffn.fc1.kernel"].at[1, 3, 5].set(jnp.nan)
    broken = unflatten_like(args[0], flat), args[1]
    with pytest.raises(NonFiniteError, match=r"step 3 of 4 \(timestep"):
        sample(velocity, broken, state, steps, first=2, segment=segment)


def on_mesh(network: str, module: Any, mesh: jax.sharding.Mesh) -> Any:
    """The same weights, read from the official layout straight onto the mesh."""
    rows = table(network, module.cfg)
    weights = {name: produce() for name, _, _, produce in export(to_numpy(module), rows, layout="official")}
    sharded = fill(abstract(lambda: module), rows, weights, network=network, mesh=mesh)
    share = mesh.shape["fsdp"] * mesh.shape["tensor"]
    for path, leaf in flatten_params(sharded).items():
        assert leaf.sharding == param_sharding(network, path, leaf.shape, mesh), path
        if re.fullmatch(r"blocks\.(.*attn\.[qkvo]|ffn\.\w+)\.kernel", path):
            assert leaf.addressable_shards[0].data.size * share == leaf.size, path
    return sharded


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_sharded_dit(axes):
    """Every mesh gives the numbers of one device, and each device does its part of the work."""
    dit, inputs = make_dit(FULL), make_inputs(FULL)
    mesh = make_mesh(axes)
    sharded = on_mesh("dit", dit, mesh)
    with use_mesh(mesh):
        run = forward.lower(sharded, inputs).compile()
        np.testing.assert_allclose(run(sharded, inputs), forward(dit, inputs), atol=1e-5)
    alone = forward.lower(dit, inputs).compile()
    assert run.cost_analysis()["flops"] < 0.2 * alone.cost_analysis()["flops"]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_sharded_text_encoder(axes):
    cfg = UMT5Config(vocab_size=64, dim=32, dim_attn=64, dim_ffn=48, num_heads=4, num_layers=2)
    encoder = randomised(lambda: UMT5(cfg, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    ids, mask = rng.integers(0, 64, (2, 16)), np.arange(16) < [[5], [16]]
    run = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))
    mesh = make_mesh(axes)
    with use_mesh(mesh):
        features = run(on_mesh("text_encoder", encoder, mesh), ids, mask)
    assert len(features.sharding.device_set) == 8
    np.testing.assert_allclose(features, run(encoder, ids, mask), atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_published_models_can_be_sharded(name):
    """Every parameter has a rule, and of the large networks no device of eight holds more than its share."""
    spec = MODELS[name]
    parts = [part for part in spec_parts(spec) if part != "dit_low"]
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    for part in parts:
        held = total = adapters = 0
        for path, leaf in flatten_params(build(part, spec, jnp.bfloat16)).items():
            shape = param_sharding(part, path, leaf.shape, mesh).shard_shape(leaf.shape)
            held, total = held + np.prod(shape), total + leaf.size
            adapters += leaf.size * is_adapter(path)
        whole = part in ("vae", "audio_vae", "vocoder") or spec.name == "wan2.6-nano"  # too small to be cut
        assert held < total * (1.01 if whole else 0.14), part
        assert part != "dit" or total - adapters == spec.dit.num_params()
