"""`wan2.6-nano` from nothing: video VAE, audio VAE, image encoder, speech, and the twin-stream model.

Each stage has a folder of its own and ends in ``weights.safetensors``, its averaged parameters; a stage that has them
is done. Two stages prepare the last, as for the large models: the image encoder learns to tell what people look like,
where those begin with CLIP's; and the sound's stream learns to speak alone, as Ovi's did, for a third of the price of a
step with the picture. Everything is drawn, rendered and encoded on the device.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params, unflatten_like
from wan_jax.config import NANO_VOCODER, ModelSpec
from wan_jax.conversion import write_compact
from wan_jax.errors import InputError, WanError, nearest
from wan_jax.model import Model, build, load
from wan_jax.models.audio_vae import AudioVAE
from wan_jax.models.clip import CLIPVision
from wan_jax.models.fusion import Fusion
from wan_jax.models.umt5 import UMT5
from wan_jax.models.vae import VAE
from wan_jax.models.vocoder import BigVGAN
from wan_jax.nn.layers import Linear
from wan_jax.nn.mel import mel_spectrogram
from wan_jax.text import Tokenizer
from wan_jax.train import codec
from wan_jax.train.flow import Dropout, Levels, losses_by_level
from wan_jax.train.loop import Watch, fit
from wan_jax.train.puppet_feed import (
    ClipPool,
    Nothing,
    PuppetPool,
    audio_examples,
    clips,
    face_examples,
    face_loss,
    render_videos,
    to_unit,
    twin_examples,
    twin_loss,
    twin_times,
    video_examples,
)
from wan_jax.train.step import Flat, Recipe, Task, assemble
from wan_jax.train.words import Words, write_tokenizer
from wan_jax.weights.readers import open_checkpoint
from wan_jax.weights.writers import write_safetensors

log = logging.getLogger(__name__)
Array = jax.Array

NEEDS = {  # stages in the order of training, and those that each builds on; a recipe may leave out some, see `OPTIONAL`
    "vae": (),
    "audio_vae": (),
    "decoder": ("vae",),
    "vocoder": ("audio_vae",),
    "image_encoder": (),
    "speech": ("audio_vae",),
    "twin": ("vae", "audio_vae", "image_encoder", "speech"),
}
OPTIONAL = ("decoder", "vocoder", "image_encoder", "speech")
CODECS = ("vae", "audio_vae", "decoder", "vocoder")
_PARTS = ("dit", "vae", "text", "clip", "sound")  # of a specification
MEASURED = 64  # clips that statistics are taken from
LEVELS = (0.1, 0.5, 0.8, 0.97)  # noise levels at which the twin model is watched


class Stage(NamedTuple):
    """One training: see `wan_jax.train.loop.fit`. ``finish`` turns the averaged networks into those that are kept.

    Without a task nothing is trained: the networks are there already.
    """

    task: Task | None
    networks: dict[str, Any]
    feed: Any
    trains: Callable[[str], bool] = lambda path: True
    finish: Callable[[dict[str, Any]], dict[str, Any]] = lambda networks: networks
    sample: Callable[[int, Flat, Flat], dict[str, float]] | None = None


def train_nano(
    spec: ModelSpec,
    settings: Mapping[str, Any],
    folder: str | Path,
    *,
    only: str | None = None,
    resume: bool = False,
    minutes: float | None = None,
    mesh: jax.sharding.Mesh | None = None,
    preview: Callable[[Model, Path], None] | None = None,
    start: Model | None = None,
) -> bool:
    """Train the stages that are not done, and export all weights when the last one is.

    Args:
        settings: per stage a dictionary: fields of `Recipe`, and of the stage (see ``configs/train_nano.py``); "watch":
            fields of `Watch`; "dtype": that the twin model computes in.
        folder: takes a folder per stage, ``tokenizer/`` and ``export/``.
        only: one stage, of `NEEDS`: for several processes that train side by side.
        minutes: of this call.
        preview: writes a clip of the model as it is into ``samples/``, as often as the twin model is watched.
        start: a model of this kind to go on from: its codecs are kept, and all else begins with its weights.
    Returns:
        Whether everything is done.
    """
    if only and only not in NEEDS:
        raise InputError(f"stage {only!r}: use {', '.join(NEEDS)}{nearest(only, NEEDS)}")
    if start and (others := [part for part in _PARTS if getattr(start.spec, part) != getattr(spec, part)]):
        raise InputError(
            f"{start.spec.name} has another {', '.join(others)} than {spec.name}: begin with one of its kind"
        )
    if "vocoder" in settings:
        spec = dataclasses.replace(spec, sound=dataclasses.replace(spec.sound, vocoder=NANO_VOCODER))
    folder, begin = Path(folder), time.monotonic()
    write_tokenizer(folder / "tokenizer")
    done = {part: getattr(start, part) for part in (*_CODED, *_MADE)} if start else {}
    wanted = [name for name in NEEDS if (name in settings or name not in OPTIONAL) and not (start and name in CODECS)]
    for name in [*(name for name in wanted if name in NEEDS[only]), only] if only else wanted:
        weights = folder / name / "weights.safetensors"
        if weights.exists():
            done |= _read(weights, spec)
            continue
        if only and name != only:
            raise InputError(f"{only} builds on {name}, and {weights} is not there: train that stage first")
        if name not in settings:
            raise InputError(f"this recipe has no settings for the stage {name}: give it some, see configs/")
        own = dict(settings[name])
        recipe = Recipe(**{"steps": 1} | {field.name: own.pop(field.name) for field in _fields(Recipe, own)})
        stage = _STAGES[name](spec, own, done, folder, settings.get("dtype", "float32"), recipe)
        if own:
            known = [field.name for field in dataclasses.fields(Recipe)]
            raise InputError("; ".join(f"{name}.{key}: unknown setting{nearest(key, known)}" for key in own))
        left = None if minutes is None else minutes - (time.monotonic() - begin) / 60
        if left is not None and left <= 0:
            return False
        watch = dataclasses.replace(Watch(**settings.get("watch", {})), minutes=left)
        if preview and name == "twin":
            stage = stage._replace(sample=functools.partial(_sample_and_show, stage, spec, done, folder, preview))
        log.info("stage %s", name)
        networks, trained = stage.networks, set(stage.networks)
        if stage.task:
            state, frozen = fit(
                stage.task, recipe, networks, stage.feed, folder / name,
                trains=stage.trains, watch=watch, mesh=mesh, resume=resume, sample=stage.sample,
            )  # fmt: skip
            if int(state.step) < recipe.steps:
                return False
            networks = assemble(_in_float32(stage.task), state.ema, frozen)
            trained = {path.split(".")[0] for path in state.params}
        finished = stage.finish(networks)
        _write(weights, {part: x for part, x in finished.items() if part in trained})
        done |= _read(weights, spec)
    if only:
        return True
    write_compact(spec, done, folder / "tokenizer", folder / "export")
    return True


def _sample_and_show(
    stage: Stage,
    spec: ModelSpec,
    done: Mapping[str, Any],
    folder: Path,
    preview: Callable[[Model, Path], None],
    step: int,
    ema: Flat,
    frozen: Flat,
) -> dict[str, float]:
    """Show the whole model, with the networks of this stage as they are, and measure."""
    found = stage.sample(step, ema, frozen)
    write_compact(spec, {**done, **assemble(stage.task, ema, frozen)}, folder / "tokenizer", folder / "preview")
    try:
        preview(load(folder / "preview", dtype="float32", offload=False), folder / "samples" / f"{step:06d}.mp4")
    except WanError as error:
        log.warning("step %d: no sample: %s", step, error)
    return found


def _fields(kind: type, given: Mapping[str, Any]) -> list[dataclasses.Field]:
    return [field for field in dataclasses.fields(kind) if field.name in given]


def _in_float32(task: Task) -> Task:
    def wide(x: Any) -> Any:
        return jax.ShapeDtypeStruct(x.shape, jnp.float32)

    return task._replace(networks=jax.tree.map(wide, task.networks))


def _write(path: Path, networks: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {name: np.asarray(x) for name, x in flatten_params(networks).items()})


def _read(path: Path, spec: ModelSpec) -> dict[str, Any]:
    """The networks that a stage has trained."""
    with open_checkpoint(path) as source:
        flat = {name: jnp.asarray(x.numpy()) for name, x in source.items()}
    parts = {name.split(".")[0] for name in flat}
    return unflatten_like({part: build(part, spec, jnp.float32) for part in parts}, flat)


# ---- the stages --------------------------------------------------------------------------------------------


def _new(make: Callable[[], Any]) -> Any:
    return jax.jit(make)()


def _vae(spec: ModelSpec, own: dict, done: dict, folder: Path, dtype: str, recipe: Recipe) -> Stage:
    """In closed form."""

    def finish(networks: dict[str, Any]) -> dict[str, Any]:
        encode = jax.jit(lambda vae, key: vae.encode(to_unit(clips(key, 8)[1].video)))
        keys = jax.random.split(jax.random.key(recipe.seed + 1), MEASURED // 8)
        latents = jnp.concatenate([encode(networks["vae"], key) for key in keys])
        mean = latents.mean((0, 1, 2, 3))
        # One deviation for all channels: those that hold little stay small, and are not noise for the twin model.
        return {"vae": codec.fold_statistics(networks["vae"], mean, jnp.sqrt(jnp.square(latents - mean).mean()))}

    rows = ClipPool(jax.jit(render_videos), size=own.pop("clips"), refresh=1, seed=recipe.seed)(0, 1)[0]
    fit_code = jax.jit(lambda vae, rows: codec.linear_vae(vae, to_unit(rows["video"]), rows["weight"].astype(float)))
    vae = fit_code(_new(lambda: VAE(spec.vae, rngs=nnx.Rngs(recipe.seed))), rows)
    return Stage(None, {"vae": vae}, Nothing(), finish=finish)


def _decoder(spec: ModelSpec, own: dict, done: dict, folder: Path, dtype: str, recipe: Recipe) -> Stage:
    """The VAE's decoder, further, while its latents stay what they are."""
    networks = {"vae": done["vae"]}
    task = Task({"vae": abstract(lambda: networks["vae"])}, _from_videos(spec, recipe), codec.vae_loss)
    return Stage(
        task, networks, _videos(own, recipe), trains=lambda path: path.startswith(("vae.decoder.", "vae.conv2."))
    )


def _from_videos(spec: ModelSpec, recipe: Recipe) -> Callable[..., Any]:
    return functools.partial(video_examples, batch=recipe.batch, spec=spec)


def _videos(own: dict, recipe: Recipe) -> ClipPool:
    return ClipPool(jax.jit(render_videos), size=own.pop("pool"), refresh=own.pop("refresh"), seed=recipe.seed)


def _spectrograms(spec: ModelSpec, seed: int) -> Array:
    mel = spec.sound.mel
    return jax.jit(lambda key: mel_spectrogram(clips(key, MEASURED)[1].audio, mel))(jax.random.key(seed))


def _audio_vae(spec: ModelSpec, own: dict, done: dict, folder: Path, dtype: str, recipe: Recipe) -> Stage:
    mel, shape = spec.sound.mel, (spec.sound.num_latents, spec.sound.vae.z_dim)

    def make() -> AudioVAE:
        return AudioVAE(spec.sound.vae, rngs=nnx.Rngs(recipe.seed))

    def finish(networks: dict[str, Any]) -> dict[str, Any]:
        vae = codec.unit_filters(networks["audio_vae"])
        return {"audio_vae": codec.unit_latents(vae, _spectrograms(spec, recipe.seed + 1))}

    networks = {"audio_vae": codec.with_statistics(_new(make), _spectrograms(spec, recipe.seed + 1))}
    task = Task(
        {"audio_vae": abstract(make)},
        functools.partial(audio_examples, batch=recipe.batch, latents=shape),
        functools.partial(codec.audio_vae_loss, mel=mel),
    )
    return Stage(task, networks, Nothing(), trains=lambda path: ".data_" not in path, finish=finish)


def _image_encoder(spec: ModelSpec, own: dict, done: dict, folder: Path, dtype: str, recipe: Recipe) -> Stage:
    """Trained by reading from its tokens what the renderer has drawn."""
    seen = jax.eval_shape(functools.partial(face_examples, None, None, batch=1), jax.random.key(0))["seen"].shape[1]

    def reader() -> Linear:
        return Linear(spec.clip.dim, seen, rngs=nnx.Rngs(recipe.seed))

    networks = {"image_encoder": _begin("image_encoder", spec, done, recipe.seed), "reader": _new(reader)}
    task = Task(
        {name: abstract(lambda x=x: x) for name, x in networks.items()},
        functools.partial(face_examples, batch=recipe.batch),
        face_loss,
    )
    return Stage(task, networks, Nothing(), finish=lambda networks: {"image_encoder": networks["image_encoder"]})


def _speech(spec: ModelSpec, own: dict, done: dict, folder: Path, dtype: str, recipe: Recipe) -> Stage:
    """The sound's stream, its adapter and the text encoder, without the picture."""
    stage = _flow(("dit", "text_encoder"), ("audio_vae",), spec, own, done, folder, dtype, recipe)
    return stage._replace(trains=is_speech)


def is_speech(path: str) -> bool:
    """Whether a parameter takes part when the sound's stream runs alone."""
    return path.startswith(("text_encoder.", "dit.audio.", "dit.voice_adapter.")) and "_fusion" not in path


def _vocoder(spec: ModelSpec, own: dict, done: dict, folder: Path, dtype: str, recipe: Recipe) -> Stage:
    def make() -> BigVGAN:
        return BigVGAN(spec.sound.vocoder, rngs=nnx.Rngs(recipe.seed))

    networks = {"vocoder": codec.quiet(_new(make)), "audio_vae": done["audio_vae"]}
    task = Task(
        {name: abstract(lambda x=x: x) for name, x in networks.items()},
        functools.partial(audio_examples, batch=recipe.batch, latents=(1, 1), window=own.pop("window")),
        functools.partial(codec.vocoder_loss, mel=spec.sound.mel),
    )
    return Stage(task, networks, Nothing(), trains=lambda path: path.startswith("vocoder."))


def _twin(spec: ModelSpec, own: dict, done: dict, folder: Path, dtype: str, recipe: Recipe) -> Stage:
    return _flow(_MADE, _CODED, spec, own, done, folder, dtype, recipe)


def _flow(
    parts: tuple[str, ...],
    coded: tuple[str, ...],
    spec: ModelSpec,
    own: dict,
    done: dict,
    folder: Path,
    dtype: str,
    recipe: Recipe,
) -> Stage:
    """Flow matching of what the codecs make of clips."""
    words = Words(Tokenizer.from_folder(folder / "tokenizer"), spec.dit.text_len)
    coders = {name: done[name] for name in coded}
    frames = (spec.num_frames - 1) // spec.vae.temporal_stride + 1
    pool = functools.partial(PuppetPool, coders, spec, words)
    draw = functools.partial(
        twin_examples,
        batch=recipe.batch,
        words=words,
        levels=Levels(**own.pop("levels")),
        dropout=Dropout(**own.pop("dropout")),
        first_frame=own.pop("first_frame", 0.0),
    )
    networks = {name: build(name, spec, jnp.dtype(dtype)) for name in parts}
    task = Task(networks, draw, functools.partial(twin_loss, frames=frames, remat=recipe.remat))
    unseen = pool(size=own.pop("unseen"), refresh=recipe.steps + 1, seed=recipe.seed + 1, split="test")
    feed = pool(size=own.pop("pool"), refresh=own.pop("refresh"), kinds=tuple(own.pop("kinds")), seed=recipe.seed)

    def sample(step: int, ema: Flat, frozen: Flat) -> dict[str, float]:
        return unseen_losses(assemble(task, ema, frozen), unseen, words, frames)

    begun = {name: _begin(name, spec, done, recipe.seed + k) for k, name in enumerate(parts)}
    return Stage(task, begun, feed, sample=sample)


_CODED = ("vae", "audio_vae")
_MADE = ("dit", "text_encoder", "image_encoder")


def _begin(part: str, spec: ModelSpec, done: dict, seed: int) -> Any:
    """A network as an earlier stage has left it, in float32; or a new one."""
    if part in done:
        return jax.tree.map(lambda x: x.astype(jnp.float32), done[part])
    kind, cfg = {
        "dit": (Fusion, spec.dit), "text_encoder": (UMT5, spec.text), "image_encoder": (CLIPVision, spec.clip)
    }[part]  # fmt: skip
    return _new(lambda: kind(cfg, rngs=nnx.Rngs(seed)))


def unseen_losses(networks: dict[str, Any], pool: PuppetPool, words: Words, frames: int) -> dict[str, float]:
    """Loss of the streams on people that are held out, at some noise levels; and what the right conditions are worth.

    "reads" is how much worse the sound's loss is when the text is another clip's, "hears" how much worse the video's
    is when the sound is.
    """
    rows, _ = pool(0, 1)
    empty = dict(zip(("ids", "mask"), words.empty(), strict=True))
    batch = {name: x for name, x in rows.items() if not name.startswith(("ids", "mask"))}
    batch |= {name: rows[f"{name}_plain"].astype(jnp.int32) for name in empty}
    batch |= {f"null_{name}": x for name, x in empty.items()}
    times = tuple(twin_times(batch, frames).items())

    def losses(**others: Array) -> dict[str, Array]:
        return losses_by_level(networks, batch | others, jax.random.key(0), LEVELS, times)

    def next_clips(*names: str) -> dict[str, Array]:
        return {name: jnp.roll(batch[name], 1, axis=0) for name in names}

    right = losses()
    found = {f"unseen {s}": x for s, x in right.items()}
    found["reads"] = losses(**next_clips("ids", "mask"))["audio"] - right["audio"]
    if "video" in right:
        found["hears"] = losses(**next_clips("audio"))["video"] - right["video"]
    return {f"{name} {level}": float(x[i]) for name, x in found.items() for i, level in enumerate(LEVELS)}


_STAGES = {
    "vae": _vae, "audio_vae": _audio_vae, "decoder": _decoder, "vocoder": _vocoder, "image_encoder": _image_encoder,
    "speech": _speech, "twin": _twin,
}  # fmt: skip
