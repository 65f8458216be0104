"""The Wan diffusion transformer: Wan2.1 and Wan2.2; text, image, first-last-frame and TI2V conditioning by config.

Axes: ``B`` batch, ``T H W`` latent frames, rows, columns, ``C`` latent channels, ``L`` video tokens, ``S`` text tokens,
``I`` image tokens, ``D`` width, ``N`` heads, ``K`` head size, ``E`` distinct timesteps per sample (1 or 2).
Source: ``wan/modules/model.py`` of both repositories; parameter names follow their checkpoints.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.config import DiTConfig
from wan_jax.nn.context import Tokens, attend, chunk_of, even
from wan_jax.nn.layers import (
    MLP,
    LayerNorm,
    Linear,
    RMSNorm,
    gelu_erf,
    gelu_tanh,
    layer_norm,
    param,
    patchify,
    timestep_embedding,
    unpatchify,
)
from wan_jax.nn.reuse import Reuse, run_or_reuse
from wan_jax.nn.rope import Rope, rope_table, rotate
from wan_jax.nn.stack import apply_stack, init_stack
from wan_jax.parallel import constrain

Array = jax.Array

# What `DiT.read` needs, and nothing after it.
READER = (
    "text_embedding", "img_emb", "blocks.cross_attn.k", "blocks.cross_attn.v", "blocks.cross_attn.norm_k",
    "blocks.cross_attn.k_img", "blocks.cross_attn.v_img", "blocks.cross_attn.norm_k_img",
)  # fmt: skip


def select(values_BED: Array, token_time: Array | None) -> Array:
    """One vector per token out of the one or two of its sample: [B, 1, D], or [B, L, D] that XLA fuses into its use."""
    if token_time is None:
        return values_BED[:, :1]
    return jnp.where(token_time[..., None] == 0, values_BED[:, :1], values_BED[:, 1:2])


class Context(NamedTuple):
    """Keys and values of the text, and of the picture where there is one: the same in all steps of a clip.

    Of one block [B, S, N, K] each; of all blocks [B, layers, S, N, K], see `DiT.read`.
    """

    text: tuple[Array, Array]
    image: tuple[Array, Array] | None = None


class Attention(nnx.Module):
    """Multi-head attention with RMS-normed queries and keys; image tokens get keys and values of their own.

    The norms run over the full width, before the split into heads.
    """

    def __init__(self, cfg: DiTConfig, *, image: bool = False, dtype: Any, rngs: nnx.Rngs):
        def linear() -> Linear:
            return Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)

        def norm() -> RMSNorm:
            return RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)

        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        self.norm_q, self.norm_k = norm(), norm()
        self.num_heads = cfg.num_heads
        if image:
            self.k_img, self.v_img, self.norm_k_img = linear(), linear(), norm()

    def __call__(
        self,
        x_BLD: Array,
        context_BSD: Array,
        *,
        rope: Rope | None = None,
        tokens: Tokens | None = None,
    ) -> Array:
        """Attention to the tokens themselves, or to others.

        Args:
            rope: turns queries and keys: these are the same tokens.
            tokens: what the mesh must know of ``x_BLD``; default all of them, on every device.
        """
        q = self.queries(x_BLD)
        if rope is not None:
            q = rotate(q, rope)
        keys = None if rope is None else tokens
        return self.o.from_heads(self.attend(q, context_BSD, self.k, self.norm_k, self.v, rope, tokens, keys))

    def read(self, text_BSD: Array, image_BID: Array | None) -> Context:
        """What `recall` attends to."""
        text = self.keys_and_values(text_BSD, self.k, self.norm_k, self.v)
        if image_BID is None:
            return Context(text)
        return Context(text, self.keys_and_values(image_BID, self.k_img, self.norm_k_img, self.v_img))

    def recall(self, x_BLD: Array, context: Context, tokens: Tokens) -> Array:
        """Attention to what was read; ``tokens``: what the mesh must know of ``x_BLD``."""
        q = self.queries(x_BLD).astype(self.o.kernel.dtype)
        found = [attend(q, *source, tokens, Tokens(source[0].shape[1])) for source in context if source]
        return self.o.from_heads(sum(found[1:], start=found[0]))

    def queries(self, x_BLD: Array) -> Array:
        """Normalised queries [B, L, N, K], in the dtype of the matrices."""
        return self._heads(x_BLD, self.q, self.norm_q)

    def attend(
        self,
        q_BLNK: Array,
        source_BSD: Array,
        k: Linear,
        norm_k: RMSNorm,
        v: Linear,
        rope: Rope | None = None,
        queries_are: Tokens | None = None,
        keys_are: Tokens | None = None,
    ) -> Array:
        """Attention to one source of keys and values; ``rope`` turns the keys."""
        keys, values = self.keys_and_values(source_BSD, k, norm_k, v, rope)
        queries_are, keys_are = queries_are or Tokens(q_BLNK.shape[1]), keys_are or Tokens(keys.shape[1])
        return attend(q_BLNK.astype(keys.dtype), keys, values, queries_are, keys_are)

    def keys_and_values(
        self, source_BSD: Array, k: Linear, norm_k: RMSNorm, v: Linear, rope: Rope | None = None
    ) -> tuple[Array, Array]:
        """Both [B, S, N, K], in the dtype of the matrices."""
        keys, values = self._heads(source_BSD, k, norm_k), v.heads(source_BSD, self.num_heads)
        if rope is not None:
            keys = rotate(keys, rope)
        return keys.astype(k.kernel.dtype), values

    def _heads(self, x_BLD: Array, linear: Linear, norm: RMSNorm) -> Array:
        """Queries or keys, rounded to the dtype of the matrices before they are turned, as in the official code."""
        return norm(linear.heads(x_BLD, self.num_heads), 2).astype(linear.kernel.dtype)


class Block(nnx.Module):
    """Self-attention and MLP, both modulated and gated by the timestep; plain cross-attention between them.

    Modulation, norms, gates and the residual stream are float32. Source: WanAttentionBlock.
    """

    def __init__(self, cfg: DiTConfig, cross_attn: Attention, *, dtype: Any, rngs: nnx.Rngs):
        self.self_attn = Attention(cfg, dtype=dtype, rngs=rngs)
        self.norm3 = LayerNorm(cfg.dim, eps=cfg.eps, rngs=rngs)  # the official number; norms 1 and 2 have no weights
        self.cross_attn = cross_attn
        self.ffn = MLP(cfg.dim, cfg.ffn_dim, cfg.dim, act=gelu_tanh, dtype=dtype, rngs=rngs)
        self.modulation = param(rngs, (6, cfg.dim), std=cfg.dim**-0.5)
        self.eps = cfg.eps

    def modulate(self, time_BE6D: Array, token_time: Array | None) -> tuple[Array, ...]:
        """Shift, scale and gate of the self-attention, then of the MLP."""
        modulation = jnp.moveaxis(self.modulation[...] + time_BE6D, 2, 0)
        return tuple(select(m, token_time) for m in modulation)

    def attend_to_self(
        self, x_BLD: Array, modulation: tuple[Array, ...], rope: Rope, tokens: Tokens
    ) -> tuple[Array, Array]:
        """The stream after self-attention, and what that added before the gate."""
        h = self.normed(x_BLD, modulation[:2])
        out = self.self_attn(h, h, rope=rope, tokens=tokens)
        return x_BLD + modulation[2] * out, out

    def feed_forward(self, x_BLD: Array, modulation: tuple[Array, ...]) -> Array:
        """The stream after the MLP."""
        return x_BLD + modulation[5] * self.ffn(self.normed(x_BLD, modulation[3:5]))

    def normed(self, x_BLD: Array, modulation: tuple[Array, ...]) -> Array:
        shift, scale = modulation
        return layer_norm(x_BLD, self.eps) * (1 + scale) + shift

    def __call__(
        self,
        x_BLD: Array,
        time_BE6D: Array,
        token_time: Array | None,
        context: Context,
        rope: Rope,
        tokens: Tokens,
    ) -> tuple[Array, dict[str, Array]]:
        modulation = self.modulate(time_BE6D, token_time)
        x_BLD, self_attn = self.attend_to_self(x_BLD, modulation, rope, tokens)
        cross_attn = self.cross_attn.recall(self.norm3(x_BLD), context, tokens)
        x_BLD = constrain(self.feed_forward(x_BLD + cross_attn, modulation), "B", "L", None)
        return x_BLD, {"self_attn": self_attn, "cross_attn": cross_attn, "block": x_BLD}

    def in_chunks(
        self,
        x_BLD: Array,
        time_BE6D: Array,
        token_time: Array | None,
        context: Context,
        rope: Rope,
        tokens: Tokens,
        chunk: int,
    ) -> Array:
        """The stream after the block, ``chunk`` tokens at a time: the whole block's memory is that of the stream, of
        all keys and values, and of one chunk.

        Only self-attention takes tokens to each other. Once its keys and values are there, every chunk goes through
        the rest alone, and comes to lie where it was.
        """
        attn, count = self.self_attn, x_BLD.shape[1] // chunk

        def cut(x_BLD: Array, start: Array) -> tuple[Array, tuple[Array, ...], Rope]:
            def of(x: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, start, chunk, axis)

            times = None if token_time is None else of(token_time, 1)
            return of(x_BLD, 1), self.modulate(time_BE6D, times), (of(rope[0], 0), of(rope[1], 0))

        def put(x: Array, part: Array, start: Array) -> Array:
            return jax.lax.dynamic_update_slice_in_dim(x, part, start, 1)

        def hold(i: Array, held: tuple[Array, Array]) -> tuple[Array, Array]:
            part, modulation, turn = cut(x_BLD, i * chunk)
            new = attn.keys_and_values(self.normed(part, modulation[:2]), attn.k, attn.norm_k, attn.v, turn)
            return put(held[0], new[0], i * chunk), put(held[1], new[1], i * chunk)

        shape = *x_BLD.shape[:2], attn.num_heads, x_BLD.shape[2] // attn.num_heads
        nothing = jnp.zeros(shape, attn.k.kernel.dtype)
        keys, values = jax.lax.fori_loop(0, count, hold, (nothing, nothing))

        def rest(i: Array, x_BLD: Array) -> Array:
            part, modulation, turn = cut(x_BLD, i * chunk)
            q = rotate(attn.queries(self.normed(part, modulation[:2])), turn).astype(keys.dtype)
            met = attend(q, keys, values, Tokens(chunk), tokens)
            part = part + modulation[2] * attn.o.from_heads(met)
            part = part + self.cross_attn.recall(self.norm3(part), context, Tokens(chunk))
            return put(x_BLD, self.feed_forward(part, modulation), i * chunk)

        return jax.lax.fori_loop(0, count, rest, x_BLD)


class ImageEmbedding(nnx.Module):
    """CLIP tokens to width D. FLF2V adds a position table over the tokens of both images. Source: MLPProj."""

    def __init__(self, cfg: DiTConfig, *, dtype: Any, rngs: nnx.Rngs):
        if cfg.image_positions:
            self.emb_pos = param(rngs, (cfg.image_tokens, cfg.image_dim))
        self.norm1 = LayerNorm(cfg.image_dim, eps=1e-5, rngs=rngs)
        self.fc1 = Linear(cfg.image_dim, cfg.image_dim, dtype=dtype, rngs=rngs)
        self.fc2 = Linear(cfg.image_dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(cfg.dim, eps=1e-5, rngs=rngs)

    def __call__(self, clip_BIC: Array) -> Array:
        if hasattr(self, "emb_pos"):
            clip_BIC = clip_BIC + self.emb_pos[...]
        return self.norm2(self.fc2(gelu_erf(self.fc1(self.norm1(clip_BIC)))))


class Head(nnx.Module):
    """Modulated norm and projection to the latents of a token. Uses the time embedding itself, not its projection."""

    def __init__(self, cfg: DiTConfig, out_dim: int, *, rngs: nnx.Rngs):
        self.head = Linear(cfg.dim, out_dim, rngs=rngs)
        self.modulation = param(rngs, (2, cfg.dim), std=cfg.dim**-0.5)
        self.eps = cfg.eps

    def __call__(self, x_BLD: Array, time_BED: Array, token_time: Array | None) -> Array:
        shift, scale = (select(m + time_BED, token_time) for m in self.modulation[...])
        return self.head(layer_norm(x_BLD, self.eps) * (1 + scale) + shift)


class Trunk(nnx.Module):
    """What every stream of tokens has: an embedding, the conditioning by time and text, blocks, and a head.

    Matrices are held and multiplied in ``dtype``; timestep embedding, modulation, norms, rotary tables and the head
    are float32 whatever ``dtype`` is.

    Args:
        patch_embedding: from latents to width D.
        out_dim: numbers that the head gives per token.
        make_block: builds one block.
    """

    def __init__(
        self,
        cfg: DiTConfig,
        patch_embedding: nnx.Module,
        out_dim: int,
        make_block: Callable[[nnx.Rngs], Block],
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        self.patch_embedding = patch_embedding
        self.text_embedding = MLP(cfg.text_dim, cfg.dim, cfg.dim, act=gelu_tanh, dtype=dtype, rngs=rngs)
        self.time_embedding = MLP(cfg.freq_dim, cfg.dim, cfg.dim, act=jax.nn.silu, rngs=rngs)
        self.time_projection = Linear(cfg.dim, 6 * cfg.dim, rngs=rngs)
        self.blocks = init_stack(make_block, cfg.num_layers, rngs)
        self.head = Head(cfg, out_dim, rngs=rngs)

    def embed_time(self, timesteps_BE: Array) -> tuple[Array, Array]:
        """The embedding [B, E, D] for the head, and its projection [B, E, 6, D] for the blocks."""
        time_BED = self.time_embedding(timestep_embedding(timesteps_BE, self.cfg.freq_dim))
        time_BE6D = self.time_projection(jax.nn.silu(time_BED)).reshape(*time_BED.shape[:2], 6, self.cfg.dim)
        return time_BED, time_BE6D


class DiT(Trunk):
    """Velocity of a noisy latent video, given the timestep and the conditions.

    The module is a pytree: pass it to `jax.jit`, `jax.grad` or `jax.vmap`.
    """

    def __init__(self, cfg: DiTConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        def block(rngs: nnx.Rngs) -> Block:
            cross_attn = Attention(cfg, image=cfg.image_tokens > 0, dtype=dtype, rngs=rngs)
            return Block(cfg, cross_attn, dtype=dtype, rngs=rngs)

        patch = math.prod(cfg.patch_size)
        embedding = Linear(patch * cfg.in_dim, cfg.dim, dtype=dtype, rngs=rngs)
        super().__init__(cfg, embedding, patch * cfg.out_dim, block, dtype=dtype, rngs=rngs)
        if cfg.image_tokens:
            self.img_emb = ImageEmbedding(cfg, dtype=dtype, rngs=rngs)

    def read(self, text_BSC: Array, image_BIC: Array | None = None) -> Context:
        """Keys and values of all blocks for a prompt's features, and a picture's: once per clip instead of every step.

        Arguments as in `__call__`.
        """
        return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), self._read(text_BSC, image_BIC))

    def _read(self, text_BSC: Array, image_BIC: Array | None) -> Context:
        """The same with the layers first."""
        text = self.text_embedding(text_BSC)
        image = self.img_emb(image_BIC) if self.cfg.image_tokens else None

        def layer(cross_attn: Attention, nothing: tuple[()]) -> tuple[tuple[()], Context]:
            found = cross_attn.read(text, image)
            return nothing, jax.tree.map(lambda x: constrain(x, "B", None, "N", None), found)

        return apply_stack(self.blocks.cross_attn, (), layer)[1]

    def without_reader(self) -> DiT:
        """The same network without what `read` needs: a seventh of the weights. It takes a `Context` alone."""
        network = jax.tree.map(lambda x: x, self)  # a copy
        for path in READER:
            *within, name = path.split(".")
            module = functools.reduce(getattr, within, network)
            if hasattr(module, name):
                setattr(module, name, None)
        return network

    def __call__(
        self,
        latents_BTHWC: Array,
        timesteps: Array,
        text_BSC: Array | Context,
        *,
        condition_BTHWC: Array | None = None,
        image_BIC: Array | None = None,
        token_time: Array | None = None,
        reuse: Reuse | None = None,
        chunk_tokens: int = 0,
        remat: bool = False,
        capture: bool = False,
    ) -> Any:
        """Predict the velocity ``noise - clean``.

        Args:
            latents_BTHWC: noisy latents; H and W divisible by the patch.
            timesteps: [B] in 0...1000, or [B, 2] when tokens of one sample have one of two timesteps.
            text_BSC: umT5 features, zero rows up to ``text_len``: the padding is attended to, as in training. Or what
                `read` has made of them, and of ``image_BIC``.
            condition_BTHWC: mask and condition latents, concatenated behind the noisy channels (I2V, FLF2V).
            image_BIC: CLIP features (Wan2.1 I2V: 257 tokens; FLF2V: 514, first image then last).
            token_time: [B or 1, L] int, which of the two timesteps each token has (TI2V: 1 on the clean first frame).
            reuse: leave out the blocks where it says so; also return what they added. Not together with ``capture``.
            chunk_tokens: run the blocks on chunks of at most so many tokens, for less memory, see `Block.in_chunks`; 0:
                on all at once. Devices that share the tokens do without. Not together with ``capture``.
            remat: recompute blocks in the backward pass.
            capture: also return a dict of named intermediates; ``self_attn``, ``cross_attn`` and ``block`` carry a
                leading layer axis.
        Returns:
            [B, T, H, W, out_dim] float32 (and the dict).
        """
        cfg = self.cfg
        x = latents_BTHWC
        if condition_BTHWC is not None:
            x = jnp.concatenate([x, condition_BTHWC.astype(x.dtype)], axis=-1)
        if x.shape[-1] != cfg.in_dim:
            raise ValueError(f"{x.shape[-1]} channels with the condition, this model takes {cfg.in_dim}")
        x, grid = patchify(x, cfg.patch_size)
        tokens = Tokens(x.shape[1], shared=True)
        chunk = chunk_of(tokens.count, chunk_tokens)
        x = constrain(even(self.patch_embedding(x).astype(jnp.float32), 1, chunk), "B", "L", None)
        if token_time is not None:
            token_time = even(token_time, 1, chunk)

        time_BED, time_BE6D = self.embed_time(timesteps.reshape(x.shape[0], -1).astype(jnp.float32))
        was_read = isinstance(text_BSC, Context)
        beside = jnp.arange(cfg.num_layers) if was_read else self._read(text_BSC, image_BIC)
        cos, sin = rope_table(grid, cfg.head_dim)
        rope = even(cos, 0, chunk), even(sin, 0, chunk)

        def block(module: Block, x: Array, context: Any) -> tuple[Array, Any]:
            if was_read:  # taken out here, so that not all of it is turned at once
                index = context
                context = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, 1, False), text_BSC)
            if chunk:
                return module.in_chunks(x, time_BE6D, token_time, context, rope, tokens, chunk), None
            x, out = module(x, time_BE6D, token_time, context, rope, tokens)
            return x, jax.tree.map(lambda x: x[:, : tokens.count], out) if capture else None

        def blocks(x: Array) -> tuple[Array, Any]:
            return apply_stack(self.blocks, x, block, beside=beside, remat=remat)

        if reuse is None:
            x, out = blocks(x)
        else:
            x, added = run_or_reuse(lambda x: blocks(x)[0], x, reuse, self.patch_embedding.kernel.dtype)
        x = self.head(x, time_BED, token_time)[:, : tokens.count]
        velocity = unpatchify(x, grid, cfg.patch_size)
        if reuse is not None:
            return velocity, added
        if not capture:
            return velocity
        out |= {"time_embedding": time_BED, "head": x, "text_tokens": self.text_embedding(text_BSC)}
        return velocity, out | {"image_tokens": self.img_emb(image_BIC) if cfg.image_tokens else None}
