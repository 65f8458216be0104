"""The ``wan-jax`` command. Exit codes: 0 done, 1 failed, 2 wrong use, 3 out of memory, 130 interrupted."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from wan_jax import __version__
from wan_jax.cli.start import add_options, start
from wan_jax.errors import InputError, OutOfMemoryError, WanError, nearest

# One module per command, each with ``add_parser(subparsers)`` and ``run(args) -> int``.
COMMANDS = ("generate", "batch", "plan", "evaluate", "models", "download", "convert", "verify", "train")
# Those that run a model: their programs are kept on disk, and some of them run on several hosts at once.
RUNNERS = {"generate": True, "batch": True, "evaluate": False, "train": False}


class Parser(argparse.ArgumentParser):
    """One line per mistake, with the nearest option or command."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            command = getattr(parsed, "parser", self)
            options = [o for action in command._actions for o in action.option_strings]  # argparse has no public list
            wrong = [f"unknown option {u!r}{nearest(u, options)}" for u in unknown if u.startswith("-")]
            command.error("; ".join(wrong) or f"unexpected {' '.join(unknown)!r}: text with blanks needs quotes")
        return parsed

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            choices = [str(c) for c in action.choices]
            raise argparse.ArgumentError(action, f"{value!r}: use {', '.join(choices)}{nearest(str(value), choices)}")


def make_parser() -> Parser:
    parser = Parser(prog="wan-jax", description="The Wan video models in JAX. Each command has its own --help.")
    parser.add_argument("--version", action="version", version=f"wan_jax {__version__}")
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = importlib.import_module(f"wan_jax.cli.{name}")
        command = module.add_parser(subparsers)
        if name in RUNNERS:
            add_options(command, hosts=RUNNERS[name])
        command.set_defaults(run=module.run, parser=command)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(make_parser().parse_args(argv))


def run_command(args: argparse.Namespace) -> int:
    """One parsed command line, with its errors told in one line."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if getattr(args, "quiet", False) else logging.INFO)
    for noisy in ("jax", "absl", "orbax", "httpx", "httpcore", "huggingface_hub", "filelock", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    try:
        code = start(args)
        return args.run(args) if code is None else code
    except KeyboardInterrupt:
        print("wan-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `wan-jax models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (WanError, OSError) as error:  # OSError: a full disk, a file without permission
        print(f"wan-jax: {error}", file=sys.stderr)
        if isinstance(error, OutOfMemoryError):
            return 3
        return 2 if isinstance(error, InputError) else 1
