"""One door to attention: `attention(q, k, v)`.

Axes: ``B`` batch, ``L`` queries, ``S`` keys, ``N`` heads, ``K`` head size.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from wan_jax.nn.layers import matmul_precision

Array = jax.Array

# Float32 scores that may exist at once: what a CPU's cache holds, a fair share of an accelerator's memory. Larger
# problems are cut along the queries, never along the keys, so that each softmax stays exact in one pass.
SCORE_BYTES = {"cpu": 8 * 2**20}
SCORE_BYTES_ACCELERATOR = 256 * 2**20
MIN_ROWS = 64  # fewer queries at once would starve the matrix unit


def attention(
    q_BLNK: Array, k_BSNK: Array, v_BSNK: Array, *, scale: float | None = None, bias: Array | None = None
) -> Array:
    """Softmax attention; scores and softmax in float32, the two products in the dtype of ``q``.

    Args:
        scale: positive factor on the scores, default ``K ** -0.5``.
        bias: [B or 1, N, L or 1, S] float32 added to the scores: position bias, padding mask.
    Returns:
        [B, L, N, K] in the dtype of ``q``. The full matrix of scores never exists when it passes `SCORE_BYTES`, nor in
        the backward pass (each chunk is recomputed).
    """
    B, L, N, K = q_BLNK.shape
    scale = K**-0.5 if scale is None else scale
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))  # heads first: plain batched matmuls
    core = functools.partial(_attend, k=k, v=v, scale=scale)
    rows = max(MIN_ROWS, SCORE_BYTES.get(jax.default_backend(), SCORE_BYTES_ACCELERATOR) // (4 * B * N * k.shape[2]))
    if rows >= L:
        return jnp.swapaxes(core(q, bias), 1, 2)
    chunks = -(-L // rows)
    rows = -(-L // chunks)  # even chunks: the last one carries little padding

    def split(x: Array) -> Array:
        """[B, N, L, ...] -> [chunks, B, N, rows, ...]."""
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * rows - L), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, rows, x.shape[3]), 2, 0)

    if bias is None or bias.shape[2] == 1:
        out = jax.lax.map(jax.checkpoint(lambda q: core(q, bias)), split(q))
    else:
        out = jax.lax.map(jax.checkpoint(lambda part: core(*part)), (split(q), split(bias)))
    return jnp.moveaxis(out, 0, 1).swapaxes(2, 3).reshape(B, chunks * rows, N, K)[:, :L]


def _attend(q: Array, bias: Array | None, *, k: Array, v: Array, scale: float) -> Array:
    """Heads-first attention of some queries to all keys; the softmax is normalised after the second product."""
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("BNLK,BNSK->BNLS", q, k, precision=precision, preferred_element_type=jnp.float32)
    if bias is not None:
        scores, scale = scores * scale + bias, 1.0
    weights = jnp.exp((scores - scores.max(-1, keepdims=True)) * scale)
    out = jnp.einsum(
        "BNLS,BNSK->BNLK", weights.astype(q.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    return (out / weights.sum(-1)[..., None]).astype(q.dtype)
