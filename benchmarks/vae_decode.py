"""Decoding a clip by the video VAE, frame by frame as the pipeline does it, to uint8 pictures.

    python benchmarks/vae_decode.py                                  # 480p x 81; on a CPU a narrow relative
    python benchmarks/vae_decode.py --peer diffusers                 # beside AutoencoderKLWan
    python benchmarks/vae_decode.py --model wan2.2-ti2v-5b --tiled

Weights are random and float32, as in the pipeline. `measure.py` says what the figures are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import measure

SMALL = dict(dim=32, dec_dim=32)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, size="64x64", num_frames=9, layers=False)
    parser.add_argument("--tiled", action="store_true", help="in tiles of the picture too")
    parser.set_defaults(dtype="float32")
    args = parser.parse_args(argv)
    spec = measure.settle(args, "vae", SMALL)

    import jax
    import jax.numpy as jnp
    import numpy as np

    from wan_jax.model import build
    from wan_jax.models.vae import to_uint8
    from wan_jax.parallel import compiler_options
    from wan_jax.pipeline import latent_shape
    from wan_jax.work import vae_decode

    cfg, differs, peer = spec.vae, None, measure.find_peer(args, spec, "vae")
    request = measure.asked(spec, args.size, args.num_frames, "none")
    shape = latent_shape(spec, request)
    shape = shape["video"] if isinstance(shape, dict) else shape
    flop = vae_decode(cfg, request.height, request.width, args.num_frames).work
    vae = measure.weights(build("vae", spec, jnp.float32), peer)
    latents = measure.random_arrays(jax.ShapeDtypeStruct(shape, jnp.float32))
    ways = ("decode_stream", "decode_tiled") if args.tiled else ("decode_stream",)
    cases = []
    for way in ways:
        program = jax.jit(
            lambda vae, z, way=way: getattr(vae, way)(z, finish=to_uint8), compiler_options=compiler_options()
        )
        cases.append(measure.Case(f"wan_jax, {way}", functools.partial(program, vae, latents), flop, args.dtype))
    if peer is not None:
        # Theirs takes latents before the normalisation that ours does itself.
        z = np.asarray(latents) * np.float32(cfg.latents_std) + np.float32(cfg.latents_mean)
        z = peer.tensor(z.transpose(0, 4, 1, 2, 3))
        cases.append(peer.case(lambda module: module.decode(z, return_dict=False)[0], flop))
        if peer.shares_weights:

            def differs() -> float:
                return measure.difference(cases[0].run(), to_uint8(cases[-1].run().transpose(0, 2, 3, 4, 1)))

    title = f"VAE decode of {spec.name}, Wan {cfg.version}, {cfg.dec_dim} wide; {args.size}, {args.num_frames} frames"
    return measure.compare(title, cases, args, differs, model=spec.name)


if __name__ == "__main__":
    measure.prepare()
    main()
