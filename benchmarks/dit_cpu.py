"""One DiT forward on one CPU core, beside diffusers' WanTransformer3DModel with the same weights, in one run.

    python benchmarks/dit_cpu.py                 # dim 512, 8 layers, 1,000 tokens, text 512 x 4096, float32

Prints process CPU seconds per forward (median of --repeats after a warm-up), their ratio, and the relative difference
of the outputs. The process pins itself to one core before either library starts its threads. Needs the extra `oracle`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--ffn", type=int, default=2048)
    parser.add_argument("--grid", type=int, nargs=3, default=(10, 10, 10), help="tokens per axis; product = tokens")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    os.environ |= {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

    import diffusers
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    from flax import nnx

    from wan_jax.checkpoint import abstract
    from wan_jax.config import DiTConfig
    from wan_jax.models.dit import DiT
    from wan_jax.parallel import compiler_options
    from wan_jax.weights.engine import fill
    from wan_jax.weights.maps import dit as dit_map

    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = DiTConfig(dim=args.dim, ffn_dim=args.ffn, num_heads=args.heads, num_layers=args.layers)
    config = dit_map.config_to_diffusers(cfg)
    config.pop("_class_name")
    theirs = diffusers.WanTransformer3DModel(**config).eval()
    weights = {name: value.numpy() for name, value in theirs.state_dict().items()}
    shape = abstract(lambda: DiT(cfg, rngs=nnx.Rngs(0)))
    ours = fill(shape, dit_map.rows(cfg), weights, network="dit", layout="diffusers")

    frames, rows, columns = args.grid
    x = torch.randn(1, cfg.in_dim, frames, 2 * rows, 2 * columns)
    text, t = torch.randn(1, cfg.text_len, cfg.text_dim), torch.tensor([500])
    run = jax.jit(lambda dit, x, t, text: dit(x, t, text), compiler_options=compiler_options())
    inputs = jnp.asarray(x.numpy().transpose(0, 2, 3, 4, 1)), jnp.asarray([500.0]), jnp.asarray(text.numpy())

    def jax_forward() -> np.ndarray:
        return np.asarray(run(ours, *inputs))

    def torch_forward() -> np.ndarray:
        with torch.no_grad():
            return theirs(hidden_states=x, timestep=t, encoder_hidden_states=text, return_dict=False)[0].numpy()

    seconds = {}
    outputs = {"wan_jax": jax_forward(), "diffusers": torch_forward().transpose(0, 2, 3, 4, 1)}
    for _ in range(args.repeats):  # interleaved, so that both see the same machine
        for name, forward in (("wan_jax", jax_forward), ("diffusers", torch_forward)):
            begin = time.process_time()
            forward()
            seconds.setdefault(name, []).append(time.process_time() - begin)
    error = np.linalg.norm(outputs["wan_jax"] - outputs["diffusers"]) / np.linalg.norm(outputs["diffusers"])
    print(
        f"dim {args.dim}, {args.layers} layers, {frames * rows * columns} tokens, text 512 x 4096, float32, core {core}"
    )
    print(f"jax {jax.__version__}, torch {torch.__version__}, diffusers {diffusers.__version__}")
    for name, values in seconds.items():
        print(
            f"{name:10s} {statistics.median(values):.3f} CPU s per forward ({min(values):.3f} to {max(values):.3f})"
        )
    ratio = statistics.median(seconds["wan_jax"]) / statistics.median(seconds["diffusers"])
    print(f"ratio wan_jax / diffusers {ratio:.3f}; relative difference of outputs {error:.1e}")


if __name__ == "__main__":
    main()
