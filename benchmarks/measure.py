"""What the benchmarks share: the device and what its matrix products reach, timing, the table and its JSON.

On an accelerator seconds are those of the clock. On a CPU they are process CPU seconds of one core, to which the
process pins itself before any library starts its threads: other work on the machine then matters little. Operations
are those of `wan_jax.work` (norms, softmax and activations are not counted); "of ceiling" compares them with matrix
products of the same precision, on the same device, in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import logging
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from wan_jax.config import ModelSpec
    from wan_jax.request import Request

ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "vfio/[0-9]*")  # in /dev
MATRIX = {"cpu": 1024, "accelerator": 8192}  # sides of the products that give the ceiling
PRODUCTS = {"cpu": 4, "accelerator": 32}  # of one program, which hides what it takes to start it
PACKAGES = ("wan_jax", "jax", "jaxlib", "flax", "torch", "diffusers", "transformers")


# ---- before jax starts -------------------------------------------------------------------------------------


def on_cpu() -> bool:
    """Whether JAX will run on the CPU, told without starting it."""
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms.startswith("cpu")
    return not any(any(Path("/dev").glob(pattern)) for pattern in ACCELERATORS)


def prepare() -> None:
    """To be called before jax or torch is imported."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # a peer in the same process needs memory too
    if on_cpu():
        os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


def parser(about: str, *, size: str, num_frames: int, layers: bool = True) -> argparse.ArgumentParser:
    """The options that all benchmarks of one network have; ``size`` and ``num_frames`` are a CPU's."""
    made = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", default="wan2.1-t2v-1.3b", help="a name of `wan-jax models`")
    made.add_argument("--size", help=f"WIDTHxHEIGHT; default the model's own, on a CPU {size}")
    made.add_argument("--num-frames", type=int, help=f"4n+1; default the model's own, on a CPU {num_frames}")
    made.add_argument("--dtype", choices=("bfloat16", "float32"), help="default bfloat16, on a CPU float32")
    if layers:
        made.add_argument("--layers", type=int, help="of the network, to cut its depth; default all")
    made.add_argument(
        "--small", action=argparse.BooleanOptionalAction, help="a narrow relative of the network; default: on a CPU"
    )
    made.add_argument("--repeats", type=int, default=5, help="after a warm-up; the median counts (default 5)")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    made.add_argument("--peer", choices=("diffusers",), help="the same work in PyTorch, in turn (extra oracle)")
    made.set_defaults(cpu=(size, num_frames))
    return made


def settle(args: argparse.Namespace, part: str, small: Mapping[str, Any]) -> ModelSpec:
    """Fill the defaults that depend on the device, and return the model, its network ``part`` narrowed as asked."""
    from wan_jax.config import find_model
    from wan_jax.weights.layouts import SPEC_FIELDS

    spec, cpu = find_model(args.model), on_cpu()
    size, num_frames = args.cpu if cpu else (f"{spec.sizes[0][0]}x{spec.sizes[0][1]}", spec.num_frames)
    args.size, args.num_frames = args.size or size, args.num_frames or num_frames
    args.dtype = args.dtype or ("float32" if cpu else "bfloat16")
    field = SPEC_FIELDS.get(part, "dit")
    changes = dict(small) if (cpu if args.small is None else args.small) else {}
    if getattr(args, "layers", None):
        changes["num_layers"] = args.layers
    return dataclasses.replace(spec, **{field: dataclasses.replace(getattr(spec, field), **changes)})


# ---- what is measured --------------------------------------------------------------------------------------


def asked(spec: ModelSpec, size: str, num_frames: int, guidance: str, num_steps: int = 2) -> Request:
    """A request with blank pictures, and one silent reference where the model takes them; "none": a pass a step."""
    import numpy as np

    from wan_jax.references import ResolvedReference
    from wan_jax.request import parse_size, resolve

    for adviser in ("request", "small"):  # nobody looks at this clip
        logging.getLogger(f"wan_jax.{adviser}").setLevel(logging.ERROR)
    options: dict[str, Any] = {} if guidance == "none" else {"guidance": guidance}
    if guidance == "none":
        options["guidance_scale"] = (1.0, 1.0) if spec.num_experts == 2 else 1.0
        if spec.sound:
            options["audio_guidance_scale"] = 1.0
            options |= dict.fromkeys(("image_guidance", "voice_guidance", "sync_guidance"), 0.0)
    width, height = parse_size(size)
    blank = np.zeros((height, width, 3), np.uint8)
    if spec.task in ("i2v", "flf2v"):
        options["image"] = blank
    if spec.task == "flf2v":
        options["last_image"] = blank
    if spec.takes_references:
        voice = np.zeros(16_000, np.float32)
        options |= {"references": [ResolvedReference(blank, voice, voice)], "consent": "none is shown"}
    return resolve(spec, "a benchmark", size=(width, height), num_frames=num_frames, num_steps=num_steps, **options)


def random_arrays(tree: Any, scale: float = 1.0) -> Any:
    """Normal numbers on the device in the place of shapes; -1 for integers, which count something that is not there.

    Equal numbers would be multiplied with less power than any real ones, and faster.
    """
    import jax
    import jax.numpy as jnp

    @functools.partial(jax.jit, static_argnums=(1, 2))
    def make(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.random.normal(key, shape, dtype) * jnp.asarray(scale, dtype)

    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def value(key: jax.Array, x: Any) -> Any:
        if not isinstance(x, jax.ShapeDtypeStruct):
            return x
        return make(key, x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.full(x.shape, -1, x.dtype)

    return structure.unflatten([value(key, x) for key, x in zip(keys, leaves, strict=True)])


def find_peer(args: argparse.Namespace, spec: ModelSpec, part: str) -> Any:
    """The `peers.Peer` that was asked for, or None."""
    if not args.peer:
        return None
    from peers import Peer

    return Peer(spec, part, args.dtype)


def weights(shape: Any, peer: Any) -> Any:
    """A network on the device: with the weights of the peer where these can be the same, else random ones."""
    return peer.network() if peer is not None and peer.shares_weights else random_arrays(shape, 0.02)


def difference(ours: Any, theirs: Any) -> float:
    """Relative, L2."""
    import numpy as np

    return float(np.linalg.norm(np.float32(ours) - np.float32(theirs)) / np.linalg.norm(np.float32(theirs)))


class Case(NamedTuple):
    """One way to do the work. run: starts it. flop: what it takes. dtype: of the products."""

    name: str
    run: Callable[[], Any]
    flop: float
    dtype: str


class Timing(NamedTuple):
    """first: seconds of the first run, compiling included. seconds: of those after it."""

    first: float
    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def clock() -> float:
    return time.process_time() if on_cpu() else time.perf_counter()


def time_in_turn(cases: Sequence[Case], repeats: int) -> list[Timing]:
    """Every case once to warm up, then all of them in turn in each round, so that all see the same machine."""
    import jax

    seconds: list[list[float]] = [[] for _ in cases]
    for _ in range(1 + repeats):
        for case, taken in zip(cases, seconds, strict=True):
            begin = clock()
            jax.block_until_ready(case.run())
            taken.append(clock() - begin)
    return [Timing(first, rest) for first, *rest in seconds]


def ceiling(dtype: str, repeats: int = 5) -> float:
    """TFLOP/s of square matrix products in this precision, here and now: the best of ``repeats``."""
    import jax
    import jax.numpy as jnp

    from wan_jax.nn.layers import matmul_precision

    kind = "cpu" if on_cpu() else "accelerator"
    n, count = MATRIX[kind], PRODUCTS[kind]
    a, b = (jax.random.normal(key, (n, n), jnp.dtype(dtype)) for key in jax.random.split(jax.random.key(0)))

    @jax.jit
    def products(a: jax.Array, b: jax.Array) -> jax.Array:
        def body(_: int, x: jax.Array) -> jax.Array:  # scaled, or the numbers would grow out of range
            return jnp.dot(x, b, precision=matmul_precision(x.dtype)) * jnp.asarray(n**-0.5, x.dtype)

        return jax.lax.fori_loop(0, count, body, a)

    flop = 2.0 * count * n**3
    (timing,) = time_in_turn([Case("", lambda: products(a, b), flop, dtype)], repeats)
    return flop / min(timing.seconds) / 1e12


def resident(mark: str) -> int | None:
    """Bytes of this process: VmRSS now, VmHWM the highest so far; None where /proc does not tell. (`ru_maxrss` would
    include the parent before exec.)
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(mark))


def peak_memory() -> int | None:
    """Highest bytes so far: of JAX on the device, or of this process on the CPU."""
    import jax

    stats = None if on_cpu() else jax.devices()[0].memory_stats()
    return stats.get("peak_bytes_in_use") if stats else resident("VmHWM")


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- what is said ------------------------------------------------------------------------------------------


def compare(
    title: str,
    cases: Sequence[Case],
    args: argparse.Namespace,
    difference: Callable[[], float] | None = None,
    **about: Any,
) -> dict[str, Any]:
    """Time cases in turn, print the table, write the JSON. The ratio of each is to the first one.

    Args:
        difference: of the outputs from the peer's, where the weights are equal.
    """
    import jax

    device = jax.devices()[0]
    peaks = {dtype: ceiling(dtype) for dtype in dict.fromkeys(case.dtype for case in cases)}
    rows = []
    timings = time_in_turn(cases, args.repeats)
    if difference:
        about["difference"] = difference()
    for case, timing in zip(cases, timings, strict=True):
        rate = case.flop / timing.median / 1e12
        rows.append({
            "name": case.name, "dtype": case.dtype, "seconds": timing.median, "min": min(timing.seconds),
            "max": max(timing.seconds), "first": timing.first, "tflop": case.flop / 1e12, "tflop_per_second": rate,
            "of_ceiling": rate / peaks[case.dtype], "ratio": timing.median / timings[0].median,
        })  # fmt: skip
    report = {
        "benchmark": title, "device": device.device_kind, "platform": device.platform, "versions": versions(),
        "clock": "CPU seconds of one core" if on_cpu() else "seconds", "repeats": args.repeats, "ceilings": peaks,
        "peak_bytes": peak_memory(), **about, "rows": rows,
    }  # fmt: skip
    print(table(report))
    write(report, args.json)
    return report


def table(report: Mapping[str, Any]) -> str:
    """A report of `compare` as text."""
    packages = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    ceilings = ", ".join(f"{rate:.3g} TFLOP/s in {dtype}" for dtype, rate in report["ceilings"].items())
    lines = [report["benchmark"], f"{report['device']} ({report['platform']}); {packages}"]
    lines += [f"ceiling of matrix products: {ceilings}; {report['clock']}, median of {report['repeats']}"]
    heads = ("", "dtype", "seconds", "min to max", "first run", "TFLOP", "TFLOP/s", "of ceiling", "ratio")
    rows = [heads] + [
        (
            row["name"], row["dtype"], f"{row['seconds']:.4g}", f"{row['min']:.4g} to {row['max']:.4g}",
            f"{row['first']:.3g}", f"{row['tflop']:.4g}", f"{row['tflop_per_second']:.4g}",
            f"{row['of_ceiling']:.0%}", f"{row['ratio']:.3f}",
        )
        for row in report["rows"]
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines += ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    if report["peak_bytes"]:
        lines.append(f"peak memory {report['peak_bytes'] / 1e9:.2f} GB")
    if (difference := report.get("difference")) is not None:
        lines.append(f"relative difference of the outputs, with equal weights: {difference:.1e}")
    return "\n".join(lines)


def write(report: Mapping[str, Any], path: Path | None) -> None:
    """Whole or not at all: whoever is stopped leaves no half of a file."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.new")
        temporary.write_text(json.dumps(report, indent=1))
        temporary.replace(path)
