"""The denoising loop: a jitted `jax.lax.scan` over a *segment* of steps, given a velocity function.

Solver state is the carry; noise levels, timesteps, guidance and every condition are arrays; only the length of a
segment is static. Between segments the host reports progress, checks for NaN, honours Ctrl-C and may save the state.
No host callback runs inside the compiled program: it would keep it out of the persistent compilation cache, and a
Ctrl-C would wait for the whole scan.
"""

from __future__ import annotations

import functools
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.errors import InputError, NonFiniteError
from wan_jax.nn.reuse import Reuse
from wan_jax.parallel import compiler_options, constrain
from wan_jax.sampling.schedule import Schedule
from wan_jax.sampling.solvers import Coefficients, State, coefficients, init_state, step

log = logging.getLogger(__name__)
Array = jax.Array
# velocity(args, sample, timestep, guidance) -> velocity. ``args`` is a pytree (weights, conditions): arrays reach the
# compiled program as arguments, never as constants of a closure. ``sample`` is one array or one per stream. Where steps
# may leave out the network's blocks, it is given a `Reuse` as well and returns what the blocks added too.
Velocity = Callable[..., Any]


class Steps(NamedTuple):
    """What changes from step to step, [N, ...] each, float32."""

    timestep: np.ndarray
    guidance: Any  # what the velocity function takes: a scale, or weights of its passes
    solver: Coefficients
    key: Any = None  # random keys of the fresh noise, for solvers that add some
    skip: np.ndarray | None = None  # bool: steps that leave out the network's blocks

    def part(self, first: int, stop: int) -> Steps:
        return jax.tree.map(lambda x: x[first:stop], self)

    @property
    def num_steps(self) -> int:
        return len(self.timestep)


class Pin(NamedTuple):
    """Latents that are known: after every step ``sample = where(mask, value, sample)`` (TI2V's clean first frame).

    With several streams a dictionary holds the pins of those that have one.
    """

    mask: Array
    value: Array


class Progress(NamedTuple):
    """Given to the callback after each segment. ``seconds`` is the time of one step of this segment; the arrays of
    ``state`` are valid until the callback returns, so copy what is to be kept.
    """

    step: int
    num_steps: int
    seconds: float
    state: State


def make_steps(
    solver: str, schedule: Schedule, guidance: Any = 1.0, seed: int = 0, skip: np.ndarray | None = None
) -> Steps:
    """Tables of one run.

    Args:
        guidance: one scale, or a pytree of arrays [N, ...] with an entry per step.
        seed: of the noise that some solvers add in every step; independent of `jax.random.key(seed)` itself.
        skip: bool [N], see `wan_jax.sampling.step_cache.plan_skips`; None keeps nothing from step to step.
    """

    def table(values: Any) -> np.ndarray:
        values = np.asarray(values, np.float32)
        return np.broadcast_to(values, (schedule.num_steps, *values.shape[1:]))

    factors, keys = coefficients(solver, schedule.sigmas), None
    if factors.fresh is not None:
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 1), schedule.num_steps)
    return Steps(schedule.timesteps.astype(np.float32), jax.tree.map(table, guidance), factors, keys, skip)


def normal(key: Array, like: Any) -> Any:
    """Standard normal noise in the shapes of ``like``, independent in each of its arrays."""
    leaves, tree = jax.tree.flatten(like)
    keys = jax.random.split(key, len(leaves))
    return tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def pinned(sample: Any, pin: Any) -> Any:
    """The sample with known latents in place."""
    if pin is None:
        return sample
    if isinstance(pin, Pin):
        return jnp.where(pin.mask, pin.value, sample)
    return {stream: pinned(x, pin.get(stream)) for stream, x in sample.items()}


def run_segment(velocity: Velocity, args: Any, state: State, steps: Steps, pin: Any) -> tuple[State, Array]:
    """Take ``steps`` (pure, jittable). Returns the state and, per step, whether the sample stayed finite."""

    def body(state: State, now: Steps) -> tuple[State, Array]:
        noise, added = None if now.key is None else normal(now.key, state.sample), None
        given = args, state.sample, now.timestep, now.guidance
        if now.skip is None:
            v = velocity(*given)
        else:
            v, added = velocity(*given, Reuse(now.skip, state.added))
        state = step(state, v, *now.solver, noise)
        state = state._replace(sample=pinned(state.sample, pin), added=added)
        return state, jnp.stack([jnp.isfinite(x).all() for x in jax.tree.leaves(state.sample)]).all()

    return jax.lax.scan(body, state, steps)


@functools.cache
def compiled_segment(velocity: Velocity) -> Callable[..., tuple[State, Array]]:
    """`run_segment` jitted for one velocity function; one program per segment length and shape."""
    return jax.jit(functools.partial(run_segment, velocity), donate_argnums=1, compiler_options=compiler_options())


def start(noise: Any, pin: Any = None, noise_scale: float = 1.0) -> State:
    """Initial solver state: the noise (one array or one per stream) as the schedule scales it, with known latents in
    place.
    """
    return init_state(pinned(jax.tree.map(lambda x: noise_scale * x, noise), pin))


def _nothing_added(velocity: Velocity, args: Any, state: State, steps: Steps) -> Any:
    """Zeros in the shape of what the network's blocks add, where a mesh wants them."""
    now = steps.part(0, 1)

    def shape(args: Any, sample: Any, now: Steps) -> Any:
        now = jax.tree.map(lambda x: x[0], now)
        return velocity(args, sample, now.timestep, now.guidance, Reuse(now.skip))[1]

    return jax.tree.map(lambda x: _zeros(x.shape, x.dtype), jax.eval_shape(shape, args, state.sample, now))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _zeros(shape: tuple[int, ...], dtype: Any) -> Array:
    return constrain(jnp.zeros(shape, dtype), "B", "L", None)


def sample(
    velocity: Velocity,
    args: Any,
    state: State,
    steps: Steps,
    *,
    first: int = 0,
    last: int | None = None,
    pin: Any = None,
    segment: int | str = 1,
    callback: Callable[[Progress], None] | None = None,
) -> State:
    """Run steps ``first`` to ``last`` of a schedule.

    Args:
        velocity: any ``velocity(args, sample, timestep, guidance) -> velocity``; a module-level function compiles once.
        state: `start(noise)`, or a saved state. It is donated: use the returned one.
        segment: steps per program, or "all": the whole schedule in one program (pods, benchmarks). The result is
            bit-equal either way.
        callback: called on the host after each segment.
    Raises:
        NonFiniteError: names the first step whose sample is not finite.
        KeyboardInterrupt: after the running segment; the callback has seen the state by then.
    """
    last = steps.num_steps if last is None else last
    length = max(last - first, 1) if segment == "all" else segment
    if not isinstance(length, int) or length < 1:
        raise InputError(f'segment={segment!r}: need a positive number of steps, or "all"')
    run = compiled_segment(velocity)
    if steps.skip is not None and state.added is None:
        state = state._replace(added=_nothing_added(velocity, args, state, steps))
    with _interrupts() as interrupted:
        while first < last:
            begin, stop = time.perf_counter(), min(first + length, last)
            state, finite = run(args, state, steps.part(first, stop), pin)
            finite = np.asarray(finite)
            if not finite.all():
                bad = first + int(np.argmin(finite))
                raise NonFiniteError(
                    f"sampling step {bad + 1} of {steps.num_steps} (timestep {steps.timestep[bad]:.0f}) gave NaN or"
                    " infinity: try float32, check the weights (wan-jax convert check), or lower the guidance scale"
                )
            seconds = (time.perf_counter() - begin) / (stop - first)
            first = stop
            if callback:
                callback(Progress(first, steps.num_steps, seconds, state))
            if interrupted.is_set():
                raise KeyboardInterrupt
    return state


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event that is honoured between segments; a second one interrupts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    previous = signal.getsignal(signal.SIGINT)

    def handler(signum: int, frame: Any) -> None:
        if event.is_set():
            raise KeyboardInterrupt
        event.set()
        log.warning("stopping after this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, handler)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, previous)
