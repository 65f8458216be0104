"""DiT goldens: one forward pass of every kind, the epsilon-sensitive cases included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity.common import build_dit, pad_rows, to_last
from wan_jax.parallel import compiler_options


def check_dit(config: dict, tensors: dict[str, np.ndarray]) -> None:
    dit = build_dit(config, tensors)
    cfg = dit.cfg
    B = tensors["in/x"].shape[0]
    kwargs = {}
    if "in/y" in tensors:
        kwargs["condition_BTHWC"] = to_last(tensors["in/y"])
    if "in/clip_fea" in tensors:
        kwargs["image_BIC"] = tensors["in/clip_fea"].reshape(B, cfg.image_tokens, cfg.image_dim)
    timesteps = tensors["in/t"]
    if timesteps.ndim == 2:  # one timestep per token, of which a sample has at most two
        tokens = timesteps[:, : config["tokens"]]
        pairs = np.stack([tokens.max(1), tokens.min(1)], 1)
        kwargs["token_time"] = jnp.asarray(tokens != pairs[:, :1], jnp.int32)
        assert all(np.isin(row, pair).all() for row, pair in zip(tokens, pairs, strict=True))
        timesteps = pairs
    text = pad_rows(tensors["in/context"], cfg.text_len)

    def forward(dit, x, t, text, kwargs):
        return dit(x, t, text, capture=True, **kwargs)

    velocity, mid = jax.jit(forward, compiler_options=compiler_options())(
        dit, to_last(tensors["in/x"]), jnp.asarray(timesteps), text, kwargs
    )
    L = config["tokens"]
    for name, ours in (
        ("time_embedding", mid["time_embedding"][:, 0]),
        ("text_tokens", mid["text_tokens"]),
        ("image_tokens", mid["image_tokens"]),
        ("block_0_self_attn", mid["self_attn"][0]),
        ("block_0_cross_attn", mid["cross_attn"][0]),
        ("block_0", mid["block"][0]),
        ("head", mid["head"]),
    ):
        expected = tensors.get(f"mid/{name}")
        if expected is None:
            continue
        if name == "time_embedding" and expected.ndim == 3:
            token_time = kwargs.get("token_time", jnp.zeros((B, L), jnp.int32))
            ours = jnp.take_along_axis(mid["time_embedding"], token_time[..., None], axis=1)
        if expected.ndim == 3 and name not in ("text_tokens", "image_tokens"):
            expected = expected[:, :L]
        np.testing.assert_allclose(np.asarray(ours), expected, atol=5e-5, rtol=0, err_msg=name)
    np.testing.assert_allclose(np.asarray(velocity), to_last(tensors["out/v"]), atol=5e-5, rtol=0)


RUNNERS = {"dit_": check_dit}
