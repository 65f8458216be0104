"""The only pipeline: encode the conditions, sample, decode. Every task is a `Condition`; every model runs through here."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import wan_jax
from wan_jax.conditions import (
    Condition, crop_to_aspect, encode_image, encode_text, first_frame_latents, fit_picture, pin_first_frame, video_condition,
)  # fmt: skip
from wan_jax.errors import InputError, OutOfMemoryError
from wan_jax.media import Clip, read_image
from wan_jax.model import Model
from wan_jax.models.vae import to_uint8
from wan_jax.nn.stack import compiler_options
from wan_jax.parallel import use_mesh
from wan_jax.request import Request, resolve
from wan_jax.sampling.guidance import expert_steps, guided
from wan_jax.sampling.resume import load_states, save_states
from wan_jax.sampling.sampler import Progress, Velocity, make_steps, sample, start
from wan_jax.sampling.schedule import make_schedule
from wan_jax.sampling.solvers import State

log = logging.getLogger(__name__)
Array = jax.Array


@functools.cache
def dit_velocity(guidance: str) -> Velocity:
    """The velocity function of a DiT and a `Condition` under one mode of guidance."""

    def velocity(args: tuple[Any, Condition], latents: Array, timestep: Array, scale: Array) -> Array:
        dit, condition = args

        def network(latents: Array, timesteps: Array, text: Array) -> Array:
            def each(x: Array | None) -> Array | None:
                return None if x is None else jnp.broadcast_to(x, (latents.shape[0], *x.shape[1:]))

            if condition.token_time is not None:
                timesteps = jnp.stack([timesteps, jnp.zeros_like(timesteps)], axis=-1)
            return dit(
                latents,
                timesteps,
                text,
                condition_BTHWC=each(condition.video_BTHWC),
                image_BIC=each(condition.image_BIC),
                token_time=condition.token_time,
            )

        return guided(network, latents, timestep, scale, condition.text_GSC, guidance)

    return velocity


def latent_shape(model: Model, request: Request) -> tuple[int, int, int, int, int]:
    """[1, t, h, w, z] of the latents of one clip."""
    vae = model.spec.vae
    frames = (request.num_frames - 1) // vae.temporal_stride + 1
    return 1, frames, request.height // vae.spatial_stride, request.width // vae.spatial_stride, vae.z_dim


def noise(model: Model, request: Request, seed: int) -> Array:
    """Standard normal noise of a seed: the same on every mesh and platform."""
    return jax.random.normal(jax.random.key(seed), latent_shape(model, request))


def encode(model: Model, request: Request) -> Condition:
    """Run the encoders. With ``model.offload`` each is freed when done."""
    text = _text_features(model, [request.prompt] + [request.negative_prompt] * (request.guidance != "none"))
    if request.image is None:
        return Condition(text)
    height, width = request.height, request.width
    if request.task == "ti2v":
        shape = latent_shape(model, request)
        first = first_frame_latents(model.vae, request.image, height, width)
        _free(model, "vae")
        pin, token_time = pin_first_frame(first, shape, model.spec.dit.patch_size)
        return Condition(text, token_time=token_time, pin=pin)
    pictures = [request.image]
    if request.last_image is not None:
        last = request.last_image
        # The official code mishandles pictures of different sizes; a centre crop to the video's aspect is what it meant.
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


def _text_features(model: Model, prompts: Sequence[str]) -> Array:
    missing = [p for p in dict.fromkeys(prompts) if p not in model.prompt_cache]
    if missing:
        ids, mask = model.tokenizer(missing, model.spec.dit.text_len)
        if ids.max() >= model.spec.text.vocab_size:
            raise InputError(f"the tokenizer gives id {ids.max()}, the text encoder knows {model.spec.text.vocab_size}")
        features = encode_text(model.text_encoder, ids, mask)
        model.prompt_cache.update((p, features[i : i + 1]) for i, p in enumerate(missing))
        _free(model, "text_encoder")
    return jnp.concatenate([model.prompt_cache[p] for p in prompts])


def _free(model: Model, part: str) -> None:
    if model.offload:
        model.release(part)


def denoise(
    model: Model,
    request: Request,
    condition: Condition,
    noises: Sequence[Array],
    *,
    segment: int | str = 1,
    callback: Callable[[int, Progress], None] | None = None,
    resume: Sequence[tuple[int, State]] | None = None,
) -> list[Array]:
    """Sample every noise; of two experts each is loaded once for all of them.

    Args:
        callback: ``(index of the noise, progress)`` after each segment.
        resume: (steps done, solver state) per noise.
    Returns:
        Final latents [1, t, h, w, z] per noise.
    """
    schedule = make_schedule(request.solver, request.num_steps, request.shift)
    high = expert_steps(schedule.timesteps, model.spec.boundary)
    steps = make_steps(request.solver, schedule, request.guidance_per_step(schedule.timesteps, high))
    velocity = dit_velocity(request.guidance)
    runs = list(resume) if resume else [(0, start(x, condition.pin)) for x in noises]
    for part, stop in (("dit", high), ("dit_low", request.num_steps)):
        if all(done >= stop for done, _ in runs):
            continue
        args = (model.network(part), condition)
        for i, (done, state) in enumerate(runs):
            state = sample(
                velocity, args, state, steps, first=done, last=max(stop, done), pin=condition.pin, segment=segment,
                callback=functools.partial(callback, i) if callback else None,
            )  # fmt: skip
            runs[i] = (max(stop, done), state)
        del args
        _free(model, part)
    return [state.sample for _, state in runs]


def decode(model: Model, latents: Array) -> np.ndarray:
    """Video uint8 [T, H, W, 3] of latents [1, t, h, w, z]; frames become uint8 on the device, one chunk at a time."""
    video = _decoder()(model.vae, latents)[0]
    return np.asarray(video)


@functools.cache
def _decoder() -> Callable[[Any, Array], Array]:
    return jax.jit(lambda vae, z: vae.decode_stream(z, finish=to_uint8), compiler_options=compiler_options())


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
    noises: Sequence[Array] | None = None,
    segment: int | str = 1,
    callback: Callable[[Progress], None] | None = None,
    progress: bool = True,
    resume_file: str | Path | None = None,
    stages: Stages | None = None,
) -> list[Clip]:
    """One `Request` to one clip per seed. See `generate`."""
    stages = stages or Stages(progress)
    noises = [noise(model, request, seed) for seed in request.seeds] if noises is None else list(noises)
    for x in noises:
        if x.shape != latent_shape(model, request):
            raise InputError(f"noise: expected shape {latent_shape(model, request)}, got {tuple(x.shape)}")
    with use_mesh(model.mesh), _clear_memory_errors():
        with stages("encoding the conditions"):
            condition = jax.block_until_ready(encode(model, request))
        with stages("sampling"), _Bars(model, request, progress, callback, resume_file) as bars:
            latents = denoise(model, request, condition, noises, segment=segment, callback=bars.update, resume=bars.resume)
        del condition
        clips = []
        with stages("decoding"):
            for seed, z in zip(request.seeds, latents, strict=True):
                clips.append(Clip(decode(model, z), fps=request.fps, settings=settings(model, request, seed)))
        _free(model, "vae")
    if resume_file:
        Path(resume_file).unlink(missing_ok=True)
    return clips


def settings(model: Model, request: Request, seed: int) -> dict[str, Any]:
    """Everything that made a clip, JSON-ready: the request, the weights' dtype, adapters and versions."""
    return request.settings(seed) | {
        "dtype": jnp.dtype(model.dtype).name,
        "loras": [{"name": lora.name, "strength": lora.strength} for lora in model.loras],
        "versions": {"wan_jax": wan_jax.__version__, "jax": jax.__version__},
    }


class _Bars:
    """A progress bar per clip, the user's callback, and the saved state behind Ctrl-C."""

    def __init__(self, model: Model, request: Request, show: bool, callback: Any, resume_file: str | Path | None):
        self.path = Path(resume_file) if resume_file else None
        every = [settings(model, request, seed) for seed in request.seeds]
        self.key = hashlib.sha256(json.dumps(every, sort_keys=True).encode()).hexdigest()
        self.resume = load_states(self.path, self.key) if self.path and self.path.exists() else None
        self.callback, self.show, self.request = callback, show, request
        self.bars: dict[int, Any] = {}
        self.runs = dict(enumerate(self.resume or []))

    def update(self, i: int, progress: Progress) -> None:
        self.runs[i] = progress.step, progress.state
        if self.show:
            self._bar(i, progress)
        if self.callback:
            self.callback(progress)

    def _bar(self, i: int, progress: Progress) -> None:
        from tqdm.auto import tqdm

        if i not in self.bars:
            title = f"seed {self.request.seeds[i]}"
            self.bars[i] = tqdm(total=progress.num_steps, desc=title, unit="step", initial=0, smoothing=0.7)
        bar = self.bars[i]
        bar.update(progress.step - bar.n)
        if progress.step == progress.num_steps:
            bar.close()

    def __enter__(self) -> _Bars:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        for bar in self.bars.values():
            bar.close()
        if isinstance(error, KeyboardInterrupt) and self.path and len(self.runs) == len(self.request.seeds):
            save_states(self.path, self.key, [self.runs[i] for i in sorted(self.runs)])
            print(f"interrupted; state saved in {self.path}: repeat the command to continue", file=sys.stderr)


@contextmanager
def _clear_memory_errors() -> Iterator[None]:
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise OutOfMemoryError(
            "out of memory. Use a smaller size or fewer frames, guidance='sequential' (--guidance sequential),"
            f" offload=True (--offload), or more devices (--mesh fsdp=N). {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def generate(
    model: Model,
    prompt: str,
    *,
    image: Any = None,
    last_image: Any = None,
    seed: int | Sequence[int] = 0,
    noise: Array | None = None,
    segment: int | str = 1,
    callback: Callable[[Progress], None] | None = None,
    progress: bool = True,
    resume_file: str | Path | None = None,
    **options: Any,
) -> Clip | list[Clip]:
    """Make a clip.

    Args:
        model: from `wan_jax.load`.
        prompt: what the clip shows.
        image, last_image: path, PIL image or uint8 [H, W, 3] array, for the models that take pictures.
        seed: one, or several for several clips.
        noise: [1, t, h, w, z] float32 instead of a seed's noise, to reproduce a run of another program.
        segment: sampling steps per compiled program; "all" for one program (no progress in between).
        callback: called after each segment with `Progress`.
        progress: show stages and steps on stderr.
        resume_file: save the sampler's state there when interrupted, and continue from it when it fits.
        options: ``negative_prompt, size, aspect, num_frames, fps, num_steps, shift, guidance_scale, solver, guidance``
            of `wan_jax.request.resolve`; defaults are the model's official ones.
    Returns:
        A `Clip`, or a list of them for several seeds.
    Raises:
        InputError, CheckpointError, NonFiniteError, OutOfMemoryError: all `WanError`.
    """
    pictures = {"image": image, "last_image": last_image}
    pictures = {name: None if value is None else read_image(value) for name, value in pictures.items()}
    request = resolve(model.spec, prompt, seed=seed, **pictures, **options)
    clips = run(
        model, request, noises=None if noise is None else [noise], segment=segment, callback=callback, progress=progress,
        resume_file=resume_file,
    )  # fmt: skip
    return clips if isinstance(seed, Sequence) else clips[0]
