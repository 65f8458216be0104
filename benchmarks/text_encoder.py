"""One prompt through umT5.

    python benchmarks/text_encoder.py                                # 512 tokens; on a CPU a narrow relative
    python benchmarks/text_encoder.py --peer diffusers --tokens 128  # beside UMT5EncoderModel of transformers

Weights are random. The pipeline encodes prompts one by one, each at its own length rounded up to 128 tokens.
`measure.py` says what the figures are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import measure

SMALL = dict(vocab_size=4096, dim=512, dim_attn=512, dim_ffn=1280, num_heads=8, num_layers=4)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = measure.parser(__doc__, size="160x160", num_frames=1)
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt (default 512, the most there are)")
    args = parser.parse_args(argv)
    spec = measure.settle(args, "text_encoder", SMALL)

    import jax
    import jax.numpy as jnp

    from wan_jax.model import DTYPES, build
    from wan_jax.parallel import compiler_options
    from wan_jax.work import text_work

    cfg, differs, peer = spec.text, None, measure.find_peer(args, spec, "text_encoder")
    encoder = measure.weights(build("text_encoder", spec, DTYPES[args.dtype]), peer)
    ids = jnp.arange(args.tokens)[None] % cfg.vocab_size
    mask = jnp.ones_like(ids)
    program = jax.jit(lambda encoder, ids, mask: encoder(ids, mask), compiler_options=compiler_options())
    flop = text_work(cfg, args.tokens).total
    cases = [measure.Case("wan_jax", functools.partial(program, encoder, ids, mask), flop, args.dtype)]
    if peer is not None:
        tokens = {"input_ids": peer.tensor(ids, "int64"), "attention_mask": peer.tensor(mask, "int64")}
        cases.append(peer.case(lambda module: module(**tokens).last_hidden_state, flop))
        if peer.shares_weights:

            def differs() -> float:
                return measure.difference(cases[0].run(), cases[-1].run())

    title = f"umT5 of {spec.name}, {cfg.dim} wide, {cfg.num_layers} layers; {args.tokens} tokens"
    return measure.compare(title, cases, args, differs, model=spec.name)


if __name__ == "__main__":
    measure.prepare()
    main()
