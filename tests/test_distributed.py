"""Two processes on this machine: the same clip as one process makes, what they say of each other, and a dead peer."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from wan_jax.cli import main
from wan_jax.model import load
from wan_jax.parallel import make_mesh
from wan_jax.pipeline import generate

CLIP = dict(size="32x32", num_frames=1, num_steps=1, progress=False)
CLIP_PROGRAM = f"""
import sys
import numpy as np
from wan_jax.distributed import check, choose_mesh, fetch, is_first, join
from wan_jax.model import load
from wan_jax.pipeline import generate

join("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
mesh = choose_mesh("data=2,fsdp=2")
print(*check(mesh, "not kept"), flush=True)
model = load(sys.argv[3], dtype="float32", mesh=mesh)
latents = []
clip = generate(model, "a cat", callback=lambda now: latents.append(fetch(now.state.sample)), **{CLIP!r})
np.savez(sys.argv[4] + sys.argv[2], latents=latents[-1], video=clip.video)
"""
WAITING_PROGRAM = """
import sys, time
from wan_jax import distributed

distributed.join("127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2]))
print("joined", flush=True)
time.sleep(90)
"""


@pytest.fixture
def port() -> str:
    try:
        with socket.create_server(("127.0.0.1", 0)) as server:
            return str(server.getsockname()[1])
    except OSError as error:
        pytest.skip(f"no sockets: {error}")


def start(program: str, *words: object) -> subprocess.Popen:
    """A process with two devices, without what would lead it to other machines."""
    environment = {name: text for name, text in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"JAX_NUM_CPU_DEVICES": "2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", program, *map(str, words)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_two_processes_make_the_clip_of_one(port, tiny_folder, tmp_path):
    two = [start(CLIP_PROGRAM, port, i, tiny_folder("t2v"), tmp_path / "clip") for i in range(2)]
    latents = []
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    model = load(tiny_folder("t2v"), dtype="float32", mesh=mesh)
    clip = generate(model, "a cat", callback=lambda now: latents.append(np.asarray(now.state.sample)), **CLIP)
    try:
        said = [process.communicate(timeout=300) for process in two]
    finally:
        for process in two:
            process.kill()
    for i, (process, (out, err)) in enumerate(zip(two, said, strict=True)):
        assert process.returncode == 0, err
        assert f"process {i} of 2" in out and "2 here, 4 in all" in out and "sum over the mesh: 4 of 4" in out
        assert "data=2, fsdp=2" in out and "FAULT" not in out
        with np.load(tmp_path / f"clip{i}.npz") as theirs:
            assert np.abs(theirs["latents"] - latents[-1]).max() <= 1e-5
            assert np.abs(theirs["video"].astype(int) - clip.video).max() <= 1


@pytest.mark.parametrize("victim", [0, 1])
def test_the_death_of_a_process_ends_the_other(port, victim):
    two = [start(WAITING_PROGRAM, port, i) for i in range(2)]
    try:
        assert [process.stdout.readline() for process in two] == ["joined\n"] * 2
        two[victim].send_signal(signal.SIGKILL)
        begin = time.monotonic()
        _, said = two[1 - victim].communicate(timeout=60)
    finally:
        for process in two:
            process.kill()
            process.wait()
    assert two[1 - victim].returncode != 0 and time.monotonic() - begin < 30
    named = r"tasks are unhealthy \(stopped sending heartbeats\):\s+1\b" if victim else "leader task"
    assert re.search(named, said), said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--distributed", "--coordinator", "host"], "--coordinator host: need HOST:PORT"),
        (["--coordinator", "host:1"], "--coordinator needs --distributed"),
    ],
)
def test_what_is_missing_is_named(options, message, capsys):
    assert main(["generate", "--model", "wan2.1-t2v-1.3b", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_lone_process_is_told_what_to_give():
    """In a process of its own: JAX joins no others once it has used its devices."""
    program = "import sys; from wan_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    process = start(program, "generate", "--distributed")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "give --coordinator HOST:PORT, --num-processes and --process-id" in said


def test_check_of_one_process(capsys):
    assert main(["generate", "--check", "--mesh", "fsdp=4,data=2"]) == 0
    said = capsys.readouterr().out
    assert "process 0 of 1" in said and "data=2, fsdp=4" in said and "sum over the mesh: 8 of 8" in said
