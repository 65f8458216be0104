"""Flow matching on any network of the house: a `DiT` on latent video, a `Fusion` on latent video and sound.

``x_sigma = (1 - sigma) clean + sigma noise``, the network is given ``1000 sigma`` and learns ``noise - clean``; all
streams of a sample have one sigma. Source: ``wan_jax.sampling.schedule``, which samples by the same convention.

Axes: ``B`` samples, ``T H W C`` latent video, ``A`` audio latents, ``S`` text tokens, ``R`` references.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.config import NUM_TRAIN_TIMESTEPS
from wan_jax.models.clip import preprocess
from wan_jax.models.fusion import STREAMS, Fusion
from wan_jax.sampling.schedule import shift_sigmas

Array = jax.Array
Batch = dict[str, Any]


@dataclass(frozen=True)
class Levels:
    """How noise levels are drawn: sigma is the logistic function of a normal number, then shifted."""

    mean: float = 0.0
    std: float = 1.0  # 0: sigma is uniform
    shift: float = 1.0


@dataclass(frozen=True)
class Dropout:
    """Chances that a sample does without one of its conditions, so that guidance can tell what each is worth.

    A dropped reference is zero in every form, as guidance shows it; ``tokens`` and ``adapters`` drop one form alone.
    """

    text: float = 0.08
    image: float = 0.05
    voice: float = 0.05
    coupling: float = 0.0
    tokens: float = 0.0
    adapters: float = 0.0
    everything: float = 0.0  # text, image and voice together


def draw_levels(key: Array, count: int, levels: Levels) -> Array:
    """Sigmas [count] in (0, 1), one in each of ``count`` equally likely ranges."""
    u = (jnp.arange(count) + jax.random.uniform(key, (count,), minval=1e-3, maxval=1 - 1e-3)) / count
    sigma = jax.nn.sigmoid(levels.mean + levels.std * jax.scipy.special.ndtri(u)) if levels.std else u
    return shift_sigmas(sigma, levels.shift)


def draw_examples(key: Array, batch: Batch, levels: Levels, dropout: Dropout, *, first_frame: float = 0.0) -> Batch:
    """What a batch becomes for one step: noise, its level, and which conditions are left.

    Args:
        batch: "video" [B, T, H, W, C] and "audio" [B, A, C], clean latents, either may be missing; the text as
            "ids" and "mask" [B, S] or features "text" [B, S, C], with "null_..." of the empty prompt [1, ...] beside
            them; and as far as the network takes them "video_references" [B, R, H, W, C], "audio_references"
            [B, K, C], "pictures" uint8 [B, R, H, W, 3] or "identity" [B, R, I, C], "voice" [B, R, F, C],
            "condition" [B, T, H, W, C], "image" [B, I, C]; and "video_weight" [B, T, H, W], of the loss.
        first_frame: chance that the first latent frame is given (I2V).
    """
    keys = iter(jax.random.split(key, 12))
    clean = {stream: batch[stream].astype(jnp.float32) for stream in STREAMS if stream in batch}
    count = len(next(iter(clean.values())))

    def chance(probability: float) -> Array:
        return jax.random.uniform(next(keys), (count,)) < probability

    def without(name: str, gone: Array) -> None:
        if name in batch:
            out[name] = jnp.where(gone.reshape(-1, *[1] * (batch[name].ndim - 1)), 0, batch[name])

    out = {name: x for name, x in batch.items() if name not in STREAMS and not name.startswith("null_")}
    out["clean"] = clean
    out["sigma"] = draw_levels(next(keys), count, levels)
    out["noise"] = {stream: jax.random.normal(next(keys), x.shape) for stream, x in clean.items()}
    everything, tokens, adapters = chance(dropout.everything), chance(dropout.tokens), chance(dropout.adapters)
    text, image, voice = (chance(p) | everything for p in (dropout.text, dropout.image, dropout.voice))
    for name in ("ids", "mask", "text"):
        if name in batch:
            out[name] = jnp.where(text.reshape(-1, *[1] * (batch[name].ndim - 1)), batch[f"null_{name}"], batch[name])
    without("video_references", image | tokens)
    without("audio_references", voice | tokens)
    out["shown"] = jnp.where(image | adapters, 0.0, 1.0)  # pictures become features in the step
    without("voice", voice | adapters)
    if dropout.coupling:
        out["coupled"] = ~chance(dropout.coupling)
    if first_frame:
        out["pinned"] = chance(first_frame)
    return out


def flow_loss(
    networks: Mapping[str, Any], example: Batch, *, times: dict[str, Sequence[float]] | None = None, remat: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Squared error of the velocity per sample, the streams' sum; and each stream's.

    Args:
        networks: "dit"; "text_encoder" where the text comes as ids, "image_encoder" where references are pictures.
        example: see `draw_examples`.
        times: positions of frames and audio latents, see `Fusion`.
    """
    clean, sigma, pinned = example["clean"], example["sigma"], example.get("pinned")
    target = {stream: example["noise"][stream] - x for stream, x in clean.items()}
    noisy = {stream: x + _wide(sigma, x) * target[stream] for stream, x in clean.items()}
    weight = {stream: jnp.ones(x.shape[:-1]) for stream, x in clean.items()}
    if "video_weight" in example:
        weight["video"] = example["video_weight"].astype(jnp.float32)
    if pinned is not None:
        first = pinned[:, None, None, None] & (jnp.arange(clean["video"].shape[1]) == 0)[:, None, None]
        noisy["video"] = jnp.where(first[..., None], clean["video"], noisy["video"])
        weight["video"] = jnp.where(first, 0, weight["video"])
    predict = _fusion if isinstance(networks["dit"], Fusion) else _dit
    velocity = predict(networks, example, noisy, NUM_TRAIN_TIMESTEPS * sigma, times=times, remat=remat)
    losses = {}
    for stream, x in velocity.items():
        error = jnp.square(x - target[stream]).mean(-1) * weight[stream]
        axes = tuple(range(1, error.ndim))
        losses[stream] = error.sum(axes) / weight[stream].sum(axes)
    return sum(losses.values()), losses


def _wide(x_B: Array, like: Array) -> Array:
    return x_B.reshape(-1, *[1] * (like.ndim - 1))


def _text(networks: Mapping[str, Any], example: Batch) -> Array:
    """Features [B, text_len, C], zero where there is no token."""
    features = example.get("text")
    if features is None:
        mask = example["mask"]
        features = jnp.where(mask[..., None] > 0, networks["text_encoder"](example["ids"], mask), 0)
    missing = networks["dit"].cfg.text_len - features.shape[1]
    return jnp.pad(features, ((0, 0), (0, missing), (0, 0)))


def _identity(networks: Mapping[str, Any], example: Batch) -> Array | None:
    """Image-encoder tokens [B, R, I, C] of the references, zero where they are dropped."""
    features = example.get("identity")
    if features is None and "pictures" in example:
        encoder, pictures = networks["image_encoder"], example["pictures"]
        pixels = pictures.reshape(-1, *pictures.shape[2:]).astype(jnp.float32) / 127.5 - 1
        features = encoder(preprocess(pixels, encoder.cfg.image_size))
        features = features.reshape(*pictures.shape[:2], *features.shape[1:])
    return None if features is None else features * _wide(example["shown"], features)


def _fusion(networks: Mapping[str, Any], example: Batch, noisy: dict, timesteps: Array, *, times: Any, remat: bool):
    fusion, text = networks["dit"], _text(networks, example)
    seen = {
        s: jnp.concatenate([x, example[name]], axis=1) if (name := f"{s}_references") in example else x
        for s, x in noisy.items()
    }
    options = {}
    if (pinned := example.get("pinned")) is not None:
        B, T, H, W, _ = seen["video"].shape
        _, ph, pw = fusion.cfg.patch_size
        first = jnp.arange(T * (H // ph) * (W // pw)) < (H // ph) * (W // pw)
        options["token_time"] = (first & pinned[:, None]).astype(jnp.int32)
        timesteps = jnp.stack([timesteps, jnp.zeros_like(timesteps)], axis=-1)
    if "coupled" in example:
        options["coupled_B"] = example["coupled"]
    velocity = fusion(
        seen,
        timesteps,
        dict.fromkeys(seen, text),
        times=times,
        identity_BRIC=_identity(networks, example),
        voice_BRTF=example.get("voice"),
        remat=remat,
        **options,
    )
    return {stream: velocity[stream][:, : x.shape[1]] for stream, x in noisy.items()}


def _dit(networks: Mapping[str, Any], example: Batch, noisy: dict, timesteps: Array, *, times: Any, remat: bool):
    video = networks["dit"](
        noisy["video"],
        timesteps,
        _text(networks, example),
        condition_BTHWC=example.get("condition"),
        image_BIC=example.get("image"),
        remat=remat,
    )
    return {"video": video}


@functools.partial(jax.jit, static_argnames=("levels", "times"))
def losses_by_level(
    networks: Mapping[str, Any], batch: Batch, key: Array, levels: tuple[float, ...], times: Any = None
) -> dict[str, Array]:
    """Mean loss of each stream at given noise levels, nothing dropped: the curve that training is judged by.

    Args:
        times: as in `flow_loss`, as a tuple of items.
    """
    nothing = Dropout(**dict.fromkeys(Dropout.__dataclass_fields__, 0.0))
    example = draw_examples(key, batch, Levels(), nothing)
    example.pop("video_weight", None)

    def at(sigma: Array) -> dict[str, Array]:
        given = example | {"sigma": jnp.full_like(example["sigma"], sigma)}
        _, losses = flow_loss(networks, given, times=times and dict(times))
        return {stream: x.mean() for stream, x in losses.items()}

    return jax.lax.map(at, jnp.asarray(levels))
