"""The umT5 text encoder: T5 with gated GELU and a relative position bias of its own in every layer.

Axes: ``B`` batch, ``S`` text tokens, ``D`` width, ``N`` heads, ``K`` head size, ``F`` MLP width.
Source: ``wan/modules/t5.py`` T5Encoder. Deviation: the residual stream is float32 whatever the dtype of the
weights, where the official encoder rounds it to bfloat16 after every branch.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.config import UMT5Config
from wan_jax.nn.attention import attention
from wan_jax.nn.layers import Linear, RMSNorm, gelu_tanh, param
from wan_jax.nn.stack import apply_stack, init_stack
from wan_jax.parallel import constrain

Array = jax.Array

_MASKED = float(np.finfo(np.float32).min)  # finite: a row without any valid key stays free of NaN


def relative_buckets(rel: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of each distance ``key - query``, int32: one half for earlier keys, the other for later ones.

    In each half the first buckets hold one distance each, the rest grow logarithmically to ``max_distance``,
    the last takes all beyond. Source: ``T5RelativeEmbedding``; its float32 logarithm decides the borders.
    """
    half = num_buckets // 2
    exact = half // 2
    distance = np.abs(rel)
    share = np.log(np.float32(np.maximum(distance, exact)) / np.float32(exact))
    share = share / np.float32(math.log(max_distance / exact))  # 0 at ``exact``, 1 at ``max_distance``
    far = exact + (share * np.float32(half - exact)).astype(np.int32)
    near_or_far = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return (near_or_far + half * (rel > 0)).astype(np.int32)


class Embedding(nnx.Module):
    """Rows of a table by number; the caller guarantees that the numbers are inside."""

    def __init__(self, rows: int, dim: int, *, std: float, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.embedding = param(rngs, (rows, dim), dtype, std=std)

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids]


class Attention(nnx.Module):
    """Multi-head self-attention without biases and without ``K ** -0.5``, which T5 trains into ``q``."""

    def __init__(self, cfg: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        def linear(d_in: int, d_out: int) -> Linear:
            return Linear(d_in, d_out, bias=False, dtype=dtype, rngs=rngs)

        self.q, self.k, self.v = (linear(cfg.dim, cfg.dim_attn) for _ in range(3))
        self.o = linear(cfg.dim_attn, cfg.dim)
        self.num_heads = cfg.num_heads

    def __call__(self, x_BSD: Array, bias_BNSS: Array) -> Array:
        B, S, _ = x_BSD.shape
        q, k, v = (project(x_BSD).reshape(B, S, self.num_heads, -1) for project in (self.q, self.k, self.v))
        return self.o(attention(q, k, v, scale=1.0, bias=bias_BNSS).reshape(B, S, -1))


class GatedMLP(nnx.Module):
    """``fc2(fc1(x) * gelu(gate(x)))`` without biases."""

    def __init__(self, dim: int, hidden: int, *, dtype: Any, rngs: nnx.Rngs):
        self.gate = Linear(dim, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.fc1 = Linear(dim, hidden, bias=False, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(hidden, dim, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.fc1(x) * gelu_tanh(self.gate(x)))


class Block(nnx.Module):
    """Pre-normed attention and MLP. Norms, position bias, softmax and the residual stream are float32."""

    def __init__(self, cfg: UMT5Config, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        self.attn = Attention(cfg, dtype=dtype, rngs=rngs)
        self.pos_embedding = Embedding(cfg.num_buckets, cfg.num_heads, std=cfg.num_heads**-0.5, rngs=rngs)
        self.norm2 = RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        self.ffn = GatedMLP(cfg.dim, cfg.dim_ffn, dtype=dtype, rngs=rngs)

    def __call__(self, x_BSD: Array, buckets_SS: Array, mask_BS: Array) -> Array:
        bias_NSS = jnp.moveaxis(self.pos_embedding(buckets_SS), -1, 0)
        bias_BNSS = jnp.where(mask_BS[:, None, None, :], bias_NSS, _MASKED)
        x_BSD = x_BSD + self.attn(self.norm1(x_BSD), bias_BNSS)
        x_BSD = x_BSD + self.ffn(self.norm2(x_BSD))
        return constrain(x_BSD, "B", None, None)


class UMT5(nnx.Module):
    """Text features for the DiT. The module is a pytree: pass it to `jax.jit`.

    Matrices and the token table are held, and multiplied, in ``dtype``.
    """

    def __init__(self, cfg: UMT5Config, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.cfg = cfg
        self.token_embedding = Embedding(cfg.vocab_size, cfg.dim, std=1.0, dtype=dtype, rngs=rngs)
        self.blocks = init_stack(lambda rngs: Block(cfg, dtype=dtype, rngs=rngs), cfg.num_layers, rngs)
        self.norm = RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)

    def __call__(self, ids_BS: Array, mask_BS: Array) -> Array:
        """Encode token ids.

        Args:
            ids_BS: int32 in [0, vocab_size), padded at the end.
            mask_BS: 1 or True on tokens, the end token included; 0 on padding, which is not attended to.
        Returns:
            [B, S, D] float32. Rows under mask 0 are meaningless: the DiT takes zeros there.
        """
        cfg = self.cfg
        S = ids_BS.shape[1]
        # One bucket per distance, spread to [S, S] on the device: no large constant in the program.
        buckets = jnp.asarray(relative_buckets(np.arange(1 - S, S), cfg.num_buckets, cfg.max_distance))
        position = jnp.arange(S)
        buckets_SS = buckets[position - position[:, None] + S - 1]
        mask_BS = mask_BS.astype(bool)

        x_BSD = constrain(self.token_embedding(ids_BS).astype(jnp.float32), "B", None, None)
        x_BSD, _ = apply_stack(self.blocks, x_BSD, lambda block, x: (block(x, buckets_SS, mask_BS), None))
        return self.norm(x_BSD)
