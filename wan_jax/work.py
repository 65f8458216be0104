"""Operations of the networks, from their architectures. A multiply-add counts as two; norms, softmax and activations
are not counted.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from wan_jax.config import DiTConfig, FusionConfig, UMT5Config, VAEConfig
from wan_jax.models.vae import decoder_widths, encoder_widths


class Work(NamedTuple):
    """Operations of a transformer."""

    linear: float = 0.0
    self_attention: float = 0.0
    cross_attention: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, factor: float) -> Work:
        return Work(*(factor * a for a in self))


def dit_work(cfg: DiTConfig, tokens: int) -> Work:
    """One forward of one sample."""
    return _stream(cfg, tokens, context=cfg.image_tokens).plus(_video_ends(cfg, tokens))


def fusion_work(
    cfg: FusionConfig, video: int, audio: int, references: int = 0, clip: tuple[int, int] | None = None
) -> Work:
    """One forward of one sample of the twin-stream transformer.

    Args:
        video, audio: tokens of each stream, those of the references included; 0 leaves a stream out.
        references: that the adapters show. Their resamplers, less than a thousandth of the rest, are left out.
        clip: tokens of each stream without those of the references; see `CouplingConfig`.
    """
    d, work = cfg.dim, Work()
    counts, own = (video, audio), clip or (video, audio)
    for i, adapter in enumerate((cfg.identity, cfg.voice)):
        tokens, other = counts[i], counts[1 - i]
        if not tokens:
            continue
        work = work.plus(_stream(cfg, tokens, context=0 if cfg.coupling else other))
        if cfg.coupling and other:  # queries and an output of its own, for the clip alone
            linear = 2 * (2 * own[i] + 2 * own[1 - i]) * d**2 + 2 * own[i] * d * cfg.num_heads
            work = work.plus(Work(linear, 0, 4 * own[i] * own[1 - i] * d).times(cfg.num_layers))
        if adapter and references:
            shown = references * adapter.num_tokens
            linear = 2 * tokens * d**2 + 2 * shown * 2 * adapter.dim * d
            work = work.plus(Work(linear, 0, 4 * tokens * shown * d).times(cfg.num_layers))
    if video:
        work = work.plus(_video_ends(cfg, video))
    stem = cfg.audio_kernel * (cfg.audio_dim * d + 3 * d * cfg.stem_dim)
    return work.plus(Work(2 * audio * (stem + cfg.audio_dim * d)))


def _stream(cfg: DiTConfig, tokens: int, context: int) -> Work:
    """Blocks, text and time of a stream whose tokens also attend to ``context`` others with keys of their own."""
    d, f, text = cfg.dim, cfg.ffn_dim, cfg.text_len
    linear = 2 * tokens * (6 * d**2 + 2 * d * f) + 2 * (text + context) * 2 * d**2
    block = Work(linear, 4 * tokens**2 * d, 4 * tokens * (text + context) * d)
    once = 2 * text * (cfg.text_dim * d + d**2) + 2 * (cfg.freq_dim * d + 7 * d**2)
    return block.times(cfg.num_layers).plus(Work(once))


def _video_ends(cfg: DiTConfig, tokens: int) -> Work:
    """Embedding of patches and of pictures, and the head."""
    patch, i = math.prod(cfg.patch_size), cfg.image_dim
    pictures = 2 * cfg.image_tokens * (i * i + i * cfg.dim)
    return Work(2 * tokens * patch * (cfg.in_dim + cfg.out_dim) * cfg.dim + pictures)


def text_work(cfg: UMT5Config, tokens: int) -> Work:
    """One prompt through umT5."""
    linear = 2 * tokens * cfg.dim * (4 * cfg.dim_attn + 3 * cfg.dim_ffn)
    return Work(linear, 4 * tokens**2 * cfg.dim_attn).times(cfg.num_layers)


class Convolutions:
    """Walk along one half of the video autoencoder.

    Attributes:
        work: operations, of all frames.
        past: numbers kept from chunk to chunk.
        widest: numbers that the widest layer reads and writes in a chunk of one latent frame.
    """

    def __init__(self, chunk: int):
        self.work, self.past, self.widest = 0.0, 0, 0
        self.chunk = chunk  # frames here of one latent frame

    def conv(
        self, c_in: int, c_out: int, time: int, space: int, frames: int, area: int, *, past: int = -1, beside: int = 0
    ) -> None:
        """``past`` frames are kept, one less than the kernel has unless given; ``beside`` channels lie beside it."""
        past = time - 1 if past < 0 else past
        self.work += 2.0 * frames * area * c_in * c_out * time * space**2
        self.past += past * area * c_in
        self.widest = max(self.widest, area * ((self.chunk + past) * c_in + self.chunk * (c_out + beside)))

    def block(self, c_in: int, c_out: int, frames: int, area: int) -> None:
        self.conv(c_in, c_out, 3, 3, frames, area)
        self.conv(c_out, c_out, 3, 3, frames, area)
        if c_in != c_out:
            self.conv(c_in, c_out, 1, 1, frames, area)

    def middle(self, c: int, frames: int, area: int) -> None:
        self.block(c, c, frames, area)
        self.conv(c, 4 * c, 1, 1, frames, area)
        self.work += 4.0 * frames * area**2 * c
        self.block(c, c, frames, area)


def vae_encode(cfg: VAEConfig, height: int, width: int, frames: int) -> Convolutions:
    """Pixels, video frames."""
    widths, patch = encoder_widths(cfg), cfg.patch_size
    walk, area = Convolutions(min(frames, cfg.temporal_stride)), height // patch * (width // patch)
    walk.conv(3 * patch**2, widths[0][0], 3, 3, frames, area)
    for (d_in, d_out), (temporal, spatial) in zip(widths, (*cfg.resamplings, (False, False)), strict=True):
        for i in range(cfg.num_res_blocks):
            walk.block(d_out if i else d_in, d_out, frames, area)
        if temporal or spatial:
            area //= 4 if spatial else 1
            walk.conv(d_out, d_out, 1, 3, frames, area)
        if temporal:
            frames = (frames - 1) // 2 + 1
            walk.conv(d_out, d_out, 3, 1, frames - 1, area, past=1)
            walk.chunk = -(-walk.chunk // 2)
    walk.middle(d_out, frames, area)
    walk.conv(d_out, 2 * cfg.z_dim, 3, 3, frames, area)
    walk.conv(2 * cfg.z_dim, 2 * cfg.z_dim, 1, 1, frames, area)
    return walk


def vae_decode(cfg: VAEConfig, height: int, width: int, frames: int) -> Convolutions:
    """Pixels, video frames."""
    widths, stride = decoder_widths(cfg), cfg.spatial_stride
    walk, area = Convolutions(1), height // stride * (width // stride)
    frames = (frames - 1) // cfg.temporal_stride + 1
    walk.conv(cfg.z_dim, cfg.z_dim, 1, 1, frames, area)
    walk.conv(cfg.z_dim, widths[0][0], 3, 3, frames, area)
    walk.middle(widths[0][0], frames, area)
    ups = (*cfg.resamplings[::-1], (False, False))
    for k, ((d_in, d_out), (temporal, spatial)) in enumerate(zip(widths, ups, strict=True)):
        for i in range(cfg.num_res_blocks + 1):
            walk.block(d_out if i else d_in, d_out, frames, area)
        if temporal:
            walk.conv(d_out, 2 * d_out, 3, 1, frames - 1, area)
            frames = 2 * frames - 1  # the first is not doubled
            walk.chunk *= 2
        if temporal or spatial:
            area *= 4 if spatial else 1
            above = widths[k + 1][0]
            walk.conv(d_out, above, 1, 3, frames, area, beside=above if cfg.version == "2.2" else 0)  # the shortcut
    walk.conv(d_out, 3 * cfg.patch_size**2, 3, 3, frames, area)
    return walk
