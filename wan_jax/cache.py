"""Compiled programs on disk: what one run has compiled, the next one reads. A bad folder costs time, not results.

One folder for each set of versions: programs of others would never be found again.
"""

from __future__ import annotations

import logging
import os
import warnings
from pathlib import Path

import jax
import jaxlib

import wan_jax
from wan_jax.home import home

log = logging.getLogger(__name__)

VARIABLE = "WAN_JAX_COMPILE_CACHE"
OFF = "off"


def keep_programs(choice: str | None = None) -> str:
    """Turn JAX's persistent compilation cache on for this process, before anything is compiled.

    Args:
        choice: a folder, or "off". By default what ``WAN_JAX_COMPILE_CACHE`` says, then ``JAX_COMPILATION_CACHE_DIR``,
            then a folder of these versions in ``WAN_JAX_HOME`` (``~/.cache/wan_jax``).
    Returns:
        Where programs are kept, in words.
    """
    choice = choice or os.environ.get(VARIABLE)
    if choice == OFF:
        jax.config.update("jax_enable_compilation_cache", False)
        return "not kept"
    folder = Path(choice or jax.config.jax_compilation_cache_dir or _default()).expanduser()
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a program that others may write is theirs to run
    except OSError as fault:
        log.warning("compiled programs cannot be kept in %s (%s): every start compiles", folder, fault.strerror)
        jax.config.update("jax_enable_compilation_cache", False)
        return f"not kept: {folder} cannot be made"
    if str(folder) != jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # many small ones are a cold start too
        # The path of XLA's own cache of tuned fusions would be part of every key, on a CPU and a TPU too: programs
        # would be lost when the folder is moved, or mounted elsewhere. They hold what was tuned anyway.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    _warn_once(folder)
    return f"kept in {folder}" + ("" if os.access(folder, os.W_OK | os.X_OK) else ", which is write-protected")


def _default() -> Path:
    return home() / "xla" / f"wan_jax-{wan_jax.__version__}-jax-{jax.__version__}-jaxlib-{jaxlib.__version__}"


def _warn_once(folder: Path) -> None:
    """JAX warns of every program that it cannot read or write, and goes on: the first of these is enough."""
    show, said = warnings.showwarning, []

    def once(message: Warning | str, *args: object, **kwargs: object) -> None:
        if "persistent compilation cache entry" not in str(message):
            show(message, *args, **kwargs)
        elif not said:
            said.append(message)
            log.warning("compiled programs in %s are damaged, or it is full; delete it (%s)", folder, message)

    warnings.showwarning = once
