"""The twin-stream transformer of Ovi and DreamID-Omni: a video and an audio stream of equal blocks, coupled in each.

Every block lets each stream attend to itself, then to its text and to the other stream with one set of queries.
Clean latents of reference pictures and voices stand behind the noisy ones in both streams; positions far from the
clip's, equal in both streams, tell which face has which voice. The ``wan2.6`` family adds adapters
(``models/identity.py``).

Axes as in ``models/dit.py``, and ``A`` audio tokens, ``R`` references.
Source: Ovi ``ovi/modules/{fusion,model}.py``; DreamID-Omni ``dreamid_omni/modules``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.config import FusionConfig
from wan_jax.models.dit import Attention, Block, Trunk
from wan_jax.models.identity import AdapterAttention, IdentityAdapter, VoiceAdapter
from wan_jax.nn.conv import Conv1d
from wan_jax.nn.layers import LayerNorm, Linear, RMSNorm, patchify, unpatchify
from wan_jax.nn.rope import Rope, rope_table, rotate
from wan_jax.nn.stack import apply_stack
from wan_jax.parallel import constrain

Array = jax.Array
STREAMS = ("video", "audio")


class FusionAttention(Attention):
    """Attention to the text and to the other stream: one set of queries, one output projection.

    Queries meet the text as they are, and the other stream rotated by their own positions. The other stream passes a
    norm that belongs to this one.
    """

    def __init__(self, cfg: FusionConfig, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(cfg, dtype=dtype, rngs=rngs)
        self.pre_attn_norm_fusion = LayerNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        self.k_fusion = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.v_fusion = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.norm_k_fusion = RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)

    def __call__(
        self, x_BLD: Array, text_BSD: Array, other_BMD: Array | None, rope: Rope, other_rope: Rope | None, adapter: Any
    ) -> Array:
        """
        Args:
            other_BMD: tokens of the other stream, None when this one runs alone.
            adapter: `AdapterAttention` of this block, the tokens that it attends to and their mask; or None.
        """
        q = self.queries(x_BLD)
        out = self.attend(q, text_BSD, self.k, self.norm_k, self.v)
        if other_BMD is not None:
            other = self.pre_attn_norm_fusion(other_BMD)
            out = out + self.attend(
                rotate(q, rope), other, self.k_fusion, self.norm_k_fusion, self.v_fusion, other_rope
            )
        out = self.o(out.reshape(x_BLD.shape))
        if adapter is not None:
            attend, tokens, mask = adapter
            out = out + attend(q, tokens, mask)
        return out


class GatedConv(nnx.Module):
    """``w2(silu(w1(x)) * w3(x))``, convolutions over time without bias. Source: ConvMLP of Ovi's audio stem."""

    def __init__(self, dim: int, hidden: int, size: int, *, dtype: Any, rngs: nnx.Rngs):
        def conv(c_in: int, c_out: int) -> Conv1d:
            return Conv1d(c_in, c_out, size, bias=False, dtype=dtype, rngs=rngs)

        self.w1, self.w2, self.w3 = conv(dim, hidden), conv(hidden, dim), conv(dim, hidden)

    def __call__(self, x_BAD: Array) -> Array:
        return self.w2(jax.nn.silu(self.w1(x_BAD)) * self.w3(x_BAD))


class AudioStem(nnx.Module):
    """Audio latents to width D. Its convolutions also mix the last noisy latents with the first references."""

    def __init__(self, cfg: FusionConfig, *, dtype: Any, rngs: nnx.Rngs):
        self.conv = Conv1d(cfg.audio_dim, cfg.dim, cfg.audio_kernel, dtype=dtype, rngs=rngs)
        self.mlp = GatedConv(cfg.dim, cfg.stem_dim, cfg.audio_kernel, dtype=dtype, rngs=rngs)

    def __call__(self, latents_BAC: Array) -> Array:
        return self.mlp(jax.nn.silu(self.conv(latents_BAC)))


class Fusion(nnx.Module):
    """Velocities of a noisy latent video and of its noisy latent sound."""

    def __init__(self, cfg: FusionConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        def block(rngs: nnx.Rngs) -> Block:
            return Block(cfg, FusionAttention(cfg, dtype=dtype, rngs=rngs), dtype=dtype, rngs=rngs)

        def trunk(embedding: nnx.Module, out_dim: int) -> Trunk:
            return Trunk(cfg, embedding, out_dim, block, dtype=dtype, rngs=rngs)

        patch = math.prod(cfg.patch_size)
        self.cfg = cfg
        self.video = trunk(Linear(patch * cfg.in_dim, cfg.dim, dtype=dtype, rngs=rngs), patch * cfg.out_dim)
        self.audio = trunk(AudioStem(cfg, dtype=dtype, rngs=rngs), cfg.audio_dim)
        size = (cfg.dim, cfg.num_heads, cfg.num_layers)
        if cfg.identity:
            self.identity_adapter = IdentityAdapter(cfg.identity, *size, dtype=dtype, rngs=rngs)
        if cfg.voice:
            self.voice_adapter = VoiceAdapter(cfg.voice, *size, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        latents: dict[str, Array],
        timesteps: Array,
        text: dict[str, Array],
        *,
        times: dict[str, Sequence[float]] | None = None,
        token_time: Array | None = None,
        identity_BRIC: Array | None = None,
        voice_BRTF: Array | None = None,
        there: dict[str, Array] | None = None,
        skip_B: Array | None = None,
        remat: bool = False,
        capture: bool = False,
    ) -> Any:
        """Predict the velocities ``noise - clean``.

        Args:
            latents: "video" [B, T, H, W, C] and "audio" [B, A, audio_dim], references behind the noisy ones. With one
                of the two alone the stream runs without the other.
            timesteps: [B] in 0...1000, or [B, 2] when video tokens have one of two timesteps; audio has the first.
            text: "video" and "audio" [B, S, C]: umT5 features, zero rows up to ``text_len``.
            times: position in time of every video frame and every audio latent, in units of latent frames. Default:
                0, 1, 2... and multiples of ``audio_rope_scale``.
            token_time: [B or 1, L] int, which of the two timesteps each video token has.
            identity_BRIC: image-encoder tokens of R references, for a model with the identity adapter.
            voice_BRTF: features of R voices (`models.identity.voice_features`), for a model with the voice adapter.
            there: per stream bool [B, R], which of the adapter's references there are; default all.
            skip_B: [B] int, a block that both streams leave out, or -1 (guidance by a weaker model).
            remat: recompute blocks in the backward pass.
            capture: also return a dict of the streams after each block, "video" [layers, B, L, D] and "audio".
        Returns:
            Velocities in the shapes of ``latents``, float32 (and the dict).
        """
        cfg = self.cfg
        times = times or {}
        timesteps = timesteps.reshape(len(timesteps), -1).astype(jnp.float32)
        tokens, ropes, time_BED, time_BE6D, embedded = {}, {}, {}, {}, {}
        grid = None
        for stream, x in latents.items():
            trunk = getattr(self, stream)
            if stream == "video":
                x, grid = patchify(x, cfg.patch_size)
                ropes[stream] = rope_table(grid, cfg.head_dim, times=times.get(stream))
            else:
                positions = times.get(stream) or [cfg.audio_rope_scale * i for i in range(x.shape[1])]
                ropes[stream] = rope_table((x.shape[1], 1, 1), cfg.head_dim, times=positions)
            tokens[stream] = _constrain(stream, trunk.patch_embedding(x).astype(jnp.float32))
            own = timesteps if stream == "video" else timesteps[:, :1]
            time_BED[stream], time_BE6D[stream] = trunk.embed_time(own)
            embedded[stream] = trunk.text_embedding(text[stream])
        token_times = {"video": token_time, "audio": None}
        features = {"video": identity_BRIC, "audio": voice_BRTF}
        features = {stream: x for stream, x in features.items() if stream in latents and x is not None}
        adapters, shown = self._adapters(features, there or {})

        def layer(modules: Any, x: dict[str, Array]) -> tuple[dict[str, Array], Any]:
            blocks, adapters, index = modules
            modulations, after = {}, {}
            for stream, block in blocks.items():
                modulations[stream] = block.modulate(time_BE6D[stream], token_times[stream])
                after[stream], _ = block.attend_to_self(x[stream], modulations[stream], ropes[stream])
            out = {}
            for stream, block in blocks.items():
                other = next((name for name in after if name != stream), None)  # as it is after its self-attention
                adapter = (adapters[stream], *shown[stream]) if stream in adapters else None
                heard = block.cross_attn(
                    block.norm3(after[stream]),
                    embedded[stream],
                    after.get(other),
                    ropes[stream],
                    ropes.get(other),
                    adapter,
                )
                h = after[stream] + heard
                out[stream] = _constrain(stream, block.feed_forward(h, modulations[stream]))
            if skip_B is not None:
                skipped = (skip_B == index)[:, None, None]
                out = {stream: jnp.where(skipped, x[stream], out[stream]) for stream in out}
            return out, out if capture else None

        stacks = ({stream: getattr(self, stream).blocks for stream in latents}, adapters, jnp.arange(cfg.num_layers))
        tokens, states = apply_stack(stacks, tokens, layer, remat=remat)
        velocity = {
            stream: getattr(self, stream).head(x, time_BED[stream], token_times[stream])
            for stream, x in tokens.items()
        }
        if "video" in velocity:
            velocity["video"] = unpatchify(velocity["video"], grid, cfg.patch_size)
        return (velocity, states) if capture else velocity

    def _adapters(
        self, features: dict[str, Array], there: dict[str, Array]
    ) -> tuple[dict[str, AdapterAttention], dict[str, tuple[Array, Array | None]]]:
        """Per stream with features: the stack of the adapter's attentions; the tokens for them, and their mask."""
        stacks, shown = {}, {}
        for stream, x in features.items():
            name = {"video": "identity_adapter", "audio": "voice_adapter"}[stream]
            if not hasattr(self, name):
                raise ValueError(f"{name} is not part of this model")
            adapter = getattr(self, name)
            mask = there.get(stream)
            if mask is not None:
                mask = jnp.repeat(mask, adapter.cfg.num_tokens, axis=1)
            stacks[stream], shown[stream] = adapter.blocks, (adapter.tokens(x), mask)
        return stacks, shown


def _constrain(stream: str, x_BLD: Array) -> Array:
    """Video tokens are cut over devices; the few audio tokens are not."""
    return constrain(x_BLD, "B", "L" if stream == "video" else None, None)
