"""Seconds and peak memory of loading a real-size model, from the official files and from their Orbax copy.

    python benchmarks/loading.py                            # Wan2.1-T2V-1.3B, in a temporary folder
    python benchmarks/loading.py --folder DIR               # keeps the checkpoints there, and uses what it finds
    python benchmarks/loading.py --folder DIR --with-text-encoder     # 11.4 GB more, for a whole `wan-jax generate`

Weights are random; names, shapes, files and shards are those of the published model: DiT and VAE in float32, and a
tiny text encoder that nobody loads (or the real one in bfloat16). Each load runs in a process of its own, DiT as
bfloat16, VAE as float32, right after the files were read once, so that the disk is left out. CPU seconds are those
of all threads. Peak memory is the high-water mark of resident memory less what is resident once jax and wan_jax are
imported. Linux only: the marks come from /proc.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import resident

GB = 1e9
# Layout -> (times the weights in bfloat16, plus GB): the most that a load may take.
LIMITS = {"official": (2.0, 1.0), "orbax": (1.4, 0.3)}


def load_once(folder: str) -> None:
    """Load once, in this process; print a line of JSON."""
    import jax

    import wan_jax

    before = resident("VmRSS")
    begin, cpu = time.perf_counter(), time.process_time()
    model = wan_jax.load(folder, offload=False)
    jax.block_until_ready((model.dit, model.vae))
    result = {"seconds": time.perf_counter() - begin, "cpu": time.process_time() - cpu}
    sizes = [leaf.size for leaf in jax.tree.leaves((model.dit, model.vae))]
    print(json.dumps(result | {"peak": resident("VmHWM") - before, "weights": 2 * sum(sizes)}))


def make(official: Path, with_text_encoder: bool, name: str) -> None:
    from wan_jax.config import find_model
    from wan_jax.conversion import random_folder, tiny_spec

    spec = find_model(name)
    if not with_text_encoder:
        small = dataclasses.replace(tiny_spec("t2v").text, dim=spec.dit.text_dim)
        spec = dataclasses.replace(spec, text=small)
    random_folder(spec, official)


def run(folder: Path, args: argparse.Namespace) -> None:
    official, orbax = folder / "official", folder / "orbax"
    if not official.exists():
        begin = time.perf_counter()
        make(official, args.with_text_encoder, args.model)
        print(f"random weights written in {time.perf_counter() - begin:.1f} s")
    if not (orbax / "wan_jax.json").exists():
        begin = time.perf_counter()
        cli = [sys.executable, "-m", "wan_jax.cli", "convert", "import", official, orbax]
        subprocess.run(cli, check=True)
        print(f"imported to Orbax in {time.perf_counter() - begin:.1f} s")
    heads = f"{'seconds':>8s} {'CPU s':>8s} {'peak GB':>8s} {'limit GB':>9s}"
    print(f"{'layout':10s} {heads}   weights in bfloat16 x factor + GB")
    for layout, (factor, extra) in LIMITS.items():
        command = [sys.executable, __file__, "--measure", folder / layout]
        runs = [json.loads(subprocess.check_output(command)) for _ in range(1 + args.repeats)][1:]
        peak, weights = max(one["peak"] for one in runs) / GB, runs[0]["weights"] / GB
        limit = factor * weights + extra
        seconds, cpu = (statistics.median(one[key] for one in runs) for key in ("seconds", "cpu"))
        verdict = "" if peak <= limit else "   OVER THE LIMIT"
        numbers = f"{seconds:8.1f} {cpu:8.1f} {peak:8.2f} {limit:9.2f}"
        print(f"{layout:10s} {numbers}   {weights:.2f} x {factor} + {extra}{verdict}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.1-t2v-1.3b", help="a name of `wan-jax models`")
    parser.add_argument("--folder", type=Path, help="where the checkpoints are or shall be; default a temporary folder")
    parser.add_argument("--with-text-encoder", action="store_true", help="write the text encoder in its real size")
    parser.add_argument("--repeats", type=int, default=3, help="median seconds, largest peak")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if args.measure:
        load_once(args.measure)
    elif args.folder:
        run(args.folder, args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            run(Path(folder), args)


if __name__ == "__main__":
    main()
