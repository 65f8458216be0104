"""The door to attention: the reference, the kernels beside it, and which one a program gets."""

from __future__ import annotations

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.errors import InputError
from wan_jax.nn import attention as door
from wan_jax.nn import kernels, tpu_attention
from wan_jax.nn.attention import attention, attention_to_part, use_attention

TILES = kernels.Tiles(256, 256, 128, 128)  # several of each for the lengths below


def problem(dtype=np.float32, *, B=2, L=300, S=200, N=2, K=128):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((B, n, N, K)), dtype) for n in (L, S, S)]


def exact(q, k, v, lengths, scale):
    """In float64, one sample at a time: output and logarithm of the sum."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out, total = [], []
    for sample, there in enumerate(lengths):
        scores = np.einsum("lnk,snk->lns", q[sample], k[sample, :there]) * scale
        highest = scores.max(-1, keepdims=True)
        weights = np.exp(scores - highest)
        out.append(np.einsum("lns,snk->lnk", weights / weights.sum(-1, keepdims=True), v[sample, :there]))
        total.append(np.log(weights.sum(-1)) + highest[..., 0])
    return np.stack(out), np.stack(total)


@pytest.mark.parametrize("room", [None, 4 * 2 * 2 * 200 * 70])
def test_lengths_of_the_reference(room, monkeypatch):
    """Whole, and in chunks of 70 queries."""
    if room:
        monkeypatch.setattr(door, "SCORE_BYTES", {"cpu": room})
    q, k, v = problem()
    lengths = jnp.array([200, 77])
    out, total = exact(q, k, v, lengths, 128**-0.5)
    np.testing.assert_allclose(attention(q, k, v, lengths=lengths), out, atol=2e-6)
    for ours, expected in zip(attention_to_part(q, k, v, lengths=lengths), (out, total), strict=True):
        np.testing.assert_allclose(ours, expected, atol=4e-6)
    bias = jnp.where(jnp.arange(200) < lengths[:, None], 0.0, door.MASKED)[:, None, None]
    np.testing.assert_allclose(attention(q, k, v, bias=bias), out, atol=2e-6)


def test_a_part_without_keys_weighs_nothing():
    q, k, v = problem(L=5, S=7)
    out, total = attention_to_part(q, k, v, lengths=jnp.array([0, 7]))
    assert np.isfinite(out).all() and (total[0] < -1e29).all() and (total[1] > -100).all()


@pytest.mark.parametrize(("dtype", "near"), [(np.float32, 4e-6), (jnp.bfloat16, 0.02)])
def test_our_kernel_in_the_interpreter(dtype, near):
    """Padded tiles, a block that is part there, blocks that are not."""
    q, k, v = problem(dtype)
    lengths = jnp.array([200, 77])
    out, _ = exact(q, k, v, lengths, 0.1)
    tiles = tpu_attention.Tiles(256, 64, 2**20)
    ours = kernels.transposed(q, k, v, lengths, scale=0.1, tiles=tiles, interpret=True)
    np.testing.assert_allclose(np.asarray(ours, np.float64), out, atol=near)


def test_scores_beyond_a_fixed_maximum(monkeypatch):
    """Where weights would vanish splash is taken; its gradients always."""
    q, k, v = problem(L=128, S=128, N=1)
    monkeypatch.setattr(kernels, "splash", lambda q, k, v, lengths, *, scale, interpret: 3 * q)
    run = functools.partial(kernels.transposed, lengths=None, tiles=tpu_attention.Tiles(128, 64, 2**20), interpret=True)
    assert not np.array_equal(run(q, k, v, scale=0.1), 3 * q)
    np.testing.assert_array_equal(run(q, k, v, scale=1.0), 3 * q)
    np.testing.assert_array_equal(jax.grad(lambda q: run(q, k, v, scale=0.1).sum())(q), jnp.full(q.shape, 3.0))


@pytest.mark.parametrize(("dtype", "near", "slope"), [(np.float32, 4e-6, 2e-5), (jnp.bfloat16, 0.02, 0.1)])
def test_splash_in_the_interpreter(dtype, near, slope):
    """Padded tiles, absent keys; output, sums and gradients. In bfloat16 the scaled queries are rounded once more."""
    q, k, v = problem(dtype)
    lengths = jnp.array([200, 77])
    out, total = exact(q, k, v, lengths, 0.1)
    ours = kernels.splash(q, k, v, lengths, scale=0.1, sums=True, tiles=TILES, interpret=True)
    for x, expected in zip(ours, (out, total), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), expected, atol=near)

    def pull(function):
        out, back = jax.vjp(lambda *qkv: function(*qkv).astype(jnp.float32), q, k, v)
        return back(out)

    ours = pull(lambda *qkv: kernels.splash(*qkv, lengths, scale=0.1, tiles=TILES, interpret=True))
    for x, expected in zip(ours, pull(lambda *qkv: attention(*qkv, lengths=lengths, scale=0.1)), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float64), np.asarray(expected, np.float64), atol=slope)


def test_tiles():
    """The tails are small, and the parts divide the tiles."""
    large, small = kernels.tiles_of("TPU v6 lite"), kernels.tiles_of("TPU v5 lite")
    assert large.q == 2048 and small.q == 1024
    for length, padded in ((75_600, 75_776), (32_760, 32_768), (18_900, 19_200), (512, 512), (257, 384)):
        tile = kernels._even_tile(length, large.kv)
        assert tile % kernels.LANES == 0 and -(-length // tile) * tile == padded
        part = kernels._part(tile, large.compute)
        assert part <= large.compute and tile % part == part % kernels.LANES == 0
    assert kernels._even_tile(18_944, large.q) == 512  # divides: nothing is padded


# ---- the choice --------------------------------------------------------------------------------------------


def seen_as(monkeypatch, platform, kind, installed=True):
    monkeypatch.setattr(door, "platform_and_kind", lambda: (platform, kind))
    monkeypatch.setattr(kernels.Kernel, "installed", installed)


def chosen(q, bias=None):
    kernel = door.choose(q, bias)
    return next((name for name, other in kernels.KERNELS.items() if other is kernel), door.REFERENCE)


def test_choice(monkeypatch):
    half, full = (jax.ShapeDtypeStruct((1, 64, 2, 128), dtype) for dtype in (jnp.bfloat16, jnp.float32))
    odd, wide = (jax.ShapeDtypeStruct((1, 64, 2, K), jnp.bfloat16) for K in (80, 256))
    assert kernels.platform_and_kind()[0] == "cpu" and chosen(half) == "xla"
    seen_as(monkeypatch, "cuda", "NVIDIA H200")
    assert [chosen(q) for q in (half, odd, wide, full)] == ["cudnn", "cudnn", "xla", "xla"]
    assert chosen(half, bias=jnp.zeros((1, 2, 64, 64))) == "xla"
    with use_attention("xla"):
        assert chosen(half) == "xla"
    with use_attention("tokamax"):
        assert chosen(half) == "tokamax" and chosen(full) == "xla"
    monkeypatch.setenv("WAN_JAX_ATTENTION", "xla")
    assert chosen(half) == "xla"
    with use_attention("auto"):  # before the environment
        assert chosen(half) == "cudnn"
    monkeypatch.delenv("WAN_JAX_ATTENTION")
    seen_as(monkeypatch, "tpu", "TPU v6 lite")
    assert [chosen(q) for q in (half, odd, wide, full)] == ["splash", "xla", "splash", "xla"]


def test_impossible_choices(monkeypatch):
    q = jax.ShapeDtypeStruct((1, 64, 2, 128), jnp.bfloat16)
    with pytest.raises(InputError, match="attention 'spalsh': use auto, xla, cudnn.*did you mean splash"):
        use_attention("spalsh").__enter__()
    monkeypatch.setenv("WAN_JAX_ATTENTION", "flash")
    with pytest.raises(InputError, match=r"use auto, xla, cudnn, splash, transposed, tokamax \(WAN_JAX_ATTENTION\)"):
        chosen(q)
    monkeypatch.delenv("WAN_JAX_ATTENTION")
    seen_as(monkeypatch, "tpu", "TPU v6 lite")
    with pytest.raises(
        InputError, match="'cudnn' is for cuda, this program for TPU v6 lite: use xla, splash, transposed, tokamax"
    ):
        with use_attention("cudnn"):
            chosen(q)
    seen_as(monkeypatch, "tpu", "TPU v6 lite", installed=False)
    with pytest.raises(InputError, match=r'not installed: pip install "wan_jax\[tokamax\]"'), use_attention("tokamax"):
        chosen(q)


def test_another_platform_gets_the_reference(monkeypatch, caplog):
    """A program traced for one platform and lowered for another, and its gradient."""
    marked = kernels.KERNELS["splash"]._replace(
        run=lambda q, k, v, lengths, *, scale: q * jnp.nan,
        sums=lambda q, k, v, lengths, *, scale: (q * jnp.nan, q[..., 0].astype(jnp.float32)),
    )
    monkeypatch.setitem(kernels.KERNELS, "splash", marked)
    q, k, v = problem(jnp.bfloat16, L=9, S=7)
    expected = attention(q, k, v), *attention_to_part(q, k, v)
    slopes = jax.grad(lambda q: attention(q, k, v).astype(jnp.float32).sum())(q)
    seen_as(monkeypatch, "tpu", "TPU v6 lite")
    door._tell.cache_clear()
    with caplog.at_level(logging.INFO, logger=door.__name__):
        ours = jax.jit(lambda *qkv: (attention(*qkv), *attention_to_part(*qkv)))(q, k, v)
        again = jax.jit(jax.grad(lambda q: attention(q, k, v).astype(jnp.float32).sum()))(q)
    for x, y in zip((*ours, again), (*expected, slopes), strict=True):
        np.testing.assert_allclose(np.asarray(x, np.float32), np.asarray(y, np.float32), atol=0.02)
    assert [record.getMessage() for record in caplog.records] == ["attention on TPU v6 lite: splash"]
