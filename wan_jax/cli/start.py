"""What commands that run a model do first: compiled programs are kept, and processes on several hosts join."""

from __future__ import annotations

import argparse
import logging

OPTIONS = ("compile_cache", "distributed", "coordinator", "num_processes", "process_id", "check")


def add_options(parser: argparse.ArgumentParser, *, hosts: bool) -> None:
    """The options of `start`; ``hosts``: those of several hosts too."""
    parser.add_argument(
        "--compile-cache", metavar="FOLDER|off", help="where compiled programs are kept for the next start; default:"
        " WAN_JAX_COMPILE_CACHE, JAX_COMPILATION_CACHE_DIR, or a folder in ~/.cache/wan_jax",
    )  # fmt: skip
    if not hosts:
        return
    group = parser.add_argument_group("one model on several hosts: the same command on all of them (docs/multihost.md)")
    group.add_argument(
        "--distributed", action="store_true",
        help="join the processes on the other hosts; found on TPU slices, under Slurm, Open MPI and Kubernetes",
    )  # fmt: skip
    group.add_argument("--coordinator", metavar="HOST:PORT", help="elsewhere: a free port of the first host,")
    group.add_argument("--num-processes", type=int, metavar="N", help="how many processes there are,")
    group.add_argument("--process-id", type=int, metavar="I", help="and which this one is, from 0")
    group.add_argument("--check", action="store_true", help="print what this process sees of all devices, and stop")


def start(args: argparse.Namespace) -> int | None:
    """Do what the options of `add_options` say; an exit code where the command ends here."""
    if not hasattr(args, "compile_cache"):
        return None
    from wan_jax.cache import keep_programs

    cache = keep_programs(args.compile_cache)
    if not hasattr(args, "distributed"):
        return None
    from wan_jax.distributed import check, choose_mesh, is_first, join
    from wan_jax.errors import InputError

    given = [name for name in ("coordinator", "num_processes", "process_id") if getattr(args, name) is not None]
    if args.distributed:
        join(args.coordinator, args.num_processes, args.process_id)
    elif given:
        raise InputError(f"--{given[0].replace('_', '-')} needs --distributed")
    if args.check:
        lines, fits = check(choose_mesh(getattr(args, "mesh", None)), cache)
        print(lines, flush=True)
        return 0 if fits else 1
    if args.distributed and not is_first():
        args.quiet = True
        logging.getLogger().setLevel(logging.WARNING)
    return None
