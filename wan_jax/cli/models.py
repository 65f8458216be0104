"""``wan-jax models``: what can be run, what it needs, and where it comes from."""

from __future__ import annotations

import argparse
import json

from wan_jax.config import MODELS, ModelSpec
from wan_jax.weights.hub import ships

TASKS = {
    "t2v": "text to video, text to image", "i2v": "picture to video", "flf2v": "first and last picture to video",
    "ti2v": "text or picture to video", "ti2av": "text or picture to video with sound",
    "r2av": "references to video with sound",
}  # fmt: skip


def add_parser(subparsers) -> argparse.ArgumentParser:
    description = "List the models: task, parameters, memory of the weights, licence."
    parser = subparsers.add_parser("models", help="list the models", description=description)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def describe(spec: ModelSpec) -> dict:
    """One row. Memory is that of the diffusion transformers' weights alone."""
    billions = spec.num_params / 1e9
    count = f"{billions / spec.num_experts:.1f} B" if billions >= 0.1 else f"{billions * 1000:.1f} M"
    experts = f"{spec.num_experts} x " * (spec.num_experts > 1)
    return {
        "name": spec.name,
        "task": TASKS[spec.task],
        "parameters": f"{experts}{count}",
        "memory_bf16_gb": round(billions * 2, 1 if billions >= 0.1 else 3),
        "memory_int8_gb": round(billions, 1 if billions >= 0.1 else 3),
        "sizes": [f"{w}x{h}" for w, h in spec.sizes],
        "num_frames": spec.num_frames,
        "fps": spec.fps,
        "licence": spec.licence,
        "repository": spec.repository or ("in this package" if ships(spec.name) else "not published"),
    }


def run(args: argparse.Namespace) -> int:
    rows = [describe(spec) for spec in MODELS.values()]
    if args.json:
        print(json.dumps(rows, indent=1))
        return 0
    table = [("NAME", "TASK", "PARAMETERS", "BF16", "INT8", "SIZES", "FRAMES", "FPS", "LICENCE", "REPOSITORY")]
    table += [
        (
            r["name"], r["task"], r["parameters"], f"{r['memory_bf16_gb']} GB", f"{r['memory_int8_gb']} GB",
            " ".join(r["sizes"]), str(r["num_frames"]), str(r["fps"]), r["licence"], r["repository"],
        )
        for r in rows
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("\nBF16: weights of the diffusion transformers alone; of two experts one is used at a time.")
    print("INT8: what these weights would take; quantisation is not here yet.")
    print("wan2.6-r2av-11b: without its adapters, which are yours to train; see `wan-jax convert adapters --help`.")
    print("The umT5-xxl text encoder (11.4 GB in bf16) runs first and can be freed before (--offload).")
    return 0
