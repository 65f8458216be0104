"""``wan-jax evaluate``: a model makes clips of held-out puppets in several ways, and all of them are scored."""

from __future__ import annotations

import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from wan_jax.config import ModelSpec
from wan_jax.errors import InputError, nearest
from wan_jax.evaluate import puppets
from wan_jax.evaluate.puppets import CHOICES, Observed
from wan_jax.evaluate.report import Report, Seen
from wan_jax.evaluate.sheet import talking_sheet
from wan_jax.evaluate.variants import VARIANTS, Change, held_out, make_clip, request, round_trip
from wan_jax.media import Clip
from wan_jax.model import Model
from wan_jax.provenance import RECORD, mark, verify
from wan_jax.request import Request
from wan_jax.train.puppets import scripts, world
from wan_jax.train.puppets.voices import RATE


def check(spec: ModelSpec, variants: Sequence[str], clips: int) -> None:
    """Refuse what cannot be evaluated, before anything is loaded."""
    for name in variants:
        if name not in VARIANTS:
            raise InputError(f"variant {name!r}: use {', '.join(VARIANTS)}{nearest(name, VARIANTS)}")
    if clips < CHOICES:
        raise InputError(f"{clips} clips: need {CHOICES} or more, each is told from the others")
    if not is_scored(spec):
        raise InputError(
            f"{spec.name} cannot be scored on puppets: that needs a model that takes references and makes {world.FPS}"
            f" frames per second with sound at {RATE} Hz, such as wan2.6-nano; for a clip of real people give --clip"
        )


def is_scored(spec: ModelSpec) -> bool:
    """Whether the detectors of puppets can tell anything of a model's clips."""
    return spec.takes_references and (spec.fps, spec.sound.mel.sample_rate) == (world.FPS, RATE)


def evaluate(
    model: Model,
    *,
    variants: Sequence[str] = tuple(VARIANTS),
    clips: int = 64,
    seed: int = 7,
    options: Mapping[str, Any] | None = None,
    folder: str | Path | None = None,
    make: Callable[[Model, Request, Change | None], Clip] = make_clip,
    progress: bool = True,
) -> Report:
    """Make and score clips. Ctrl-C ends early: the report holds what was done.

    Args:
        variants: of `VARIANTS`.
        clips: of each variant; the sampler's seeds are ``seed``, ``seed + 1``...
        options: of `wan_jax.generate`, such as ``num_steps`` or ``guidance_scale``.
        folder: takes every clip, a contact sheet of each, and a line for each in ``clips.jsonl``, as they are made.
        make: makes one clip.
    Raises:
        InputError: see `check`.
    """
    from tqdm.auto import tqdm

    check(model.spec, variants, clips)
    report = Report(model.spec.name, seed)
    people = sorted({VARIANTS[name].people for name in variants})
    try:
        with tqdm(total=clips * len(variants), unit="clip", disable=not progress) as bar:
            for index, count in itertools.product(range(clips), people):
                plan, truth = held_out(seed, index, count)
                report.plan(count, plan, puppets.observe_pictures(truth.pictures))
                for name in (name for name in variants if VARIANTS[name].people == count):
                    bar.set_description(name)
                    asked = request(model.spec, VARIANTS[name], plan, truth, seed + index, options or {})
                    begin = time.perf_counter()
                    clip = make(model, asked, VARIANTS[name].change)
                    seconds = time.perf_counter() - begin
                    observed = puppets.observe(clip.video, clip.audio, count)
                    marks = _marks(clip, model.spec.name) if name == "full" else {}
                    report.add(name, count, Seen(index, observed, marks), seconds)
                    if folder:
                        _save(Path(folder, name, f"{index:04d}.mp4"), clip, truth, observed)
                        about = {"variant": name, "clip": index, "seed": seed + index, "prompt": asked.prompt}
                        about |= {"seconds": round(seconds, 2)} | marks | _told(observed)
                        with Path(folder, "clips.jsonl").open("a", encoding="utf-8") as file:
                            file.write(json.dumps(about) + "\n")
                    bar.update()
                _add_bounds(report, model, index, count, truth)
    except KeyboardInterrupt:
        report.interrupted = True
    return report


def preview(model: Model, path: Path, seed: int = 7) -> None:
    """Make the clip of one held-out puppet, and a contact sheet beside it: what a training shows of itself."""
    plan, truth = held_out(seed, 0, 1)
    clip = make_clip(model, request(model.spec, VARIANTS["full"], plan, truth, seed, {}))
    _save(path, clip, truth, puppets.observe(clip.video, clip.audio, 1))


def _add_bounds(report: Report, model: Model, index: int, people: int, truth: world.Clip) -> None:
    """The rendered clip itself, and what the codecs leave of it."""
    report.add("truth", people, Seen(index, puppets.observe(truth.video, truth.audio, people)))
    video, audio = round_trip(model, truth.video, truth.audio)
    quality = {"reconstruction, dB": puppets.psnr(video, truth.video)}
    report.add("codec", people, Seen(index, puppets.observe(video, audio, people), quality))


def _save(path: Path, clip: Clip, truth: world.Clip, observed: Observed) -> None:
    clip.save(path)
    sheet = talking_sheet(clip, list(truth.pictures), observed.openings)
    Clip(sheet[None], fps=clip.fps).save(path.with_suffix(".png"))


def _marks(clip: Clip, model: str) -> dict[str, bool]:
    """Whether the watermarks that `generate` puts into a clip are found in a file of it."""
    settings = {name: value for name, value in clip.settings.items() if name != RECORD}
    marked = mark(replace(clip, settings=settings), model=model)
    with tempfile.TemporaryDirectory() as folder:
        found = verify(marked.save(Path(folder, "clip.mp4")))
    return {
        "watermark in the picture": bool(found.picture and found.picture.found),
        "watermark in the sound": bool(found.sound and found.sound.found),
    }


def _told(observed: Observed) -> dict[str, Any]:
    """What the detectors say, JSON-ready."""
    colour, pattern = observed.wall
    vowels = observed.timbre.vowels if observed.timbre else ()
    return {
        "wall": f"{world.PATTERNS[pattern]} {world.WALLS[colour]}",
        "motions": [world.MOTIONS[motion] for motion in observed.motions],
        "pitches": [round(syllable.pitch, 1) for syllable in observed.syllables],
        "vowels": " ".join(scripts.VOWELS[vowel] for vowel in vowels),
    }
