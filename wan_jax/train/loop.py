"""The loop that every training shares: feed, step, watch, save; stop cleanly, and continue as if never stopped."""

from __future__ import annotations

import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from wan_jax.errors import InputError, NonFiniteError
from wan_jax.parallel import use_mesh
from wan_jax.train.snapshots import Snapshots
from wan_jax.train.step import Flat, Recipe, State, Task, make_step, place, place_frozen, split, start

log = logging.getLogger(__name__)


class Feed(Protocol):
    """Where examples come from."""

    def __call__(self, step: int, count: int) -> tuple[Any, Any]:
        """What the steps from ``step`` on take: what they share, and [count, ...] of their own or None."""

    def position(self) -> dict[str, Any]:
        """JSON-ready: where the feed stands."""

    def seek(self, position: dict[str, Any]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Watch:
    """How often what happens beside the steps, in steps; 0 is never, and at the end of a run.

    Args:
        minutes: of this call; training then stops as it does at SIGTERM.
        keep: states.
    """

    log: int = 20
    save: int = 500
    sample: int = 0
    minutes: float | None = None
    keep: int = 2


def fit(
    task: Task,
    recipe: Recipe,
    networks: dict[str, Any],
    feed: Feed,
    folder: str | Path,
    *,
    trains: Callable[[str], bool] = lambda path: True,
    watch: Watch = Watch(),
    mesh: jax.sharding.Mesh | None = None,
    resume: bool = False,
    sample: Callable[[int, Flat, Flat], dict[str, float] | None] | None = None,
) -> tuple[State, Flat]:
    """Train until ``recipe.steps``, a signal, or the end of the time.

    Args:
        networks: concrete modules by name; those of ``task.networks``.
        folder: takes ``states/``, ``metrics.jsonl`` and, where TensorBoard is installed, its events.
        trains: which parameters, by ``network.path``.
        resume: continue from the last whole state in the folder; without one, begin.
        sample: called with the step, the moving average and the frozen parameters; what it returns is logged.
    Returns:
        The last state, and the frozen parameters. ``state.step < recipe.steps`` tells that training was stopped.
    Raises:
        NonFiniteError: a loss or gradient is not finite; names the step. The states before it are kept.
        InputError: there are states in the folder and ``resume`` is not set. WanError: the disk is full.
        CheckpointError: what is to be resumed is damaged or of another run.
    """
    folder = Path(folder)
    with use_mesh(mesh), Snapshots(folder / "states", watch.keep) as snapshots, _stop_signals(watch) as stop:
        params, frozen = split(networks, trains)
        state, frozen = place(start(recipe, params), mesh), place_frozen(frozen, mesh)
        del params, networks
        step = 0
        if snapshots.steps():
            if not resume:
                raise InputError(f"{folder} holds a run at step {snapshots.steps()[-1]}: add --resume, or name another")
            step, state, about = snapshots.restore(state)
            feed.seek(about["feed"])
        run = make_step(task, recipe, state, mesh)
        count, saved = recipe.steps_per_call, step
        metrics = Metrics(folder, step)
        log.info("%s: step %d of %d, %d parameters train", folder, step, recipe.steps, _count(state.params))
        while step < recipe.steps and not stop.is_set():
            shared, own = feed(step, count)
            state, means = run(state, frozen, shared, own)
            metrics.add(step, means)
            before, step = step, step + count
            if _due(watch.sample, before, step, recipe.steps) and sample:
                metrics.write(step, sample(step, state.ema, frozen) or {})
            if _due(watch.log, before, step, recipe.steps):
                metrics.report(step)
            if _due(watch.save, before, step, recipe.steps):
                metrics.report(step)  # a state is only kept once all losses before it are known to be finite
                snapshots.save(step, state, {"feed": feed.position()})
                saved = step
        metrics.report(step)
        if saved < step:
            snapshots.save(step, state, {"feed": feed.position()})
        snapshots.wait()
        metrics.close()
    if step < recipe.steps:
        log.info("%s: stopped at step %d; --resume continues", folder, step)
    return state, frozen


def _due(every: int, before: int, step: int, last: int) -> bool:
    return step == last or bool(every and before // every < step // every)


def _count(params: Flat) -> int:
    return sum(x.size for x in params.values())


class Metrics:
    """Means of the steps to ``metrics.jsonl``, to TensorBoard where it is installed, and to the log.

    They are fetched from the device when reported, so that it need not wait for the host between two calls.
    """

    def __init__(self, folder: Path, step: int):
        self._path = folder / "metrics.jsonl"
        self._waiting: list[tuple[int, dict[str, jax.Array]]] = []
        self._since, self._steps = time.perf_counter(), 0
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        kept = [line for line in lines if _logged(line) <= step]  # what a killed run did beyond is done again
        self._path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._board = _tensorboard(folder)

    def add(self, step: int, means: dict[str, jax.Array]) -> None:
        self._waiting.append((step, means))

    def report(self, step: int) -> None:
        """Fetch, check and write the means since the last report."""
        if not self._waiting:
            return
        values: dict[str, list[np.ndarray]] = {}
        for first, means in self._waiting:
            for name, x in means.items():
                x = np.asarray(x)
                if not np.isfinite(x).all():
                    bad = first + int(np.argmin(np.isfinite(x))) + 1
                    raise NonFiniteError(
                        f"step {bad}: {name} is NaN or infinite: lower the learning rate, or check the data; "
                        "--resume continues from the last state before it"
                    )
                values.setdefault(name, []).append(x)
        now = time.perf_counter()
        count = sum(len(x) for x in values["loss"])
        means = {name: float(np.concatenate(x).mean()) for name, x in values.items()}
        self.write(step, means | {"seconds": (now - self._since) / count})
        self._waiting, self._since = [], now

    def write(self, step: int, values: dict[str, float]) -> None:
        if not values:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step} | {name: round(x, 6) for name, x in values.items()}) + "\n")
        log.info("step %d: %s", step, ", ".join(f"{name} {x:.4g}" for name, x in values.items()))
        if self._board:
            for name, x in values.items():
                self._board.add_scalar(name, x, step)

    def close(self) -> None:
        if self._board:
            self._board.close()


def _logged(line: str) -> float:
    """The step of a line; infinite for one that was cut short."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboard.summary import Writer
    except ImportError:
        return None
    return Writer(str(folder / "tensorboard"))


@contextmanager
def _stop_signals(watch: Watch) -> Iterator[threading.Event]:
    """An event that SIGTERM, the first Ctrl-C, and the end of the time set; a second Ctrl-C interrupts at once."""
    event = threading.Event()
    timer = threading.Timer(60 * watch.minutes, event.set) if watch.minutes else None
    if timer:
        timer.daemon = True
        timer.start()
    previous = {}

    def handler(signum: int, frame: Any) -> None:
        if event.is_set() and signum == signal.SIGINT:
            raise KeyboardInterrupt
        event.set()
        log.warning("stopping after this step, and saving")

    if threading.current_thread() is threading.main_thread():
        previous = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        if timer:
            timer.cancel()
        for number, old in previous.items():
            signal.signal(number, old)
