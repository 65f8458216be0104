"""What shorter ways to a clip cost in quality, beside the time that they save: step caches, fewer steps, guidance on a
part of them.

    python benchmarks/shortcuts.py               # wan2.6-nano, 8 held-out puppets

Every way makes the same clips from the same noise. Prints the median seconds of sampling one (on a CPU process CPU
seconds of all cores, which other work on the machine hardly changes), the ratio to the full schedule, and how far the
frames are from that schedule's: PSNR in dB and SSIM (Wang et al. 2004, luma, windows of 7), mean over the clips with
their standard error. Programs are compiled beforehand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

WAYS: dict[str, dict[str, Any]] = {
    "full schedule": {},
    "step cache 0.05": dict(step_cache=0.05),
    "step cache 0.1": dict(step_cache=0.1),
    "step cache 0.2": dict(step_cache=0.2),
    "step cache 0.4": dict(step_cache=0.4),
    "3/4 of the steps": dict(share=0.75),
    "half of the steps": dict(share=0.5),
    "guidance below 0.9": dict(guidance_interval=(0.0, 0.9)),
    "guidance 0.3 to 0.9": dict(guidance_interval=(0.3, 0.9)),
}


def ssim(a_THW3: np.ndarray, b_THW3: np.ndarray) -> float:
    """Structural similarity of two uint8 videos, mean over the frames."""
    from scipy.ndimage import uniform_filter

    luma = np.array([0.299, 0.587, 0.114])
    a, b = (x.astype(np.float64) @ luma for x in (a_THW3, b_THW3))

    def mean(x: np.ndarray) -> np.ndarray:
        return uniform_filter(x, size=(0, 7, 7))[:, 3:-3, 3:-3]

    ma, mb = mean(a), mean(b)
    unbiased = 49 / 48
    va, vb, vab = (unbiased * (mean(x) - m) for x, m in ((a * a, ma * ma), (b * b, mb * mb), (a * b, ma * mb)))
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    return float((((2 * ma * mb + c1) * (2 * vab + c2)) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="wan2.6-nano", help="a model that `wan-jax evaluate` can score")
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--num-steps", type=int, default=40, help="of the full schedule (default 40)")
    parser.add_argument("--solver", default="unipc")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="float32")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()

    import jax

    import wan_jax
    from wan_jax import pipeline
    from wan_jax.evaluate.puppets import psnr
    from wan_jax.evaluate.variants import VARIANTS, held_out, request
    from wan_jax.parallel import use_mesh
    from wan_jax.sampling.step_cache import prepare

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    model = wan_jax.load(args.model, dtype=args.dtype)
    truths = [held_out(args.seed, i, 1) for i in range(args.clips)]

    def ask(i: int, options: dict[str, Any]) -> Any:
        options = dict(options) | {"solver": args.solver}
        options["num_steps"] = round(options.pop("share", 1.0) * args.num_steps)
        return request(model.spec, VARIANTS["full"], *truths[i], args.seed + i, options)

    def make(i: int, options: dict[str, Any]) -> tuple[np.ndarray, float]:
        """Frames, and the seconds of sampling alone."""
        asked = ask(i, options)
        with use_mesh(model.mesh):
            condition, noise = pipeline.encode(model, asked), pipeline.noise(model, asked, asked.seeds[0])
            begin = clock()
            (latents,) = jax.block_until_ready(pipeline.denoise(model, asked, condition, [noise], segment="all"))
            seconds = clock() - begin
            return pipeline.decode_video(model, latents["video"]), seconds

    def left_out(options: dict[str, Any]) -> str:
        asked = ask(0, options)
        skips, measure = prepare(model.spec.name, asked.step_cache, asked.schedule().sigmas[:-1], [0])
        if measure:
            parser.error(f"{args.model} was never measured for the step cache: make a clip with --step-cache first")
        return f"{asked.num_steps - int(0 if skips is None else skips.sum())}"

    rows, full = {}, []
    for name, options in WAYS.items():
        make(0, options)  # compiles
        clips, seconds = zip(*(make(i, options) for i in range(args.clips)), strict=True)
        full = full or clips
        likeness = {
            "psnr": [psnr(a, b) for a, b in zip(clips, full, strict=True)],
            "ssim": [ssim(a, b) for a, b in zip(clips, full, strict=True)],
        }
        rows[name] = {"steps": left_out(options), "seconds": statistics.median(seconds)} | likeness

    where = f"jax {jax.__version__}, {jax.devices()[0].device_kind}"
    print(f"{args.model}, {args.dtype}, {args.num_steps} steps of {args.solver}, {args.clips} clips; {where}")
    print(f"{'':22}{'steps that run':>15}{'seconds':>10}{'speed':>8}{'PSNR, dB':>18}{'SSIM':>18}")
    for name, row in rows.items():
        speed = rows["full schedule"]["seconds"] / row["seconds"]
        line = f"{name:22}{row['steps']:>15}{row['seconds']:10.2f}{speed:8.2f}"
        if name != "full schedule":
            for values, digits in ((row["psnr"], 1), (row["ssim"], 3)):
                error = np.std(values) / max(len(values) - 1, 1) ** 0.5
                line += f"{np.mean(values):11.{digits}f} +- {error:.{digits}f}".rjust(18)
        print(line)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
