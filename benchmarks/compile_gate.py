"""A gate that needs no TPU and no GPU: what their compilers say of one step of a 14B model, against a baseline.

    python benchmarks/compile_gate.py                   # every compiler that is installed: pip install "wan_jax[gate]"
    python benchmarks/compile_gate.py --only v6e        # v6e, v7x, h200 or rtx4090
    python benchmarks/compile_gate.py --baseline write  # after a change that is meant, or a new compiler

The step is one denoising step of 720p x 81 frames (75,600 tokens) with guidance in a batch of two. All figures are
compiler estimates (`hlo.py` says how they are read); a claim of speed still needs a device. The same compiler gives the
same figures, to the byte. Exit code: 0 passed, 1 something got worse, 2 no verdict (no compiler is installed, or the
baseline is of other versions: look at the table, then write a new one).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import hlo

from wan_jax.aot import compile_here, elsewhere, environment
from wan_jax.config import MODELS
from wan_jax.errors import InputError
from wan_jax.plan import Device, find_device
from wan_jax.request import Request, resolve

BASELINE = Path(__file__).parent / "compile_gate.json"
MODEL = "wan2.1-t2v-14b"
PACKAGES = {"tpu": ("jax", "libtpu"), "cuda": ("jax", "jax-cuda13-plugin", "nvidia-cublas", "nvidia-cudnn-cu13")}
MARGIN = 1.03  # how much of anything may be added before it is a fault


class Case(NamedTuple):
    device: str
    axes: dict[str, int] | None = None
    quantize: str | None = None


CASES = {
    "v6e": Case("v6e-8", {"data": 2, "fsdp": 4}),
    "v7x": Case("v7x-8", {"data": 2, "fsdp": 4}),
    "h200": Case("h200"),
    "rtx4090": Case("rtx4090", quantize="fp8"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, help="one device")
    parser.add_argument("--baseline", choices=("check", "write"), default="check")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    baselines = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    results, faults, undecided = {}, [], []
    for name in [args.only] if args.only else CASES:
        try:
            results[name] = estimate(CASES[name])
        except InputError as error:
            undecided.append(f"{name}: {error}")
            continue
        known = baselines.get(name)
        if args.baseline == "write":
            baselines[name] = results[name]
        elif known is None or known["versions"] != results[name]["versions"]:
            undecided.append(f"{name}: the baseline is of {known and known['versions']}: re-baseline")
            known = None
        faults += [f"{name}: {fault}" for fault in compare(results[name], known)]
        if not args.json:
            show(name, results[name], known)
    if args.baseline == "write":
        BASELINE.write_text(json.dumps(baselines, indent=1) + "\n")
    if args.json:
        print(json.dumps({"results": results, "faults": faults, "undecided": undecided}, indent=1))
    else:
        print("\n".join([f"WORSE {fault}" for fault in faults] + [f"NO VERDICT {reason}" for reason in undecided]))
    return 1 if faults else 2 if undecided else 0


def estimate(case: Case) -> dict[str, Any]:
    """Versions and figures of one case.

    Raises:
        InputError: its compiler is not installed.
    """
    device, spec = find_device(case.device), MODELS[MODEL]
    environment(device)
    versions = {name: importlib.metadata.version(name) for name in PACKAGES[device.platform]}
    request = resolve(spec, "a gate", size=(1280, 720), num_frames=81, guidance="batch")
    figures = elsewhere(figures_here, device, request, case)
    return {"versions": versions, "figures": figures}


def figures_here(device: Device, request: Request, case: Case) -> dict[str, Any]:
    """In the process of the compiler."""
    begin = time.perf_counter()
    compiled = compile_here(device, MODELS[MODEL], request, case.axes, "bfloat16", case.quantize)
    print(f"{device} compiled in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    memory = compiled.memory_analysis()
    # The CUDA compiler counts what is donated twice in its peak.
    gpu = device.platform == "cuda"
    peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes if gpu else memory.peak_memory_in_bytes
    report = hlo.read(compiled.as_text(), hlo.CHIPS.get(device.name))
    counts = {name: value for name, value in dataclasses.asdict(report).items() if value or isinstance(value, int)}
    calls = {target: n for target, n in counts.pop("calls", {}).items() if target.startswith(("__cu", "tpu_"))}
    times = {name: round(value, 4) for name, value in counts.items() if isinstance(value, float)}
    if times:
        times["non_attention"] = round(times["matmul"] + times["elementwise"] + times["copies"], 4)
    return {"peak_gib": round(peak / 2**30, 3)} | counts | times | calls


def compare(result: dict[str, Any], known: dict[str, Any] | None) -> list[str]:
    """What is wrong in itself, and what got worse than ``known``."""
    now = result["figures"]
    faults = [f"{now[name]} {name}" for name in ("windowed", "transposes") if now[name]]
    if "libtpu" not in result["versions"]:
        faults += [] if now["gelu"] else ["no product with GELU in its epilogue"]
        faults += [] if now.get("__cudnn$fmhaSoftmax", 0) >= 2 else ["fewer than two attentions by cuDNN"]
    if known is None:
        return faults
    before = known["figures"]
    for name in ("peak_gib", "non_attention", "copies", "collectives", "large_copies"):
        if now.get(name, 0) > MARGIN * before.get(name, 0):
            faults.append(f"{name} {now[name]}, was {before.get(name, 0)}")
    for name, count in before.items():
        if name.startswith(("__cu", "tpu_")) and now.get(name, 0) < count:
            faults.append(f"{now.get(name, 0)} {name}, were {count}")
    return faults


def show(name: str, result: dict[str, Any], known: dict[str, Any] | None) -> None:
    case = CASES[name]
    form = ", ".join([f"{axis} {n}" for axis, n in (case.axes or {}).items()] + [case.quantize or "bfloat16"])
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    print(f"{case.device} ({form}), compiler estimates by {versions}")
    for figure, value in result["figures"].items():
        unit = " s" if isinstance(value, float) and figure != "peak_gib" else ""
        before = "" if known is None else f"   baseline {known['figures'].get(figure, 0)}"
        print(f"  {figure:22s} {value}{unit}{before}")


if __name__ == "__main__":
    sys.exit(main())
