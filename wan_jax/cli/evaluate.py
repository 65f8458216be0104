"""``wan-jax evaluate``: how well does a model keep to the face, the voice and the text, and do the lips follow?"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from wan_jax.errors import InputError

EPILOG = """\
examples:
  wan-jax evaluate --model wan2.6-nano --clips 64 --seed 7
  wan-jax evaluate --model wan2.6-nano --variants full no-voice uncoupled --out scores --json
  wan-jax evaluate --clip clip.mp4 --reference photo.jpg --voice voice.wav       one clip of a real person

On puppets every score stands beside that of the rendered truth, of the truth through the model's own codecs, and of
the model's clips with pictures and sounds shuffled. Variants:
  full        text, picture and voice
  no-picture  the reference picture dropped          no-voice   the reference voice dropped
  adapters    references by the adapters alone       tokens     by the reference tokens alone
  uncoupled   attention between picture and sound cut
  text        no reference, the text says what people look like
  two         two people who take turns
Ctrl-C prints the table of what was made so far, from 8 clips on.

For a clip of a real person nothing learned is used: colour drift within 3 is steady, sound within 2 frames of the
lips is in sync. Faces are found with the extra `faces`; without them there is no row of sync and likeness.
"""
SAMPLING = (
    "num_steps", "step_cache", "guidance_scale", "audio_guidance_scale", "image_guidance", "voice_guidance",
    "sync_guidance",
)  # fmt: skip


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "evaluate", help="score a model on puppets, or one clip", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="name, hub repository or folder of a model that was trained on puppets")
    what.add_argument("--clip", help="a clip of a person, .mp4")
    world = parser.add_argument_group("with --model")
    world.add_argument("--clips", type=int, default=64, help="of each variant, 8 or more (default 64)")
    world.add_argument("--seed", type=int, default=7, help="of the people and of the sampler (default 7)")
    world.add_argument("--variants", nargs="+", metavar="NAME", help="default: all")
    world.add_argument("--out", type=Path, metavar="FOLDER", help="keep clips, contact sheets and clips.jsonl there")
    world.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    world.add_argument("--offline", action="store_true", default=None, help="never use the network")
    for name in SAMPLING:
        kind = int if name == "num_steps" else float
        world.add_argument(f"--{name.replace('_', '-')}", type=kind, help="as in `generate`; default: the model's")
    person = parser.add_argument_group("with --clip")
    person.add_argument("--reference", help="the picture that the clip was made with")
    person.add_argument("--voice", help="the voice that it was made with, 0.5 to 30 s")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def run(args: argparse.Namespace) -> int:
    return _clip(args) if args.clip else _model(args)


def _model(args: argparse.Namespace) -> int:
    from wan_jax.cli.generate import find_spec
    from wan_jax.evaluate.run import check, evaluate
    from wan_jax.evaluate.variants import VARIANTS
    from wan_jax.model import load

    if args.reference or args.voice:
        raise InputError("--reference and --voice belong to --clip: puppets have their own")
    variants = tuple(dict.fromkeys(args.variants or VARIANTS))
    log = args.out and args.out / "clips.jsonl"
    if log and log.exists():
        raise InputError(f"{log} exists: name another folder")
    check(find_spec(args.model), variants, args.clips)
    model = load(args.model, dtype=args.dtype, offline=args.offline)
    options = {name: value for name in SAMPLING if (value := getattr(args, name)) is not None}
    report = evaluate(
        model, variants=variants, clips=args.clips, seed=args.seed, options=options, folder=args.out,
        progress=not args.quiet,
    )  # fmt: skip
    print(report.to_json() if args.json else report)
    return 130 if report.interrupted else 0


def _clip(args: argparse.Namespace) -> int:
    from wan_jax.evaluate.gauges import RATE, gauge
    from wan_jax.media import read_audio, read_image, read_video

    picture = read_image(args.reference) if args.reference else None
    voice = read_audio(args.voice, sample_rate=RATE) if args.voice else None
    rows = gauge(read_video(args.clip), picture, voice)
    if args.json:
        print(json.dumps({name: None if math.isnan(x) else round(x, 4) for name, x in rows.items()}, indent=1))
    else:
        print("\n".join(f"{name:28}{x:9.2f}" for name, x in rows.items()))
    return 0
