"""From the user's inputs to the arrays that steer the network: text features, picture latents, masks, CLIP tokens.

Source: ``wan/text2video.py``, ``image2video.py``, ``first_last_frame2video.py``, ``textimage2video.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.media import to_unit
from wan_jax.models.clip import preprocess
from wan_jax.models.dit import Context, DiT
from wan_jax.nn.resize import bicubic_resize
from wan_jax.parallel import compiler_options
from wan_jax.sampling.sampler import Pin

Array = jax.Array

TEXT_STEP = 128  # tokens; most prompts are shorter


class Condition(NamedTuple):
    """Everything that steers one clip, as arrays.

    text: features [G, S, C] of the prompt and (G = 2) of the negative prompt, zero rows up to the text length; or what
        the network has read of them and of the CLIP tokens, see `DiT.read`.
    video_BTHWC: mask and condition latents, concatenated to the noisy latents (I2V, FLF2V).
    image_BIC: CLIP tokens (Wan2.1 I2V, FLF2V).
    token_time: [1, L], 1 where a token belongs to the clean first frame (TI2V with a picture).
    pin: latents that stay as they are (TI2V with a picture).
    """

    text: Array | Context
    video_BTHWC: Array | None = None
    image_BIC: Array | None = None
    token_time: Array | None = None
    pin: Pin | None = None


def read(dit: DiT, condition: Condition) -> Context:
    """What a network makes of the prompts and the picture, the same in every step."""
    image = condition.image_BIC
    if image is not None:
        image = jnp.broadcast_to(image, (len(condition.text), *image.shape[1:]))
    return dit.read(condition.text, image)


def encode_text(encoder: Any, ids: np.ndarray, mask: np.ndarray) -> Array:
    """umT5 features [G, S, C], zero where there is no token: the DiT was trained on zero rows, not on encoded padding.

    Padding is not attended to, so a prompt is encoded at its own length, rounded up to spare compilations.
    """
    run = compiled("text", lambda encoder, ids, mask: jnp.where(mask[..., None] > 0, encoder(ids, mask), 0))
    rows = []
    for i in range(len(ids)):  # one by one: half the memory
        length = min(ids.shape[1], -(-int(mask[i].sum()) // TEXT_STEP) * TEXT_STEP)
        features = run(encoder, ids[i : i + 1, :length], mask[i : i + 1, :length])
        rows.append(jnp.pad(features, ((0, 0), (0, ids.shape[1] - length), (0, 0))))
    return jnp.concatenate(rows)


_COMPILED: dict[str, Any] = {}


def compiled(name: str, function: Any) -> Any:
    """One compiled program per stage. Options depend on the backend, which must not start at import."""
    if name not in _COMPILED:
        _COMPILED[name] = jax.jit(function, compiler_options=compiler_options())
    return _COMPILED[name]


def encode_image(encoder: Any, pictures: list[np.ndarray]) -> Array:
    """CLIP tokens [1, I, C] of one picture, or of the first and the last in turn; uint8 [H, W, 3] each."""
    run = compiled("image", lambda encoder, image: encoder(preprocess(image, encoder.cfg.image_size)))
    return jnp.concatenate([run(encoder, to_unit(picture)[None]) for picture in pictures], axis=1)


def frame_mask(known: Mapping[int, Any] | set[int], num_frames: int, stride: int) -> np.ndarray:
    """[t, stride] float32: channel c of latent frame k tells if video frame ``stride * k - stride + 1 + c`` is known.

    All channels of latent frame 0 speak of frame 0.
    """
    flags = np.zeros(num_frames, np.float32)
    flags[list(known)] = 1
    return np.concatenate([np.repeat(flags[:1], stride), flags[1:]]).reshape(-1, stride)


def video_condition(vae: Any, known: Mapping[int, Array], num_frames: int, height: int, width: int) -> Array:
    """Mask and latents [1, t, h, w, stride + z] of a video of which some frames are known, grey elsewhere.

    Args:
        known: frame index -> [H, W, 3] float32 in [-1, 1], already at ``height`` x ``width``.
    """

    def encode(vae: Any, frames: Array, index: Array) -> Array:
        video = jnp.zeros((1, num_frames, height, width, 3)).at[0, index].set(frames)
        return vae.encode_stream(video)

    indices = sorted(known)
    # The index is static for a task (0, or 0 and the last), so it is part of the program's name.
    run = compiled(f"condition {num_frames} {height} {width}", encode)
    latents = run(vae, jnp.stack([known[i] for i in indices]), jnp.asarray(indices))
    mask = frame_mask(set(indices), num_frames, vae.cfg.temporal_stride)
    mask = jnp.broadcast_to(mask[None, :, None, None, :], (*latents.shape[:4], mask.shape[-1]))
    return jnp.concatenate([mask, latents], axis=-1)


def fit_picture(picture: np.ndarray, height: int, width: int) -> Array:
    """Bicubic resize of a uint8 picture to float32 [height, width, 3] in [-1, 1], as the official I2V code does it."""
    return bicubic_resize(jnp.asarray(to_unit(picture)), (height, width))


def crop_to_aspect(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Largest centre crop with the aspect of ``height`` x ``width``."""
    h, w = picture.shape[:2]
    crop_h, crop_w = min(h, max(1, round(w * height / width))), min(w, max(1, round(h * width / height)))
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    return picture[top : top + crop_h, left : left + crop_w]


def first_frame_latents(vae: Any, picture: np.ndarray, height: int, width: int) -> Array:
    """TI2V: Lanczos resize to cover, centre crop, encode one frame: [1, 1, h, w, z]."""
    from PIL import Image

    image = Image.fromarray(picture)
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    image = image.crop((left, top, left + width, top + height))
    run = compiled("first frame", lambda vae, video: vae.encode(video))
    return run(vae, jnp.asarray(to_unit(np.asarray(image)))[None, None])


def pin_first_frame(latents: Array, shape: tuple[int, ...], patch: tuple[int, int, int]) -> tuple[Pin, Array]:
    """TI2V: keep the first latent frame; its tokens have timestep 0. ``shape`` is [1, T, H, W, C] of the latents."""
    mask = jnp.zeros((1, shape[1], 1, 1, 1), bool).at[:, 0].set(True)
    value = jnp.zeros(shape).at[:, :1].set(latents)
    _, T, H, W, _ = shape
    per_frame = (H // patch[1]) * (W // patch[2])
    token_time = (jnp.arange(T * per_frame) < per_frame).astype(jnp.int32)[None]
    return Pin(mask, value), token_time
