"""Batches: what lines mean, what is wrong with them, and that every file is made once whoever is killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_jax.batch import Item, LostError, Queue, work
from wan_jax.cli import generate, main, make_parser
from wan_jax.cli.batch import Lines, _places
from wan_jax.errors import CheckpointError, NonFiniteError
from wan_jax.media import read_settings, read_video

SHORT = ("--size", "32x32", "--num-frames", "1", "--num-steps", "1", "--dtype", "float32", "--quiet")
ITEMS = [Item(f"{i}.txt", f"key{i}") for i in range(12)]
# A worker that notes each file it begins and each it has finished.
WORKER = """
import os, sys, time
from pathlib import Path
from wan_jax.batch import Item, work

folder, name, seconds = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])

def make(item, state, path):
    path.write_text("half")
    print(item.name, flush=True)
    time.sleep(seconds)
    path.write_text(name)

print("ready", flush=True)
outcome = work(folder, [Item(f"{i}.txt", f"key{i}") for i in range(12)], make, lease=1)
print("made", *outcome.made, flush=True)
"""


pytestmark = pytest.mark.usefixtures("alone")


def write_lines(*lines: object) -> str:
    Path("p.jsonl").write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return "p.jsonl"


def names(folder: str) -> list[str]:
    return sorted(os.listdir(folder))


# ---- lines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"prompt": "-a cat", "num_frames": 5, "fps": 8.0}, ["--prompt=-a cat", "--num-frames", "5", "--fps", "8"]),
        ({"seed": 3, "guidance-scale": [2, 3.5]}, ["--seed", "3", "--guidance-scale", "2", "3.5"]),
        ({"seed": [3, 4], "tiled": True, "no_audio": True}, ["--seed", "3", "4", "--tiled", "--no-audio"]),
        ({"image": None, "size": "32x32"}, ["--size", "32x32"]),
        (
            {"reference": ["a.png", "b.png"], "voice": [None, "b.wav"], "describe": ["1:a man", "2:a dog"]},
            "--reference a.png --reference b.png --voice b.wav --describe".split() + ["1:a man", "--describe=2:a dog"],
        ),
        ({"reference": "a.png", "voice": "a.wav"}, ["--reference", "a.png", "--voice", "a.wav"]),
    ],
)
def test_a_line_says_what_the_command_line_says(line, words):
    expected = generate.options_of(make_parser().parse_args(["generate", *words]))
    assert Lines().options(json.dumps(line)) == expected


def test_a_line_may_take_a_flag_back():
    assert Lines().options('{"tiled": false, "no_audio": false}') == {"tiled": False, "audio": True}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a cat", "line 2: not JSON"),
        ('["a cat"]', "line 2: need an object"),
        ('{"prompt": "x", "prompt": "y"}', "a key stands twice"),
        ({"promt": "x"}, "line 2: unknown key 'promt', did you mean prompt"),
        ({"prompt": "x", "model": "wan2.1-t2v-1.3b"}, "unknown key 'model'"),
        ({"prompt": "x", "help": True}, "unknown key 'help'"),
        ({"prompt": "x", "num_frames": "five"}, "--num-frames: invalid int value: 'five'"),
        ({"prompt": "x", "num_frames": 4}, "line 2: num_frames=4: need 4n+1, try 5"),
        ({"prompt": "x", "num_frames": [1, 5]}, "num_frames: [1, 5]: need text or a number"),
        ({"prompt": "x", "tiled": 1}, "tiled: 1: need true or false"),
        ({"prompt": "x", "size": "65x48"}, "width must be a multiple of 16"),
        ({"prompt": "x", "image": "a.png"}, "makes video from text alone"),
        ({"prompt": "x", "voice": "a.wav"}, "voice: 1 of them for 0 of reference"),
        ({"prompt": "x", "output": "../x.png"}, "need the plain name of one file"),
        ({"prompt": "x", "output": "x-%05d.png"}, "need the plain name of one file"),
        ({"prompt": "x", "output": "x.avi"}, "its suffix is none of"),
        ({"prompt": "a cat"}, "is made by line 1 too"),
        ({"num_frames": 1}, "the prompt is empty"),
    ],
)
def test_wrong_lines_are_named_before_loading(line, message, tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr("wan_jax.model.load", lambda *_, **__: pytest.fail("loaded"))
    Image.new("RGB", (8, 8)).save("a.png")
    path = write_lines({"prompt": "a cat"}, line)
    assert main(["batch", path, "--model", str(tiny_folder("t2v")), "--out", "clips", *SHORT]) == 2
    said = capsys.readouterr().err
    assert message in said and "line 1:" not in said and not Path("clips").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--output", "x.mp4"], "--output is for one clip"),
        (["--from", "x.mp4"], "--from is for one clip"),
        (["--lease", "0"], "--lease 0: need 1"),
        (["--num-processes", "2"], "--num-processes needs --distributed"),
    ],
)
def test_wrong_use(options, message, capsys):
    assert main(["batch", write_lines({"prompt": "x"}), "--model", "wan2.1-t2v-1.3b", "--out", "c", *options]) == 2
    assert message in capsys.readouterr().err


def test_ray_is_an_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["batch", write_lines({"prompt": "x"}), "--model", "m", "--out", "c", "--ray"]) == 2
    assert "pip install wan_jax[ray]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("hosts", "places"),
    [
        ([{"CPU": 8}, {"CPU": 16, "GPU": 2.0}], [{"num_gpus": 1}] * 2),
        ([{"TPU": 4.0, "CPU": 8}, {"CPU": 2}], [{"resources": {"TPU": 4.0}}]),
        ([{"CPU": 2}, {"CPU": 0.0}, {}], [{"num_cpus": 1, "scheduling_strategy": "SPREAD"}]),
    ],
)
def test_where_ray_puts_workers(hosts, places):
    nodes = [{"Alive": True, "Resources": host} for host in hosts]
    assert _places([*nodes, {"Alive": False, "Resources": {"GPU": 8}}]) == places


def test_a_killed_worker_of_ray(tiny_folder, monkeypatch):
    """Two workers, one killed with a clip in its hands: every clip is made, and none that is there again."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)  # nobody looks for the GPUs
    written, killed = {}, []

    def kill() -> None:
        """The owner of a claim, once a clip is there; then note when each clip is written."""
        while len(written) < 6:
            written.update((path.name, path.stat().st_mtime_ns) for path in Path("clips").glob("*.mp4"))
            if written and not killed:
                with suppress(OSError, IndexError):
                    killed.append(int(next(iter(Path("clips/.work").glob("*/owner"))).read_text().split()[1]))
                    os.kill(killed[0], signal.SIGKILL)
            time.sleep(0.02)

    path = write_lines(*({"prompt": "a cat", "seed": k, "output": f"{k}.mp4"} for k in range(6)))
    words = ["batch", path, "--model", str(tiny_folder("t2v")), "--out", "clips", *SHORT, "--num-frames", "5"]
    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        assert main([*words, "--num-steps", "50", "--lease", "10", "--ray"]) == 0
    finally:
        ray.shutdown()
    killer.join(10)
    assert killed and names("clips") == sorted(written) == [f"{k}.mp4" for k in range(6)]
    assert written == {path.name: path.stat().st_mtime_ns for path in Path("clips").iterdir()}


def test_a_batch(tiny_folder, capsys, monkeypatch):
    """Options of the command hold for all lines; a failing line is told, and made when the command is repeated."""
    lines = {"prompt": "A cat!", "seed": [1, 2]}, {"prompt": "bad"}, {"prompt": "x", "output": "x.webp", "seed": 5}
    words = ["batch", write_lines(*lines), "--model", str(tiny_folder("t2v")), "--out", "clips", *SHORT]
    assert main([*words, "--dry-run"]) == 0
    planned = sorted(Path(line).name for line in capsys.readouterr().out.splitlines())
    assert len(planned) == 4 and "x.webp" in planned and sum(name.startswith("a-cat-") for name in planned) == 2

    from wan_jax import pipeline

    run, made = pipeline.run, []

    def failing(model, request, **options):
        made.append(request.prompt)
        if request.prompt == "bad":
            raise NonFiniteError("step 1 gave NaN")
        return run(model, request, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run", failing)
        assert main(words) == 1
    assert "step 1 gave NaN" not in names("clips") and made == ["A cat!", "A cat!", "bad", "x"]
    (missing,) = set(planned) - set(names("clips"))
    assert missing.startswith("bad-") and set(names("clips")) < set(planned)  # no temporary file, no claim
    before = {name: Path("clips", name).stat().st_mtime_ns for name in names("clips")}
    assert main(words) == 0
    assert names("clips") == planned
    assert before == {name: Path("clips", name).stat().st_mtime_ns for name in before}
    assert {read_settings(Path("clips", name))["seed"] for name in planned} == {0, 1, 2, 5}


# ---- the queue ---------------------------------------------------------------------------------------------


def make(item: Item, state: Path, path: Path) -> None:
    path.write_text(item.key)


def test_failures_are_noted_and_damaged_weights_end_everything(tmp_path):
    def full(item: Item, state: Path, path: Path) -> None:
        make(item, state, path)
        if item == ITEMS[3]:
            raise OSError(28, "No space left on device")

    outcome = work(tmp_path, ITEMS, full)
    assert "No space left" in outcome.failed["3.txt"] and len(outcome.made) == 11
    assert names(tmp_path) == sorted(item.name for item in ITEMS if item != ITEMS[3])
    assert work(tmp_path, ITEMS, make).made == ["3.txt"]

    def damaged(item: Item, state: Path, path: Path) -> None:
        raise CheckpointError("truncated")

    with pytest.raises(CheckpointError):
        work(tmp_path / "other", ITEMS, damaged)
    assert work(tmp_path / "other", ITEMS, make, lease=1).made == [item.name for item in ITEMS]  # no claim was left


def test_a_sleeper_has_lost_its_claim(tmp_path):
    sleeper, other = Queue(tmp_path, ITEMS[:1], 0.2), Queue(tmp_path, ITEMS[:1], 0.2)
    assert sleeper.take() == 0
    old = sleeper.claim.place / "0.txt"
    old.write_text("old")
    begin = time.monotonic()
    assert other.take() == 0 and time.monotonic() - begin > 0.2
    with pytest.raises(LostError):
        sleeper.claim.hand_over(old, tmp_path / "0.txt")
    new = other.claim.place / "0.txt"
    new.write_text("new")
    other.claim.hand_over(new, tmp_path / "0.txt")
    assert (tmp_path / "0.txt").read_text() == "new" and sleeper.take() == -1 and sleeper.outcome.found == []


def test_a_heartbeat_keeps_a_claim(tmp_path):
    owner, other = Queue(tmp_path, ITEMS[:1], 0.4), Queue(tmp_path, ITEMS[:1], 0.4)
    assert owner.take() == 0
    with owner.claim.held(0.4):
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            assert other._claim("key0") is None
            time.sleep(0.05)
    assert other._claim("key0")  # given up


def start_worker(folder: Path, name: str, seconds: float) -> subprocess.Popen:
    words = [sys.executable, "-c", WORKER, str(folder), name, str(seconds)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def test_what_a_killed_worker_leaves_is_made_once(tmp_path):
    """Two workers share; one is killed in the middle of a file; the other makes that file too, and no file twice."""
    folder = tmp_path / "out"
    killed = start_worker(folder, "killed", 0.05)
    try:
        begun = [killed.stdout.readline().strip() for _ in range(4)]  # ready and three files
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        two = [start_worker(folder, name, 0.1) for name in ("a", "b")]
        said = [worker.communicate(timeout=60)[0].splitlines() for worker in two]
    finally:
        killed.kill()
    assert begun[0] == "ready" and all(worker.returncode == 0 for worker in two)
    made = [line.split()[1:] for lines in said for line in lines if line.startswith("made")]
    files = {item.name: (folder / item.name).read_text() for item in ITEMS}
    assert names(folder) == sorted(files)  # nothing else is left
    assert sorted(made[0] + made[1]) == sorted(name for name, by in files.items() if by != "killed")
    assert set(files.values()) <= {"killed", "a", "b"} and begun[3] in made[0] + made[1]


def test_a_killed_process_of_a_model(tiny_folder):
    """SIGKILL of a real worker among its clips; the command repeated makes the rest, and leaves the first alone."""
    path = write_lines(*({"prompt": "a cat", "seed": k, "output": f"{k}.mp4"} for k in range(4)))
    words = ["batch", path, "--model", str(tiny_folder("t2v")), "--out", "clips", *SHORT, "--num-frames", "5"]
    process = subprocess.Popen([sys.executable, "-m", "wan_jax.cli", *words, "--num-steps", "20", "--lease", "1"])
    try:
        while not Path("clips/0.mp4").exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        process.kill()
    first = Path("clips/0.mp4").stat().st_mtime_ns
    assert len(list(Path("clips").glob("*.mp4"))) < 4
    assert main([*words, "--num-steps", "20", "--lease", "1"]) == 0
    assert names("clips") == [f"{k}.mp4" for k in range(4)] and Path("clips/0.mp4").stat().st_mtime_ns == first
    videos = [read_video(Path("clips", name)).video for name in names("clips")]
    assert all(video.shape == (5, 32, 32, 3) for video in videos) and not np.array_equal(videos[0], videos[1])
