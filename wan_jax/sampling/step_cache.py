"""Which steps of a schedule may leave out the blocks of the network, decided before the first one.

What the blocks add to the tokens changes slowly from step to step, in its size too. A `Curve` holds that size over the
noise levels, measured once per model on a clip that is sampled in full; it does not depend on the number of steps. A
step is left out as long as the sizes of the steps that were left out since differ by less than a threshold in sum.

Source: Ma et al., "MagCache", arXiv 2506.09045, section 4. Deviation: sizes over noise levels in place of ratios per
step, so that one measurement serves every schedule.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.home import home

log = logging.getLogger(__name__)

FIRST = 0.2  # share of the steps at the start that always run: they lay out the clip
MOST = 3  # steps in a row that may do without
SHIPPED = "step_cache.json"  # in the assets


class Curve(NamedTuple):
    """Root mean square of what the blocks add, [N] float64 per stream, at noise levels that fall."""

    sigmas: np.ndarray
    sizes: Mapping[str, np.ndarray]

    def at(self, sigmas: np.ndarray) -> np.ndarray:
        """Sizes [streams, n] at other noise levels."""
        return np.stack([np.interp(sigmas, self.sigmas[::-1], size[::-1]) for size in self.sizes.values()])


def plan_skips(curve: Curve, sigmas: np.ndarray, threshold: float, starts: Sequence[int] = (0,)) -> np.ndarray:
    """Steps that do without the blocks: bool [N].

    Args:
        sigmas: [N] of the steps.
        threshold: how far sizes may differ in sum, 0.05 is careful and 0.2 bold.
        starts: steps before which nothing is known, as the first of another expert.
    """
    sizes, skips = curve.at(sigmas), np.zeros(len(sigmas), bool)
    first, last, error = int(np.ceil(FIRST * len(sigmas))), 0, 0.0
    for i in range(len(sigmas)):
        error += np.abs(1 - sizes[:, i] / sizes[:, last]).max()
        skips[i] = i >= first and i not in starts and error <= threshold and i - last <= MOST
        if not skips[i]:
            last, error = i, 0.0
    return skips


def prepare(
    model: str, threshold: float, sigmas: np.ndarray, starts: Sequence[int]
) -> tuple[np.ndarray | None, Measure | None]:
    """What a run with this threshold does: which steps it leaves out, None for nothing kept from step to step; and
    what measures, where that has to come first.
    """
    if not threshold:
        return None, None
    if curve := find_curve(model):
        skips = plan_skips(curve, sigmas, threshold, starts)
        log.info("step cache: %d of %d steps leave out the blocks", skips.sum(), len(skips))
        return skips, None
    log.warning("%s was never measured for the step cache: this clip runs every step, and measures", model)
    return np.zeros(len(sigmas), bool), Measure()


class Measure:
    """Takes the curve of a model while a clip is sampled in full, one step per program."""

    def __init__(self) -> None:
        self._sizes: dict[float, dict[str, float]] = {}

    def update(self, sigma: float, added: Any) -> None:
        """Note what the blocks added at one noise level."""
        streams = added if isinstance(added, Mapping) else {"video": added}
        self._sizes[float(sigma)] = {stream: float(_size(x)) for stream, x in streams.items()}

    def keep(self, model: str, sigmas: np.ndarray) -> None:
        """Write the curve where `find_curve` looks for it, if every one of these noise levels was seen."""
        if any(float(sigma) not in self._sizes for sigma in sigmas):
            log.warning("the step cache was not measured: that takes a clip with every step in one run, segment=1")
            return
        path = _home(model)
        seen = [self._sizes[float(sigma)] for sigma in sigmas]
        sizes = {stream: [float(f"{step[stream]:.5g}") for step in seen] for stream in seen[0]}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"sigmas": [round(float(x), 5) for x in sigmas], "sizes": sizes}))
        except OSError as fault:
            log.warning("the measured step cache cannot be kept in %s (%s)", path, fault.strerror)
        else:
            log.info("measured for the step cache of %s: %s; the next clip leaves steps out", model, path)


@jax.jit
def _size(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.square(x.astype(jnp.float32)).mean())


def find_curve(model: str) -> Curve | None:
    """The curve of a model: measured here before, or shipped; None if it was never measured."""
    try:
        found = json.loads(_home(model).read_text())
    except FileNotFoundError:
        found = json.loads(resources.files("wan_jax.assets").joinpath(SHIPPED).read_text()).get(model)
    except (OSError, ValueError) as fault:
        log.warning("%s cannot be read (%s): delete it to measure anew", _home(model), fault)
        found = None
    return found and Curve(np.array(found["sigmas"]), {s: np.array(x) for s, x in found["sizes"].items()})


def _home(model: str) -> Path:
    return home() / "step_cache" / f"{model}.json"
