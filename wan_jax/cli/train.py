"""``wan-jax train``: the small model from nothing, or a model on a folder of clips."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from wan_jax.cli.recipes import read_recipe
from wan_jax.errors import InputError, nearest

log = logging.getLogger(__name__)

KINDS = ("nano", "finetune")


def add_parser(subparsers) -> argparse.ArgumentParser:
    description = "Train by a recipe. A run that is stopped (Ctrl-C, SIGTERM, --minutes) saves; --resume continues it."
    parser = subparsers.add_parser("train", help="train a model", description=description)
    parser.add_argument("--config", required=True, metavar="FILE", help="recipe, e.g. configs/train_nano.py")
    parser.add_argument(
        "--model",
        help="what to train further: a name of `wan-jax models`, a repository or a folder; with train_nano.py: what to"
        " begin with instead of nothing",
    )  # fmt: skip
    parser.add_argument("--data", metavar="FOLDER", help="clips (.mp4), captions (.txt) and sound (.wav)")
    parser.add_argument(
        "--i-have-consent", action="store_true", help="every person in the references (NAME.ref1.png) of --data agreed"
    )
    parser.add_argument("--out", metavar="FOLDER", help="takes states, metrics and weights (default: runs/RECIPE)")
    parser.add_argument("--only", metavar="STAGE", help="of a recipe with stages: this one; beside others, say")
    parser.add_argument("--resume", action="store_true", help="continue from the last state in --out")
    parser.add_argument("--minutes", type=float, help="stop and save after so many")
    parser.add_argument("--mesh", help="devices, e.g. fsdp=8 or data=8; default: one device")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")
    return parser


def run(args: argparse.Namespace) -> int:
    settings = read_recipe(args.config)
    kind = settings.pop("kind", None)
    if kind not in KINDS:
        raise InputError(f"{args.config}: kind={kind!r}: use {' or '.join(KINDS)}{nearest(str(kind), KINDS)}")
    from wan_jax.parallel import make_mesh, parse_mesh

    mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
    out = Path(args.out or Path("runs") / Path(args.config).stem)
    common = dict(resume=args.resume, minutes=args.minutes, mesh=mesh)
    if kind == "nano":
        if args.data:
            raise InputError(f"{args.config} draws its own clips: leave out --data")
        from wan_jax.config import NANO
        from wan_jax.evaluate.run import preview
        from wan_jax.model import load
        from wan_jax.train.nano import train_nano

        begin = load(args.model, dtype="float32") if args.model else None
        train_nano(NANO, settings, out, only=args.only, preview=preview, start=begin, **common)
        return 0
    if args.only:
        raise InputError(f"--only {args.only}: {args.config} has no stages")
    if not (args.model and args.data):
        raise InputError(f"{args.config} trains a model further: name it by --model, and a folder of clips by --data")
    from wan_jax.conversion import export_folder
    from wan_jax.model import load
    from wan_jax.train.finetune import finetune

    model = load(args.model, dtype=settings.pop("dtype", "bfloat16"), mesh=mesh)
    trained = finetune(
        model, settings, args.data, out, resume=args.resume, minutes=args.minutes, consent=args.i_have_consent
    )  # fmt: skip
    if trained is not None:
        model.replace("dit", trained)
        layout = "compact" if model.files.layout == "compact" else "official"
        export_folder(model, out / "export", layout, say=log.info)
    return 0
