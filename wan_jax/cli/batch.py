"""``wan-jax batch``: a file of prompts to a folder of clips, by one worker or many."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from wan_jax.cli import generate
from wan_jax.errors import InputError, nearest

if TYPE_CHECKING:
    from wan_jax.batch import Item, Outcome
    from wan_jax.request import Request

log = logging.getLogger(__name__)

EPILOG = """\
examples:
  wan-jax batch prompts.jsonl --model wan2.1-t2v-1.3b --out clips --size 832x480 --num-steps 30
  wan-jax batch prompts.jsonl --model wan2.1-t2v-14b --out /shared/clips --ray                 (extra ray)

Each line of the file is a JSON object with the options of `generate`, without the dashes; those of the command line
hold for every line that does not say otherwise:
  {"prompt": "a cat surfing", "seed": [1, 2, 3], "num_frames": 49}
  {"prompt": "she turns and smiles", "image": "photo.jpg", "output": "smile.mp4"}
  {"prompt": "Character1 says \\"Hi!\\" to character2.", "reference": ["a.jpg", "b.jpg"], "voice": ["a.wav", null]}
All lines are checked before the model is loaded. Files are named by prompt and settings, or by "output"; a file that
exists is not made again, so repeat the command to continue. Start the command as often as there are devices or hosts,
with the same folder: the workers share the lines, and what a killed one leaves falls to the others.
Exit codes: 0 all lines done, 1 some failed, 2 wrong use, 130 interrupted.
"""
OWN = ("prompts", "out", "lease", "ray")
# Options of `generate` that a line cannot have, and that the command cannot have for all lines.
NOT_IN_LINES = (*generate.OF_THE_WAY, *generate.NOT_SETTINGS, "i_have_consent", "help")
NOT_FOR_ALL = {"output": "--output", "source": "--from", "profile": "--profile"}
MAX_FAULTS = 20  # shown
_SLUG = 40  # characters of the prompt in a file's name


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "batch", help="make many clips", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("prompts", type=Path, help="one JSON object a line")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="takes the clips; shared by workers")
    parser.add_argument(
        "--lease", type=float, default=60.0, metavar="SECONDS", help="silence after which a worker is dead (default 60)"
    )
    parser.add_argument("--ray", action="store_true", help="a worker on every GPU or TPU host of the Ray cluster")
    generate.add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    if not args.lease >= 1:
        raise InputError(f"--lease {args.lease:g}: need 1 or more seconds")
    if args.ray and not args.dry_run:
        return _on_ray(args)
    from wan_jax.batch import work
    from wan_jax.distributed import is_first
    from wan_jax.pipeline import run as run_pipeline

    options = _options(args)
    way = generate.Way.take(options)
    items = read_items(args.prompts, way, options)
    if args.dry_run:
        print(*(args.out / item.name for item in items), sep="\n")
        return 0
    model = way.load()

    def make(item: Item, state: Path, path: Path) -> None:
        request, seed = item.options
        request = replace(generate.make_request(way.spec, request), seeds=(seed,))
        run_pipeline(
            model, request, segment=way.segment, progress=False, resume_file=state,
            finish=(lambda clips: way.sign(clips[0].save(path))) if is_first() else None, **way.marks,
        )  # fmt: skip

    def say(text: str) -> None:
        log.info("%s", text)

    with _termination_interrupts():
        return _tell(work(args.out, items, make, lease=args.lease, say=say))


@contextmanager
def _termination_interrupts() -> Iterator[None]:
    """A scheduler that takes the machine away sends SIGTERM: stop as at Ctrl-C, which keeps the sampler's state."""
    previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _tell(outcome: Outcome) -> int:
    made, found, failed = map(len, outcome)
    log.info("%d made, %d were there or made by other workers, %d failed", made, found, failed)
    return 1 if failed else 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What holds for all lines."""
    for name, option in NOT_FOR_ALL.items():
        if getattr(args, name):
            raise InputError(f"{option} is for one clip: leave it out")
    return generate.options_of(argparse.Namespace(**{k: v for k, v in vars(args).items() if k not in OWN}))


# ---- lines -------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


class Lines:
    """Reads lines as `generate` reads its command line."""

    def __init__(self) -> None:
        self.parser = _Parser(prog="line", add_help=False, allow_abbrev=False)
        generate.add_options(self.parser)
        self.actions = {  # argparse has no public list
            option[2:].replace("-", "_"): action
            for action in self.parser._actions
            for option in action.option_strings
            if action.dest not in NOT_IN_LINES
        }

    def options(self, text: str) -> dict[str, Any]:
        """What a line says, named as `generate.options_of` names it.

        Raises:
            InputError: no JSON object, an unknown key, a value of another kind.
        """
        try:
            line = json.loads(text, object_pairs_hook=_without_repeats)
        except (ValueError, RecursionError) as error:
            raise InputError(f"not JSON: {error}") from error
        if not isinstance(line, dict):
            raise InputError(f'need an object such as {{"prompt": "a cat"}}, got {text.strip():.40}')
        line = {key.replace("-", "_"): value for key, value in line.items() if value is not None}
        if wrong := [f"unknown key {key!r}{nearest(key, self.actions)}" for key in line if key not in self.actions]:
            raise InputError("; ".join(wrong))
        flags, words = {}, list(_references(line.pop("reference", []), line.pop("voice", [])))
        for key, value in line.items():
            action = self.actions[key]
            if action.nargs == 0:
                if not isinstance(value, bool):
                    raise InputError(f"{key}: {value!r:.40}: need true or false")
                flags[action.dest] = action.const if value else not action.const
            elif action.nargs == "+":
                words += [f"--{key.replace('_', '-')}", *(_word(key, x) for x in _listed(value))]
            else:
                values = _listed(value) if key == "describe" else [value]
                words += [f"--{key.replace('_', '-')}={_word(key, x)}" for x in values]
        given = vars(self.parser.parse_args(words))
        return {name: value for name, value in given.items() if value is not None and name in self._dests()} | flags

    def _dests(self) -> set[str]:
        return {action.dest for action in self.actions.values()}


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _word(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise InputError(f"{key}: {value!r:.40}: need text or a number")
    return str(value)


def _references(pictures: Any, voices: Any) -> Iterator[str]:
    """Options of references, each followed by that of its voice."""
    pictures, voices = _listed(pictures), _listed(voices)
    if len(voices) > len(pictures):
        raise InputError(f"voice: {len(voices)} of them for {len(pictures)} of reference; null stands for none")
    for k, picture in enumerate(pictures):
        yield f"--reference={_word('reference', picture)}"
        if k < len(voices) and voices[k] is not None:
            yield f"--voice={_word('voice', voices[k])}"


def read_items(path: Path, way: generate.Way, common: Mapping[str, Any]) -> list[Item]:
    """Every line, once per seed, checked; equal shapes follow each other, so that a program is compiled once.

    Raises:
        InputError: names every wrong line.
    """
    from wan_jax.batch import Item

    try:
        texts = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    logging.getLogger("wan_jax.request").addFilter(_Once())
    reader, faults = Lines(), []
    groups: dict[Any, list[Item]] = {}
    lines: dict[str, int] = {}  # name of a file -> the line that makes it
    for number, text in enumerate(texts, 1):
        if not text.strip():
            continue
        try:
            options = generate.overlay(common, reader.options(text))
            output = options.pop("output", None)
            request = generate.make_request(way.spec, options)
            for seed in request.seeds:
                key = _key(way, request, seed)
                name = _name(request, output, key, seed)
                if name in lines:
                    raise InputError(f'{name} is made by line {lines[name]} too: give another "seed" or "output"')
                lines[name] = number
                groups.setdefault(_shape(request), []).append(Item(name, key, (options, seed)))
        except (InputError, OSError) as error:
            faults.append(f"line {number}: {error}")
    if faults:
        more = [f"... and {len(faults) - MAX_FAULTS} more"] * (len(faults) > MAX_FAULTS)
        raise InputError(f"{path}:\n  " + "\n  ".join([*faults[:MAX_FAULTS], *more]))
    if not groups:
        raise InputError(f'{path} is empty: one JSON object a line, such as {{"prompt": "a cat"}}')
    return [item for group in groups.values() for item in group]


class _Once(logging.Filter):
    """A thousand lines would say the same."""

    def __init__(self) -> None:
        super().__init__()
        self.said: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        new = record.getMessage() not in self.said
        self.said.add(record.getMessage())
        return new


def _key(way: generate.Way, request: Request, seed: int) -> str:
    """Of all that makes a clip."""
    loras, marks = [(lora.name, lora.strength) for lora in way.loras], sorted(way.marks)
    about = request.settings(seed) | {"model": way.model, "dtype": way.dtype, "loras": loras, "marks": marks}
    if way.quantize:
        about["quantize"] = way.quantize
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]


def _name(request: Request, output: str | None, key: str, seed: int) -> str:
    if output is None:
        slug = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower())[:_SLUG].strip("-")
        return f"{slug or 'clip'}-{key}{generate.suffix(request)}"
    if Path(output).name != output or output.startswith(".") or "%" in output:
        raise InputError(f"output {output!r}: need the plain name of one file, such as cat.mp4")
    name = generate.place(request, output).name
    return name if len(request.seeds) == 1 else Path(name).with_stem(f"{Path(name).stem}-seed{seed}").name


def _shape(request: Request) -> tuple[Any, ...]:
    """What decides which compiled programs a request needs."""
    sound = request.sound
    references = [r.voice is not None for r in sound.references] if sound else []
    pictures = request.image is not None, request.last_image is not None
    streams = (sound.video, sound.audio, sound.num_latents) if sound else ()
    return (
        request.width, request.height, request.num_frames, request.guidance, request.solver,
        request.chunk_tokens, request.tiled, *pictures, *streams, *references,
    )  # fmt: skip


# ---- Ray ---------------------------------------------------------------------------------------------------


def _on_ray(args: argparse.Namespace) -> int:
    """The same command on every GPU or host of a Ray cluster. The folder is the queue: Ray starts workers, and starts
    them again when they die."""
    try:
        import ray
    except ImportError as error:
        raise InputError("--ray needs Ray: pip install wan_jax[ray]") from error
    values = {name: value for name, value in vars(args).items() if name not in ("run", "parser")} | {"ray": False}

    @ray.remote(max_restarts=3, max_task_retries=3)
    class Worker:
        def run(self, folder: str, values: dict[str, Any]) -> int:
            from wan_jax.cli import run_command

            os.chdir(folder)
            return run_command(argparse.Namespace(**values, run=run))

    ray.init(ignore_reinit_error=True)
    workers = [Worker.options(**resources).remote() for resources in _places(ray.nodes())]
    log.info("%d workers", len(workers))
    codes = []
    for running in [worker.run.remote(os.getcwd(), values) for worker in workers]:
        try:
            codes.append(ray.get(running))
        except ray.exceptions.RayError as error:  # died too often, or does not see the folder
            log.error("a worker is lost: %s", error)
    return min(codes, default=1)  # a worker that returns 0 has seen every file


def _places(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Resources of each worker: one GPU, or all TPU chips of a host; CPUs only where no host has either."""
    hosts = [node["Resources"] for node in nodes if node["Alive"]]
    places: list[dict[str, Any]] = [{"num_gpus": 1} for host in hosts for _ in range(int(host.get("GPU", 0)))]
    places += [{"resources": {"TPU": host["TPU"]}} for host in hosts if host.get("TPU")]
    return places or [{"num_cpus": 1, "scheduling_strategy": "SPREAD"} for host in hosts if host.get("CPU", 0) >= 1]
