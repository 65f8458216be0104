"""``wan-jax generate``: text and pictures to a clip."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from wan_jax.config import MODELS, find_model
from wan_jax.errors import InputError

EPILOG = """\
examples:
  wan-jax generate --model wan2.1-t2v-1.3b --prompt "a cat surfing a wave at sunset" --output clip.mp4
  wan-jax generate --model wan2.1-i2v-14b-480p --image photo.jpg --prompt "she turns and smiles" --output clip.mp4
  wan-jax generate --model wan2.1-flf2v-14b-720p --image a.png --last-image b.png --prompt "..." --output clip.mp4
  wan-jax generate --model wan2.1-t2v-14b --num-frames 1 --prompt "a still life" --output picture.png
  wan-jax generate --from clip.mp4 --seed 1 2 3 --output again.mp4       the same settings, three other seeds

The model is a name of `wan-jax models`, a hub repository, or a folder (official, diffusers or converted layout).
Every file carries its settings; --from reads them back. Ctrl-C keeps the state of the sampler beside the output:
repeat the command to continue. Exit codes: 0 done, 1 failed, 2 wrong use, 3 out of memory, 130 interrupted.
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "generate", help="make a clip", description="Make a clip, or a picture with --num-frames 1.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    what = parser.add_argument_group("what to make")
    what.add_argument("--model", help="name, hub repository or folder")
    what.add_argument("--prompt", help="what the clip shows")
    what.add_argument("--negative-prompt", help="what it must not show; default: the official list")
    what.add_argument("--image", type=Path, help="first picture (I2V, FLF2V, TI2V)")
    what.add_argument("--last-image", type=Path, help="last picture (FLF2V)")
    what.add_argument("--size", help="WIDTHxHEIGHT in pixels, e.g. 832x480; with a picture: the area")
    what.add_argument("--aspect", help="W:H, e.g. 16:9, instead of --size")
    what.add_argument("--num-frames", type=int, help="4n+1; 1 makes a picture")
    what.add_argument("--fps", type=float, help="frames per second of the file; default: the model's")
    what.add_argument("--seed", type=int, nargs="+", help="one, or several for several clips (default 0)")
    what.add_argument("--output", type=Path, default=Path("clip.mp4"), help=".mp4 .gif .webp .png .jpg (default clip.mp4)")
    what.add_argument("--from", dest="source", type=Path, metavar="CLIP", help="take the settings of this file as defaults")
    how = parser.add_argument_group("how to sample")
    how.add_argument("--num-steps", type=int, help="sampling steps; default: the model's")
    how.add_argument("--shift", type=float, help="shift of the noise schedule; default: the model's")
    how.add_argument("--guidance-scale", type=float, nargs="+", help="one number, or LOW HIGH for two experts; 1 is off")
    how.add_argument("--solver", choices=("unipc", "dpm++", "euler"), help="default unipc")
    how.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="adapter; may be repeated;"
                     " high=FILE or low=FILE for one expert of two")  # fmt: skip
    where = parser.add_argument_group("where and in what precision")
    where.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="default bfloat16")
    where.add_argument("--mesh", help="devices, e.g. fsdp=8 or data=2,seq=4; default: one device")
    where.add_argument("--guidance", choices=("batch", "sequential"), help="prompt and negative prompt at once (default) or in turn")
    where.add_argument("--offload", action=argparse.BooleanOptionalAction, help="one network in memory at a time; default: decided by the memory found")  # fmt: skip
    where.add_argument("--segment", default="1", help="sampling steps per compiled program, or 'all' (default 1)")
    where.add_argument("--offline", action="store_true", help="never use the network; say what is missing")
    talk = parser.add_argument_group("reporting")
    talk.add_argument("--dry-run", action="store_true", help="check everything and print the settings; load no weights")
    talk.add_argument("--profile", action="store_true", help="print seconds per stage and peak memory")
    talk.add_argument("--quiet", action="store_true", help="only warnings and errors")
    return parser


def run(args: argparse.Namespace) -> int:
    from wan_jax.media import check_writable, read_image
    from wan_jax.request import resolve

    options = _options(args)
    name = options.pop("model", None)
    if name is None:
        raise InputError("give --model (see `wan-jax models`)")
    if not options.get("prompt"):
        raise InputError('give --prompt "what the clip shows"')
    outputs = _outputs(args.output, options["seed"])
    for path in outputs:
        check_writable(path)
    for key in ("image", "last_image"):
        options[key] = read_image(options[key]) if options.get(key) else None
    if args.dry_run or name in MODELS:  # every value is checked before anything is loaded
        spec = find_model(name) if not Path(name).is_dir() else _spec_of(name)
        request = resolve(spec, **options)
        if args.dry_run:
            print(json.dumps(request.settings(request.seeds[0]) | {"seeds": request.seeds}, indent=1, ensure_ascii=False))
            return 0
    return _generate(args, name, options, outputs)


def _spec_of(folder: str):
    from wan_jax.weights.layouts import locate

    return locate(folder).spec


def _generate(args: argparse.Namespace, name: str, options: dict[str, Any], outputs: list[Path]) -> int:
    from wan_jax.model import load
    from wan_jax.parallel import make_mesh, parse_mesh
    from wan_jax.pipeline import Stages, run
    from wan_jax.request import resolve

    mesh = make_mesh(parse_mesh(args.mesh)) if args.mesh else None
    model = load(name, dtype=args.dtype, mesh=mesh, loras=args.lora, offload=args.offload, offline=args.offline or None)
    request = resolve(model.spec, **options)
    segment = args.segment if args.segment == "all" else int(args.segment)
    stages = Stages(show=not args.quiet)
    resume_file = args.output.with_name(f".{args.output.name}.resume.safetensors")
    clips = run(model, request, segment=segment, progress=not args.quiet, resume_file=resume_file, stages=stages)
    with stages("writing"):
        for clip, path in zip(clips, outputs, strict=True):
            clip.save(path)
    for path in outputs:
        print(path)
    if args.profile:
        _print_profile(stages.seconds)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Command line over the settings of --from over defaults."""
    from wan_jax.media import read_settings
    from wan_jax.request import from_settings

    options: dict[str, Any] = {"seed": [0]}
    if args.source:
        settings = read_settings(args.source)
        options |= from_settings(settings)
        options["seed"] = [options["seed"]] if isinstance(options["seed"], int) else options["seed"]
        if settings.get("model") in MODELS:
            options["model"] = settings["model"]
        # Paths are never taken from a file that may come from anywhere.
        for key, flag in (("image_sha256", "--image"), ("last_image_sha256", "--last-image"), ("loras", "--lora")):
            if settings.get(key) and not getattr(args, flag[2:].replace("-", "_")):
                print(f"{args.source} was made with {flag}: give it again to repeat the clip", file=sys.stderr)
    names = (
        "model", "prompt", "negative_prompt", "image", "last_image", "size", "aspect", "num_frames", "fps", "seed", "num_steps",
        "shift", "guidance_scale", "solver", "guidance",
    )  # fmt: skip
    given = {key: getattr(args, key) for key in names if getattr(args, key) is not None}
    if "aspect" in given:
        options.pop("size", None)
    options |= given
    scale = options.get("guidance_scale")
    if isinstance(scale, list) and len(scale) == 1:
        options["guidance_scale"] = scale[0]
    return options


def _outputs(path: Path, seeds: list[int]) -> list[Path]:
    """The path itself, or one per seed: clip.mp4 -> clip-seed1.mp4, clip-seed2.mp4."""
    return [path] if len(seeds) == 1 else [path.with_stem(f"{path.stem}-seed{seed}") for seed in seeds]


def _print_profile(seconds: dict[str, float]) -> None:
    import resource

    import jax

    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s")
    print(f"peak host memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "peak_bytes_in_use" in stats:
            print(f"peak memory of {device}: {stats['peak_bytes_in_use'] / 2**30:.2f} GB")
