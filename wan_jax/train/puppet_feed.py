"""The puppet world as a source of training: everything is drawn and rendered on the device, from keys alone.

Axes: ``B`` clips, ``P`` people of a clip, ``T H W`` frames, rows, columns, ``S`` text tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from wan_jax.config import ModelSpec
from wan_jax.models.clip import preprocess
from wan_jax.models.identity import voice_features
from wan_jax.nn.mel import mel_spectrogram
from wan_jax.nn.positions import reference_positions
from wan_jax.train.flow import Batch, Dropout, Levels, draw_examples, flow_loss
from wan_jax.train.puppets import faces, world
from wan_jax.train.words import Words

Array = jax.Array

CHUNK = 32  # clips that are rendered and encoded at once
STILL = 3  # of them, for the VAE: reference pictures
MOUTH_TOKENS = 3.0  # weight of the latents under a mouth, of 1
MOUTH_PIXELS, FACE_PIXELS = 6.0, 2.0  # weights of pixels


class Nothing:
    """The feed of a task that draws its examples itself."""

    def __call__(self, step: int, count: int) -> tuple[Any, Any]:
        return None, None

    def position(self) -> dict[str, Any]:
        return {}

    def seek(self, position: dict[str, Any]) -> None:
        pass


def clips(key: Array, count: int, people: int = 1, split: str = "train") -> tuple[world.Plan, world.Clip]:
    """Plans and clips, leaves [count, ...]. Pure: what is not used of them is not rendered either."""
    keys = jax.random.split(key, count)
    plans = jax.vmap(lambda key: world.draw(key, split, people))(keys)
    return plans, jax.vmap(world.render)(plans)


def to_unit(pixels: Array) -> Array:
    """uint8 to float32 in [-1, 1]."""
    return pixels.astype(jnp.float32) / 127.5 - 1


def boxes(box_BPT4: Array, size: int) -> Array:
    """Which cells of a ``size`` x ``size`` grid the boxes of any person touch: bool [B, T, size, size]."""
    edge = jnp.arange(size) / size
    left, top, right, bottom = (box_BPT4[..., None, k] for k in range(4))
    columns = (edge + 1 / size > left) & (edge < right)
    rows = (edge + 1 / size > top) & (edge < bottom)
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def render_videos(key: Array) -> Batch:
    """One chunk of clips for the VAE: "video" as uint8 and "weight" of the pixels, [CHUNK, ...].

    A few are reference pictures that stand still.
    """
    _, clip = clips(key, CHUNK)
    mouth = clip.truth.mouth
    tall = (mouth[..., 3] - mouth[..., 1])[..., None]
    face = mouth - tall * jnp.asarray([0.0, 1.3, 0.0, 0.0])  # from the brows to the chin
    size = clip.video.shape[2]
    weight = jnp.where(boxes(mouth, size), MOUTH_PIXELS, jnp.where(boxes(face, size), FACE_PIXELS, 1.0))
    video = clip.video.at[:STILL].set(clip.pictures[:STILL])  # over the axis of frames
    return {"video": video, "weight": weight.at[:STILL].set(1).astype(jnp.uint8)}


def video_examples(rows: Batch, own: Any, key: Array, *, batch: int, spec: ModelSpec) -> Batch:
    """Draw what `wan_jax.train.codec.vae_loss` takes from rendered clips."""
    key_rows, key_noise = jax.random.split(key)
    chosen = jax.tree.map(lambda x: x[jax.random.randint(key_rows, (batch,), 0, len(x))], rows)
    _, frames, height, width, _ = chosen["video"].shape
    vae = spec.vae
    cells = (height // vae.spatial_stride, width // vae.spatial_stride, vae.z_dim)
    return {
        "video": to_unit(chosen["video"]),
        "pixel_weight": chosen["weight"].astype(jnp.float32),
        "noise": jax.random.normal(key_noise, (batch, (frames - 1) // vae.temporal_stride + 1, *cells)),
    }


def audio_examples(
    shared: Any, own: Any, key: Array, *, batch: int, latents: tuple[int, int], window: int | None = None
) -> Batch:
    """What the losses of the audio codec take.

    Args:
        latents: [A, z] of a clip. window: samples that are cut out of every clip; default all.
    """
    key_clips, key_noise, key_window = jax.random.split(key, 3)
    _, clip = clips(key_clips, batch)
    audio, length = clip.audio, window or clip.audio.shape[1]
    starts = jax.random.randint(key_window, (batch,), 0, audio.shape[1] - length + 1)
    audio = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, length))(audio, starts)
    return {"audio": audio, "noise": jax.random.normal(key_noise, (batch, *latents))}


def face_examples(shared: Any, own: Any, key: Array, *, batch: int) -> Batch:
    """Reference pictures, uint8 [B, H, W, 3], and what can be seen in them, [B, n]."""
    plans, clip = clips(key, batch)
    seen = jax.vmap(faces.features)(jax.tree.map(lambda x: x[:, 0], plans.people.face))
    return {"pictures": clip.pictures[:, 0], "seen": seen}


def face_loss(networks: dict[str, Any], example: Batch) -> tuple[Array, dict[str, Array]]:
    """Squared error of what the reader makes of the image encoder's tokens, their mean."""
    encoder = networks["image_encoder"]
    tokens = encoder(preprocess(to_unit(example["pictures"]), encoder.cfg.image_size))
    error = jnp.square(networks["reader"](tokens.mean(1)) - example["seen"]).mean(1)
    return error, {"seen": error}


def encode_clips(codec: dict[str, Any], key: Array, *, spec: ModelSpec, words: Words, people: int, split: str) -> Batch:
    """One chunk of clips as `wan_jax.train.flow.draw_examples` takes them.

    Args:
        codec: "vae" and "audio_vae", anything with ``encode``. Without the first: what the sound alone needs.
    """
    plans, clip = clips(key, CHUNK, people, split)
    mel = spec.sound.mel
    voices = clip.voices.reshape(-1, clip.voices.shape[-1])
    heard = codec["audio_vae"].encode(mel_spectrogram(voices, mel))
    texts = {
        name: jax.vmap(lambda plan, options=options: words.caption(plan, **options))(plans)
        for name, options in {
            "plain": dict(described=False),
            "described": dict(described=True),
            "alone": dict(described=True, references=False),
        }.items()
        if name != "alone" or people == 1
    }
    tokens = {f"ids_{name}": ids for name, (ids, _) in texts.items()}
    tokens |= {f"mask_{name}": mask for name, (_, mask) in texts.items()}
    encoded = {name: x.astype(jnp.uint8) for name, x in tokens.items()} | {
        "audio": codec["audio_vae"].encode(mel_spectrogram(clip.audio, mel)),
        "audio_references": heard.reshape(CHUNK, -1, heard.shape[-1]),
        "voice": voice_features(clip.voices, mel),
    }
    return encoded | _encode_pictures(codec["vae"], clip) if "vae" in codec else encoded


def _encode_pictures(vae: Any, clip: world.Clip) -> Batch:
    latents = vae.encode(to_unit(clip.video))
    count, frames, rows = latents.shape[:3]
    touched = boxes(clip.truth.mouth, rows)  # [B, T, h, w], of every video frame
    grouped = touched[:, 1:].reshape(count, frames - 1, -1, rows, rows).any(2)
    touched = jnp.concatenate([touched[:, :1], grouped], axis=1)
    references = vae.encode(to_unit(clip.pictures).reshape(-1, 1, *clip.pictures.shape[2:]))
    return {
        "video": latents.astype(jnp.bfloat16),
        "video_references": references.reshape(*clip.pictures.shape[:2], *references.shape[2:]).astype(jnp.bfloat16),
        "pictures": clip.pictures,
        "video_weight": jnp.where(touched, MOUTH_TOKENS, 1.0).astype(jnp.bfloat16),
    }


class ClipPool:
    """Clips that are made in chunks, kept on the device and drawn from at random; made anew after some steps.

    Args:
        make: ``key -> rows``, compiled, a chunk of `CHUNK` clips.
        size: clips of one pool, a multiple of `CHUNK`. refresh: steps that a pool serves.
    """

    def __init__(self, make: Callable[[Array], Batch], *, size: int, refresh: int, seed: int = 0):
        self._make, self._key = make, jax.random.key(seed)
        self._size, self._refresh = size, refresh
        self._held: tuple[int, Batch | None] = (-1, None)

    def __call__(self, step: int, count: int) -> tuple[Any, Any]:
        number = step // self._refresh
        if self._held[0] != number:
            self._held = (-1, None)
            keys = jax.random.split(jax.random.fold_in(self._key, number), self._size // CHUNK)
            self._held = number, jax.tree.map(lambda *x: jnp.concatenate(x), *map(self._make, keys))
        return self._held[1], None

    def position(self) -> dict[str, Any]:
        return {}  # the step tells

    def seek(self, position: dict[str, Any]) -> None:
        pass


class PuppetPool:
    """Encoded clips of one person and of two, and which of them a step takes.

    Args:
        codec: see `encode_clips`.
        size: clips of both pools together, shared as the kinds need them. refresh: see `ClipPool`.
        kinds: in turn of the calls: "one" person with a reference, "two" persons, or one "alone", told by the text.
    """

    def __init__(
        self,
        codec: dict[str, Any],
        spec: ModelSpec,
        words: Words,
        *,
        size: int,
        refresh: int,
        kinds: tuple[str, ...] = ("one",),
        seed: int = 0,
        split: str = "train",
    ):
        self._kinds = kinds
        self._pools = {}
        pairs = kinds.count("two") * size // len(kinds) // CHUNK * CHUNK
        for people, share in ((1, size - pairs), (2, pairs)):
            encode = jax.jit(functools.partial(encode_clips, spec=spec, words=words, people=people, split=split))
            make = functools.partial(encode, codec)
            self._pools[people] = ClipPool(make, size=share, refresh=refresh, seed=2 * seed + people)

    def __call__(self, step: int, count: int) -> tuple[Any, Any]:
        kind = self._kinds[step // count % len(self._kinds)]
        rows, _ = self._pools[2 if kind == "two" else 1](step, count)
        if kind == "alone":
            return {name: x for name, x in rows.items() if name not in _OF_REFERENCES}, None
        return {name: x for name, x in rows.items() if not name.endswith("_alone")}, None

    def position(self) -> dict[str, Any]:
        return {}

    def seek(self, position: dict[str, Any]) -> None:
        pass


_OF_REFERENCES = (
    "video_references", "audio_references", "pictures", "voice", "ids_plain", "mask_plain", "ids_described",
    "mask_described",
)  # fmt: skip


def twin_examples(
    rows: Batch, own: Any, key: Array, *, batch: int, words: Words, levels: Levels, dropout: Dropout, first_frame: float
) -> Batch:
    """Draw a batch from a pool and make it what `flow_loss` takes; half of the captions tell what people look like."""
    key_rows, key_text, key = jax.random.split(key, 3)
    size = len(rows["audio"])
    chosen = jax.tree.map(lambda x: x[jax.random.randint(key_rows, (batch,), 0, size)], rows)
    told = jax.random.uniform(key_text, (batch, 1)) < 0.5
    empty = dict(zip(("ids", "mask"), words.empty(), strict=True))
    for name in empty:
        variants = {v: chosen.pop(f"{name}_{v}") for v in ("plain", "described", "alone") if f"{name}_{v}" in chosen}
        text = variants.get("alone")
        if text is None:
            text = jnp.where(told, variants["described"], variants["plain"])
        chosen |= {name: text.astype(jnp.int32), f"null_{name}": empty[name]}
    return draw_examples(key, chosen, levels, dropout, first_frame=first_frame)


def twin_loss(
    networks: dict[str, Any], example: Batch, *, frames: int, remat: bool = False
) -> tuple[Array, dict[str, Array]]:
    """`flow_loss` with references at the places that belong to them; ``frames``: latents of a clip."""
    return flow_loss(networks, example, times=twin_times(example, frames), remat=remat)


def twin_times(example: Batch, frames: int) -> dict[str, tuple[float, ...]]:
    """Positions in time of both streams of an example, see `wan_jax.sound.reference_times`."""
    clean = example["clean"] if "clean" in example else example
    people = example["voice"].shape[1] if "voice" in example else 0
    lengths = [example["audio_references"].shape[1] // people] * people if people else []
    video, audio, scale = reference_positions(frames, clean["audio"].shape[1], people, lengths)
    return {"video": tuple(video.tolist()), "audio": tuple((audio * scale).tolist())}
