"""A published model on one's own clips: low-rank factors, its adapters, or all of its transformer."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from wan_jax.checkpoint import abstract
from wan_jax.errors import InputError, WanError, nearest
from wan_jax.media import Clip, contact_sheet
from wan_jax.model import Model
from wan_jax.models.identity import is_adapter
from wan_jax.parallel import use_mesh
from wan_jax.pipeline import generate
from wan_jax.train.data import ClipFolder, Format
from wan_jax.train.flow import Batch, Dropout, Levels, draw_examples, flow_loss
from wan_jax.train.loop import Watch, fit
from wan_jax.train.lora import add_factors, lora_task, new_factors, write_lora
from wan_jax.train.puppet_feed import twin_loss
from wan_jax.train.step import Flat, Recipe, Task, assemble
from wan_jax.weights import layouts

log = logging.getLogger(__name__)

TRAINS: dict[str, Callable[[str], bool]] = {
    "lora": lambda path: path.startswith("lora."),
    "adapters": lambda path: is_adapter(path.removeprefix("dit.")),
    "all": lambda path: True,
}


def finetune(
    model: Model,
    settings: Mapping[str, Any],
    data: str | Path,
    folder: str | Path,
    *,
    resume: bool = False,
    minutes: float | None = None,
    consent: bool = False,
) -> Any:
    """Train until the recipe's end, a signal, or the end of the time; continue with ``resume``.

    Args:
        model: loaded on the mesh, and in the dtype, that it is to compute in.
        settings: "trains" (a key of `TRAINS`); "recipe", "watch", "levels" and "dropout": fields of `Recipe`, `Watch`,
            `Levels` and `Dropout`; "rank", "targets" of the factors; "size" (width, height), "num_frames" of a clip;
            "first_frame": see `draw_examples`; "samples": clips to make of the model as it is, every ``watch.sample``
            steps, as options of `wan_jax.generate` each; they and contact sheets go to ``samples/``.
        data: see `wan_jax.train.data`. consent: see `ClipFolder`.
        folder: takes the states, the metrics, ``clips/`` and the factors as ``lora.safetensors``.
    Returns:
        The averaged transformer of a finished run, to be exported; None for factors, and where training was stopped.
    Raises:
        InputError: unknown settings, a model that has not what is to be trained, or see `ClipFolder` and `fit`.
    """
    model.need_full_weights("training")
    given, spec, folder = dict(settings), model.spec, Path(folder)
    trains, rank, targets = given.pop("trains", "lora"), given.pop("rank", 16), given.pop("targets", ())
    recipe, watch, levels, dropout = (
        _fill(kind, kind.__name__.lower(), given.pop(kind.__name__.lower(), {}))
        for kind in (Recipe, Watch, Levels, Dropout)
    )
    if "steps" not in settings.get("recipe", {}):
        raise InputError("recipe.steps is missing: say how many steps to train")
    to = Format.of(spec, given.pop("size", None), given.pop("num_frames", None))
    first_frame, samples = given.pop("first_frame", 0.0), given.pop("samples", ())
    if given:
        raise InputError(f"{', '.join(given)}: unknown settings of a fine-tuning")
    if trains not in TRAINS:
        raise InputError(f"trains={trains!r}: use {', '.join(TRAINS)}{nearest(str(trains), TRAINS)}")
    if trains == "adapters" and not (spec.sound and spec.dit.identity):
        raise InputError(f"{spec.name} has no adapters: use trains='lora' or 'all'")
    if spec.num_experts == 2:
        raise InputError(f"{spec.name} has two experts, each for its own noise levels: take a model with one")
    if first_frame and not spec.sound:
        raise InputError(f"first_frame={first_frame}: only models with sound learn it by chance; {spec.name} has none")

    with use_mesh(model.mesh):
        cache = folder / "clips"
        feed = ClipFolder(data, model, cache, to, batch=recipe.batch, seed=recipe.seed, consent=consent)

    def draw(shared: Batch, own: Batch, key: jax.Array) -> Batch:
        return draw_examples(key, own | shared, levels, dropout, first_frame=first_frame)

    loss = functools.partial(twin_loss if spec.takes_references else flow_loss, remat=recipe.remat)
    networks = {"dit": model.dit}
    task = Task({"dit": abstract(lambda: model.dit)}, draw, loss)
    if trains == "lora":
        networks["lora"] = new_factors(model.dit, rank, seed=recipe.seed, targets=targets)
        task = lora_task(task, networks["lora"])

    def sample(step: int, ema: Flat, frozen: Flat) -> None:
        trained = assemble(task, ema, frozen)
        dit = add_factors(trained["dit"], trained["lora"]) if trains == "lora" else trained["dit"]
        usual = dict(size=to[:2], num_frames=to.num_frames)
        for i, options in enumerate(samples, 1):
            _show(model, dit, usual | options, folder / "samples" / f"{step:06d}-{i}")

    state, frozen = fit(
        task, recipe, networks, feed, folder, sample=sample if samples else None,
        trains=TRAINS[trains], watch=dataclasses.replace(watch, minutes=minutes), mesh=model.mesh, resume=resume,
    )  # fmt: skip
    if int(state.step) < recipe.steps:
        return None
    trained = assemble(task, state.ema, frozen)
    if trains != "lora":
        return trained["dit"]
    write_lora(folder / "lora.safetensors", trained["lora"], trained["dit"], layouts.table("dit", spec.dit))
    return None


def _show(model: Model, dit: Any, options: Mapping[str, Any], path: Path) -> None:
    """A clip of the model with another transformer, and its contact sheet; what fails is only logged."""
    held = model.dit
    model.replace("dit", dit)
    try:
        clip = generate(model, **options, progress=False)
        clip.save(path.with_suffix(".mp4"))
        Clip(contact_sheet(clip)[None], fps=clip.fps).save(path.with_suffix(".png"))
    except WanError as error:
        log.warning("%s: no sample: %s", path.name, error)
    finally:
        model.replace("dit", held)


def _fill(kind: type, name: str, given: Mapping[str, Any]) -> Any:
    known = [field.name for field in dataclasses.fields(kind)]
    if unknown := given.keys() - set(known):
        raise InputError("; ".join(f"{name}.{key}: unknown setting{nearest(key, known)}" for key in sorted(unknown)))
    return kind(**given)
