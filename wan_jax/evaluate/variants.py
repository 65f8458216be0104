"""Ways to make a clip of held-out puppets: all that a user can ask for, and with one of the model's paths cut.

Axes: ``P`` people, ``T`` frames.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax import pipeline
from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.conditions import compiled
from wan_jax.config import ModelSpec
from wan_jax.media import Clip, to_unit
from wan_jax.model import Model
from wan_jax.parallel import use_mesh
from wan_jax.references import ResolvedReference, voice_crop
from wan_jax.request import Request, resolve
from wan_jax.sound import SoundCondition, decode_audio, encode_voices
from wan_jax.train.puppets import world

CONSENT = "nobody is shown or heard: puppets of wan_jax.train.puppets"
Change = Callable[[Model, SoundCondition], tuple[Model, SoundCondition]]


# ---- ways to make a clip -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Variant:
    """One way to make the clips. ``change`` switches something off that is no option of `generate`."""

    about: str
    people: int = 1
    references: bool = True
    change: Change | None = None


def _without(stream: str) -> Change:
    """References of a stream are zero in every form, as guidance and training leave them out."""

    def change(model: Model, condition: SoundCondition) -> tuple[Model, SoundCondition]:
        keep = condition.passes.keep
        passes = condition.passes._replace(keep=keep | {stream: jnp.zeros_like(keep[stream])})
        return model, condition._replace(passes=passes)

    return change


def _zero(*names: str) -> Change:
    """Parts of the condition are zero."""

    def change(model: Model, condition: SoundCondition) -> tuple[Model, SoundCondition]:
        zero = {name: jax.tree.map(jnp.zeros_like, getattr(condition, name)) for name in names}
        return model, condition._replace(**zero)

    return change


def _uncoupled(model: Model, condition: SoundCondition) -> tuple[Model, SoundCondition]:
    """Nothing passes from stream to stream: the values of that attention, and its own output if it has one, are zero.

    Works for both forms of attention between streams, whether or not training ever left it out.
    """
    silent = copy.copy(model)
    silent.network = lambda part: without_coupling(model.network(part))
    return silent, condition


def without_coupling(fusion: Any) -> Any:
    """A `Fusion` whose streams do not hear each other."""
    flat = flatten_params(fusion)
    cut = {path: jnp.zeros_like(x) for path, x in flat.items() if {"v_fusion", "o_fusion"} & set(path.split("."))}
    return unflatten_like(fusion, flat | cut)


VARIANTS = {
    "full": Variant("text, picture and voice"),
    "no-picture": Variant("the reference picture dropped", change=_without("video")),
    "no-voice": Variant("the reference voice dropped", change=_without("audio")),
    "adapters": Variant("picture and voice by the adapters alone", change=_zero("references")),
    "tokens": Variant("picture and voice by the reference tokens alone", change=_zero("identity_BRIC", "voice_BRTF")),
    "uncoupled": Variant("attention between picture and sound cut", change=_uncoupled),
    "text": Variant("no reference: the text says what people look like", references=False),
    "two": Variant("two people who take turns", people=2),
}


# ---- what is asked for -------------------------------------------------------------------------------------


def held_out(seed: int, index: int, people: int) -> tuple[world.Plan, world.Clip]:
    """Plan and rendered clip number ``index`` of a seed, NumPy leaves; the same however many are drawn."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), people), index)
    return jax.tree.map(np.asarray, _render(people)(key))


@functools.cache
def _render(people: int) -> Callable[[jax.Array], tuple[world.Plan, world.Clip]]:
    def run(key: jax.Array) -> tuple[world.Plan, world.Clip]:
        plan = world.draw(key, "test", people)
        return plan, world.render(plan)

    return jax.jit(run)


def request(
    spec: ModelSpec, variant: Variant, plan: world.Plan, truth: world.Clip, seed: int, options: Mapping[str, Any]
) -> Request:
    """What a user would ask for to get this clip."""
    references = [ResolvedReference(p, v, voice_crop(v)) for p, v in zip(truth.pictures, truth.voices, strict=True)]
    given = dict(references=references, consent=CONSENT) if variant.references else {}
    prompt = world.prompt(plan, described=not variant.references)
    return resolve(spec, prompt, size=(world.SIZE, world.SIZE), num_frames=world.FRAMES, seed=seed, **given, **options)


def make_clip(model: Model, request: Request, change: Change | None = None) -> Clip:
    """As `wan_jax.generate` makes it; with a change of the model or the condition, by the same stages.

    Without watermarks: their noise is not the model's.
    """
    if change is None:
        return pipeline.run(model, request, progress=False, watermark=False)[0]
    (seed,) = request.seeds
    with use_mesh(model.mesh):
        changed, condition = change(model, pipeline.encode(model, request))
        (latents,) = pipeline.denoise(changed, request, condition, [pipeline.noise(model, request, seed)])
        return pipeline.decode(model, request, latents, pipeline.settings(model, request, seed))


def round_trip(model: Model, video: np.ndarray, audio: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Picture and sound through the model's codecs and back.

    Args:
        video: uint8 [T, H, W, 3]. audio: float32 [n] at the model's rate.
    """
    encode = compiled("round trip", lambda vae, video: vae.encode_stream(video))
    with use_mesh(model.mesh):
        seen = pipeline.decode_video(model, encode(model.vae, jnp.asarray(to_unit(video))[None]))
        latents = encode_voices(model.audio_vae, [audio], model.spec.sound.mel)
        return seen, decode_audio(model.audio_vae, model.vocoder, latents, len(audio), model.spec.sound.mel)
