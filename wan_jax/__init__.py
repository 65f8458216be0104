"""wan_jax: the Wan video models in JAX.

    model = wan_jax.load("wan2.1-t2v-1.3b")
    clip = wan_jax.generate(model, prompt="a cat surfing a wave at sunset")
    clip.save("clip.mp4")

Public names are resolved on first use, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "load": "wan_jax.model",
    "Model": "wan_jax.model",
    "generate": "wan_jax.pipeline",
    "Reference": "wan_jax.references",
    "Clip": "wan_jax.media",
    "MODELS": "wan_jax.config",
    "find_model": "wan_jax.config",
    "make_mesh": "wan_jax.parallel",
    "WanError": "wan_jax.errors",
}
__all__ = ["__version__", *_PUBLIC]

if TYPE_CHECKING:  # what editors and type checkers see
    from wan_jax.config import MODELS as MODELS
    from wan_jax.config import find_model as find_model
    from wan_jax.errors import WanError as WanError
    from wan_jax.media import Clip as Clip
    from wan_jax.model import Model as Model
    from wan_jax.model import load as load
    from wan_jax.parallel import make_mesh as make_mesh
    from wan_jax.pipeline import generate as generate
    from wan_jax.references import Reference as Reference


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'wan_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
