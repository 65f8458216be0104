"""What the golden checks share: layouts and building models from a golden's config and parameters."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.checkpoint import abstract
from wan_jax.config import DiTConfig
from wan_jax.models.dit import DiT
from wan_jax.weights.engine import fill
from wan_jax.weights.maps import dit as dit_map


def params(tensors: Mapping[str, np.ndarray], prefix: str = "") -> dict[str, np.ndarray]:
    """Parameters under ``params/<prefix>``, with their official keys."""
    start = f"params/{prefix}"
    return {name[len(start) :]: value for name, value in tensors.items() if name.startswith(start)}


def to_last(x: np.ndarray) -> np.ndarray:
    """[..., C, T, H, W] -> [..., T, H, W, C]."""
    return np.moveaxis(x, -4, -1)


def pad_rows(x: np.ndarray, rows: int) -> np.ndarray:
    """Zero rows up to ``rows`` on the second last axis."""
    return np.concatenate([x, np.zeros((*x.shape[:-2], rows - x.shape[-2], x.shape[-1]), x.dtype)], axis=-2)


def dit_config(config: Mapping) -> DiTConfig:
    """A golden's config states the reduced CLIP widths too."""
    image = config.get("clip_tokens", 0)
    flf2v = config["model_type"] == "flf2v"
    return DiTConfig(
        **{
            name: config[name]
            for name in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_dim")
        },
        text_len=config["text_len"],
        freq_dim=config["freq_dim"],
        patch_size=tuple(config["patch_size"]),
        eps=config["eps"],
        image_tokens=image * (2 if flf2v else 1),
        image_dim=config.get("clip_dim", 1280),
        image_positions=flf2v,
    )


def build_dit(config: Mapping, tensors: Mapping[str, np.ndarray], prefix: str = "") -> DiT:
    cfg = dit_config(config)
    shape = abstract(lambda: DiT(cfg, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return fill(shape, dit_map.rows(cfg), params(tensors, prefix), network="dit", what="golden")
