"""Attention on a mesh: every exchange gives the numbers and the gradients of one device, whole models too."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.test_dit import TINY, make_dit, make_inputs
from tests.test_sound import TINY as TINY_FUSION
from tests.test_sound import make_fusion
from tests.test_sound import make_inputs as make_sound_inputs
from wan_jax.checkpoint import flatten_params
from wan_jax.errors import InputError
from wan_jax.nn import attention as door
from wan_jax.nn import context, kernels
from wan_jax.nn.attention import attention
from wan_jax.nn.context import Tokens, attend, even, split, use_context
from wan_jax.parallel import make_mesh, use_mesh

QUICK = {"xla_backend_optimization_level": "0"}


@pytest.fixture(scope="module")
def problem():
    """21 tokens, which nothing divides but 3 and 7, of four heads; the output and its gradients on one device."""
    rng = np.random.default_rng(0)
    q, k, v, out = (rng.standard_normal((2, 21, 4, 8), np.float32) for _ in range(4))
    expected, pull = jax.vjp(attention, q, k, v)
    return (q, k, v), out, (expected, pull(out))


@pytest.mark.parametrize(
    ("axes", "exchange", "program"),
    [
        ({"fsdp": 8}, "auto", ["all_to_all", "ppermute"]),  # four heads on eight devices: both
        ({"data": 2, "fsdp": 2, "seq": 2}, "auto", ["all_to_all"]),
        ({"seq": 4, "tensor": 2}, "auto", ["all_to_all", "ppermute"]),  # two heads are left
        ({"fsdp": 2, "seq": 4}, "ring", ["ppermute"]),
        ({"data": 2, "seq": 4}, "combined", ["all_to_all", "ppermute"]),
        ({"fsdp": 8}, "partitioner", []),
    ],
    ids=str,
)
def test_exchanges(problem, axes, exchange, program):
    args, cotangent, expected = problem
    tokens = Tokens(21, shared=True)

    def run(*args):
        out, pull = jax.vjp(lambda *qkv: attend(*map(even, qkv), tokens, tokens)[:, :21], *args)
        return out, pull(cotangent)

    with use_mesh(make_mesh(axes)), use_context(exchange):
        traced = jax.jit(run).trace(*args)
        ours = traced.lower().compile(QUICK)(*args)
    assert [name for name in ("all_to_all", "ppermute") if name in str(traced.jaxpr)] == program
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), ours, expected)


def test_a_ring_without_sums_gathers_the_keys(problem, monkeypatch):
    """As on NVIDIA, where the kernel does not tell the sum of its softmax."""
    monkeypatch.setattr(context, "attention_to_part", lambda *args, **options: None)
    args, _, (expected, _) = problem
    tokens = Tokens(21, shared=True)
    with use_mesh(make_mesh({"fsdp": 8})):
        traced = jax.jit(lambda *qkv: attend(*map(even, qkv), tokens, tokens)[:, :21]).trace(*args)
        ours = traced.lower().compile(QUICK)(*args)
    assert "all_gather" in str(traced.jaxpr) and "ppermute" not in str(traced.jaxpr)
    np.testing.assert_allclose(ours, expected, atol=2e-6)


def test_only_one_stream_is_shared():
    """Text for shared queries, and shared keys for the queries of the sound: nothing that is padded is heard."""
    rng = np.random.default_rng(1)
    video, few = rng.standard_normal((2, 21, 4, 8), np.float32), rng.standard_normal((2, 5, 4, 8), np.float32)
    shared, whole = Tokens(21, shared=True), Tokens(5)

    def run(video, few):
        video = jnp.pad(video, ((0, 0), (0, 3), (0, 0), (0, 0)), constant_values=9.0)
        return attend(video, few, few, shared, whole)[:, :21], attend(few, video, video, whole, shared)

    with use_mesh(make_mesh({"data": 2, "fsdp": 2, "seq": 2})):
        ours = jax.jit(run, compiler_options=QUICK)(video, few)
    np.testing.assert_allclose(ours[0], attention(video, few, few), atol=2e-6)
    np.testing.assert_allclose(ours[1], attention(few, video, video), atol=2e-6)


def test_split():
    """(heads, devices) -> (neighbours that trade heads, groups in a ring)."""
    cases = {(40, 8): (8, 1), (12, 8): (4, 2), (40, 16): (8, 2), (12, 4): (4, 1), (5, 8): (1, 8), (3, 1): (1, 1)}
    for given, sides in cases.items():
        assert split(*given) == sides
    with use_context("ring"):
        assert split(40, 8) == (1, 8)
    with use_context("combined"):
        assert split(40, 8) == (4, 2)
        with pytest.raises(InputError, match=r"12 heads, 3 devices; share tokens \(fsdp x seq\) over 4 or 6 devices"):
            split(12, 3)
    with use_context("ulysses"):
        assert split(12, 4) == (4, 1)
        with pytest.raises(InputError, match="12 heads, 8 devices; .* over 4 or 6 devices, or leave it to auto"):
            split(12, 8)
    with pytest.raises(InputError, match="did you mean ulysses"), use_context("ulises"):
        pass


def test_the_choice_is_told_once(caplog):
    context._tell.cache_clear()
    q = jax.ShapeDtypeStruct((1, 24, 12, 8), jnp.float32)
    with caplog.at_level(logging.INFO, logger=context.__name__), use_mesh(make_mesh({"fsdp": 8})):
        for tokens in (Tokens(24, True), Tokens(23, True)):
            jax.eval_shape(lambda q, tokens=tokens: attend(q, q, q, tokens, tokens), q)
    assert [r.getMessage() for r in caplog.records] == ["12 heads, tokens on 8 devices: Ulysses over 4, ring of 2"]


def test_even():
    x = jnp.ones((1, 21, 2))
    assert even(x) is x
    with use_mesh(make_mesh({"data": 2, "seq": 4})):
        assert even(x).shape == (1, 24, 2) and even(x[0], 0).shape == (24, 2) and even(x).sum() == 42
        assert even(x[:, :20]).shape == (1, 20, 2)


def test_even_for_the_tiles_of_a_tpu(monkeypatch):
    """Padded once, for the devices and for the kernel."""
    monkeypatch.setattr(kernels, "platform_and_kind", lambda: ("tpu", "TPU v6 lite"))
    clip = jax.ShapeDtypeStruct((1, 75_600, 2), jnp.float32)
    for axes in ({"data": 2, "seq": 4}, {"fsdp": 8}):
        with use_mesh(make_mesh(axes)):
            assert jax.eval_shape(even, clip).shape == (1, 75_776, 2)
    assert jax.eval_shape(even, clip).shape == (1, 75_776, 2)


# ---- models ------------------------------------------------------------------------------------------------


def same(run, *args, axes):
    run = jax.jit(run, compiler_options=QUICK)
    alone = run(*args)
    with use_mesh(make_mesh(axes)):
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), run(*args), alone)


def uneven_inputs():
    """3 x 3 x 5 tokens."""
    inputs = make_inputs(TINY)
    return inputs | {"latents_BTHWC": jax.random.normal(jax.random.key(5), (2, 3, 6, 10, TINY.in_dim))}


def test_dit_with_tokens_that_do_not_divide():
    """Velocity and gradient of the weights."""

    def run(dit, inputs):
        def loss(dit):
            velocity = dit(**inputs)
            return jnp.square(velocity).mean(), velocity

        (_, velocity), gradient = jax.value_and_grad(loss, has_aux=True)(dit)
        return velocity, flatten_params(gradient)

    same(run, make_dit(TINY), uneven_inputs(), axes={"fsdp": 4, "seq": 2})


def test_dit_with_a_time_for_each_token():
    """As in TI2V, whose first frame is clean; intermediates come without the padding."""
    inputs = uneven_inputs() | {"timesteps": jnp.float32([[700, 0], [30, 0]])}
    inputs["token_time"] = (jnp.arange(45) < 15).astype(jnp.int32)[None]
    same(lambda dit, inputs: dit(**inputs, capture=True), make_dit(TINY), inputs, axes={"fsdp": 8})


def test_twin_streams_with_tokens_that_do_not_divide():
    """Eight devices share the 12 tokens of the video, not those of the sound."""
    inputs = make_fusion(TINY_FUSION), *make_sound_inputs(batch=2)
    same(lambda fusion, *inputs: fusion(*inputs), *inputs, axes={"fsdp": 8})


def test_a_mesh_leaves_the_kernel_of_one_device():
    """Inside the exchange the door sees one device; outside it the partitioner must be able to cut."""
    q = jax.ShapeDtypeStruct((1, 16, 8, 128), jnp.bfloat16)
    seen = []

    def look(x):
        seen.append(door._on_one_device())
        return x

    with use_mesh(make_mesh({"fsdp": 8})):
        place = context.activation_spec(q.shape, "B", "L", "N", None)
        jax.eval_shape(lambda x: look(jax.shard_map(look, in_specs=place, out_specs=place)(x)), q)
    jax.eval_shape(look, q)
    assert seen == [True, False, True]
