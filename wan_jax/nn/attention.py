"""One door to attention: `attention(q, k, v)`.

Axes: ``B`` batch, ``L`` queries, ``S`` keys, ``N`` heads, ``K`` head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from wan_jax.nn.layers import matmul_precision

Array = jax.Array

# Bytes of float32 scores that may exist at once. Larger problems are cut along the queries, never along the keys,
# so that each softmax stays exact in one pass and the result does not depend on the cut.
SCORE_BYTES = 256 * 2**20


def attention(q_BLNK: Array, k_BSNK: Array, v_BSNK: Array, *, scale: float | None = None, bias: Array | None = None) -> Array:
    """Softmax attention; scores and softmax in float32, the two products in the dtype of ``q``.

    Args:
        scale: factor on the scores, default ``K ** -0.5``.
        bias: [B or 1, N, L or 1, S] float32 added to the scores: position bias, padding mask.
    Returns:
        [B, L, N, K] in the dtype of ``q``. At most `SCORE_BYTES` of scores are materialised at once, also in the
        backward pass (each chunk is recomputed).
    """
    B, L, N, K = q_BLNK.shape
    S = k_BSNK.shape[1]
    scale = K**-0.5 if scale is None else scale
    core = functools.partial(_attend, k=k_BSNK, v=v_BSNK, scale=scale)
    rows = max(1, SCORE_BYTES // (4 * B * N * S))
    if rows >= L:
        return core(q_BLNK, bias=bias)
    chunks = -(-L // rows)
    rows = -(-L // chunks)  # even chunks: the last one carries little padding

    def split(x: Array, axis: int) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, chunks * rows - L)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], chunks, rows, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    if bias is None or bias.shape[2] == 1:
        out = jax.lax.map(jax.checkpoint(lambda part: core(part, bias=bias)), split(q_BLNK, 1))
    else:
        parts = split(q_BLNK, 1), split(bias, 2)
        out = jax.lax.map(jax.checkpoint(lambda part: core(part[0], bias=part[1])), parts)
    return jnp.moveaxis(out, 0, 1).reshape(B, chunks * rows, N, K)[:, :L]


def _attend(q: Array, *, k: Array, v: Array, scale: float, bias: Array | None) -> Array:
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("BLNK,BSNK->BNLS", q, k, precision=precision, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BNLS,BSNK->BLNK", weights, v, precision=precision)
