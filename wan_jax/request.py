"""What is asked for, resolved and checked before any weight is touched: the one place for sizes, frames and defaults.

Sources: ``wan/configs``, ``generate.py`` and the size rules in image2video.py and textimage2video.py.
"""

from __future__ import annotations

import hashlib
import logging
import math
import numbers
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from wan_jax.captions import mark_speech, ovi_prompt, structured_caption
from wan_jax.config import MODELS, ModelSpec
from wan_jax.errors import InputError
from wan_jax.sampling.guidance import check_mode
from wan_jax.sampling.schedule import FEW_STEPS, RCM, Schedule, make_schedule

log = logging.getLogger(__name__)

AREA_480P = 832 * 480
MAX_SEED = 2**63 - 1
FULL_SCHEDULE = 15  # steps from which neighbours are alike enough for a step cache
FEWEST_TOKENS = 256  # of a chunk: with fewer the products are thin


@dataclass(frozen=True)
class SoundRequest:
    """What a model with sound is asked for beside the picture.

    ``caption`` is the prompt in the form that the model was trained on. ``video`` or ``audio`` may be False where a
    model can make one alone. ``references`` are `wan_jax.references.ResolvedReference`.
    """

    caption: str
    video: bool
    audio: bool
    num_latents: int
    audio_negative_prompt: str
    audio_guidance_scale: float
    image_guidance: float
    voice_guidance: float
    sync_guidance: float
    references: tuple[Any, ...]
    clean_voice: bool
    consent: str

    def settings(self) -> dict[str, Any]:
        """JSON-ready; references by the SHA-256 of their pixels and samples."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["references"] = [
            {name: getattr(r, name) for name in ("image_sha256", "voice_sha256", "description")}
            for r in self.references
        ]
        return values


@dataclass(frozen=True)
class Request:
    """One resolved generation. Built by `resolve`; `settings` is what is embedded in the file.

    ``guidance_scale`` is (low noise, high noise) for two experts. ``width`` and ``height`` are the size of the video;
    ``size`` is what was asked for, of which a picture takes the area alone. rCM has a ``sigma_max`` and no ``shift``,
    the other solvers a ``shift`` and no ``sigma_max``.
    """

    model: str
    task: str
    prompt: str
    negative_prompt: str
    size: tuple[int, int]
    width: int
    height: int
    num_frames: int
    fps: float
    num_steps: int
    shift: float | None
    sigma_max: float | None
    guidance_scale: float | tuple[float, float]
    guidance_interval: tuple[float, float]
    solver: str
    guidance: str
    step_cache: float
    chunk_tokens: int
    tiled: bool
    seeds: tuple[int, ...]
    image: np.ndarray | None = None
    last_image: np.ndarray | None = None
    sound: SoundRequest | None = None

    def settings(self, seed: int) -> dict[str, Any]:
        """JSON-ready settings of the clip with this seed; pictures by the SHA-256 of their pixels."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        values["seed"] = seed
        values.pop("seeds")
        if (sound := values.pop("sound")) is not None:
            values |= sound.settings()
        for name in ("image", "last_image"):
            picture = values.pop(name)
            if picture is not None:
                values[f"{name}_sha256"] = array_hash(picture)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def schedule(self) -> Schedule:
        options = {} if self.sigma_max is None else {"sigma_max": self.sigma_max}
        return make_schedule(self.solver, self.num_steps, self.shift, **options)

    def guidance_per_step(self, timesteps: np.ndarray, high_steps: int) -> np.ndarray:
        """The scale of every step: the official tuple is (low, high), the high-noise expert comes first."""
        if not isinstance(self.guidance_scale, tuple):
            return np.full(len(timesteps), self.guidance_scale, np.float32)
        low, high = self.guidance_scale
        return np.where(np.arange(len(timesteps)) < high_steps, high, low).astype(np.float32)


def array_hash(array: np.ndarray) -> str:
    """SHA-256 of a shape and the values."""
    return hashlib.sha256(repr(array.shape).encode() + np.ascontiguousarray(array).tobytes()).hexdigest()


def resolve(
    spec: ModelSpec,
    prompt: str,
    *,
    negative_prompt: str | None = None,
    image: np.ndarray | None = None,
    last_image: np.ndarray | None = None,
    size: str | tuple[int, int] | None = None,
    aspect: str | None = None,
    num_frames: int | None = None,
    fps: float | None = None,
    num_steps: int | None = None,
    shift: float | None = None,
    sigma_max: float | None = None,
    guidance_scale: float | Sequence[float] | None = None,
    guidance_interval: Sequence[float] | None = None,
    solver: str = "unipc",
    guidance: str = "batch",
    step_cache: float | None = None,
    chunk_tokens: int | None = None,
    tiled: bool = False,
    seed: int | Sequence[int] = 0,
    **sound: Any,
) -> Request:
    """Fill the defaults of a model and check every value.

    Args:
        image, last_image: uint8 [H, W, 3].
        size: (width, height) or "832x480". For image models it gives the area; the picture gives the aspect.
        aspect: "16:9", instead of ``size``.
        num_frames: 4n + 1; 1 makes a picture.
        fps: 0.1 to 240, of the file; the models know one rate only.
        sigma_max: of rCM: noise over clean at the start; default 80, with a picture 200. More gives less variety.
        guidance_interval: (low, high) noise levels, default (0, 1). Steps at others run the prompt's pass alone.
        solver: "unipc", "dpm++", "euler"; for models and adapters that were distilled to a few steps "distilled"
            (lightx2v and its kin), "rcm" and its deterministic form "rcm-ode" (TurboDiffusion). With these the defaults
            are four steps, shift 5 and no guidance.
        guidance: "batch" or "sequential" (the prompt and the negative prompt one after the other: less memory).
            A guidance scale of 1 needs no negative prompt and runs one pass.
        step_cache: 0 runs every step; 0.05 (careful) to 0.2 (bold) leaves out the network's blocks where they would
            add what they added before, see `wan_jax.sampling.step_cache`. The first clip of a model that was never
            measured runs every step and measures it.
        chunk_tokens: run the network's blocks on so many tokens at a time, for clips that do not fit: beside the stream
            there are then only all keys and values, and what one chunk needs. The same clip but for rounding. 0: on all
            at once. Of models without sound.
        tiled: decode in tiles of the picture, for frames that do not fit; differs slightly, see `VAE.decode_tiled`.
        sound: options of models with sound, see `resolve_sound`.
    Raises:
        InputError: says what was got, what is needed, and the nearest valid value.
    """
    solver = _typed("solver", solver, str, "unipc")
    if solver in FEW_STEPS:
        spec = spec.distilled()
    prompt = _typed("prompt", prompt, str, "")
    if not prompt.strip():
        raise InputError("the prompt is empty: describe the scene, for example 'a cat surfing a wave at sunset'")
    image, last_image = _check_images(spec, image, last_image)
    num_frames = _typed("num_frames", num_frames, int, spec.num_frames)
    stride = spec.vae.temporal_stride
    if num_frames < 1 or (num_frames - 1) % stride:
        near = max(1, round((num_frames - 1) / stride) * stride + 1)
        raise InputError(f"num_frames={num_frames}: need {stride}n+1, try {near}")
    if spec.task == "flf2v" and num_frames < stride + 1:
        raise InputError(f"num_frames={num_frames}: a first and a last picture need at least {stride + 1} frames")
    fps = _typed("fps", fps, float, spec.fps)
    if not 0.1 <= fps <= 240:
        raise InputError(f"fps={fps:g}: need 0.1 to 240, {spec.name} was trained at {spec.fps}")
    if spec.sound and fps != spec.fps:
        raise InputError(f"fps={fps:g}: picture and sound belong together at {spec.fps}")
    if spec.sound:
        heard = resolve_sound(spec, prompt, num_frames, **sound)
    elif sound:
        names = ", ".join(s.name for s in MODELS.values() if s.sound)
        raise InputError(f"{spec.name} has no sound and takes no {', '.join(sound)}; models with sound are {names}")
    else:
        heard = None
    asked, (width, height) = _size(spec, size, aspect, image)
    official = spec.shift_480p if spec.shift_480p and width * height <= AREA_480P else spec.shift
    num_steps = _typed("num_steps", num_steps, int, spec.num_steps)
    if solver in RCM:
        if shift is not None:
            raise InputError(f"shift={shift}: {solver} has none; where it starts is sigma_max")
        sigma_max = _typed("sigma_max", sigma_max, float, 80.0 if image is None else 200.0)
        make_schedule(solver, num_steps, None, sigma_max=sigma_max)
    else:
        if sigma_max is not None:
            raise InputError(f"sigma_max={sigma_max}: belongs to {' and '.join(RCM)}; {solver} takes shift")
        shift = _typed("shift", shift, float, official)
        make_schedule(solver, num_steps, shift)  # raises, naming the value
    scale = _guidance_scale(spec, guidance_scale)
    interval = _guidance_interval((0.0, 1.0) if guidance_interval is None else guidance_interval)
    if solver in FEW_STEPS and scale not in (1.0, (1.0, 1.0)):
        log.warning("models for solver %s need no guidance: a scale of 1 runs one pass per step", solver)
    guidance = check_mode(_typed("guidance", guidance, str, "batch"))
    step_cache = _typed("step_cache", step_cache, float, 0.0)
    if not 0 <= step_cache <= 1:
        raise InputError(f"step_cache={step_cache:g}: need 0 (off) to 1, try 0.1")
    if step_cache and num_steps < FULL_SCHEDULE:
        log.warning("%d steps leave little to reuse: a step cache is meant for %d and more", num_steps, FULL_SCHEDULE)
    chunk_tokens = _typed("chunk_tokens", chunk_tokens, int, 0)
    if chunk_tokens and (chunk_tokens < FEWEST_TOKENS or heard):
        least = f"need {FEWEST_TOKENS} or more, or 0 (all at once); try 4096"
        raise InputError(f"chunk_tokens={chunk_tokens}: " + ("of models without sound" if heard else least))
    seeds = tuple(_typed("seed", s, int) for s in (seed if _is_sequence(seed) else (seed,)))
    for s in seeds:
        if not 0 <= s <= MAX_SEED:
            raise InputError(f"seed={s}: need 0 to {MAX_SEED}")
    if len(set(seeds)) != len(seeds) or not seeds:
        raise InputError(f"seeds {list(seeds)}: give one or several different ones")
    if image is None and asked not in spec.sizes:
        trained = ", ".join(f"{w}x{h}" for w, h in spec.sizes)
        log.warning("%s was not trained on %dx%d (but on %s): quality may suffer", spec.name, *asked, trained)
    return Request(
        model=spec.name,
        task=spec.task,
        prompt=prompt,
        negative_prompt=_typed("negative_prompt", negative_prompt, str, "") or spec.negative_prompt,
        size=asked,
        width=width,
        height=height,
        num_frames=num_frames,
        fps=fps,
        num_steps=num_steps,
        shift=shift,
        sigma_max=sigma_max,
        guidance_scale=scale,
        guidance_interval=interval,
        solver=solver,
        guidance="none" if scale in (1.0, (1.0, 1.0)) and not heard else guidance,
        step_cache=step_cache,
        chunk_tokens=chunk_tokens,
        tiled=_typed("tiled", tiled, bool, False),
        seeds=seeds,
        image=image,
        last_image=last_image,
        sound=heard,
    )


def resolve_sound(
    spec: ModelSpec,
    prompt: str,
    num_frames: int,
    *,
    references: Sequence[Any] = (),
    consent: str = "",
    audio: bool = True,
    video: bool = True,
    audio_negative_prompt: str | None = None,
    audio_guidance_scale: float | None = None,
    image_guidance: float | None = None,
    voice_guidance: float | None = None,
    sync_guidance: float | None = None,
    clean_voice: bool = False,
) -> SoundRequest:
    """The part of a request that only models with sound have.

    Args:
        references: `wan_jax.references.ResolvedReference`, in the order in which the prompt counts them.
        consent: what the user states about the persons in them; recorded in the clip. Needed with references.
        audio, video: False for a clip without sound, for sound alone.
        audio_negative_prompt, audio_guidance_scale: of the sound, as the others are of the picture.
        image_guidance, voice_guidance: how far to lead away from a clip without the pictures, without the voices.
        sync_guidance: how far to lead away from a clip whose picture and sound do not hear each other.
        clean_voice: whether the voices were cleaned; only recorded.
    """
    known, references = spec.sound, tuple(references)
    if sync_guidance and spec.dit.coupling is None:
        takers = ", ".join(s.name for s in MODELS.values() if s.sound and s.dit.coupling)
        raise InputError(
            f"{spec.name} never ran without its streams' attention to each other, as sync_guidance needs: leave it out,"
            f" or use {takers}"
        )
    if references and not spec.takes_references:
        takers = ", ".join(s.name for s in MODELS.values() if s.takes_references)
        raise InputError(f"{spec.name} takes no references; use {takers}, or give a first picture as image= (--image)")
    if spec.needs_references and not references:
        raise InputError(f"{spec.name} needs 1 to 5 references: give references= (--reference)")
    if references and not consent:
        raise InputError(
            "references show or sound like someone: state that every person agreed, by i_have_consent=True"
            " (--i-have-consent); it is recorded in the clip"
        )
    audio, video = _typed("audio", audio, bool), _typed("video", video, bool)
    if not (audio and video) and spec.takes_references:
        raise InputError(f"{spec.name} makes picture and sound together: leave neither out")
    if not (audio or video):
        raise InputError("neither picture nor sound is asked for: leave out one of the two at most")
    if known.caption == "structured":
        caption = structured_caption(prompt, [r.description for r in references])
    else:
        caption = ovi_prompt(mark_speech(prompt), known.caption)
    seconds = num_frames / spec.fps
    latents = max(1, round(seconds * known.mel.sample_rate / known.hop))
    return SoundRequest(
        caption=caption,
        video=video,
        audio=audio,
        num_latents=known.num_latents if num_frames == spec.num_frames else latents,
        audio_negative_prompt=_typed("audio_negative_prompt", audio_negative_prompt, str, "") or known.negative_prompt,
        audio_guidance_scale=_typed("audio_guidance_scale", audio_guidance_scale, float, known.guidance_scale),
        image_guidance=_typed("image_guidance", image_guidance, float, known.image_guidance) if references else 0.0,
        voice_guidance=_typed("voice_guidance", voice_guidance, float, known.voice_guidance) if references else 0.0,
        sync_guidance=_typed("sync_guidance", sync_guidance, float, known.sync_guidance),
        references=references,
        clean_voice=_typed("clean_voice", clean_voice, bool),
        consent=consent if references else "",
    )


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _typed(name: str, value: Any, kind: type, default: Any = None) -> Any:
    """``value``, or the default for None, as text (str), truth (bool), whole number (int) or finite number (float)."""
    value = default if value is None else value
    wanted, types = {
        str: ("text", str), bool: ("true or false", bool), int: ("a whole number", numbers.Integral),
        float: ("a finite number", numbers.Real),
    }[kind]  # fmt: skip
    with suppress(OverflowError):  # of integers that no float holds
        fits = isinstance(value, types) and isinstance(value, bool) == (kind is bool)
        if fits and (kind is not float or math.isfinite(value)):
            return kind(value)
    raise InputError(f"{name}={value!r:.100}: need {wanted}")


def _check_images(spec: ModelSpec, image: Any, last_image: Any) -> tuple[Any, Any]:
    if not spec.takes_image() and image is not None:
        takers = ", ".join(s.name for s in MODELS.values() if s.takes_image() and s.task != "flf2v")
        made = "references" if spec.takes_references else "text alone"
        raise InputError(f"{spec.name} makes video from {made}; for a first picture use one of {takers}")
    if spec.task in ("i2v", "flf2v") and image is None:
        raise InputError(f"{spec.name} needs a picture: give image= (--image)")
    if spec.task == "flf2v" and last_image is None:
        raise InputError(f"{spec.name} needs a first and a last picture: give last_image= (--last-image) too")
    if spec.task != "flf2v" and last_image is not None:
        takers = ", ".join(s.name for s in MODELS.values() if s.task == "flf2v")
        raise InputError(f"{spec.name} takes no last picture; use {takers}")
    for name, picture in (("image", image), ("last_image", last_image)):
        if picture is not None and (picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3):
            raise InputError(f"{name}: expected uint8 [height, width, 3], got {picture.dtype} {picture.shape}")
    return image, last_image


def _guidance_scale(spec: ModelSpec, scale: Any) -> float | tuple[float, float]:
    scale = spec.guidance_scale if scale is None else scale
    values = tuple(_typed("guidance_scale", s, float) for s in (scale if _is_sequence(scale) else (scale,)))
    if len(values) == 1:
        return values[0] if spec.num_experts == 1 else values * 2
    if len(values) != 2 or spec.num_experts == 1:
        wanted = "one number, or two: (low, high)" if spec.num_experts == 2 else "one number"
        raise InputError(f"guidance_scale={scale}: {spec.name} takes {wanted}")
    return values  # type: ignore[return-value]


def _guidance_interval(interval: Any) -> tuple[float, float]:
    values = tuple(_typed("guidance_interval", x, float) for x in (interval if _is_sequence(interval) else (interval,)))
    if len(values) != 2 or not 0 <= values[0] < values[1] <= 1:
        raise InputError(f"guidance_interval={interval}: need two noise levels, 0 <= low < high <= 1, such as 0.2 0.9")
    return values


def parse_size(size: Any) -> tuple[int, int]:
    """Read "832x480" or a pair as (width, height)."""
    parts = size.lower().replace("*", "x").split("x") if isinstance(size, str) else size
    try:
        width, height = (int(part) for part in parts)
    except (TypeError, ValueError) as error:
        raise InputError(f"size {size!r}: expected WIDTHxHEIGHT such as 832x480") from error
    return width, height


def _size(
    spec: ModelSpec, size: Any, aspect: str | None, image: np.ndarray | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) as asked for, and of the video."""
    if size is not None and aspect is not None:
        raise InputError("give size or aspect, not both")
    if aspect is not None:
        asked = size_for_aspect(spec, aspect)
    else:
        asked = spec.sizes[0] if size is None else parse_size(size)
    multiple = spec.size_multiple
    for name, value in zip(("width", "height"), asked, strict=True):
        if value < multiple or (value % multiple and image is None):
            near = max(multiple, round(value / multiple) * multiple)
            raise InputError(f"size {asked[0]}x{asked[1]}: {name} must be a multiple of {multiple}, try {near}")
    if image is None:
        return asked, asked
    rows, columns, area = *image.shape[:2], asked[0] * asked[1]
    if spec.sound and size is None and aspect is None:
        area = spec.sound.area
    if spec.task == "ti2v":
        width, height = ti2v_size(columns, rows, area, multiple)
    elif spec.sound:
        height, width = ovi_first_frame_size(rows, columns, area)
    else:
        height, width = i2v_size(rows, columns, area, spec.vae.spatial_stride, spec.dit.patch_size[1])
    if min(width, height) < multiple:
        raise InputError(f"a picture of {columns}x{rows} is too narrow for an area of {area} pixels: crop it")
    return asked, (width, height)


def size_for_aspect(spec: ModelSpec, aspect: str) -> tuple[int, int]:
    """The trained size of this aspect ratio ("16:9"), or one of the default area when no trained size is within 5 %."""
    try:
        w, h = (float(part) for part in aspect.split(":"))
        ratio = w / h
    except (AttributeError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"aspect {aspect!r}: expected W:H such as 16:9") from error
    if not 0.2 <= ratio <= 5:
        raise InputError(f"aspect {aspect}: need between 1:5 and 5:1")
    best = min(spec.sizes, key=lambda s: abs(math.log(s[0] / s[1] / ratio)))
    if abs(math.log(best[0] / best[1] / ratio)) < math.log(1.05):
        return best
    area, multiple = spec.sizes[0][0] * spec.sizes[0][1], spec.size_multiple
    if spec.sound:
        height, width = ovi_size(1000, round(1000 * ratio), spec.sound.area)
        return width, height
    width, height = math.sqrt(area * ratio), math.sqrt(area / ratio)
    return round(width / multiple) * multiple, round(height / multiple) * multiple


def i2v_size(height: int, width: int, max_area: int, stride: int, patch: int) -> tuple[int, int]:
    """(height, width) of the video for a picture: its aspect, the given area, whole patches. Source: image2video.py."""
    aspect = height / width
    rows = int(math.sqrt(max_area * aspect) // stride // patch * patch)
    columns = int(math.sqrt(max_area / aspect) // stride // patch * patch)
    return rows * stride, columns * stride


def ti2v_size(width: int, height: int, area: int, multiple: int) -> tuple[int, int]:
    """(width, height) of the video for a picture; the nearer of two roundings. Source: ``best_output_size``.

    Where the official code divides by zero, for pictures too narrow for the area, the size is 0.
    """
    ratio = width / height
    exact_w = math.sqrt(area * ratio)
    exact_h = area / exact_w
    w1 = int(exact_w // multiple * multiple)
    h2 = int(exact_h // multiple * multiple)
    if not w1 or not h2:
        return w1, h2
    h1 = int(area / w1 // multiple * multiple)
    w2 = int(area / h2 // multiple * multiple)

    def distance(w: int, h: int) -> float:
        return max(ratio / (w / h), (w / h) / ratio)

    return (w1, h1) if distance(w1, h1) < distance(w2, h2) else (w2, h2)


def ovi_size(height: int, width: int, area: int) -> tuple[int, int]:
    """(height, width) scaled to an area, in whole pixels and then to the nearest multiple of 32.

    Source: ``snap_hw_to_multiple_of_32`` of Ovi.
    """
    scale = math.sqrt(area / (height * width))
    return tuple(32 * max(1, round(round(side * scale) / 32)) for side in (height, width))


def ovi_first_frame_size(height: int, width: int, area: int) -> tuple[int, int]:
    """(height, width) of the video for a first picture: of eight candidates in multiples of 32 the one nearest to the
    area, then to the picture's aspect. Source: ``preprocess_image_tensor`` of Ovi.
    """
    aspect, scale = width / height, math.sqrt(area / (height * width))
    middle = max(1, round(math.sqrt(max(1, area // 32**2) / aspect)))
    rows = [max(1, middle + step) for step in range(-3, 4)]
    sides = [(32 * row, 32 * max(1, round(row * aspect))) for row in rows]
    sides.append(tuple(32 * max(1, round(side * scale / 32)) for side in (height, width)))
    return min(sides, key=lambda size: (abs(size[0] * size[1] - area), abs(size[1] / size[0] - aspect)))


def from_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `resolve` out of settings embedded in a file. Nothing that names a path is taken from there."""
    known = (
        "prompt", "negative_prompt", "size", "num_frames", "fps", "num_steps", "shift", "sigma_max", "guidance_scale",
        "guidance_interval", "solver", "guidance", "step_cache", "chunk_tokens", "tiled", "seed", "audio", "video",
        "audio_negative_prompt", "audio_guidance_scale", "image_guidance", "voice_guidance", "sync_guidance",
        "clean_voice",
    )  # fmt: skip
    kwargs = {name: settings[name] for name in known if name in settings}
    if kwargs.get("guidance") == "none":  # follows from the scale
        kwargs.pop("guidance")
    return kwargs
