"""The twin-stream transformer of Ovi and DreamID-Omni: a video and an audio stream of equal blocks, coupled in each.

Every block lets each stream attend to itself, then to its text and to the other stream with one set of queries.
Clean latents of reference pictures and voices stand behind the noisy ones in both streams; positions far from the
clip's, equal in both streams, tell which face has which voice. The ``wan2.6`` family adds adapters
(``models/identity.py``), and its small models let the streams meet in an attention of their own (`CouplingConfig`).

Axes as in ``models/dit.py``, and ``A`` audio tokens, ``R`` references.
Source: Ovi ``ovi/modules/{fusion,model}.py``; DreamID-Omni ``dreamid_omni/modules``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.config import CouplingConfig, FusionConfig
from wan_jax.models.dit import Attention, Block, Trunk
from wan_jax.models.identity import AdapterAttention, IdentityAdapter, VoiceAdapter
from wan_jax.nn.attention import attention
from wan_jax.nn.context import Tokens, even
from wan_jax.nn.conv import Conv1d
from wan_jax.nn.layers import LayerNorm, Linear, RMSNorm, param, patchify, unpatchify
from wan_jax.nn.positions import MARGIN
from wan_jax.nn.reuse import Reuse, run_or_reuse
from wan_jax.nn.rope import Rope, rope_table, rotate
from wan_jax.nn.stack import apply_stack
from wan_jax.parallel import constrain

Array = jax.Array
STREAMS = ("video", "audio")


class Meeting(NamedTuple):
    """Where and when a stream meets the other one.

    rope, other_rope: of the tokens of both.
    lags_NLS: with `CouplingConfig`, seconds from tokens of the other stream to those of this one, of the clip alone.
    coupled_B: bool, in which samples they meet; default all.
    """

    rope: Rope
    other_rope: Rope
    lags_NLS: Array | None = None
    coupled_B: Array | None = None


class FusionAttention(Attention):
    """Attention to the text and to the other stream.

    In Ovi one set of queries and one output projection serve both: queries meet the text as they are, and the other
    stream rotated by their own positions. With `CouplingConfig` the other stream has queries and an output of its own,
    heads that a token can shut, and a sense of time. It always passes a norm that belongs to this stream.
    """

    def __init__(self, cfg: FusionConfig, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(cfg, dtype=dtype, rngs=rngs)
        self.pre_attn_norm_fusion = LayerNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        self.k_fusion = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.v_fusion = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
        self.norm_k_fusion = RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
        if cfg.coupling:
            self.q_fusion = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
            self.norm_q_fusion = RMSNorm(cfg.dim, eps=cfg.eps, rngs=rngs)
            self.o_fusion = Linear(cfg.dim, cfg.dim, dtype=dtype, rngs=rngs)
            self.gate_fusion = Linear(cfg.dim, cfg.num_heads, dtype=dtype, rngs=rngs)
            self.gate_fusion.kernel = param(rngs, (cfg.dim, cfg.num_heads), dtype)  # all heads open
            self.reach_fusion = param(rngs, (cfg.num_heads,), fill=math.log(cfg.coupling.reach))

    def __call__(
        self,
        x_BLD: Array,
        text_BSD: Array,
        other_BMD: Array | None,
        meeting: Meeting | None,
        adapter: Any,
        tokens: Tokens,
        other_tokens: Tokens | None,
    ) -> Array:
        """
        Args:
            other_BMD: tokens of the other stream, None when this one runs alone.
            adapter: `AdapterAttention` of this block, the tokens that it attends to and their mask; or None.
            tokens, other_tokens: what the mesh must know of the two streams.
        """
        q = self.queries(x_BLD)
        out = self.attend(q, text_BSD, self.k, self.norm_k, self.v, None, tokens)
        other = None if other_BMD is None else self.pre_attn_norm_fusion(other_BMD)
        if other is not None and meeting.lags_NLS is None:
            source = other, self.k_fusion, self.norm_k_fusion, self.v_fusion, meeting.other_rope
            out = out + self.attend(rotate(q, meeting.rope), *source, tokens, other_tokens)
        out = self.o.from_heads(out)
        if other is not None and meeting.lags_NLS is not None:
            out = out + self.meet(x_BLD, other, meeting)
        if adapter is not None:
            attend, references, mask = adapter
            out = out + attend(q, references, mask)
        return out

    def meet(self, x_BLD: Array, other_BMD: Array, meeting: Meeting) -> Array:
        """What tokens of the clip take from those of the other stream near in time; zero for tokens of references."""
        _, L, S = meeting.lags_NLS.shape
        x, other, dtype = x_BLD[:, :L], other_BMD[:, :S], self.o_fusion.kernel.dtype
        q = rotate(self._heads(x, self.q_fusion, self.norm_q_fusion), meeting.rope)
        k = rotate(self._heads(other, self.k_fusion, self.norm_k_fusion), meeting.other_rope)
        far = jnp.square(meeting.lags_NLS * jnp.exp(-self.reach_fusion[...])[:, None, None])
        v = self.v_fusion.heads(other, self.num_heads)
        heads = attention(q.astype(dtype), k.astype(dtype), v, bias=-0.5 * far[None])
        heads = heads * (2 * jax.nn.sigmoid(self.gate_fusion(x)))[..., None]
        out = self.o_fusion.from_heads(heads)
        if meeting.coupled_B is not None:
            out = jnp.where(meeting.coupled_B[:, None, None], out, 0)
        return jnp.pad(out, ((0, 0), (0, x_BLD.shape[1] - L), (0, 0)))


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
        coupled_B: Array | None = None,
        skip_B: Array | None = None,
        reuse: Reuse | None = None,
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
            coupled_B: bool, in which samples the streams meet, for a model with `CouplingConfig`; default all.
            skip_B: [B] int, a block that both streams leave out (guidance by a weaker model); 0 and less is none: the
                official code cannot leave out the first.
            reuse: leave out all blocks where it says so; also return what they added to each stream. Not together with
                ``capture``.
            remat: recompute blocks in the backward pass.
            capture: also return a dict of the streams after each block, "video" [layers, B, L, D] and "audio".
        Returns:
            Velocities in the shapes of ``latents``, float32 (and the dict).
        """
        cfg = self.cfg
        times = times or {}
        timesteps = timesteps.reshape(len(timesteps), -1).astype(jnp.float32)
        tokens, counts, ropes, time_BED, time_BE6D, embedded = {}, {}, {}, {}, {}, {}
        grid = None
        for stream, x in latents.items():
            trunk = getattr(self, stream)
            if stream == "video":
                x, grid = patchify(x, cfg.patch_size)
                cos, sin = rope_table(grid, cfg.head_dim, times=times.get(stream))
                ropes[stream] = even(cos, 0), even(sin, 0)
            else:
                positions = times.get(stream) or [cfg.audio_rope_scale * i for i in range(x.shape[1])]
                ropes[stream] = rope_table((x.shape[1], 1, 1), cfg.head_dim, times=positions)
            counts[stream] = Tokens(x.shape[1], shared=stream == "video")
            x = trunk.patch_embedding(x).astype(jnp.float32)
            tokens[stream] = _constrain(stream, even(x) if stream == "video" else x)
            own = timesteps if stream == "video" else timesteps[:, :1]
            time_BED[stream], time_BE6D[stream] = trunk.embed_time(own)
            embedded[stream] = trunk.text_embedding(text[stream])
        token_times = {"video": None if token_time is None else even(token_time), "audio": None}
        meetings = self._meetings(ropes, grid, times, coupled_B) if len(latents) == 2 else {}
        features = {"video": identity_BRIC, "audio": voice_BRTF}
        features = {stream: x for stream, x in features.items() if stream in latents and x is not None}
        adapters, shown = self._adapters(features, there or {})

        def layer(modules: Any, x: dict[str, Array]) -> tuple[dict[str, Array], Any]:
            blocks, adapters, index = modules
            modulations, after = {}, {}
            for stream, block in blocks.items():
                modulations[stream] = block.modulate(time_BE6D[stream], token_times[stream])
                after[stream], _ = block.attend_to_self(x[stream], modulations[stream], ropes[stream], counts[stream])
            out = {}
            for stream, block in blocks.items():
                other = _other(stream)  # as it is after its self-attention
                adapter = (adapters[stream], *shown[stream]) if stream in adapters else None
                h = block.norm3(after[stream])
                met = after.get(other), meetings.get(stream)
                heard = block.cross_attn(h, embedded[stream], *met, adapter, counts[stream], counts.get(other))
                h = after[stream] + heard
                out[stream] = _constrain(stream, block.feed_forward(h, modulations[stream]))
            if skip_B is not None:
                skipped = ((skip_B == index) & (index > 0))[:, None, None]
                out = {stream: jnp.where(skipped, x[stream], out[stream]) for stream in out}
            return out, {stream: x[:, : counts[stream].count] for stream, x in out.items()} if capture else None

        stacks = ({stream: getattr(self, stream).blocks for stream in latents}, adapters, jnp.arange(cfg.num_layers))

        def blocks(tokens: dict[str, Array]) -> tuple[dict[str, Array], Any]:
            return apply_stack(stacks, tokens, layer, remat=remat)

        if reuse is None:
            tokens, states = blocks(tokens)
        else:
            dtype = next(iter(embedded.values())).dtype
            tokens, states = run_or_reuse(lambda tokens: blocks(tokens)[0], tokens, reuse, dtype)
        velocity = {
            stream: getattr(self, stream).head(x, time_BED[stream], token_times[stream])[:, : counts[stream].count]
            for stream, x in tokens.items()
        }
        if "video" in velocity:
            velocity["video"] = unpatchify(velocity["video"], grid, cfg.patch_size)
        return (velocity, states) if capture or reuse is not None else velocity

    def _meetings(
        self,
        ropes: dict[str, Rope],
        grid: tuple[int, int, int],
        times: dict[str, Sequence[float]],
        coupled_B: Array | None,
    ) -> dict[str, Meeting]:
        """How each stream attends to the other one."""
        if self.cfg.coupling is None:
            return {stream: Meeting(rope, ropes[_other(stream)]) for stream, rope in ropes.items()}
        counts = {"video": grid[0], "audio": len(ropes["audio"][0])}
        clip = {s: sum(t < MARGIN for t in times[s]) if times.get(s) else n for s, n in counts.items()}
        seconds = moments(self.cfg.coupling, self.cfg.num_heads, clip["video"], clip["audio"])
        per_frame, own = {"video": grid[1] * grid[2], "audio": 1}, {}
        for stream, x_NT in seconds.items():  # every token of a frame has the frame's time; rotation counts in frames
            rope = rope_table((clip[stream], 1, 1), self.cfg.head_dim, times=x_NT.mean(0) * self.cfg.coupling.fps)
            own[stream] = tuple(jnp.repeat(table, per_frame[stream], axis=0) for table in rope)
            seconds[stream] = jnp.repeat(jnp.asarray(x_NT, jnp.float32), per_frame[stream], axis=1)
        return {
            s: Meeting(own[s], own[_other(s)], x[:, :, None] - seconds[_other(s)][:, None, :], coupled_B)
            for s, x in seconds.items()
        }

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


def moments(cfg: CouplingConfig, num_heads: int, num_frames: int, num_latents: int) -> dict[str, np.ndarray]:
    """Seconds at the middle of what a latent stands for: "video" [heads, num_frames] and "audio" [1, num_latents].

    Video latent k > 0 holds ``latent_frames`` video frames, which the heads take in turn; latent 0 holds one.
    """
    frame = np.arange(num_frames) * cfg.latent_frames - cfg.latent_frames + 1
    frame = np.maximum(frame + np.arange(num_heads)[:, None] % cfg.latent_frames, 0)
    return {"video": (frame + 0.5) / cfg.fps, "audio": (np.arange(num_latents)[None] + 0.5) * cfg.audio_latent}


def _other(stream: str) -> str:
    return STREAMS[1 - STREAMS.index(stream)]


def _constrain(stream: str, x_BLD: Array) -> Array:
    """Video tokens are cut over devices; the few audio tokens are not."""
    return constrain(x_BLD, "B", "L" if stream == "video" else None, None)
