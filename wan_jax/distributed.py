"""One program on several processes: joining them, a mesh over all of their devices, and the values of such arrays.

Every process runs the same command and computes the same program; arrays lie on the devices of all of them. Little
else differs from one process, since under `wan_jax.parallel.use_mesh` JAX makes every array on the whole mesh: numpy
cannot read an array whose pieces lie elsewhere (`fetch` can), and only the first process writes files (`is_first`).
"""

from __future__ import annotations

import os
import platform
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

import wan_jax
from wan_jax.errors import InputError, WanError
from wan_jax.parallel import make_mesh, parse_mesh, replicated

# A process that is silent for so long is taken for dead, and the others stop, naming it. Heartbeats come from a thread
# of their own: compiling or loading for minutes is not silence.
HEARTBEAT_SECONDS = 20
JOIN_SECONDS = 300  # for all processes to start
_RECORD_BYTES = 256  # of what a process says of itself in `check`


def join(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Meet the other processes; to be called before anything touches a device.

    On TPU slices, under Slurm, Open MPI and Kubernetes, JAX finds all three by itself.

    Args:
        coordinator: HOST:PORT of process 0, a free port that the others reach; else ``JAX_COORDINATOR_ADDRESS``.
        num_processes, process_id: how many there are, and which this is, from 0; else ``JAX_NUM_PROCESSES`` and
            ``JAX_PROCESS_ID``.
    Raises:
        InputError: something is neither given nor found. WanError: the others did not come.
    """
    num_processes = _from_environment("JAX_NUM_PROCESSES", num_processes)
    process_id = _from_environment("JAX_PROCESS_ID", process_id)
    if coordinator and not coordinator.rpartition(":")[2].isdecimal():
        raise InputError(f"--coordinator {coordinator}: need HOST:PORT such as 10.0.0.1:12345")
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id,
            initialization_timeout=JOIN_SECONDS, heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise InputError(
            f"cannot join the other processes: {error} Outside of TPU slices, Slurm, Open MPI and Kubernetes give"
            " --coordinator HOST:PORT, --num-processes and --process-id"
        ) from error
    except RuntimeError as error:
        raise WanError(f"cannot join the other processes: {error}") from error


def _from_environment(name: str, given: int | None) -> int | None:
    text = os.environ.get(name)
    if given is not None or text is None:
        return given
    if not text.isdecimal():
        raise InputError(f"{name}={text!r}: need a whole number")
    return int(text)


def is_first() -> bool:
    """Whether this process writes the files: process 0, or the only one."""
    return jax.process_index() == 0


def choose_mesh(text: str | None) -> Mesh | None:
    """The mesh of "fsdp=4,seq=2"; without a text all devices of several processes, or None: one device of one."""
    if text:
        return make_mesh(parse_mesh(text))
    return make_mesh() if jax.process_count() > 1 else None


def fetch(x: jax.Array) -> np.ndarray:
    """The whole of an array in the memory of every process. All processes must call this together."""
    if x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def agree(value: int) -> int:
    """What the first process says, on all of them."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def check(mesh: Mesh | None, cache: str) -> tuple[str, bool]:
    """What this process sees of the machines, and whether they fit together; computes one sum over all devices.

    Args:
        mesh: of the run to come.
        cache: where compiled programs are kept, in words.
    Returns:
        Lines to print, and False when versions differ or the sum is wrong.
    """
    here = f"wan_jax {wan_jax.__version__}, jax {jax.__version__}, Python {platform.python_version()}"
    local = jax.local_devices()
    lines = [
        f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}: {here}",
        f"  devices: {len(local)} here, {jax.device_count()} in all, {local[0].device_kind} ({local[0].platform})",
        "  mesh: " + ("one device" if mesh is None else ", ".join(f"{name}={n}" for name, n in mesh.shape.items())),
        f"  compiled programs: {cache}",
    ]
    faults = [f"process {i} has {said}" for i, said in enumerate(_gather(here)) if said != here]
    if mesh is not None:
        count = mesh.devices.size
        ones = jax.make_array_from_callback(
            (count,), jax.NamedSharding(mesh, jax.P(mesh.axis_names)), lambda index: np.ones(count, np.float32)[index]
        )
        total = float(jax.jit(lambda x: x.sum(), out_shardings=replicated(mesh))(ones))
        lines.append(f"  sum over the mesh: {total:g} of {count}")
        if total != count:
            faults.append("the devices do not add up: look at the network between the hosts")
    return "\n".join([*lines, *(f"  FAULT: {fault}" for fault in faults)]), not faults


def _gather(text: str) -> list[str]:
    """What every process says, in their order."""
    if jax.process_count() == 1:
        return [text]
    record = np.zeros(_RECORD_BYTES, np.uint8)
    data = text.encode()[:_RECORD_BYTES]
    record[: len(data)] = np.frombuffer(data, np.uint8)
    return [bytes(row).rstrip(b"\0").decode() for row in multihost_utils.process_allgather(record)]
