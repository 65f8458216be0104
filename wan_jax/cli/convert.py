"""``wan-jax convert``: import to Orbax, export to the official and diffusers layouts, check a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

NETWORKS = ("dit", "dit_low", "vae", "text_encoder", "image_encoder", "audio_vae", "vocoder")
TINY = ("t2v", "i2v", "flf2v", "ti2v", "t2v-moe", "i2v-moe", "ovi", "r2av", "wan2.6")
EPILOG = """\
examples:
  wan-jax convert check  Wan2.1-T2V-1.3B                           every key used once, every parameter filled once
  wan-jax convert import Wan2.1-T2V-1.3B t2v-1.3b-orbax            restores faster, straight onto a mesh
  wan-jax convert export my-model  my-model-diffusers --layout diffusers
  wan-jax convert export my-model  my-model-official  --part dit --lora style.safetensors:0.8
  wan-jax convert adapters dreamid-omni wan2.6-base --image-encoder wan2.1-i2v-14b-480p     wan2.6-r2av-11b, untrained
  wan-jax convert random tiny --tiny t2v                           a small random model to try the commands with
SRC is a folder in any layout, a model name or a hub repository.
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "convert", help="import, export and check checkpoints", description="Checkpoints from one layout to another.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    dtypes = dict(choices=("bfloat16", "float32"), default="bfloat16", help="of the matrices (default bfloat16)")

    check = actions.add_parser("check", help="coverage of names and shapes; reads no data")
    check.add_argument("source", metavar="SRC")

    to_orbax = actions.add_parser("import", help="official or diffusers layout to Orbax")
    to_orbax.add_argument("source", metavar="SRC")
    to_orbax.add_argument("target", metavar="DST", type=Path)
    to_orbax.add_argument("--dtype", **dtypes)
    to_orbax.add_argument("--offline", action="store_true", help="never use the network")

    out = actions.add_parser("export", help="any layout to the official or diffusers layout")
    out.add_argument("source", metavar="SRC")
    out.add_argument("target", metavar="DST", type=Path)
    out.add_argument("--layout", choices=("official", "diffusers"), default="official")
    out.add_argument("--part", action="append", choices=NETWORKS, help="network to write; may be repeated; default all")
    out.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="merge this adapter first")
    out.add_argument("--dtype", **dtypes)
    out.add_argument("--offline", action="store_true", help="never use the network")

    new = actions.add_parser("adapters", help="new identity and voice adapters on a base: an untrained wan2.6-r2av-11b")
    new.add_argument("source", metavar="SRC", help="dreamid-omni, or a folder of it")
    new.add_argument("target", metavar="DST", type=Path)
    new.add_argument("--image-encoder", metavar="SRC", required=True, help="wan2.1-i2v-14b-480p, or a folder of it")
    new.add_argument("--dtype", **dtypes)
    new.add_argument("--seed", type=int, default=0, help="of the new weights")
    new.add_argument("--offline", action="store_true", help="never use the network")

    random = actions.add_parser("random", help="random weights in a published layout, for tests and demonstrations")
    random.add_argument("target", metavar="DST", type=Path)
    kind = random.add_mutually_exclusive_group(required=True)
    kind.add_argument("--tiny", choices=TINY, help="a small one of this kind")
    kind.add_argument("--model", help="one with the real sizes of a published model")
    random.add_argument("--layout", choices=("official", "diffusers"), default="official")
    random.add_argument("--seed", type=int, default=0)
    for action in (check, to_orbax, out, new, random):
        action.set_defaults(parser=action)
    return parser


def run(args: argparse.Namespace) -> int:
    actions = {"check": _check, "import": _import, "export": _export, "adapters": _adapters, "random": _random}
    return actions[args.action](args)


def _check(args: argparse.Namespace) -> int:
    from wan_jax.conversion import check_folder
    from wan_jax.weights.hub import resolve
    from wan_jax.weights.layouts import locate, spec_parts

    files, faults = locate(resolve(args.source)), 0
    for part in (*spec_parts(files.spec), "tokenizer"):
        if not files.parts[part].exists():
            print(f"{part}: not in this folder, looked for {files.parts[part]}")
    for part, coverage in check_folder(files.folder).items():
        faults += len(coverage.faults)
        state = "complete" if not coverage.faults else f"{len(coverage.faults)} FAULTS"
        print(f"{part}: {state}; {len(coverage.used)} keys used once, {len(coverage.ignored)} ignored")
        for reason in sorted(set(coverage.ignored.values())):
            keys = [key for key, why in coverage.ignored.items() if why == reason]
            print(f"  ignored, {reason}: {len(keys)} keys, e.g. {keys[0]}")
        for fault in coverage.faults:
            print(f"  {fault}")
    return 1 if faults else 0


def _import(args: argparse.Namespace) -> int:
    from wan_jax.conversion import import_folder
    from wan_jax.model import load

    import_folder(load(args.source, dtype=args.dtype, offload=True, offline=args.offline or None), args.target)
    return 0


def _export(args: argparse.Namespace) -> int:
    from wan_jax.conversion import export_folder
    from wan_jax.model import load

    model = load(args.source, dtype=args.dtype, loras=args.lora, offload=True, offline=args.offline or None)
    export_folder(model, args.target, args.layout, parts=args.part)
    return 0


def _adapters(args: argparse.Namespace) -> int:
    from wan_jax.conversion import add_adapters
    from wan_jax.model import load

    options = dict(dtype=args.dtype, offload=True, offline=args.offline or None)
    add_adapters(load(args.source, **options), load(args.image_encoder, **options), args.target, seed=args.seed)
    return 0


def _random(args: argparse.Namespace) -> int:
    from wan_jax.config import find_model
    from wan_jax.conversion import random_folder, tiny_spec

    spec = tiny_spec(args.tiny) if args.tiny else find_model(args.model)
    random_folder(spec, args.target, layout=args.layout, seed=args.seed)
    return 0
