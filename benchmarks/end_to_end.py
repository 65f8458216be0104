"""A whole clip, stage by stage, and a second one in the same process, for which everything is compiled.

    python benchmarks/end_to_end.py                                  # on a CPU wan2.6-nano with its own weights
    python benchmarks/end_to_end.py --model wan2.1-t2v-1.3b --num-steps 4 --peer diffusers
    python benchmarks/end_to_end.py --model FOLDER

Published models get random weights, made on the device; a folder, and wan2.6-nano, are loaded. Seconds are those of
the clock: the stages also read, write and wait. Operations are those of `wan-jax plan`. The peer is diffusers'
WanPipeline without its safety and file handling, its prompts encoded by transformers.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

SMALL = dict(dim=256, ffn_dim=1024, num_heads=4, num_layers=4)
SMALL_TEXT = dict(vocab_size=384, dim=4096, dim_attn=256, dim_ffn=512, num_heads=4, num_layers=2)
SMALL_VAE = dict(dim=16, dec_dim=16)
STAGES = {"encoding the conditions": ("text encoder", "conditions"), "sampling": ("denoise",), "decoding": ("decode",)}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, size="64x64", num_frames=5)
    parser.add_argument("--num-steps", type=int, help="default the model's own")
    parser.set_defaults(model="wan2.6-nano" if measure.on_cpu() else "wan2.1-t2v-1.3b")
    args = parser.parse_args(argv)

    from wan_jax.cache import keep_programs
    from wan_jax.config import MODELS, NANO
    from wan_jax.model import load
    from wan_jax.pipeline import Stages
    from wan_jax.pipeline import run as run_pipeline
    from wan_jax.plan import find_device, make_plan

    keep_programs("off")
    with tempfile.TemporaryDirectory() as folder:
        if args.model in MODELS and args.model != NANO.name:
            model = random_model(args, Path(folder))
        else:
            args.dtype = args.dtype or "bfloat16"
            model = load(args.model, dtype=args.dtype)
        spec = model.spec
        size = args.size or f"{spec.sizes[0][0]}x{spec.sizes[0][1]}"
        request = measure.asked(
            spec, size, args.num_frames or spec.num_frames, "batch", args.num_steps or spec.num_steps
        )
        plan = make_plan(spec, request, find_device("cpu"))
        rows = []
        for name in ("first clip", "second clip"):
            stages, begin = Stages(False), time.perf_counter()
            model.prompt_cache.clear()
            run_pipeline(
                model, request, progress=False, stages=stages,
                finish=lambda clips: clips[0].save(Path(folder) / "clip.mp4"),
            )  # fmt: skip
            rows.append({"name": name, "seconds": time.perf_counter() - begin, "stages": stages.seconds})
        if args.peer:
            rows += peer_rows(args, spec, request)
    return tell(args, plan, request, rows)


def random_model(args: argparse.Namespace, folder: Path) -> Any:
    """A published model, narrowed with ``--small``, with random weights and a tokenizer that spells."""
    import dataclasses

    from wan_jax.conversion import tiny_tokenizer
    from wan_jax.model import DTYPES, Model, build
    from wan_jax.weights.layouts import Files, spec_parts

    spec = measure.settle(args, "dit", SMALL)
    if measure.on_cpu() if args.small is None else args.small:
        text, vae = dataclasses.replace(spec.text, **SMALL_TEXT), dataclasses.replace(spec.vae, **SMALL_VAE)
        spec = dataclasses.replace(spec, text=text, vae=vae)
    tiny_tokenizer(spec.text.vocab_size)(folder)
    files = Files(folder, "official", spec, dict.fromkeys((*spec_parts(spec), "tokenizer"), folder))
    model = Model(files, dtype=DTYPES[args.dtype], mesh=None, offload=False)
    for part in model.parts:
        model.replace(part, measure.random_arrays(build(part, spec, model.dtype), 0.02))
    return model


def peer_rows(args: argparse.Namespace, spec: Any, request: Any) -> list[dict[str, Any]]:
    """Two clips by diffusers: text, steps and pictures, without marks and files."""
    import diffusers
    import numpy as np
    from peers import Peer

    text, dit = Peer(spec, "text_encoder", args.dtype), Peer(spec, "dit", args.dtype)
    vae = Peer(spec, "vae", "float32")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=request.shift
    )
    pipe = diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, transformer=dit.compiled(), vae=vae.module, scheduler=scheduler
    )
    pipe.set_progress_bar_config(disable=True)
    ids = text.tensor(np.ones((2, spec.dit.text_len)), "int64")
    rows = []
    for name in ("first clip", "second clip"):
        begin = time.perf_counter()
        with text.torch.inference_mode():
            prompt, negative = text.module(input_ids=ids).last_hidden_state.split(1)
            pipe(
                prompt_embeds=prompt, negative_prompt_embeds=negative, height=request.height, width=request.width,
                num_frames=request.num_frames, num_inference_steps=request.num_steps, guidance_scale=5.0,
            )  # fmt: skip
        rows.append({"name": f"diffusers, {name}", "seconds": time.perf_counter() - begin, "stages": {}})
    return rows


def tell(args: argparse.Namespace, plan: Any, request: Any, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Print and write it. Ratios are to the second clip without marking and writing, which the peer does not do."""
    import jax

    work = {stage: sum(s.work for s in plan.stages if s.name in names) / 1e12 for stage, names in STAGES.items()}
    device = jax.devices()[0]
    second = sum(rows[1]["stages"][stage] for stage in STAGES)
    for row in rows[2:]:
        row["ratio"] = row["seconds"] / second
    title = (
        f"{plan.spec.name}, {request.width}x{request.height}, {request.num_frames} frames, {request.num_steps} steps,"
        f" {plan.passes} passes a step"
    )
    report = {
        "benchmark": title, "device": device.device_kind, "platform": device.platform, "versions": measure.versions(),
        "peak_bytes": measure.peak_memory(), "tflop": work, "rows": rows,
    }  # fmt: skip
    print(title)
    print(f"{device.device_kind} ({device.platform}); " + ", ".join(f"{k} {v}" for k, v in report["versions"].items()))
    for row in rows:
        ratio = f", {row['ratio']:.2f} x ours without marking and writing" if "ratio" in row else ""
        print(f"{row['name']}: {row['seconds']:.2f} s{ratio}")
        for stage, seconds in row["stages"].items():
            rate = f", {work[stage]:.4g} TFLOP, {work[stage] / seconds:.3g} TFLOP/s" if stage in work else ""
            print(f"  {stage}: {seconds:.2f} s{rate}")
    if report["peak_bytes"]:
        print(f"peak memory {report['peak_bytes'] / 1e9:.2f} GB")
    measure.write(report, args.json)
    return report


if __name__ == "__main__":
    main()
