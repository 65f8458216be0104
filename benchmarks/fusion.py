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
from typing import Any

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


def asked(spec: Any, guidance: str, size: tuple[int, int], num_frames: int, num_passes: int = 4) -> Any:
    """A request with one reference: the prompt alone, or the four passes of DreamID-Omni."""
    import numpy as np

    from wan_jax.references import ResolvedReference
    from wan_jax.request import resolve

    voice = np.zeros(16_000, np.float32)
    alone = dict.fromkeys(("guidance_scale", "audio_guidance_scale"), 1.0) | dict(image_guidance=0, voice_guidance=0)
    return resolve(
        spec, "a plan", size=size, num_frames=num_frames, guidance=guidance, consent="none is shown",
        references=[ResolvedReference(np.zeros((64, 64, 3), np.uint8), voice, voice)],
        **(alone if num_passes == 1 else {}),
    )  # fmt: skip


def measure(repeats: int) -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    import jax
    import jax.numpy as jnp
    import numpy as np

    from wan_jax.aot import step
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
        run, shapes = step(spec, asked(spec, mode, (256, 256), 33, num_passes))
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

    from wan_jax.aot import ask
    from wan_jax.config import MODELS
    from wan_jax.plan import find_device

    spec = MODELS["dreamid-omni"]
    billions = spec.dit.num_params() / 1e9
    print(f"jax {jax.__version__}; {spec.name}, {billions:.1f} B parameters in bfloat16, 704x1280, 121 frames")
    for guidance in ("sequential", "batch"):
        memory = ask(find_device("h200"), spec, asked(spec, guidance, (1280, 704), 121))
        print(
            f"four passes {guidance}: arguments {memory.arguments / 1e9:.2f} GB, temporaries"
            f" {memory.temporaries / 1e9:.2f} GB; compiled in {memory.seconds:.0f} s"
        )


if __name__ == "__main__":
    main()
