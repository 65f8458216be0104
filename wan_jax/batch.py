"""Many files into one folder, by any number of workers: each is made once, none is lost when a worker dies.

The folder is the queue; there is no server. A worker owns an item as long as a folder of its own, made in one step by
``mkdir``, stands in ``.work``: ``.work/KEY.0``. It touches that folder now and then (the heartbeat), writes into it
and moves the finished file out of it. A folder that has not been touched for a lease belongs to a dead worker: whoever
makes ``KEY.1`` has taken the item over and removes ``KEY.0``, out of which nothing can be moved any more, should its
owner only have slept. Silence is measured by the watcher's own clock. All of this holds where ``mkdir`` and ``rename``
are atomic between hosts: local disks and NFS, not buckets mounted as folders.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

from wan_jax.distributed import agree, is_first
from wan_jax.errors import CheckpointError, WanError

log = logging.getLogger(__name__)

LEASE = 60.0  # seconds of silence after which a worker is taken for dead
_OWNER = "owner"  # the file in a claim that says whose it is
_NONE = -1


class Item(NamedTuple):
    """One file to make.

    name: of the file in the folder. key: of all that it is made of, fit for a file name. options: for who makes it.
    """

    name: str
    key: str
    options: Any = None


class Outcome(NamedTuple):
    """Names of the items, by what this worker saw of them; failed: name -> what was wrong."""

    made: list[str]
    found: list[str]
    failed: dict[str, str]


class LostError(WanError):
    """Another worker has taken the item over: this one was silent for too long."""


class Claim:
    """The right to make one item: a folder that only this worker made."""

    def __init__(self, place: Path):
        self.place = place
        self._owner = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        (place / _OWNER).write_text(self._owner)

    @contextmanager
    def held(self, lease: float) -> Iterator[None]:
        """Touch the claim in a thread while the block runs; then give it up."""
        done = threading.Event()

        def beat() -> None:
            while not done.wait(lease / 5):
                with suppress(OSError):
                    os.utime(self.place)

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            if self._is_ours():
                shutil.rmtree(self.place, ignore_errors=True)

    def hand_over(self, made: Path, target: Path) -> None:
        """Give a finished file its name.

        Raises:
            LostError: it is no longer ours to give.
        """
        try:
            if self._is_ours():
                os.replace(made, target)
                return
        except FileNotFoundError:  # removed since
            pass
        raise LostError(f"{target.name}: this worker was silent for too long, another one makes it")

    def _is_ours(self) -> bool:
        try:
            return (self.place / _OWNER).read_text() == self._owner
        except FileNotFoundError:
            return False


class Queue:
    """The items of a folder, as one worker sees them."""

    def __init__(self, folder: Path, items: Sequence[Item], lease: float):
        self.folder, self.items, self.lease = folder, items, lease
        self.work = folder / ".work"
        self.tried: set[int] = set()
        self.outcome = Outcome([], [], {})
        self.claim: Claim | None = None
        self._seen: dict[Path, tuple[int, float]] = {}  # claim of another -> (last touched, when we saw that first)

    def take(self) -> int:
        """Claim the next item to be made and return its index; -1 when nothing is left. Waits for other workers: what
        they leave undone falls to this one."""
        while open_items := [i for i in range(len(self.items)) if i not in self.tried]:
            for i in open_items:
                name, key = self.items[i].name, self.items[i].key
                claim = None if (self.folder / name).exists() else self._claim(key)
                if (self.folder / name).exists():  # also when it was finished while we claimed it
                    if claim:
                        shutil.rmtree(claim.place, ignore_errors=True)
                    self.tried.add(i)
                    self.outcome.found.append(name)
                elif claim:
                    self.tried.add(i)
                    self.claim = claim
                    return i
            time.sleep(min(1.0, self.lease / 5))
        with suppress(OSError):  # something of another worker is in it
            self.work.rmdir()
        return _NONE

    def _claim(self, key: str) -> Claim | None:
        held = max(self.work.glob(f"{key}.*[0-9]"), key=_number, default=None)
        if held is not None and not self._is_silent(held):
            return None
        place = self.work / f"{key}.{0 if held is None else _number(held) + 1}"
        try:
            self.work.mkdir(exist_ok=True)
            place.mkdir()
            if held is not None:
                log.warning("%s: its worker is silent, taken over", key)
                (held / _OWNER).unlink(missing_ok=True)
                shutil.rmtree(held, ignore_errors=True)
            return Claim(place)
        except (FileExistsError, FileNotFoundError):  # another worker was faster, or has just removed an empty .work
            return None

    def _is_silent(self, place: Path) -> bool:
        try:
            touched = place.stat().st_mtime_ns
        except FileNotFoundError:  # given up just now; the next round will tell
            return False
        last, since = self._seen.get(place, (None, 0.0))
        if touched != last:
            self._seen[place] = touched, time.monotonic()
            return False
        return time.monotonic() - since > self.lease


def _number(place: Path) -> int:
    return int(place.suffix[1:])


def work(
    folder: Path,
    items: Sequence[Item],
    make: Callable[[Item, Path, Path], None],
    *,
    lease: float = LEASE,
    say: Callable[[str], None] = lambda text: None,
) -> Outcome:
    """Make what is missing in a folder, beside any other workers. Returns when every item exists or has failed here.

    A `WanError` or OSError of an item is noted and the rest goes on; damaged weights (CheckpointError) end everything.
    Several processes of one program (`wan_jax.distributed`) are one worker: all make, the first one claims and writes.

    Args:
        items: in this order, names and keys unique.
        make: ``(item, state, file)`` writes the file; it may keep a state there for whoever continues, and removes it.
        lease: seconds.
        say: takes one line of progress an item, on the process that writes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    queue = Queue(folder, items, lease)
    outcome = queue.outcome
    while (i := agree(queue.take() if is_first() else 0)) != _NONE:
        item, claim, begin = items[i], queue.claim, time.perf_counter()
        made = (claim.place if claim else folder) / item.name
        try:
            with claim.held(lease) if claim else nullcontext():
                make(item, queue.work / f"{item.key}.resume.safetensors", made)
                if claim:
                    claim.hand_over(made, folder / item.name)
        except CheckpointError:
            raise
        except LostError as error:
            queue.tried.discard(i)  # should the other one fail too
            log.warning("%s", error)
        except (WanError, OSError) as error:
            outcome.failed[item.name] = str(error)
            log.error("%s failed: %s", item.name, error)
        else:
            outcome.made.append(item.name)
            count = len(outcome.made) + len(outcome.found) + len(outcome.failed)
            say(f"{count} of {len(items)}: {item.name}, {time.perf_counter() - begin:.1f} s")
    return outcome
