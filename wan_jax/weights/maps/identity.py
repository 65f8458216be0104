"""Names of the identity and the voice adapter. They are our own: our paths, a layer's number in them, both layouts."""

from __future__ import annotations

import re

from wan_jax.config import FusionConfig
from wan_jax.weights.engine import Row

_LAYERS = (
    ("norm1", "norm"), ("norm2", "norm"), ("mlp.fc1", "linear"), ("mlp.fc2", "linear"),
    ("attn.q", "linear"), ("attn.k", "linear"), ("attn.v", "linear"), ("attn.o", "linear"),
    ("attn.norm_q", "norm"), ("attn.norm_k", "norm"),
)  # fmt: skip
_BOTH = (
    ("slots", "array"), ("resampler.queries", "array"), ("resampler.norm", "norm"), ("norm", "norm"),
    ("blocks.k", "linear"), ("blocks.v", "linear"), ("blocks.norm_k", "norm"), ("blocks.o", "linear"),
    *((f"resampler.layers.{name}", kind) for name, kind in _LAYERS),
)  # fmt: skip
_IDENTITY = (*_BOTH, ("proj", "linear"))
_VOICE = (
    *_BOTH, ("conv1", "conv"), ("conv2", "conv"), ("summary", "linear"),
    *((f"layers.{name}", kind) for name, kind in _LAYERS),
)  # fmt: skip


def rows(cfg: FusionConfig) -> list[Row]:
    """The table of the adapters that a configuration has: none for Ovi and DreamID-Omni."""
    names = [(f"identity_adapter.{name}", kind) for name, kind in _IDENTITY if cfg.identity]
    names += [(f"voice_adapter.{name}", kind) for name, kind in _VOICE if cfg.voice]
    numbered = (re.sub(r"\.(blocks|layers)\.", r".\1.{i}.", path) for path, _ in names)
    return [Row(path, kind, name, name) for (path, kind), name in zip(names, numbered, strict=True)]
