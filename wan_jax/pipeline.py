"""The only pipeline: encode the conditions, sample, decode. Every task is a `Condition`; every model runs here."""

from __future__ import annotations

import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wan_jax
from wan_jax.conditions import (
    Condition,
    compiled,
    crop_to_aspect,
    encode_image,
    encode_text,
    first_frame_latents,
    fit_picture,
    pin_first_frame,
    read,
    video_condition,
)
from wan_jax.config import ModelSpec
from wan_jax.distributed import fetch
from wan_jax.errors import InputError, OutOfMemoryError
from wan_jax.media import Clip, read_image
from wan_jax.model import Model
from wan_jax.models.dit import DiT
from wan_jax.models.fusion import STREAMS, Fusion
from wan_jax.models.vae import to_uint8
from wan_jax.nn.reuse import Reuse
from wan_jax.parallel import compiler_options, use_mesh
from wan_jax.provenance import RECORD, mark
from wan_jax.references import CONSENT, Reference, letterbox, resolve_references
from wan_jax.request import Request, SoundRequest, array_hash, resolve
from wan_jax.resume import Resume
from wan_jax.sampling.guidance import classifier_free, expert_steps, guided, phases
from wan_jax.sampling.sampler import Progress, Velocity, make_steps, sample, start
from wan_jax.sampling.solvers import State
from wan_jax.sampling.step_cache import prepare
from wan_jax.small import warn_of_other_worlds
from wan_jax.sound import (
    SoundCondition,
    decode_audio,
    encode_identities,
    encode_pictures,
    encode_speakers,
    encode_voices,
    fusion_velocity,
    guidance_passes,
    reference_times,
)
from wan_jax.weights.layouts import spec_parts

Array = jax.Array
DECODING = ("fps", "tiled")  # settings that a run may change between sampling and decoding, when memory was short
PROMPTS_KEPT = 16  # features of earlier prompts, 4 MB each: a batch has thousands


@functools.cache
def dit_velocity(guidance: str, chunk_tokens: int = 0) -> Velocity:
    """The velocity function of a DiT and a `Condition` under one mode of guidance; ``chunk_tokens``: see `DiT`."""

    def velocity(
        args: tuple[Any, Condition], latents: Array, timestep: Array, scale: Array, reuse: Reuse | None = None
    ) -> Any:
        dit, condition = args

        def network(latents: Array, timesteps: Array, text: Array, added: Any) -> tuple[Array, Any]:
            def each(x: Array | None) -> Array | None:
                return None if x is None else jnp.broadcast_to(x, (latents.shape[0], *x.shape[1:]))

            if condition.token_time is not None:
                timesteps = jnp.stack([timesteps, jnp.zeros_like(timesteps)], axis=-1)
            out = dit(
                latents,
                timesteps,
                text,
                condition_BTHWC=each(condition.video_BTHWC),
                image_BIC=each(condition.image_BIC),
                token_time=condition.token_time,
                reuse=reuse and reuse._replace(added=added),
                chunk_tokens=chunk_tokens,
            )
            return out if reuse else (out, None)

        added = reuse and reuse.added
        out = guided(network, latents, timestep, classifier_free(scale), condition.text, guidance, added)
        return out if reuse else out[0]

    return velocity


def latent_shape(spec: ModelSpec, request: Request) -> Any:
    """[1, t, h, w, z] of the latents of one clip; with sound a dictionary of "video" and "audio" [1, a, z]."""
    vae, sound = spec.vae, request.sound
    frames = (request.num_frames - 1) // vae.temporal_stride + 1
    video = 1, frames, request.height // vae.spatial_stride, request.width // vae.spatial_stride, vae.z_dim
    if sound is None:
        return video
    audio = 1, sound.num_latents, spec.sound.vae.z_dim
    return {stream: shape for stream, shape in (("video", video), ("audio", audio)) if getattr(sound, stream)}


def noise(model: Model, request: Request, seed: int) -> Any:
    """Standard normal noise of a seed: the same on every mesh and platform."""
    key, shape = jax.random.key(seed), latent_shape(model.spec, request)
    if request.sound is None:
        return jax.random.normal(key, shape)
    keys = dict(zip(STREAMS, jax.random.split(key), strict=True))
    return {stream: jax.random.normal(keys[stream], shape[stream]) for stream in shape}


def encode(model: Model, request: Request) -> Condition | SoundCondition:
    """Run the encoders. With ``model.offload`` each is freed when done."""
    if request.sound is not None:
        return _encode_with_sound(model, request, request.sound)
    text = _text_features(model, [request.prompt] + [request.negative_prompt] * (request.guidance != "none"))
    if request.image is None:
        return Condition(text)
    height, width = request.height, request.width
    if request.task == "ti2v":
        shape = latent_shape(model.spec, request)
        first = first_frame_latents(model.vae, request.image, height, width)
        _free(model, "vae")
        pin, token_time = pin_first_frame(first, shape, model.spec.dit.patch_size)
        return Condition(text, token_time=token_time, pin=pin)
    pictures = [request.image]
    if request.last_image is not None:
        last = request.last_image
        # The official code mishandles pictures of different sizes; it meant a centre crop to the video's aspect.
        pictures.append(last if last.shape == request.image.shape else crop_to_aspect(last, height, width))
    image = None
    if model.spec.clip is not None:
        image = encode_image(model.image_encoder, pictures)
        _free(model, "image_encoder")
    frames = {0: fit_picture(pictures[0], height, width)}
    if len(pictures) == 2:
        frames[request.num_frames - 1] = fit_picture(pictures[1], height, width)
    video = video_condition(model.vae, frames, request.num_frames, height, width)
    _free(model, "vae")
    return Condition(text, video_BTHWC=video, image_BIC=image)


def _encode_with_sound(model: Model, request: Request, sound: SoundRequest) -> SoundCondition:
    spec, references = model.spec, sound.references
    negative = {"video": request.negative_prompt, "audio": sound.audio_negative_prompt}
    scale = {"video": request.guidance_scale, "audio": sound.audio_guidance_scale}
    shape = latent_shape(model.spec, request)
    guided = any(scale[stream] != 1 for stream in shape)
    texts = [sound.caption, *(negative[stream] for stream in shape if guided)]
    features = _text_features(model, texts)
    text = {s: features[jnp.asarray([0, i] if guided else [0])] for i, s in enumerate(shape, 1)}
    if model.files.layout == "compact":
        pictures = [letterbox(r.image, request.height, request.width) for r in references]
        warn_of_other_worlds(model.vae, model.tokenizer, request.prompt, pictures)
    passes, weights = guidance_passes(
        text, scale, image=sound.image_guidance, voice=sound.voice_guidance, sync=sound.sync_guidance,
        skip=spec.sound.skip_layer,
    )  # fmt: skip
    condition = SoundCondition(passes, weights)
    if request.image is not None and sound.video:
        picture = fit_picture(request.image, request.height, request.width)
        first = compiled("first picture", lambda vae, video: vae.encode(video))(model.vae, picture[None, None])
        pin, token_time = pin_first_frame(first, shape["video"], spec.dit.patch_size)
        condition = condition._replace(pin={"video": pin}, token_time=token_time)
    if references:
        pictures = [letterbox(r.image, request.height, request.width) for r in references]
        clean = {"video": encode_pictures(model.vae, pictures)}
        if voices := [r.voice_second for r in references if r.voice is not None]:
            clean["audio"] = encode_voices(model.audio_vae, voices, spec.sound.mel)
        condition = condition._replace(references=clean)
        if spec.dit.identity:
            tokens = encode_identities(model.image_encoder, [r.image for r in references])
            condition = condition._replace(identity_BRIC=tokens)
            _free(model, "image_encoder")
        if spec.dit.voice:
            condition = condition._replace(voice_BRTF=encode_speakers([r.voice for r in references], spec.dit.voice))
    _free(model, "vae", "audio_vae")
    return condition


def _text_features(model: Model, prompts: Sequence[str]) -> Array:
    missing = [p for p in dict.fromkeys(prompts) if p not in model.prompt_cache]
    if missing:
        ids, mask = model.tokenizer(missing, model.spec.dit.text_len)
        if ids.max() >= model.spec.text.vocab_size:
            raise InputError(f"the tokenizer gives id {ids.max()}, the text encoder knows {model.spec.text.vocab_size}")
        features = encode_text(model.text_encoder, ids, mask)
        model.prompt_cache.update((p, features[i : i + 1]) for i, p in enumerate(missing))
        _free(model, "text_encoder")
    features = {p: model.prompt_cache.pop(p) for p in dict.fromkeys(prompts)}
    kept = list(model.prompt_cache.items())[-PROMPTS_KEPT:]
    model.prompt_cache = dict(kept) | features  # the latest last
    return jnp.concatenate([features[p] for p in prompts])


def _free(model: Model, *parts: str) -> None:
    if model.offload:
        model.release(*parts)


def denoise(
    model: Model,
    request: Request,
    condition: Condition | SoundCondition,
    noises: Sequence[Any],
    *,
    segment: int | str = 1,
    callback: Callable[[int, Progress], None] | None = None,
    states: Mapping[int, tuple[int, State]] | None = None,
) -> list[Any]:
    """Sample every noise; of two experts each is loaded once for all of them.

    Args:
        callback: ``(index of the noise, progress)`` after each segment.
        states: index of a noise -> (steps done, solver state), to continue from. They are donated.
    Returns:
        Final latents per noise, of its shape.
    """
    spec, schedule, states = model.spec, request.schedule(), states or {}
    high = expert_steps(schedule.timesteps, spec.boundary)
    runs = [
        states[i] if i in states else (0, start(x, condition.pin, schedule.noise_scale)) for i, x in enumerate(noises)
    ]
    every = phases(schedule, spec.boundary, request.guidance, request.guidance_interval)
    levels = schedule.sigmas[:-1]
    skip, measure = prepare(spec.name, request.step_cache, levels, [phase.start for phase in every])

    def update(i: int, now: Progress) -> None:
        if measure:
            measure.update(levels[now.step - 1], now.state.added)
        if callback:
            callback(i, now)

    for part, high_noise in (("dit", True), ("dit_low", False)):
        ours = [phase for phase in every if phase.high_noise == high_noise]
        if all(done >= phase.stop for done, _ in runs for phase in ours):
            continue
        args = settle(model.network(part), condition, compiled("read", read))
        _free(model, part)  # what has read the prompt: the rest is in the arguments
        for i, phase in itertools.product(range(len(runs)), ours):
            (done, state), now = runs[i], replace(request, guidance=phase.mode)
            velocity, guidance = make_velocity(spec, now, condition, schedule.timesteps, high)
            if done <= phase.start:
                state = state._replace(added=None)  # was of other passes, or of the other expert
            state = sample(
                velocity, args, state, make_steps(request.solver, schedule, guidance, request.seeds[i], skip),
                first=done, last=max(phase.stop, done), pin=condition.pin, segment=segment,
                callback=functools.partial(update, i),
            )  # fmt: skip
            runs[i] = (max(phase.stop, done), state)
        del args
    if measure:
        measure.keep(spec.name, levels)
    return [state.sample for _, state in runs]


def settle(network: DiT | Fusion, condition: Condition | SoundCondition, run: Any = read) -> tuple[Any, Any]:
    """Network and condition as the steps take them: what depends on the prompt alone is computed once, by ``run``."""
    if isinstance(network, Fusion):
        return network, condition
    return network.without_reader(), condition._replace(text=run(network, condition), image_BIC=None)


def make_velocity(
    spec: ModelSpec, request: Request, condition: Condition | SoundCondition, timesteps: np.ndarray, high: int
) -> tuple[Velocity, Any]:
    """The velocity function, and what it takes as guidance in every step."""
    if request.sound is None:
        return dit_velocity(request.guidance, request.chunk_tokens), request.guidance_per_step(timesteps, high)
    times: dict[str, Any] = {}
    if spec.takes_references:
        shape = latent_shape(spec, request)
        times = reference_times(shape["video"][1], shape["audio"][1], request.sound.references, spec.sound)
    guidance = {stream: np.tile(w, (len(timesteps), 1)) for stream, w in condition.weights.items()}
    return fusion_velocity(request.guidance, times.get("video"), times.get("audio")), guidance


def decode(model: Model, request: Request, latents: Any, settings: dict[str, Any]) -> Clip:
    """The clip of final latents."""
    if request.sound is None:
        return Clip(decode_video(model, latents, tiled=request.tiled), fps=request.fps, settings=settings)
    video = audio = rate = None
    if "video" in latents:
        video = decode_video(model, latents["video"], tiled=request.tiled)
    if "audio" in latents:
        rate = model.spec.sound.mel.sample_rate
        samples = round(request.num_frames / request.fps * rate)
        audio = decode_audio(model.audio_vae, model.vocoder, latents["audio"], samples, model.spec.sound.mel)
    return Clip(video, fps=request.fps, audio=audio, sample_rate=rate, settings=settings)


def decode_video(model: Model, latents: Array, *, tiled: bool = False) -> np.ndarray:
    """Video uint8 [T, H, W, 3] of latents [1, t, h, w, z]; frames become uint8 on the device, one chunk at a time."""
    return fetch(_decoder(tiled)(model.vae, latents))[0]


@functools.cache
def _decoder(tiled: bool) -> Callable[[Any, Array], Array]:
    def run(vae: Any, latents: Array) -> Array:
        return (vae.decode_tiled if tiled else vae.decode_stream)(latents, finish=to_uint8)

    return jax.jit(run, compiler_options=compiler_options())


class Stages:
    """Prints what runs and how long it took, to stderr; keeps the seconds for ``--profile``."""

    def __init__(self, show: bool):
        self.show = show
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        if self.show:
            print(f"{name} ...", file=sys.stderr, flush=True)
        yield
        self.seconds[name] = time.perf_counter() - begin
        if self.show:
            print(f"{name}: {self.seconds[name]:.1f} s", file=sys.stderr, flush=True)


def run(
    model: Model,
    request: Request,
    *,
    noises: Sequence[Any] | None = None,
    segment: int | str = 1,
    callback: Callable[[Progress], None] | None = None,
    progress: bool = True,
    resume_file: str | Path | None = None,
    stages: Stages | None = None,
    finish: Callable[[list[Clip]], None] | None = None,
    watermark: bool = True,
    watermark_key: str | None = None,
    badge: bool = False,
) -> list[Clip]:
    """One `Request` to one clip per seed. See `generate`.

    Args:
        noises: per clip, in place of the seeds' first noise; shapes as in `latent_shape`.
        finish: takes the clips while the saved state still exists, so that a failure to write them loses nothing.
    """
    model.files.require(*spec_parts(model.spec), "tokenizer")
    if jax.process_count() > 1:
        resume_file = None  # each process holds a part of the state, and they stop at different steps
    stages = stages or Stages(progress)
    given = noises or [None] * len(request.seeds)
    described = [settings(model, request, seed, x) for seed, x in zip(request.seeds, given, strict=True)]
    folder = str(model.files.folder.resolve())  # equal settings for other weights are another run
    sampled = [{name: x for name, x in about.items() if name not in DECODING} for about in described]
    with (
        Resume(resume_file, [about | {"folder": folder} for about in sampled]) as resume,
        use_mesh(model.mesh),
        _clear_memory_errors(),
    ):
        noises = noises or [noise(model, request, seed) for seed in request.seeds]
        with stages("encoding the conditions"):
            condition = jax.block_until_ready(encode(model, request))
        with stages("sampling"), _bar(request, resume, progress) as show:

            def update(i: int, now: Progress) -> None:
                resume.update(i, now.step, now.state)
                show()
                if callback:
                    callback(now)

            latents = denoise(model, request, condition, noises, segment=segment, callback=update, states=resume.states)
        del condition
        with stages("decoding"):
            clips = [decode(model, request, z, about) for about, z in zip(described, latents, strict=True)]
        _free(model, "vae", "audio_vae", "vocoder")
        with stages("marking"):
            clips = [_marked(clip, request.model, watermark, watermark_key, badge) for clip in clips]
        if finish:
            with stages("writing"):
                finish(clips)
    return clips


def _marked(clip: Clip, model: str, watermark: bool, key: str | None, badge: bool) -> Clip:
    """The clip with its watermarks, or with the record that the user asked for none."""
    if watermark:
        return mark(clip, model=model, key=key, badge=badge)
    return replace(clip, settings=clip.settings | {RECORD: {"watermark": False}})


def settings(model: Model, request: Request, seed: int, noise: Any = None) -> dict[str, Any]:
    """Everything that made a clip, JSON-ready: the request, the weights' dtype, adapters and versions."""
    hashes = [array_hash(np.asarray(x)) for x in jax.tree.leaves(noise)]
    given = {"noise_sha256": " ".join(hashes)} if hashes else {}
    if model.quantize:
        given["quantize"] = model.quantize
    of_model = {
        "dtype": jnp.dtype(model.dtype).name,
        "loras": [{"name": lora.name, "strength": lora.strength} for lora in model.loras],
        "versions": {"wan_jax": wan_jax.__version__, "jax": jax.__version__},
    }
    return request.settings(seed) | given | of_model


@contextmanager
def _bar(request: Request, resume: Resume, show: bool) -> Iterator[Callable[[], None]]:
    """One progress bar over the steps of all clips; yields what redraws it."""
    if not show:
        yield lambda: None
        return
    from tqdm.auto import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    def done() -> int:
        return sum(steps for steps, _ in resume.states.values())

    total = request.num_steps * len(request.seeds)
    with tqdm(total=total, initial=done(), unit="step", smoothing=0.7) as bar, logging_redirect_tqdm():
        yield lambda: bar.update(done() - bar.n)


@contextmanager
def _clear_memory_errors() -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise OutOfMemoryError(
            "out of memory. Use a smaller size or fewer frames, guidance='sequential' (--guidance sequential),"
            " chunk_tokens=4096 (--chunk-tokens 4096), tiled=True (--tiled), offload=True (--offload), or more devices"
            f" (--mesh fsdp=N). {reason}"
        ) from error


def generate(
    model: Model,
    prompt: str,
    *,
    image: Any = None,
    last_image: Any = None,
    references: Sequence[Reference] = (),
    i_have_consent: bool = False,
    seed: int | Sequence[int] = 0,
    noise: Any = None,
    segment: int | str = 1,
    callback: Callable[[Progress], None] | None = None,
    progress: bool = True,
    resume_file: str | Path | None = None,
    watermark: bool = True,
    watermark_key: str | None = None,
    badge: bool = False,
    **options: Any,
) -> Clip | list[Clip]:
    """Make a clip.

    Args:
        model: from `wan_jax.load`.
        prompt: what the clip shows.
        image, last_image: path, PIL image or uint8 [H, W, 3] array, for the models that take pictures.
        references: who or what appears in the clip, and with which voice, for the models that take references.
        i_have_consent: the statement that every person shown or heard in the references agreed. Needed with
            references; recorded in the clip.
        seed: one, or several for several clips.
        noise: [1, t, h, w, z] float32 instead of one seed's noise, to reproduce a run of another program; for models
            with sound {"video": that, "audio": [1, a, z]}.
        segment: sampling steps per compiled program; "all" for one program (no progress in between).
        callback: called after each segment with `Progress`.
        progress: show stages and steps on stderr.
        resume_file: save the sampler's state there when interrupted, and continue from it when it fits.
        watermark: mark picture and sound as generated, see `wan_jax.provenance`. False is recorded in the settings.
        watermark_key: a secret; by default the public key, with which anyone can verify.
        badge: also write "AI" into a corner of the picture.
        options: ``negative_prompt, size, aspect, num_frames, fps, num_steps, shift, sigma_max, guidance_scale,
            guidance_interval, solver, guidance, step_cache, chunk_tokens, tiled`` of `wan_jax.request.resolve`, and
            those of `wan_jax.request.resolve_sound` for models with sound; defaults are the model's official ones.
    Returns:
        A `Clip`, or a list of them for several seeds.
    Raises:
        InputError, CheckpointError, NonFiniteError, OutOfMemoryError: all `WanError`.
    """
    pictures: dict[str, Any] = {"image": image, "last_image": last_image}
    pictures = {name: None if value is None else read_image(value) for name, value in pictures.items()}
    if references:
        options["references"] = resolve_references(references, clean=options.get("clean_voice", False))
        options["consent"] = CONSENT if i_have_consent else ""
    request = resolve(model.spec, prompt, seed=seed, **pictures, **options)
    noises = None
    if noise is not None:
        noise, shape = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), noise), latent_shape(model.spec, request)
        got = jax.tree.map(jnp.shape, noise)
        if got != shape or len(request.seeds) > 1:
            raise InputError(f"noise: expected shape {shape} and one seed, got {got} and {len(request.seeds)}")
        noises = [noise]
    clips = run(
        model, request, noises=noises, segment=segment, callback=callback, progress=progress, resume_file=resume_file,
        watermark=watermark, watermark_key=watermark_key, badge=badge,
    )  # fmt: skip
    return clips if isinstance(seed, Sequence) else clips[0]
