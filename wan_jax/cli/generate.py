"""``wan-jax generate``: text and pictures to a clip."""

from __future__ import annotations

import argparse
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan_jax.cli.recipes import read_recipe
from wan_jax.cli.start import OPTIONS
from wan_jax.config import MODELS, ModelSpec, find_model
from wan_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from wan_jax.request import Request

log = logging.getLogger(__name__)

EPILOG = """\
examples:
  wan-jax generate --model wan2.1-t2v-1.3b --prompt "a cat surfing a wave at sunset" --output clip.mp4
  wan-jax generate --model wan2.1-i2v-14b-480p --image photo.jpg --prompt "she turns and smiles" --output clip.mp4
  wan-jax generate --model wan2.1-flf2v-14b-720p --image a.png --last-image b.png --prompt "..." --output clip.mp4
  wan-jax generate --model wan2.1-t2v-14b --num-frames 1 --prompt "a still life" --output picture.png
  wan-jax generate --model dreamid-omni --reference photo.jpg --voice voice.wav --reference friend.mp4 --i-have-consent
      --prompt 'Character1 says "We did it!" to character2, who laughs, in a sunny kitchen' --output clip.mp4
  wan-jax generate --model ovi-5s --image photo.jpg --prompt 'She says "Good morning." Audio: calm voice, birds'
  wan-jax generate --from clip.mp4 --seed 1 2 3 --output again.mp4       the same settings, three other seeds
  wan-jax generate --config configs/t2v_14b.py --prompt "a still lake"   settings from a recipe

The model is a name of `wan-jax models`, a hub repository, or a folder (official, diffusers or converted layout).
Every file carries its settings; --from reads them back. Options of the command line come first, then those of
--from, then those of --config, then the model's. Ctrl-C, or a failure, keeps the state of the sampler beside the
output: repeat the command to continue. Exit codes: 0 done, 1 failed, 2 wrong use, 3 out of memory, 130 interrupted.
"""
DTYPES = ("bfloat16", "float32")
KINDS = ("int8", "fp8")  # of `wan_jax.nn.quant`
NOT_SETTINGS = ("config", "source", "dry_run", "sheet", "profile", "quiet", "run", "parser", *OPTIONS)
# What belongs to a way of running, whatever is asked for; see `Way`.
OF_THE_WAY = ("model", "dtype", "quantize", "stream_weights", "mesh", "lora", "offload", "offline", "segment",
              "watermark", "watermark_key", "badge", "c2pa_cert", "c2pa_key", "embed_prompt")  # fmt: skip
# Settings that a recipe cannot have: they belong to one run, not to a way of running.
NOT_IN_RECIPES = ("references", "describe", "i_have_consent", "watermark_key", "c2pa_cert", "c2pa_key")


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "generate", help="make a clip", description="Make a clip, or a picture with --num-frames 1.", epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add_options(parser)
    return parser


def add_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what to make")
    what.add_argument("--model", help="name, hub repository or folder")
    what.add_argument("--prompt", help="what the clip shows")
    what.add_argument("--negative-prompt", help="what it must not show; default: the official list")
    what.add_argument("--image", help="first picture (I2V, FLF2V, TI2V)")
    what.add_argument("--last-image", help="last picture (FLF2V)")
    what.add_argument("--size", help="WIDTHxHEIGHT in pixels, e.g. 832x480; with a picture: the area")
    what.add_argument("--aspect", help="W:H, e.g. 16:9, instead of --size")
    what.add_argument("--num-frames", type=int, help="4n+1; 1 makes a picture")
    what.add_argument("--fps", type=float, help="frames per second of the file; default: the model's")
    what.add_argument("--seed", type=int, nargs="+", help="one, or several for several clips (default 0)")
    what.add_argument(
        "--output", help=".mp4 .gif .webp .png .jpg, or a folder/ for numbered pictures (default clip.mp4, clip.png)"
    )
    what.add_argument("--from", dest="source", metavar="CLIP", help="take the settings inside this file")
    what.add_argument("--config", metavar="FILE", help="take the settings of this recipe, see configs/")
    who = parser.add_argument_group("who appears and speaks (models with sound)")
    who.add_argument(
        "--reference", action=_AddReference, dest="references", metavar="FILE",
        help="picture or video of a person, an animal or a thing; a video gives its sharpest frame, and its sound as"
        " the voice; up to 5 times. The prompt calls them character1, character2, ...",
    )  # fmt: skip
    who.add_argument(
        "--voice", action=_AddReference, dest="references", metavar="FILE",
        help="how the reference before it sounds: 0.5 to 30 s of speech; the words come from the prompt, in quotes",
    )  # fmt: skip
    who.add_argument(
        "--describe", action="append", metavar="N:TEXT", help='of reference N, e.g. 1:"a woman with short red hair"'
    )
    who.add_argument(
        "--i-have-consent", action="store_true", default=None,
        help="state that every person in the references agreed; needed with --reference, recorded in the clip",
    )  # fmt: skip
    who.add_argument(
        "--clean-voice", action="store_true", default=None,
        help="take the most voiced second of each voice at a common loudness; default: its second second, as trained",
    )  # fmt: skip
    who.add_argument("--no-audio", dest="audio", action="store_false", default=None, help="picture alone (Ovi)")
    who.add_argument("--audio-only", dest="video", action="store_false", default=None, help="sound alone, .wav (Ovi)")
    who.add_argument("--audio-negative-prompt", help="how it must not sound")
    who.add_argument("--audio-guidance-scale", type=float, help="of the sound; --guidance-scale is the picture's")
    who.add_argument("--image-guidance", type=float, help="how strongly the pictures of the references rule; 0 is off")
    who.add_argument("--voice-guidance", type=float, help="how strongly their voices rule; 0 is off")
    who.add_argument("--sync-guidance", type=float, help="how strongly lips and sound rule each other; 0 is off")
    how = parser.add_argument_group("how to sample")
    how.add_argument("--num-steps", type=int, help="sampling steps; default: the model's")
    how.add_argument("--shift", type=float, help="shift of the noise schedule; default: the model's")
    how.add_argument(
        "--guidance-scale", type=float, nargs="+", help="one number, or LOW HIGH for two experts; 1 is off"
    )
    how.add_argument(
        "--step-cache", type=float, metavar="X",
        help="leave out the blocks of steps that change little: 0.05 is careful, 0.2 bold (default 0: none)",
    )  # fmt: skip
    how.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="noise levels between which guidance acts, e.g. 0.2 0.9; other steps run one pass (default 0 1)",
    )  # fmt: skip
    how.add_argument(
        "--solver", choices=("unipc", "dpm++", "euler", "distilled", "rcm", "rcm-ode"),
        help="default unipc; for step-distilled models and adapters: distilled, for TurboDiffusion: rcm, rcm-ode"
        " (4 steps without guidance)",
    )  # fmt: skip
    how.add_argument("--sigma-max", type=float, help="noise that rcm starts at; default 80, with a picture 200")
    how.add_argument(
        "--lora", action="append", metavar="FILE[:STRENGTH]",
        help="adapter; may be repeated; high=FILE or low=FILE for one expert of two",
    )  # fmt: skip
    where = parser.add_argument_group("where and in what precision")
    where.add_argument("--dtype", choices=DTYPES, help="default bfloat16")
    where.add_argument(
        "--quantize", choices=KINDS, help="one byte per weight, half the memory, nearly the same clip: int8 on every"
        " device; fp8 is less exact, and also multiplies in 8 bits on NVIDIA GPUs from Ada and Hopper on",
    )  # fmt: skip
    where.add_argument(
        "--stream-weights", action="store_true", default=None,
        help="weights stay in the memory of the host and come layer by layer, in every pass: the same clip, and a large"
        " model on a small card",
    )  # fmt: skip
    where.add_argument("--mesh", help="devices, e.g. fsdp=8 or data=2,seq=4; default: one, with --distributed all")
    where.add_argument(
        "--guidance", choices=("batch", "sequential"), help="prompt and negative prompt at once (default) or in turn"
    )
    where.add_argument(
        "--chunk-tokens", type=int, metavar="N",
        help="run the network on N tokens at a time: less memory for large clips; try 4096. Of models without sound",
    )  # fmt: skip
    where.add_argument(
        "--tiled", action="store_true", default=None, help="decode in tiles of the picture: less memory at large sizes"
    )
    where.add_argument(
        "--offload", action=argparse.BooleanOptionalAction,
        help="one network in memory at a time; default: decided by the memory found",
    )  # fmt: skip
    where.add_argument("--segment", type=_segment, help="sampling steps per compiled program, or 'all' (default 1)")
    where.add_argument(
        "--offline", action="store_true", default=None, help="never use the network; say what is missing"
    )
    marks = parser.add_argument_group("marks: every clip says that it was generated (see docs/watermark.md)")
    marks.add_argument(
        "--no-watermark", dest="watermark", action="store_false", default=None,
        help="leave out the watermarks in picture and sound; recorded in the settings inside the file",
    )  # fmt: skip
    marks.add_argument("--watermark-key", metavar="SECRET", help="a private key; default: the public one")
    marks.add_argument("--badge", action="store_true", default=None, help='also write "AI" into a corner')
    marks.add_argument("--c2pa-cert", metavar="PEM", help="sign the file with this certificate (extra c2pa)")
    marks.add_argument("--c2pa-key", metavar="PEM", help="and this private key")
    marks.add_argument(
        "--embed-prompt", action="store_true", default=None, help="the prompt itself in the manifest, not its SHA-256"
    )
    talk = parser.add_argument_group("reporting")
    talk.add_argument("--dry-run", action="store_true", help="check everything and print the settings; load no weights")
    talk.add_argument("--sheet", action="store_true", help="also a contact sheet beside the clip, CLIP.sheet.png")
    talk.add_argument("--profile", action="store_true", help="print seconds per stage and peak memory")
    talk.add_argument("--quiet", action="store_true", help="only warnings and errors")


class _AddReference(argparse.Action):
    """Collects --reference and --voice in one list: a voice belongs to the reference before it."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option: str | None = None) -> None:
        references = [dict(reference) for reference in getattr(namespace, self.dest) or []]
        if option == "--reference":
            references.append({"path": value})
        elif not references:
            parser.error(f"--voice {value}: a voice belongs to the --reference before it; there is none")
        elif "voice" in references[-1]:
            parser.error(f"--voice {value}: the reference before it has a voice already")
        else:
            references[-1]["voice"] = value
        setattr(namespace, self.dest, references)


def _segment(text: str) -> int | str:
    if text == "all" or (text.isdecimal() and int(text)):
        return text if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r}: need a positive number of steps, or 'all'")


@dataclass(frozen=True)
class Way:
    """How to run, whatever is asked for: the model, where it computes, how clips are marked."""

    model: str
    spec: ModelSpec
    dtype: str
    quantize: str | None
    stream: bool
    mesh: Any
    loras: list[Any]
    offload: bool | None
    offline: bool | None
    segment: int | str
    marks: dict[str, Any]
    sign: Callable[[Path], Path]

    @classmethod
    def take(cls, options: dict[str, Any]) -> Way:
        """What `OF_THE_WAY` names, out of the options."""
        from wan_jax.distributed import choose_mesh
        from wan_jax.weights.lora import Lora

        if "model" not in options:
            raise InputError("give --model (see `wan-jax models`)")
        own = {name: options.pop(name) for name in OF_THE_WAY if name in options}
        loras = own.get("lora", ())
        return cls(
            model=own["model"],
            spec=find_spec(own["model"]),
            dtype=own.get("dtype", "bfloat16"),
            quantize=own.get("quantize"),
            stream=own.get("stream_weights", False),
            mesh=choose_mesh(own.get("mesh")),
            loras=[Lora.open(lora) for lora in ((loras,) if isinstance(loras, str) else loras)],
            offload=own.get("offload"),
            offline=own.get("offline"),
            segment=own.get("segment", 1),
            marks={name: own[name] for name in ("watermark", "watermark_key", "badge") if name in own},
            sign=_signer(own),
        )

    def load(self) -> Any:
        from wan_jax.model import load

        return load(
            self.model, dtype=self.dtype, quantize=self.quantize, stream=self.stream, mesh=self.mesh,
            loras=self.loras, offload=self.offload, offline=self.offline,
        )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    from wan_jax.distributed import is_first
    from wan_jax.pipeline import Stages
    from wan_jax.pipeline import run as run_pipeline
    from wan_jax.plan import summary

    # Everything is checked before anything is loaded.
    options = options_of(args)
    way, output = Way.take(options), options.pop("output", None)
    request = make_request(way.spec, options, _asked_for_consent)
    output = place(request, output)
    outputs = _outputs(output, request.seeds)
    if args.dry_run:
        about = request.settings(request.seeds[0]) | {"seed": request.seeds, "output": [str(path) for path in outputs]}
        print(json.dumps(about, indent=1, ensure_ascii=False))
        return 0

    if is_first():  # a process cannot ask the devices of another how much they hold
        log.info(summary(way.spec, request, way.mesh, way.dtype, way.offload, way.quantize, way.stream))
    stages = Stages(show=not args.quiet)

    def write(clips: list[Any]) -> None:
        for clip, path in zip(clips, outputs, strict=True):
            way.sign(clip.save(path))
            if args.sheet and clip.video is not None:
                _write_sheet(clip, request, way.spec, path)

    run_pipeline(
        way.load(), request, segment=way.segment, progress=not args.quiet, stages=stages,
        resume_file=output.with_name(f".{output.name}.resume.safetensors"),
        finish=write if is_first() else None, **way.marks,
    )  # fmt: skip
    if is_first():
        print(*outputs, sep="\n")
    if args.profile:
        _print_profile(stages.seconds)
    return 0


def _write_sheet(clip: Any, request: Request, spec: ModelSpec, path: Path) -> None:
    """References, frames, sound and, of a model that makes puppets, how far their mouths open."""
    from wan_jax.evaluate import puppets, run
    from wan_jax.evaluate.sheet import talking_sheet
    from wan_jax.media import Clip

    references = request.sound.references if request.sound else ()
    openings = []
    if clip.audio is not None and run.is_scored(spec):
        openings = puppets.observe(clip.video, clip.audio, 2 if len(references) == 2 else 1).openings
    sheet = talking_sheet(clip, [reference.image for reference in references], openings)
    Clip(sheet[None], fps=clip.fps).save(path.with_suffix(".sheet.png"))


def make_request(spec: ModelSpec, options: Mapping[str, Any], ask: Callable[[], bool] = lambda: False) -> Request:
    """The request that options stand for, all files read.

    Args:
        ask: for the consent of those in the references, where the options do not state it.
    """
    from wan_jax.media import read_image
    from wan_jax.references import CONSENT, resolve_references
    from wan_jax.request import resolve

    options = dict(options)
    for key in ("image", "last_image"):
        if key in options:
            options[key] = read_image(options[key])
    described, consent = options.pop("describe", ()), options.pop("i_have_consent", False)
    if references := _references(options.pop("references", ()), described):
        options["references"] = resolve_references(references, clean=options.get("clean_voice", False))
        options["consent"] = CONSENT if consent or ask() else ""
    return resolve(spec, options.pop("prompt", ""), **options)


def place(request: Request, output: str | Path | None) -> Path:
    """Where the clip is written, checked; the default has the suffix that fits."""
    from wan_jax.media import check_writable

    return check_writable(output or f"clip{suffix(request)}", 0 if suffix(request) == ".wav" else request.num_frames)


def suffix(request: Request) -> str:
    """Of the file for sound alone, a picture, a clip."""
    if request.sound is not None and not request.sound.video:
        return ".wav"
    return ".png" if request.num_frames == 1 else ".mp4"


def _references(given: Iterable[dict[str, str]], described: Iterable[str]) -> list[Any]:
    """--reference, --voice and --describe as `Reference`."""
    from wan_jax.references import Reference

    given, descriptions = list(given), {}
    for text in described:
        number, colon, words = text.partition(":")
        if not (colon and number.strip().isdecimal() and 1 <= int(number) <= len(given) and words.strip()):
            raise InputError(f"--describe {text!r}: need N:TEXT, N the number of a reference (1 to {len(given)})")
        descriptions[int(number)] = words.strip()
    return [Reference.open(**reference, description=descriptions.get(k)) for k, reference in enumerate(given, 1)]


def _signer(options: dict[str, Any]) -> Callable[[Path], Path]:
    """What --c2pa-cert, --c2pa-key and --embed-prompt do with a written file; without them nothing."""
    from wan_jax.provenance import sign

    certificate, key = options.pop("c2pa_cert", None), options.pop("c2pa_key", None)
    embed_prompt = options.pop("embed_prompt", False)
    if certificate is None and key is None:
        return lambda path: path
    if certificate is None or key is None:
        raise InputError("a manifest needs both --c2pa-cert and --c2pa-key")
    for path in (certificate, key):
        if not Path(path).is_file():
            raise InputError(f"{path}: no such file; --c2pa-cert and --c2pa-key name PEM files")
    return functools.partial(sign, certificate=certificate, private_key=key, embed_prompt=embed_prompt)


def _asked_for_consent() -> bool:
    """Ask on a terminal, once for a run; without a terminal nobody has consented."""
    from wan_jax.references import CONSENT

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    print(f"References: {CONSENT}. This is recorded in the clip.", file=sys.stderr)
    return input("Is it so? [yes/no] ").strip().lower() == "yes"


def find_spec(name: str) -> ModelSpec:
    """What model a name stands for. Reads headers of a folder, downloads nothing."""
    from wan_jax.weights.hub import resolve
    from wan_jax.weights.layouts import locate

    if not Path(name).expanduser().exists():
        with suppress(InputError):
            return find_model(name)
    return locate(resolve(name)).spec  # a folder, or an error that tells what was found instead


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """Options of the command line over the settings of --from over those of --config."""
    names = vars(args).keys() - set(NOT_SETTINGS)
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    layers = _recipe(args.config, names - set(NOT_IN_RECIPES)), _settings_of(args.source, given), given
    return functools.reduce(overlay, layers, {})


def overlay(options: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """The options with those of a layer in their place; a size takes the place of an aspect too, and the reverse."""
    replaced = {"size", "aspect"} if layer.keys() & {"size", "aspect"} else set()
    return {name: value for name, value in options.items() if name not in replaced} | dict(layer)


def _recipe(path: str | None, names: Iterable[str]) -> dict[str, Any]:
    """What ``get_config()`` of a recipe returns, as options."""
    if path is None:
        return {}
    config = read_recipe(path)
    if unknown := config.keys() - set(names):
        faults = (f"unknown setting {name!r}{nearest(name, names)}" for name in sorted(unknown))
        raise InputError(f"{path}: {'; '.join(faults)}")
    return {name: value for name, value in config.items() if value is not None}


def _settings_of(path: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Settings inside a clip, as options. The file may come from anywhere: nothing that names a path is taken."""
    from wan_jax.media import read_settings
    from wan_jax.request import from_settings

    if path is None:
        return {}
    settings = read_settings(path)
    files = {"image_sha256": "image", "last_image_sha256": "last_image", "loras": "lora", "references": "references"}
    for key, name in files.items():
        if settings.get(key) and name not in given:
            option = name.removesuffix("s").replace("_", "-")
            log.warning("%s was made with --%s: give it again to repeat the clip", path, option)
    allowed = {"model": tuple(MODELS), "dtype": DTYPES, "quantize": KINDS}
    return from_settings(settings) | {
        name: settings[name] for name, values in allowed.items() if settings.get(name) in values
    }


def _outputs(path: Path, seeds: Iterable[int]) -> list[Path]:
    """The path itself, or one per seed: clip.mp4 -> clip-seed1.mp4, clip-seed2.mp4."""
    seeds = list(seeds)
    return [path] if len(seeds) == 1 else [path.with_stem(f"{path.stem}-seed{seed}") for seed in seeds]


def _print_profile(seconds: dict[str, float]) -> None:
    import resource

    import jax

    lines = [f"{name}: {value:.2f} s" for name, value in seconds.items()]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    lines.append(f"peak host memory: {peak / 1e9:.2f} GB")
    for device in jax.local_devices():
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "peak_bytes_in_use" in stats:
            lines.append(f"peak memory of {device}: {stats['peak_bytes_in_use'] / 1e9:.2f} GB")
    print("\n".join(lines), file=sys.stderr)
