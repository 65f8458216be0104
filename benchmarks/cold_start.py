"""From the start of a process to its first step and to its clip: with an empty folder of compiled programs, and again.

    python benchmarks/cold_start.py                          # wan2.6-nano, which comes with the package
    python benchmarks/cold_start.py --model FOLDER --size 832x480 --num-frames 81 --num-steps 4

Every start is a new process that does what `wan-jax generate` does. Beside the clock stand its CPU seconds, which
other work on the machine changes little; and what JAX says of the time it took to trace, to lower, to compile and to
read compiled programs (in all threads; compiling is part of no other).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

BEGIN = "WAN_JAX_BENCHMARK_BEGIN"  # when the parent started the process, in seconds since the epoch
EVENTS = {
    "tracing": "/jax/core/compile/jaxpr_trace_duration",
    "lowering": "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "compiling or reading": "/jax/core/compile/backend_compile_duration",
    "of that reading": "/jax/compilation_cache/cache_retrieval_time_sec",
}
PUPPET = 'Character1 nods in front of a plain blue wall and says "ba do mi".'


def start(args: argparse.Namespace) -> None:
    """In the new process: make a clip, print when what was done."""
    begin, marks, taken = float(os.environ[BEGIN]), {}, dict.fromkeys(EVENTS, 0.0)

    def mark(name: str) -> None:
        marks.setdefault(name, (time.time() - begin, time.process_time()))

    import jax

    from wan_jax.cache import keep_programs
    from wan_jax.model import load
    from wan_jax.pipeline import Stages
    from wan_jax.pipeline import run as run_pipeline
    from wan_jax.references import CONSENT, Reference, resolve_references
    from wan_jax.request import resolve

    keep_programs()

    def hear(event: str, seconds: float, **_: Any) -> None:
        for name, ours in EVENTS.items():
            taken[name] += seconds * (event == ours)

    jax.monitoring.register_event_duration_secs_listener(hear)
    mark("imported")
    model = load(args.model)
    for part in model.parts if not model.offload else ():
        model.network(part)
    mark("loaded")
    names = ("size", "num_frames", "num_steps")
    options = {name: value for name in names if (value := getattr(args, name)) is not None}
    if model.spec.takes_references:
        assets = Path(sys.modules["wan_jax"].__file__).parent / "assets"
        puppet = Reference.open(assets / "puppet.png", assets / "puppet.wav")
        options |= {"references": resolve_references([puppet]), "consent": CONSENT}
    request = resolve(model.spec, PUPPET, **options)

    stages = Stages(False)
    with tempfile.TemporaryDirectory() as folder:
        run_pipeline(
            model, request, progress=False, stages=stages, callback=lambda _: mark("first step"),
            finish=lambda clips: clips[0].save(Path(folder) / "clip.mp4"),
        )  # fmt: skip
    mark("written")
    print(json.dumps({
        "marks": marks, "stages": stages.seconds, "jax": taken, "steps": request.num_steps,
        "peak_bytes": measure.resident("VmHWM"),
    }))  # fmt: skip


def run(args: argparse.Namespace, home: str) -> dict[str, Any]:
    """One start with the compiled programs in ``home``, as `start` tells it."""
    words = ["--child", "--model", args.model]
    for name in ("size", "num_frames", "num_steps"):
        if (value := getattr(args, name)) is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    environment = {name: text for name, text in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"WAN_JAX_COMPILE_CACHE": home, BEGIN: str(time.time())}
    command = [sys.executable, __file__, *words]
    said = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.6-nano", help="as of `wan-jax generate` (default wan2.6-nano)")
    parser.add_argument("--size", help="default the model's own")
    parser.add_argument("--num-frames", type=int, help="default the model's own")
    parser.add_argument("--num-steps", type=int, help="default the model's own")
    parser.add_argument("--repeats", type=int, default=5, help="warm starts; the median counts (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        return start(args)
    report = {"benchmark": f"cold start of {args.model}", "versions": measure.versions(), "repeats": args.repeats}
    print(report["benchmark"] + "; " + ", ".join(f"{name} {number}" for name, number in report["versions"].items()))
    with tempfile.TemporaryDirectory() as home:
        for name, starts in (("cold", 1), ("warm", args.repeats)):
            report[name] = summary([run(args, home) for _ in range(starts)])
            tell(f"{name}, median of {starts}" if starts > 1 else name, report[name])
            measure.write(report, args.json)
    return report


def tell(name: str, said: dict[str, Any]) -> None:
    marks = (f"{mark} {wall:.1f} s (CPU {cpu:.1f})" for mark, (wall, cpu) in said["marks"].items())
    print(f"{name}, {said['steps']} steps: " + ", ".join(marks))
    parts = said["jax"] | said["stages"]
    print("  " + ", ".join(f"{what} {seconds:.2f} s" for what, seconds in parts.items()), flush=True)


def summary(starts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians of every figure."""

    def median(values: Sequence[Any]) -> Any:
        first = values[0]
        if isinstance(first, dict):
            return {name: median([value[name] for value in values]) for name in first}
        if isinstance(first, list):
            return [median(column) for column in zip(*values, strict=True)]
        return statistics.median(values)

    return median(starts) | {"starts": list(starts)}


if __name__ == "__main__":
    main()
