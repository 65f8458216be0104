"""One guided step of the twin-stream transformer: what four passes cost, and what memory the step takes.

    python benchmarks/fusion.py                   # on this machine: one pass, a batch of four, four in turn
    python benchmarks/fusion.py --compiler h200   # 11.7 B parameters, 704x1280x121 frames, one reference: memory, by
                                                  # the CUDA compiler alone (pip install "jax[cuda13]"); needs no GPU

Times are process CPU seconds on one core (the process pins itself), medians of --repeats rounds after a warm-up, the
three in turn in each round. Compiler figures are the compiler's own, not measured on a device.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import time
from pathlib import Path
from typing import Any

# GpuTargetConfigProto of what the compiler is asked about.
H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
SMALL = dict(dim=512, ffn_dim=2048, num_heads=8, num_layers=4, text_dim=512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compiler", choices=("h200",), help="ask this device's compiler for the memory at full size")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    if args.compiler:
        ask_compiler()
    else:
        measure(args.repeats)


def step(spec: Any, mode: str, size: tuple[int, int], num_frames: int, num_latents: int, num_passes: int = 4) -> Any:
    """One guided step as a function, and its arguments by shape: network, condition, solver state, table of steps."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from wan_jax.model import build
    from wan_jax.sampling.sampler import make_steps, run_segment
    from wan_jax.sampling.schedule import make_schedule
    from wan_jax.sampling.solvers import State
    from wan_jax.sound import SoundCondition, fusion_velocity, guidance_passes, num_voice_latents, reference_times

    class Voiced:
        voice = voice_second = np.zeros(16_000, np.float32)

    def shape(*sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    cfg, (height, width) = spec.dit, size
    rows, columns = height // spec.vae.spatial_stride, width // spec.vae.spatial_stride
    latents = {"video": shape(1, num_frames, rows, columns, cfg.in_dim), "audio": shape(1, num_latents, cfg.audio_dim)}
    references = {
        "video": shape(1, 1, rows, columns, cfg.in_dim),
        "audio": shape(1, num_voice_latents(16_000, spec.sound), cfg.audio_dim),
    }
    scales = dict.fromkeys(latents, 3.0 if num_passes == 4 else 1.0)
    prompts = {stream: shape(2, cfg.text_len, cfg.text_dim) for stream in latents}
    beyond = dict(image=1.5, voice=2.0) if num_passes == 4 else {}
    passes = jax.eval_shape(lambda text: guidance_passes(text, scales, **beyond)[0], prompts)
    condition = SoundCondition(passes, {stream: shape(num_passes) for stream in latents}, references)
    guidance = {stream: np.ones((50, num_passes), np.float32) for stream in latents}
    steps = make_steps("unipc", make_schedule("unipc", 50, 5.0), guidance).part(0, 1)
    times = reference_times(num_frames, num_latents, [Voiced()], spec.sound)
    velocity = fusion_velocity(mode, times["video"], times["audio"])

    def run(fusion: Any, condition: Any, state: Any, steps: Any) -> Any:
        return run_segment(velocity, (fusion, condition), state, steps, None)[0]

    return run, (build("dit", spec, jnp.bfloat16), condition, State(*[latents] * 4), steps)


def measure(repeats: int) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    import jax
    import jax.numpy as jnp
    import numpy as np

    from wan_jax.config import MODELS
    from wan_jax.parallel import compiler_options

    base = MODELS["dreamid-omni"]
    spec = dataclasses.replace(base, dit=dataclasses.replace(base.dit, **SMALL))
    rng = np.random.default_rng(0)

    def value(x: jax.ShapeDtypeStruct) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.full(x.shape, -1, x.dtype)
        return jnp.asarray(0.02 * rng.standard_normal(x.shape, np.float32), jnp.float32)

    print(f"jax {jax.__version__}, {jax.devices()[0]}; {spec.dit.dim} wide, {spec.dit.num_layers} blocks, float32")
    programs = {}
    for label, mode, num_passes in (
        ("1 pass", "batch", 1), ("4 in a batch", "batch", 4), ("4 in turn", "sequential", 4)
    ):  # fmt: skip
        run, shapes = step(spec, mode, (256, 256), 9, 46, num_passes)
        inputs = jax.tree.map(lambda x: value(x) if isinstance(x, jax.ShapeDtypeStruct) else x, shapes)
        programs[label] = jax.jit(run, compiler_options=compiler_options()).lower(*inputs).compile(), inputs
    seconds: dict[str, list[float]] = {label: [] for label in programs}
    for _ in range(repeats + 1):
        for label, (compiled, inputs) in programs.items():
            begin = time.process_time()
            jax.block_until_ready(compiled(*inputs))
            seconds[label].append(time.process_time() - begin)
    medians = {label: statistics.median(values[1:]) for label, values in seconds.items()}
    for label, (compiled, _) in programs.items():
        ratio = f"{medians[label] / medians['1 pass']:.2f} x one pass"
        temporary = compiled.memory_analysis().temp_size_in_bytes / 2**20
        print(f"{label}: {medians[label]:.3f} s ({ratio}), {temporary:.0f} MiB of temporaries")


def ask_compiler() -> None:
    import jax
    import jaxlib
    from jax.experimental import topologies

    libraries = Path(jaxlib.__file__).parent.parent / "nvidia"
    folders = ":".join(str(path) for path in sorted(libraries.glob("**/lib")))
    if os.environ.get("LD_LIBRARY_PATH", "") != folders:  # read when a process starts
        import sys

        flags = "--xla_gpu_enable_triton_gemm=false"  # else every product is an untuned Triton one
        os.environ |= {"LD_LIBRARY_PATH": folders, "CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": flags}
        os.execv(sys.executable, [sys.executable, *sys.argv])

    from wan_jax.config import MODELS
    from wan_jax.nn import attention

    # The door to attention looks at the backend of this process, which is a CPU; the device is another.
    attention.SCORE_BYTES = {}
    spec = MODELS["dreamid-omni"]
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="1x1x1", target_config=H200, topology="1x1x1"
    )
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    billions = spec.dit.num_params() / 1e9
    print(f"jax {jax.__version__}; {spec.name}, {billions:.1f} B parameters in bfloat16, 704x1280, 121 frames")
    for mode in ("sequential", "batch"):
        run, shapes = step(spec, mode, (704, 1280), 31, 157)
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)
        begin = time.perf_counter()
        traced = jax.jit(run, donate_argnums=2).trace(*placed)
        compiled = traced.lower(lowering_platforms=("cuda",)).compile()
        memory = compiled.memory_analysis()
        print(
            f"four passes {mode}: arguments {memory.argument_size_in_bytes / 1e9:.2f} GB, temporaries"
            f" {memory.temp_size_in_bytes / 1e9:.2f} GB; compiled in {time.perf_counter() - begin:.0f} s"
        )


if __name__ == "__main__":
    main()
