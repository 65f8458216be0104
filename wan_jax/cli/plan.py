"""``wan-jax plan``: what a generation will need and take on a device that need not be here."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from wan_jax.cli.generate import DTYPES, KINDS
from wan_jax.config import ModelSpec, find_model
from wan_jax.errors import InputError

if TYPE_CHECKING:
    from wan_jax.plan import Plan
    from wan_jax.request import Request

EPILOG = """\
examples:
  wan-jax plan --model wan2.2-t2v-a14b --size 1280x720 --num-frames 81 --device v6e-8
  wan-jax plan --model wan2.1-t2v-14b --device rtx4090 --guidance sequential --quantize fp8
  wan-jax plan --model dreamid-omni --num-references 2 --device h200 --compile

Devices: v5e-N v5p-N v6e-N v7x-N, as slices are named; a100 h100 h200 b200 l40s rtx4090 rtx5090, with xN for several;
cpu, with the memory that is free here. Several devices share everything (fsdp) unless --mesh says otherwise.
Least seconds are operations over the device's rate: no program is as fast. --compile asks the device's own compiler
for the memory of a step; it needs the compiler's package (libtpu, or jax[cuda13]), no device.
"""
OPTIONS = ("size", "aspect", "num_frames", "num_steps", "guidance", "guidance_scale", "chunk_tokens", "tiled")
VOICE_SECOND = 16_000  # samples: what a model hears of each reference


def add_parser(subparsers) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        "plan", help="what a clip will need and take on a device", epilog=EPILOG,
        description="Operations, least time and memory of a clip, without the device and without weights.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", required=True, help="name or hub repository")
    parser.add_argument("--device", required=True, help="such as v6e-8, h200, h100x8, rtx4090, cpu")
    parser.add_argument("--size", help="WIDTHxHEIGHT in pixels; default: the model's")
    parser.add_argument("--aspect", help="W:H, e.g. 16:9, instead of --size")
    parser.add_argument("--num-frames", type=int, help="4n+1; default: the model's")
    parser.add_argument("--image", help="first picture; without it, models that need one get one of the size")
    parser.add_argument("--num-references", type=int, help="of models that take references (default 1)")
    parser.add_argument("--num-steps", type=int, help="sampling steps; default: the model's")
    parser.add_argument("--guidance-scale", type=float, nargs="+", help="1 is off")
    parser.add_argument("--guidance", choices=("batch", "sequential"), help="passes at once (default) or in turn")
    parser.add_argument("--chunk-tokens", type=int, metavar="N", help="blocks run on N tokens at a time")
    parser.add_argument("--tiled", action="store_true", default=None, help="decode in tiles of the picture")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default bfloat16")
    parser.add_argument("--quantize", choices=KINDS, help="weights of one byte, see `generate`")
    parser.add_argument("--stream-weights", action="store_true", help="weights stay on the host, see `generate`")
    parser.add_argument("--mesh", help="devices, e.g. fsdp=8 or data=2,seq=4")
    parser.add_argument(
        "--offload", action=argparse.BooleanOptionalAction, help="one network in memory at a time; default: by memory"
    )
    parser.add_argument("--compile", action="store_true", help="ask the device's compiler too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    from wan_jax.aot import ask
    from wan_jax.parallel import parse_mesh
    from wan_jax.plan import find_device, make_plan

    spec, device = find_model(args.model), find_device(args.device)
    axes = parse_mesh(args.mesh) if args.mesh else None
    if args.compile and args.stream_weights:
        raise InputError("--compile counts no memory of a host: leave it out, or --stream-weights")
    how = {"dtype": args.dtype, "quantize": args.quantize}
    stream = args.stream_weights
    plan = make_plan(spec, _request(spec, args), device, axes=axes, offload=args.offload, stream=stream, **how)
    estimate = ask(device, spec, plan.request, plan.axes, **how) if args.compile else None
    print(json.dumps(_values(plan, estimate), indent=1) if args.json else _text(plan, estimate))
    return 0


def _request(spec: ModelSpec, args: argparse.Namespace) -> Request:
    """What `generate` would make of these options, with blank pictures and silent voices."""
    import numpy as np

    from wan_jax.media import read_image
    from wan_jax.references import MAX_REFERENCES, ResolvedReference
    from wan_jax.request import parse_size, resolve, size_for_aspect

    options: dict[str, Any] = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    asked = size_for_aspect(spec, args.aspect) if args.aspect else parse_size(args.size or spec.sizes[0])
    blank = np.broadcast_to(np.uint8(0), (max(1, asked[1]), max(1, asked[0]), 3))
    if args.image:
        options["image"] = read_image(args.image)
    elif spec.task in ("i2v", "flf2v"):
        options["image"] = blank
    if spec.task == "flf2v":
        options["last_image"] = options["image"]
    count = args.num_references
    if count is None:
        count = int(spec.takes_references)
    if not 0 <= count <= MAX_REFERENCES:
        raise InputError(f"--num-references {count}: need 0 to {MAX_REFERENCES}")
    if count:
        voice = np.zeros(VOICE_SECOND, np.float32)
        options |= {"references": (ResolvedReference(blank, voice, voice),) * count, "consent": "none is shown"}
    return resolve(spec, "a plan", **options)


def _values(plan: Plan, estimate: Any) -> dict[str, Any]:
    """JSON-ready."""
    request, device = plan.request, plan.device
    resident, alone = plan.memory(offload=False), plan.memory(offload=True)
    values = {
        "model": plan.spec.name, "size": [request.width, request.height], "num_frames": request.num_frames,
        "num_steps": request.num_steps, "passes": plan.passes, "guidance": request.guidance, "dtype": plan.dtype,
        "quantize": plan.quantize, "stream_weights": plan.stream, "device": str(device), "mesh": plan.axes,
        "offload": plan.offloads, "tokens": plan.tokens,
        "forward_flop": plan.forward._asdict() | {"total": plan.forward.total},
        "step_flop": plan.forward.total * plan.passes,
        "clip_flop": sum(stage.work for stage in plan.stages),
        "least_seconds": plan.seconds(),
        "stages": [
            {
                "name": stage.name, "flop": stage.work, "least_seconds_published_rate": stage.seconds[0],
                "least_seconds_measured_rate": stage.seconds[1], "weight_bytes": stage.weights,
                "activation_bytes": round(stage.activations), "peak_bytes": round(resident[stage.name]),
                "peak_bytes_offload": round(alone[stage.name]),
            }
            for stage in plan.stages
        ],
        "peak_bytes": round(plan.peak), "usable_bytes": device.usable and round(device.usable), "fits": plan.fits,
        "changes": [
            {"option": option, "peak_bytes": round(then.peak), "fits": then.fits} for option, then in plan.changes()
        ],
    }  # fmt: skip
    if estimate:
        values["compiler_estimate_step_bytes"] = estimate.peak
    return values


def _text(plan: Plan, estimate: Any) -> str:
    request, device, forward = plan.request, plan.device, plan.forward
    mesh = ", mesh " + ",".join(f"{name}={n}" for name, n in plan.axes.items() if n > 1) if device.count > 1 else ""
    weights = (plan.quantize or plan.dtype) + " weights on the host" * plan.stream
    how = {"batch": " in a batch", "sequential": " in turn"}.get(request.guidance, "") * (plan.passes > 1)
    lines = [
        f"{plan.spec.name}, {request.width}x{request.height}, {request.num_frames} frames, {request.num_steps} steps,"
        f" {plan.passes} pass{'es' * (plan.passes > 1)}{how}, {weights}, on {device}{mesh}",
        "tokens: " + ", ".join(f"{count:,} {stream}" for stream, count in plan.tokens.items() if count),
        "",
    ]
    scales = {"forward": 1, "step": plan.passes, f"{request.num_steps} steps": plan.forwards}
    table = [("TFLOP", "linear", "self-attention", "cross-attention", "total")]
    table += [(name, *(f"{n * x / 1e12:,.1f}" for x in (*forward, forward.total))) for name, n in scales.items()]
    lines += _columns(table) + [""]

    resident, alone = plan.memory(offload=False), plan.memory(offload=True)
    table = [("per device", "TFLOP in all", "least s", "weights GB", "activations GB", "peak GB", "with --offload")]
    for stage in plan.stages:
        least = stage.seconds[1] or stage.seconds[0]
        gb = sum(stage.weights.values()), stage.activations, resident[stage.name], alone[stage.name]
        table.append((stage.name, f"{stage.work / 1e12:,.1f}", _seconds(least), *(f"{x / 1e9:,.1f}" for x in gb)))
    lines += [*_columns(table), ""]

    if (seconds := plan.seconds()) is not None:
        rate = f"{device.matmul:g} measured" if device.matmul else f"{device.bf16:g} published"
        rate += f" TFLOP/s in bfloat16, {device.float32:,.3g} in float32 (VAE)"
        lines.append(f"least time: {_seconds(seconds)} s at {rate}")
    held = "one network at a time" if plan.offloads else "all networks stay"
    lines.append(f"peak memory: {_gb(plan.peak)}{' per device' * (device.count > 1)}, {held}")
    if estimate:
        denoise = next(stage for stage in plan.stages if stage.name == "denoise")
        ours = denoise.weights["dit"] + denoise.activations
        lines.append(f"one step: {_gb(ours)} by this plan, {_gb(estimate.peak)} compiler estimate")
    if device.usable is None:
        return "\n".join([*lines, "the memory of this device is not known"])
    of = f"of {_gb(device.usable)} that a program gets"
    lines.append(f"{'fits' if plan.fits else 'does not fit'}: {_gb(plan.peak)} {of}")
    changes = plan.changes()
    if changes:
        lines.append("to change, each beside those before it:")
        for option, then in changes:
            fits = "fits" if then.fits else f"of {_gb(then.device.usable)}"
            lines.append(f"  {option}: {_gb(then.peak)}, {fits}")
    if plan.fits is False and not any(then.fits for _, then in changes):
        lines.append("nothing of this makes it fit: choose a smaller model or fewer frames")
    return "\n".join(lines)


def _seconds(value: float | None) -> str:
    return "not known" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Names to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([name.ljust(widths[0]), *map(str.rjust, numbers, widths[1:])]) for name, *numbers in rows]
