"""The one folder where this package keeps things between runs."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """``WAN_JAX_HOME``, by default ``~/.cache/wan_jax``. It need not exist."""
    return Path(os.environ.get("WAN_JAX_HOME") or "~/.cache/wan_jax").expanduser()
