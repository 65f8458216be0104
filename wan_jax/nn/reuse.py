"""Leaving out a stack of blocks in some steps of sampling: it adds what it added the last time.

Between neighbouring steps of a diffusion model that sum hardly changes. Which steps do without is known before the
first one (``sampling/step_cache.py``), so one compiled program serves: a conditional whose other branch costs nothing.
Source: Ma et al., "MagCache", arXiv 2506.09045.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from wan_jax.parallel import constrain

Array = jax.Array


class Reuse(NamedTuple):
    """Given to a network beside its inputs; it then returns what its blocks added beside its output.

    skip: bool, whether the blocks are left out.
    added: what they added the last time they ran, [B, L, D] or one per stream; None runs them, whatever ``skip`` is.
    """

    skip: Array
    added: Any = None


def run_or_reuse(run: Callable[[Any], Any], x: Any, reuse: Reuse, dtype: Any) -> tuple[Any, Any]:
    """``run(x)``, or ``x`` with what `run` added before; and what was added.

    Args:
        x: tokens [B, L, D], one array or a pytree of them.
        dtype: that the sums are kept in.
    """

    def anew() -> tuple[Any, Any]:
        y = run(x)
        return y, jax.tree.map(lambda y, x: constrain((y - x).astype(dtype), "B", "L", None), y, x)

    def again() -> tuple[Any, Any]:
        return jax.tree.map(jnp.add, x, reuse.added), reuse.added

    return anew() if reuse.added is None else jax.lax.cond(reuse.skip, again, anew)
