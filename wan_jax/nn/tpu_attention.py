"""Our attention kernel for TPUs whose matrix unit is 256 wide (v6e, v7x), for heads of 128.

Two things set it apart from ``splash``:

* Scores are kept the other way round, [keys, queries]. The product of values and weights, [K, keys] x [keys, queries],
  then fills the matrix unit in both directions; as [queries, keys] x [keys, K] it would use half of its columns.
  (That of keys and queries contracts K = 128 numbers either way, half of its rows.)
* The maximum of a softmax is replaced by a number that is known before the scores: any number gives the same result,
  as long as nothing overflows and the largest weight does not vanish. By Cauchy and Schwarz no score of a query
  exceeds its length times that of the longest key. Nothing is rescaled then as further keys come, and there is no
  maximum to be found.

With ``b`` that bound for the scores in base 2, every score lies in [-b, b], and weights are ``2 ** (score - b +
HEADROOM)``: at most ``2 ** HEADROOM``, and the largest of a query at least ``2 ** (HEADROOM - 2 b)``. `fits` says for
which queries and keys that is far from both ends of a float32; for others `nn.kernels` takes ``splash``, in the same
program.

Axes: ``N`` heads, ``L`` queries, ``S`` keys, ``K`` head size.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

HEADROOM = 64.0  # powers of two: 2**64 times the number of keys times a value stays below 2**127
LARGEST = 80.0  # bound in powers of two: weights down to 2**-30 of the largest one stay above 2**-126
ROWS = 8  # of a register: sums are kept in that many partial ones


class Tiles(NamedTuple):
    """Tokens: queries at once, keys loaded at once. ``vmem``: bytes of vector memory that the kernel may take."""

    q: int
    kv: int
    vmem: int


TILES = Tiles(4864, 512, 56 * 2**20)  # 75,776 tokens are 16 blocks of 4,736 queries; a v7x has 64 MiB


def bounds(q_NLK: Array, k_NSK: Array) -> Array:
    """[N, L] float32: no product of a query with any of the keys is larger."""
    q_NL, k_NS = (jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1)) for x in (q_NLK, k_NSK))
    return q_NL * k_NS.max(-1, keepdims=True)


def fits(bounds_NL: Array) -> Array:
    """Whether `attend` is exact for queries in base 2 with these `bounds`."""
    return bounds_NL.max() <= LARGEST


def attend(
    q_NLK: Array,
    k_NSK: Array,
    v_NSK: Array,
    bounds_NL: Array,
    lengths_N: Array,
    *,
    tiles: Tiles,
    interpret: bool = False,
) -> Array:
    """Attention to the first keys, in the dtype of ``q``.

    Args:
        q_NLK: with the scale and ``log2(e)`` in them, so that weights are powers of two; L a multiple of ``tiles.q``.
        k_NSK, v_NSK: S a multiple of ``tiles.kv``.
        lengths_N: int32, how many keys are there, at least one.
    """
    (N, L, K), S = q_NLK.shape, k_NSK.shape[1]
    grid = (N, L // tiles.q, S // tiles.kv)

    def keys_at(n: Array, i: Array, j: Array, lengths: Array) -> tuple[Array, Array, int]:
        """Blocks without any key are not loaded: the last one stays."""
        return n, jnp.minimum(j, jax.lax.div(lengths[n] - 1, tiles.kv)), 0

    query = pl.BlockSpec((None, tiles.q, K), lambda n, i, j, lengths: (n, i, 0))
    key = pl.BlockSpec((None, tiles.kv, K), keys_at)
    bound = pl.BlockSpec((None, 1, tiles.q), lambda n, i, j, lengths: (n, 0, i))
    return pl.pallas_call(
        functools.partial(_kernel, size=tiles.kv),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=grid,
            in_specs=[query, key, key, bound],
            out_specs=query,
            scratch_shapes=[pltpu.VMEM((K, tiles.q), jnp.float32), pltpu.VMEM((ROWS, tiles.q), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct(q_NLK.shape, q_NLK.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tiles.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * math.prod(q_NLK.shape) * S,
            transcendentals=N * L * S,
            bytes_accessed=2 * (2 * N * L * K + 2 * N * S * K * grid[1]),
        ),
        name="wan_attention",
        interpret=interpret,
    )(lengths_N, q_NLK, k_NSK, v_NSK, bounds_NL[:, None])


def _kernel(lengths_ref, q_ref, k_ref, v_ref, bound_ref, out_ref, sum_ref, total_ref, *, size: int) -> None:
    """One block of keys for one of queries. ``sum_ref`` [K, queries] adds up values, ``total_ref`` weights."""
    j, length = pl.program_id(2), lengths_ref[pl.program_id(0)]

    @pl.when(j == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)
        total_ref[...] = jnp.zeros_like(total_ref)

    def add(masked: bool) -> None:
        contract_last = (((1,), (1,)), ((), ()))
        scores = jax.lax.dot_general(k_ref[...], q_ref[...], contract_last, preferred_element_type=jnp.float32)
        scores = scores - (bound_ref[...] - HEADROOM)
        if masked:
            key = j * size + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
            scores = jnp.where(key < length, scores, -jnp.inf)
        weights = jnp.exp2(scores)
        total_ref[...] += weights.reshape(-1, ROWS, weights.shape[1]).sum(0)
        contract_first = (((0,), (0,)), ((), ()))
        weights = weights.astype(v_ref.dtype)
        sum_ref[...] += jax.lax.dot_general(v_ref[...], weights, contract_first, preferred_element_type=jnp.float32)

    pl.when((j + 1) * size <= length)(lambda: add(masked=False))
    pl.when((j * size < length) & (length < (j + 1) * size))(lambda: add(masked=True))  # the last block of keys

    @pl.when(j == pl.num_programs(2) - 1)
    def _():
        total = total_ref[...].sum(0, keepdims=True)
        out_ref[...] = (sum_ref[...] / total).T.astype(out_ref.dtype)
