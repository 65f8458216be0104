"""One denoising step, as the sampler runs it: one pass of the transformer, or several under guidance.

    python benchmarks/dit_step.py                        # 1.3B 480p; on a CPU a narrow relative and 1,000 tokens
    python benchmarks/dit_step.py --peer diffusers       # beside WanTransformer3DModel
    python benchmarks/dit_step.py --model wan2.2-t2v-a14b --size 1280x720 --layers 10
    python benchmarks/dit_step.py --model dreamid-omni --guidance none batch sequential

Weights are random. `measure.py` says what the figures are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import measure

SMALL = dict(dim=512, ffn_dim=2048, num_heads=8, num_layers=8)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, size="160x160", num_frames=37)
    parser.add_argument(
        "--guidance", nargs="+", choices=("none", "batch", "sequential"), default=["none"],
        help="passes of a step: one (default), all at once, in turn",
    )  # fmt: skip
    args = parser.parse_args(argv)
    spec = measure.settle(args, "dit", SMALL)

    import jax

    from wan_jax.aot import step
    from wan_jax.conditions import read
    from wan_jax.model import DTYPES, build
    from wan_jax.parallel import compiler_options
    from wan_jax.pipeline import settle
    from wan_jax.plan import find_device, make_plan

    peer = measure.find_peer(args, spec, "dit")
    network = measure.weights(build("dit", spec, DTYPES[args.dtype]), peer)
    cases, checks = [], []
    for guidance in args.guidance:
        request = measure.asked(spec, args.size, args.num_frames, guidance)
        plan = make_plan(spec, request, find_device("cpu"), dtype=args.dtype)
        flop = plan.forward.total * plan.passes
        run, (_, *shapes) = step(spec, request, DTYPES[args.dtype], settled=False)
        inputs = measure.random_arrays(shapes)
        settled = settle(network, inputs[0], jax.jit(read))
        ours = functools.partial(jax.jit(run, compiler_options=compiler_options()), *settled, *inputs[1:])
        cases.append(measure.Case(f"wan_jax, guidance {guidance}", ours, flop, args.dtype))
        if peer is None:
            continue
        condition, state, steps, _ = inputs
        cases.append(peer.case(passes(peer, condition, state, steps), flop))
        if peer.shares_weights:
            checks.append(functools.partial(difference, *cases[-2:], state.sample, steps))
    tokens = " + ".join(f"{count:,}" for count in plan.tokens.values() if count)
    title = (
        f"step of {spec.name}, {spec.dit.dim} wide, {spec.dit.num_layers} layers; {args.size}, {args.num_frames}"
        f" frames: {tokens} tokens, {spec.dit.text_len} of text"
    )
    differs = (lambda: max(check() for check in checks)) if checks else None
    return measure.compare(title, cases, args, differs, model=spec.name, tokens=plan.tokens)


def passes(peer: Any, condition: Any, state: Any, steps: Any) -> Callable[[Any], Any]:
    """The passes of a step as one batch of the peer's, without the solver."""
    import numpy as np

    latents, text = np.asarray(state.sample), np.asarray(condition.text)
    if condition.video_BTHWC is not None:
        latents = np.concatenate([latents, np.asarray(condition.video_BTHWC)], axis=-1)
    arrays = {"hidden_states": latents.transpose(0, 4, 1, 2, 3), "encoder_hidden_states": text}
    if condition.image_BIC is not None:
        arrays["encoder_hidden_states_image"] = np.asarray(condition.image_BIC)
    tensors = {name: peer.tensor(x if x is text else x.repeat(len(text), axis=0)) for name, x in arrays.items()}
    tensors["timestep"] = peer.tensor(np.float32(steps.timestep).repeat(len(text)), "float32")
    return lambda module: module(**tensors, return_dict=False)[0]


def difference(ours: measure.Case, theirs: measure.Case, sample: Any, steps: Any) -> float:
    """Of the guided velocities. What our solver keeps is the clean prediction, sample - sigma * velocity."""
    import numpy as np

    after, _ = ours.run()
    prompt, *negative = np.split((y := theirs.run().transpose(0, 2, 3, 4, 1)), len(y))
    velocity = negative[0] + steps.guidance[0] * (prompt - negative[0]) if negative else prompt
    return measure.difference((np.asarray(sample) - np.asarray(after.clean1)) / steps.solver.sigma[0], velocity)


if __name__ == "__main__":
    measure.prepare()
    main()
