"""``wan-jax train``: the small model from nothing, or a model on a folder of clips."""

from __future__ import annotations

import argparse
import functools
import logging
import runpy
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wan_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from wan_jax.model import Model
    from wan_jax.train.data import Format

log = logging.getLogger(__name__)

KINDS = ("nano", "finetune")


def add_parser(subparsers) -> argparse.ArgumentParser:
    description = "Train by a recipe. A run that is stopped (Ctrl-C, SIGTERM, --minutes) saves; --resume continues it."
    parser = subparsers.add_parser("train", help="train a model", description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, e.g. configs/train_nano.py")
    parser.add_argument("--model", help="what to train further: a name of `wan-jax models`, a repository or a folder")
    parser.add_argument("--data", metavar="FOLDER", help="clips (.mp4), captions (.txt) and sound (.wav)")
    parser.add_argument(
        "--i-have-consent", action="store_true", help="every person in the references (NAME.ref1.png) of --data agreed"
    )
    parser.add_argument("--out", metavar="FOLDER", help="takes states, metrics and weights (default: runs/RECIPE)")
    parser.add_argument("--resume", action="store_true", help="continue from the last state in --out")
    parser.add_argument("--minutes", type=float, help="stop and save after so many")
    parser.add_argument("--mesh", help="devices, e.g. fsdp=8 or data=8; default: one device")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def run(args: argparse.Namespace) -> int:
    settings = _recipe(args.config)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"{args.config}: kind={kind!r}: use {' or '.join(KINDS)}{nearest(str(kind), KINDS)}")
    from wan_jax.parallel import make_mesh, parse_mesh

    mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
    out = Path(args.out or Path("runs") / Path(args.config).stem)
    common = dict(resume=args.resume, minutes=args.minutes, mesh=mesh)
    if kind == "nano":
        if args.model or args.data:
            raise InputError(f"{args.config} trains from nothing: leave out --model and --data")
        from wan_jax.config import NANO
        from wan_jax.train.nano import train_nano

        train_nano(NANO, settings, out, **common)
        return 0
    if not (args.model and args.data):
        raise InputError(f"{args.config} trains a model further: name it by --model, and a folder of clips by --data")
    from wan_jax.model import load
    from wan_jax.train.finetune import finetune

    model = load(args.model, dtype=settings.pop("dtype", "bfloat16"), mesh=mesh)
    references = functools.partial(_encode_references, consent=args.i_have_consent)
    trained = finetune(
        model, settings, args.data, out, resume=args.resume, minutes=args.minutes,
        references=references if model.spec.takes_references else None,
    )  # fmt: skip
    if trained is not None:
        _export(model, trained, out / "export")
    return 0


def _encode_references(
    model: Model, caption: str, pairs: Sequence[tuple[Path, Path | None]], to: Format, *, consent: bool
) -> dict[str, np.ndarray]:
    """The references of a clip as `generate` encodes them: what `wan_jax.train.data.ClipFolder` takes."""
    from wan_jax import pipeline
    from wan_jax.references import CONSENT, Reference, resolve_references
    from wan_jax.request import resolve

    if len({voice is None for _, voice in pairs}) > 1:
        raise InputError(f"{pairs[0][0].parent}: of the references of one clip all have a voice, or none")
    request = resolve(
        model.spec, caption, size=(to.width, to.height), num_frames=to.num_frames, guidance_scale=1.0,
        audio_guidance_scale=1.0, consent=CONSENT if consent else "",
        references=resolve_references([Reference(image=look, voice=voice) for look, voice in pairs]),
    )  # fmt: skip
    condition = pipeline.encode(model, request)
    found = {f"{stream}_references": x for stream, x in condition.references.items()}
    found |= {"identity": condition.identity_BRIC, "voice": condition.voice_BRTF}
    return {name: np.asarray(x[0]) for name, x in found.items() if x is not None}


def _export(model: Model, dit: Any, target: Path) -> None:
    """The model with another transformer, as a folder that `generate` takes."""
    from wan_jax.conversion import part_path, write_folder
    from wan_jax.train.nano import export as export_compact
    from wan_jax.weights import layouts
    from wan_jax.weights.engine import export

    tokenizer = model.files.parts["tokenizer"]
    if model.files.layout == "compact":
        networks = {part: dit if part == "dit" else model.network(part) for part in model.parts}
        return export_compact(model.spec, networks, tokenizer, target)

    def tensors(part: str) -> Any:
        network = dit if part == "dit" else model.network(part)
        return export(network, layouts.table(part, layouts.network_config(model.spec, part)), layout="official")

    write_folder(model.spec, target, "official", model.parts, tensors, log.info, model.release)
    shutil.copytree(tokenizer, part_path(model.spec, target, "official", "tokenizer"))


def _recipe(path: str) -> dict[str, Any]:
    """What ``get_config()`` of a recipe returns."""
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file; recipes are Python files, see configs/")
    recipe = runpy.run_path(path)
    if "get_config" not in recipe:
        raise InputError(f"{path} is no recipe: it defines no get_config()")
    return recipe["get_config"]().to_dict()
