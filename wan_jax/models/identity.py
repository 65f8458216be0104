"""The two adapters of the ``wan2.6`` family: whose face the video shows, whose voice the sound has.

Each turns its references into a few tokens, and holds one small attention for every block of its stream that attends
to them beside the text, with the text's queries (decoupled cross-attention, Ye et al. 2023, IP-Adapter). Its output
matrix begins at zero: a base model with new adapters is the base model, exactly. Beside the 30 blocks of
``wan2.6-r2av-11b`` they have 499 and 395 million parameters, 472 and 378 of them in the blocks' attentions.

Two ways to leave a reference out: the mask of `AdapterAttention` for one that is not there, features set to zero for
one that is dropped in training or guidance. The second leaves learned tokens that say "unknown".

Axes: ``B`` batch, ``R`` references, ``I`` image tokens, ``C`` their width, ``n`` samples of sound, ``T`` mel frames,
``F`` features of a frame, ``L`` queries of a block, ``S`` tokens, ``D`` width, ``N`` heads, ``K`` head size.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.config import DiTConfig, IdentityConfig, MelConfig, VoiceConfig
from wan_jax.models.dit import Attention
from wan_jax.nn.attention import attention
from wan_jax.nn.conv import Conv1d
from wan_jax.nn.layers import MLP, LayerNorm, Linear, RMSNorm, gelu_erf, param, timestep_embedding
from wan_jax.nn.mel import frames, hann_window, mel_spectrogram
from wan_jax.nn.stack import apply_stack, init_stack
from wan_jax.parallel import constrain

Array = jax.Array

EPS = 1e-6  # of all norms, as in the base model
ADAPTERS = ("identity_adapter", "voice_adapter")  # their names in the fusion model
MASKED = -1e9  # score of a token that is not there: its weight is exactly zero

PITCH_RANGE = (60.0, 500.0)  # Hz, of human speech
PITCH_CENTRE = 173.0  # Hz, middle of the range: pitch is given in octaves from here
PITCH_BAND = 4000.0  # Hz: harmonics above add more noise than periodicity
PITCH_PERIODS = 4.0 / 2 ** np.arange(6)  # octaves; the first is wider than the range, the last is 150 cents
OCTAVE_COST = 0.05  # periodicity per octave: two periods are as periodic as one. Fewest octave errors of .02 and .05
VOICED = (0.4, 0.8)  # periodicity of a frame that counts as unvoiced, as voiced. White noise has .2, its peaks .3
QUIET = (1e-4, 1e-8)  # power, of the loudest frame and of full scale, below which frames are silence
RATE_BAND = (2.0, 8.0)  # Hz, of syllables
STEADY = 1e-5  # modulation power below which a sound counts as steady; that of a spoken second is about .05
NUM_EXPLICIT = 5  # features of a frame behind the mel: pitch, voicedness, energy, the clip's median pitch and its rate


def is_adapter(path: str) -> bool:
    """Whether a parameter of the fusion model belongs to an adapter: what is trained while the base is frozen."""
    return path.split(".")[0] in ADAPTERS


class AdapterAttention(nnx.Module):
    """One block's attention to the adapter's tokens; zero at initialisation."""

    def __init__(self, dim: int, token_dim: int, num_heads: int, *, eps: float, dtype: Any, rngs: nnx.Rngs):
        self.k = Linear(token_dim, dim, dtype=dtype, rngs=rngs)
        self.v = Linear(token_dim, dim, dtype=dtype, rngs=rngs)
        self.norm_k = RMSNorm(dim, eps=eps, rngs=rngs)
        self.o = Linear(dim, dim, dtype=dtype, rngs=rngs)
        self.o.kernel = param(rngs, (dim, dim), dtype)
        self.num_heads = num_heads

    def __call__(self, q_BLNK: Array, tokens_BSD: Array, mask_BS: Array | None = None) -> Array:
        """What is added to the block's text cross-attention.

        Args:
            q_BLNK: the block's normalised text query, not rotated.
            tokens_BSD: see `IdentityAdapter.tokens` and `VoiceAdapter.tokens`.
            mask_BS: bool, which tokens are there; default all.
        Returns:
            [B, L, N * K] in the dtype of the matrices; zero for a sample without any token.
        """
        dtype = self.o.kernel.dtype
        k, v = (linear.heads(tokens_BSD, self.num_heads) for linear in (self.k, self.v))
        bias = None if mask_BS is None else jnp.where(mask_BS, 0.0, MASKED)[:, None, None]
        out = self.o.from_heads(attention(q_BLNK.astype(dtype), self.norm_k(k, 2).astype(dtype), v, bias=bias))
        return out if mask_BS is None else jnp.where(mask_BS.any(-1)[:, None, None], out, 0)


class Layer(nnx.Module):
    """Pre-normed attention of the tokens to each other, and to a context where there is one; then an MLP."""

    def __init__(self, dim: int, num_heads: int, *, dtype: Any, rngs: nnx.Rngs):
        self.norm1 = LayerNorm(dim, eps=EPS, rngs=rngs)
        self.attn = Attention(DiTConfig(dim=dim, num_heads=num_heads, eps=EPS), dtype=dtype, rngs=rngs)
        self.norm2 = LayerNorm(dim, eps=EPS, rngs=rngs)
        self.mlp = MLP(dim, 4 * dim, dim, act=gelu_erf, dtype=dtype, rngs=rngs)

    def __call__(self, x_BLD: Array, context_BSD: Array | None = None) -> Array:
        h = self.norm1(x_BLD)
        x_BLD = x_BLD + self.attn(h, h if context_BSD is None else jnp.concatenate([context_BSD, h], axis=1))
        x_BLD = x_BLD + self.mlp(self.norm2(x_BLD))
        return constrain(x_BLD, "B", None, None)


def _layers(dim: int, num_heads: int, num_layers: int, *, dtype: Any, rngs: nnx.Rngs) -> Layer:
    return init_stack(lambda rngs: Layer(dim, num_heads, dtype=dtype, rngs=rngs), num_layers, rngs)


class Resampler(nnx.Module):
    """Any number of tokens to ``num_tokens``: learned queries attend to them and to each other.

    Source: the perceiver resampler of Alayrac et al. 2022 (Flamingo).
    """

    def __init__(self, dim: int, num_tokens: int, num_layers: int, num_heads: int, *, dtype: Any, rngs: nnx.Rngs):
        self.queries = param(rngs, (num_tokens, dim), std=1.0)
        self.layers = _layers(dim, num_heads, num_layers, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(dim, eps=EPS, rngs=rngs)

    def __call__(self, context_BSD: Array, start_BD: Array | float = 0.0) -> Array:
        """[B, num_tokens, D] float32; ``start_BD`` is added to every query."""
        B, _, D = context_BSD.shape
        x = jnp.broadcast_to(start_BD, (B, D))[:, None] + self.queries[...]
        x, _ = apply_stack(self.layers, x, lambda layer, x: (layer(x, context_BSD), None))
        return self.norm(x)


class Adapter(nnx.Module):
    """What the two share: the resampler, a learned vector for each reference's number, an attention for each block."""

    def __init__(
        self,
        cfg: IdentityConfig | VoiceConfig,
        dim: int,
        num_heads: int,
        num_blocks: int,
        *,
        num_layers: int,
        dtype: Any,
        rngs: nnx.Rngs,
    ):
        def block(rngs: nnx.Rngs) -> AdapterAttention:
            return AdapterAttention(dim, cfg.dim, num_heads, eps=EPS, dtype=dtype, rngs=rngs)

        self.cfg = cfg
        self.resampler = Resampler(cfg.dim, cfg.num_tokens, num_layers, cfg.num_heads, dtype=dtype, rngs=rngs)
        self.slots = param(rngs, (cfg.max_references, cfg.dim), std=1.0)  # as large as the normalised tokens
        self.blocks = init_stack(block, num_blocks, rngs)

    def _join(self, tokens: Array, references: int) -> Array:
        """[B * R, num_tokens, D] -> [B, R * num_tokens, D], every token marked with the number of its reference."""
        tokens = tokens.reshape(-1, references, *tokens.shape[1:]) + self.slots[:references, None]
        return tokens.reshape(len(tokens), -1, self.cfg.dim)


class IdentityAdapter(Adapter):
    """Image-encoder tokens of the references to identity tokens, for the video stream.

    Args:
        dim, num_heads, num_blocks: of the stream.
        dtype: of the matrices; norms, queries and slots are float32.
    """

    def __init__(self, cfg: IdentityConfig, dim: int, num_heads: int, num_blocks: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(cfg, dim, num_heads, num_blocks, num_layers=cfg.num_layers, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(cfg.feature_dim, eps=EPS, rngs=rngs)
        self.proj = Linear(cfg.feature_dim, cfg.dim, dtype=dtype, rngs=rngs)

    def tokens(self, features_BRIC: Array) -> Array:
        """Tokens of up to ``max_references`` pictures.

        Args:
            features_BRIC: `CLIPVision`'s tokens of each picture; zeros for a dropped one.
        Returns:
            [B, R * num_tokens, cfg.dim] float32, reference after reference.
        """
        R = features_BRIC.shape[1]
        context = self.proj(self.norm(features_BRIC.reshape(-1, *features_BRIC.shape[2:])))
        return self._join(self.resampler(context), R)


class VoiceAdapter(Adapter):
    """Sound of the references to voice tokens, for the audio stream.

    A convolution over three frames, another that halves their number (the stem of Whisper, Radford et al. 2022), a
    transformer, and a resampler of one layer. Pitch enters as sinusoids (Tancik et al. 2020), because cents matter
    over a range of three octaves; that of the whole clip, with its rate, is where the queries start from.

    Args:
        dim, num_heads, num_blocks: of the stream.
        dtype: of the matrices; norms, queries and slots are float32.
    """

    def __init__(self, cfg: VoiceConfig, dim: int, num_heads: int, num_blocks: int, *, dtype: Any, rngs: nnx.Rngs):
        super().__init__(cfg, dim, num_heads, num_blocks, num_layers=1, dtype=dtype, rngs=rngs)
        pitch = 2 * len(PITCH_PERIODS)
        self.conv1 = Conv1d(cfg.mel.num_bins + pitch + 2, cfg.dim, 3, dtype=dtype, rngs=rngs)
        self.conv2 = Conv1d(cfg.dim, cfg.dim, 3, dtype=dtype, rngs=rngs)
        self.layers = _layers(cfg.dim, cfg.num_heads, cfg.num_layers, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(cfg.dim, eps=EPS, rngs=rngs)
        self.summary = Linear(pitch + 1, cfg.dim, dtype=dtype, rngs=rngs)

    def tokens(self, features_BRTF: Array) -> Array:
        """Tokens of up to ``max_references`` voices.

        Args:
            features_BRTF: see `voice_features`; zeros for a dropped one.
        Returns:
            [B, R * num_tokens, cfg.dim] float32, reference after reference.
        """
        R = features_BRTF.shape[1]
        frames = features_BRTF.reshape(-1, *features_BRTF.shape[2:])
        mel, explicit = jnp.split(frames, [self.cfg.mel.num_bins], axis=-1)
        pitch, voiced, energy, median, rate = jnp.split(explicit, NUM_EXPLICIT, axis=-1)

        frames = jnp.concatenate([mel, pitch_embedding(pitch) * voiced, voiced, energy], axis=-1)
        x = gelu_erf(self.conv2(gelu_erf(self.conv1(frames)))[:, ::2]).astype(jnp.float32)
        x = x + timestep_embedding(jnp.arange(x.shape[1]), self.cfg.dim)
        x, _ = apply_stack(self.layers, x, lambda layer, x: (layer(x), None))

        heard = voiced.max(axis=1)  # without a voiced frame there is no pitch to tell
        clip = jnp.concatenate([pitch_embedding(median[:, 0]) * heard, rate[:, 0]], axis=-1)
        return self._join(self.resampler(self.norm(x), self.summary(clip)), R)


def pitch_embedding(octaves: Array) -> Array:
    """[..., 1] octaves from `PITCH_CENTRE` -> sines and cosines of six periods from 4 octaves to 150 cents."""
    angles = octaves * jnp.asarray(2 * np.pi / PITCH_PERIODS, jnp.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def voice_features(wave_BRn: Array, cfg: MelConfig) -> Array:
    """What a voice is known by: spectrum, pitch, loudness and rhythm, one row per mel frame, about unit size.

    Args:
        wave_BRn: float32 in [-1, 1] at ``cfg.sample_rate``, at least half an ``n_fft`` long.
    Returns:
        [B, R, T, num_bins + 5] float32: the log-mel; pitch in octaves from `PITCH_CENTRE` (0 where unvoiced);
        voicedness in 0...1; energy (1 is 20 dB); and, the same in all frames of a clip, the median pitch of its voiced
        frames and its speaking rate in octaves from 4 Hz. Never all zero, even in silence.
    """
    mel = mel_spectrogram(wave_BRn.reshape(-1, wave_BRn.shape[-1]), cfg)
    windows = frames(wave_BRn, cfg)
    octaves, voiced = pitch_contour(windows, cfg)
    octaves = jnp.where(voiced > 0, octaves, 0.0)
    rms = jnp.sqrt(jnp.square(windows).mean(-1))
    rate = jnp.log2(speaking_rate(rms, cfg) / 4.0)
    columns = (
        octaves,
        voiced,
        (20 * jnp.log10(rms + 1e-4) + 30) / 20,
        jnp.broadcast_to(_median(octaves, voiced)[..., None], rms.shape),
        jnp.broadcast_to(rate[..., None], rms.shape),
    )
    mel = mel.reshape(*rms.shape, cfg.num_bins) + 2
    return jnp.concatenate([mel, jnp.stack(columns, axis=-1)], axis=-1)


def pitch_contour(frames: Array, cfg: MelConfig) -> tuple[Array, Array]:
    """Pitch of each frame by its autocorrelation, divided by the window's so that long periods do not fade.

    Args:
        frames: [..., T, n_fft].
    Returns:
        Two float32 arrays [..., T]: octaves from `PITCH_CENTRE`, within `PITCH_RANGE`; and voicedness in 0...1.
    Source: Boersma 1993, "Accurate short-term analysis of the fundamental frequency". Deviations: band-limited to
    `PITCH_BAND`, read off at twice the sampling rate and refined by a parabola; no search for the best path.
    """
    n, rate = cfg.n_fft, 2 * cfg.sample_rate
    lags = np.arange(int(rate / PITCH_RANGE[1]) - 1, int(rate / PITCH_RANGE[0]) + 2)
    # From the power spectrum straight to these lags, behind lag zero: a matrix is faster than an inverse FFT here.
    bins = np.arange(int(2 * n * PITCH_BAND / cfg.sample_rate))
    cosines = np.cos(np.pi * np.outer(bins, np.append(0, lags) / 2) / n) * np.where(bins, 1.0, 0.5)[:, None]
    window = hann_window(n)
    of_window = np.square(np.abs(np.fft.rfft(window, 2 * n)))[bins] @ cosines

    spectrum = jnp.fft.rfft((frames - frames.mean(-1, keepdims=True)) * window, 2 * n)[..., : len(bins)]
    power = jnp.square(spectrum.real) + jnp.square(spectrum.imag)
    correlation = jnp.dot(power, jnp.asarray(cosines, jnp.float32), precision=jax.lax.Precision.HIGHEST)
    total = correlation[..., :1]
    silence = QUIET[0] * total.max(-2, keepdims=True) + QUIET[1] * of_window[0]
    score = correlation[..., 1:] / (total + silence) * jnp.asarray(of_window[0] / of_window[1:], jnp.float32)
    before, here, after = score[..., :-2], score[..., 1:-1], score[..., 2:]
    cost = jnp.asarray(OCTAVE_COST * np.log2(lags[1:-1]), jnp.float32)
    best = jnp.where((here >= before) & (here > after), here - cost, -jnp.inf).argmax(-1)[..., None]
    before, here, after = (jnp.take_along_axis(x, best, -1)[..., 0] for x in (before, here, after))

    bend = jnp.minimum(before - 2 * here + after, -1e-9)
    shift = jnp.clip(0.5 * (before - after) / bend, -0.5, 0.5)
    octaves = jnp.log2(rate / PITCH_CENTRE / (best[..., 0] + lags[1] + shift))
    periodicity = here - 0.25 * (before - after) * shift
    return octaves, jnp.clip((periodicity - VOICED[0]) / (VOICED[1] - VOICED[0]), 0.0, 1.0)


def _median(x: Array, weight: Array) -> Array:
    """Weighted median over the last axis; the smallest value where all weights are zero."""
    order = x.argsort(-1)
    total = jnp.take_along_axis(weight, order, -1).cumsum(-1)
    middle = (total >= total[..., -1:] / 2).argmax(-1)[..., None]
    return jnp.take_along_axis(x, jnp.take_along_axis(order, middle, -1), -1)[..., 0]


def speaking_rate(rms: Array, cfg: MelConfig) -> Array:
    """Syllables per second: the centre of gravity of the envelope's modulation spectrum within `RATE_BAND`.

    Args:
        rms: [..., T], amplitude of each mel frame.
    Returns:
        [...] Hz float32, 4 for a steady or silent sound.
    Source: Morgan and Fosler-Lussier 1998, "Combining multiple estimators of speaking rate" (``enrate``).
    """
    T = rms.shape[-1]
    rates = np.arange(RATE_BAND[0], RATE_BAND[1] + 0.125, 0.25)
    seconds = np.arange(T) * cfg.hop / cfg.sample_rate
    waves = np.hanning(T + 2)[1:-1, None] * np.exp(-2j * np.pi * np.outer(seconds, rates))
    mean = rms.mean(-1, keepdims=True)
    envelope = (rms - mean) / (mean + 1e-4)
    parts = (jnp.asarray(part / T, jnp.float32) for part in (waves.real, waves.imag))
    power = sum(jnp.square(jnp.dot(envelope, part, precision=jax.lax.Precision.HIGHEST)) for part in parts)
    return ((power * rates).sum(-1) + 4.0 * STEADY) / (power.sum(-1) + STEADY)
