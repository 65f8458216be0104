"""Download, pinning and verification, with the real hub client against a hub in a thread of the test."""

import hashlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from wan_jax import cli
from wan_jax.errors import CheckpointError, InputError
from wan_jax.weights import hub

TOKEN = "hf_planted_secret"
REPO = "Wan-AI/Wan2.1-T2V-1.3B"
WANTED = hub.repositories("wan2.1-t2v-1.3b")[0]
WEIGHTS = "diffusion_pytorch_model.safetensors"
NEEDED = {"config.json", WEIGHTS, "Wan2.1_VAE.pth", "google/umt5-xxl/tokenizer.json"}


def contents(seed: int) -> dict[str, bytes]:
    """A repository with one large file; what is not needed is there as well."""
    large = hashlib.shake_256(bytes([seed])).digest(4_000_000)
    other = {"README.md": b"read", "assets/logo.png": b"picture", "xlm-roberta-large/tokenizer.json": b"{}"}
    vae, tokenizer = b"vae" * 1000, b'{"version": "1.0"}'
    return {
        "config.json": b"{}",
        WEIGHTS: large,
        "Wan2.1_VAE.pth": vae,
        "google/umt5-xxl/tokenizer.json": tokenizer,
    } | other


def is_large(name: str) -> bool:
    return name.endswith((".safetensors", ".pth"))


class Hub:
    """The addresses that are used: the listing of a revision, and files, in ranges and with redirects."""

    def __init__(self):
        self.repositories = {REPO}  # all with the same files
        self.commits = {"1" * 40: contents(1)}
        self.main = "1" * 40
        self.requests: list[tuple[str, str]] = []  # (path, range)
        self.sent = Counter()
        self.drop_after: dict[str, list[int]] = {}  # file -> bytes after which the next connections break
        self.status: dict[str, int] = {}
        self.damaged: set[str] = set()
        self.ranges = True
        self.redirects = False
        self.cdn_headers: list[dict[str, str]] = []
        self.tokens: set[str | None] = set()
        self.delay = 0.0  # seconds between two pieces of 64 kB
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                outer.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = request.path.partition("?")[0]
        self.requests.append((path, request.headers.get("Range", "")))
        if path.startswith("/cdn/"):
            path = path.removeprefix("/cdn")
            self.cdn_headers.append(dict(request.headers))
        else:
            self.tokens.add(request.headers.get("Authorization"))
        known = "|".join(map(re.escape, self.repositories))
        if found := re.fullmatch(f"/api/models/({known})/revision/(.+)", path):
            commit = self.main if found[2] == "main" else found[2]
            if commit not in self.commits:
                return self.fail(request, 404, "RevisionNotFound")
            return self.send(request, json.dumps(self.listing(found[1], commit)).encode(), 200)
        if not (found := re.fullmatch(f"/(?:{known})/resolve/([0-9a-f]+)/(.+)", path)):
            return self.fail(request, 404, "RepoNotFound")
        name = found[2]
        if status := self.status.get(name):
            return self.fail(request, status, "")
        if self.redirects and not request.path.startswith(
            "/cdn/"
        ):  # as the real hub does for large files: to another host
            request.send_response(302)
            request.send_header("Location", f"http://localhost:{self.server.server_port}/cdn{path}")
            request.send_header("Content-Length", "0")
            return request.end_headers()
        data = self.commits[found[1]][name]
        data = b"?" + data[1:] if name in self.damaged else data
        start = int(request.headers["Range"][6:-1]) if self.ranges else 0
        drops = self.drop_after.get(name)
        self.send(request, data[start:], 206 if self.ranges else 200, name, drops.pop(0) if drops else None)

    def listing(self, repo_id: str, commit: str) -> dict:
        siblings = []
        for name, data in self.commits[commit].items():
            git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sha256 = hashlib.sha256(data).hexdigest()
            lfs = {"lfs": {"size": len(data), "sha256": sha256, "pointerSize": 130}} if is_large(name) else {}
            siblings.append({"rfilename": name, "size": len(data), "blobId": git} | lfs)
        return {"id": repo_id, "sha": commit, "siblings": siblings}

    def send(self, request, body: bytes, status: int, name: str = "", drop: int | None = None) -> None:
        request.send_response(status)
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        body = body[:drop]
        try:
            for i in range(0, len(body), 65536):
                self.sent[name] += len(body[i : i + 65536])  # before: the client may be ahead of this thread
                request.wfile.write(body[i : i + 65536])
                time.sleep(self.delay)
        except ConnectionError:  # the client was killed
            pass

    def fail(self, request, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("Content-Length", "0")
        request.end_headers()


@pytest.fixture
def server(tmp_path, monkeypatch):
    running = Hub()
    # The client has read the environment when it was imported: for this process its constants are set.
    template = running.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", running.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    environment = {
        "HF_ENDPOINT": running.address,
        "HF_HOME": tmp_path / "hf",
        "WAN_JAX_HOME": tmp_path / "wan",
    }
    for name, value in environment.items() | {("HF_TOKEN", TOKEN), ("HF_HUB_CACHE", tmp_path / "hf" / "hub")}:
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(hub, "_RETRY_SECONDS", 0.001)
    monkeypatch.setattr(hub, "_CHUNK", 2**16)
    yield running
    running.server.shutdown()
    running.server.server_close()


def read(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def needed(server: Hub, commit: str = "1" * 40) -> dict[str, bytes]:
    return {name: data for name, data in server.commits[commit].items() if name in NEEDED}


def count_hashed(monkeypatch) -> list[str]:
    hashed, digest = [], hub._digest
    monkeypatch.setattr(hub, "_digest", lambda path, file: hashed.append(path.name) or digest(path, file))
    return hashed


def record() -> dict:
    return json.loads(hub.Record.path(REPO).read_text())


def test_first_download_is_recorded_and_the_second_call_is_silent(server, monkeypatch, caplog):
    hashed = count_hashed(monkeypatch)
    folder = hub.resolve("wan2.1-t2v-1.3b", progress=False)
    assert read(folder) == needed(server)
    assert record()["revision"] == folder.name == "1" * 40
    sha256 = hashlib.sha256(server.commits["1" * 40][WEIGHTS]).hexdigest()
    assert record()["files"][WEIGHTS] == {"size": 4_000_000, "digest": sha256}
    assert len(hashed) == len(NEEDED)
    assert [r.message for r in caplog.records] == [
        f"{REPO} is published under Apache-2.0: https://huggingface.co/{REPO}"
    ]

    server.requests.clear(), hashed.clear(), caplog.clear()
    server.commits["2" * 40], server.main = contents(2), "2" * 40  # the hub moves on: the record does not
    assert hub.resolve("wan2.1-t2v-1.3b", progress=False) == folder
    assert not server.requests and not hashed and not caplog.records


def test_the_hub_client_finds_the_files_in_its_cache(server):
    from huggingface_hub import hf_hub_download

    folder = hub.resolve(WANTED, progress=False)
    found = hf_hub_download(REPO, WEIGHTS, revision="1" * 40, local_files_only=True)
    assert Path(found).samefile(folder / WEIGHTS)


def test_an_explicit_revision_replaces_the_record(server, caplog):
    hub.resolve(WANTED, progress=False)
    server.commits["2" * 40], server.main = contents(1) | {WEIGHTS: b"new" * 999}, "2" * 40
    caplog.clear(), server.sent.clear()
    folder = hub.resolve(WANTED, revision="main", progress=False)
    assert read(folder) == needed(server, "2" * 40)
    assert "2" * 40 + " replaces " + "1" * 40 in caplog.text
    assert "Apache" not in caplog.text  # shown once
    assert set(server.sent) == {"", WEIGHTS}  # unchanged contents are not transferred again
    assert hub.resolve(WANTED, progress=False) == folder
    with pytest.raises(CheckpointError, match="does not have this revision.*revision='main'"):
        hub.resolve(WANTED, revision="3" * 40)


def test_more_patterns_fetch_only_what_they_add(server):
    hub.resolve(hub.Repository(REPO, ("*.pth",)), progress=False)
    server.requests.clear()
    folder = hub.resolve(hub.Repository(REPO, ("*.pth", "config.json")), progress=False)
    assert set(read(folder)) == {"Wan2.1_VAE.pth", "config.json"}
    assert [path.rpartition("/")[2] for path, _ in server.requests] == ["config.json"]
    with pytest.raises(CheckpointError, match="none of nothing"):
        hub.resolve(hub.Repository(REPO, ("nothing",)))


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
def test_contents_with_another_digest_are_named_and_deleted(server, name):
    server.damaged.add(name)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(WANTED, progress=False)
    bad = b"?" + server.commits["1" * 40][name][1:]
    got = hashlib.sha256(bad) if is_large(name) else hashlib.sha1(b"blob %d\0" % len(bad) + bad)
    assert f"{name}: got {got.hexdigest()}, expected {record()['files'][name]['digest']}" in str(caught.value)
    server.damaged.clear(), server.sent.clear()
    assert read(hub.resolve(WANTED, progress=False)) == needed(server)
    assert set(server.sent) == {name}


@pytest.mark.parametrize("place", range(0, 4_000_000, 333_333))
def test_a_flipped_bit_is_found_and_replaced(server, place):
    path = hub.resolve(WANTED, progress=False) / WEIGHTS
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.resolve().write_bytes(data)
    with pytest.raises(CheckpointError, match=WEIGHTS):
        hub.resolve(WANTED, progress=False, offline=True)
    assert read(hub.resolve(WANTED, progress=False)) == needed(server)


def test_a_touched_file_is_hashed_again_and_accepted(server, monkeypatch):
    folder = hub.resolve(WANTED, progress=False)
    os.utime(folder / WEIGHTS, (1, 1))
    hashed = count_hashed(monkeypatch)
    assert hub.resolve(WANTED, progress=False) == folder and hashed == [WEIGHTS]
    assert hub.resolve(WANTED, progress=False) == folder and hashed == [WEIGHTS]


def test_a_broken_connection_is_taken_up_where_it_broke(server):
    server.drop_after[WEIGHTS] = [1_000_000, 0, 500_000]
    assert read(hub.resolve(WANTED, progress=False)) == needed(server)
    ranges = [r for path, r in server.requests if path.endswith(WEIGHTS)]
    assert ranges[0] == "bytes=0-" and len(ranges) == 4
    assert server.sent[WEIGHTS] < 4_000_000 + 3 * 2**16  # at most the piece in flight is sent twice


def test_a_server_without_ranges_starts_from_the_beginning(server):
    server.ranges, server.drop_after[WEIGHTS] = False, [1_000_000]
    assert read(hub.resolve(WANTED, progress=False)) == needed(server)


def test_redirects_keep_the_range_and_not_the_token(server):
    server.redirects, server.drop_after[WEIGHTS] = True, [1_000_000]
    assert read(hub.resolve(WANTED, progress=False)) == needed(server)
    assert server.sent[WEIGHTS] < 4_000_000 + 2**16
    assert len(server.cdn_headers) == len(NEEDED) + 1
    assert not any("Authorization" in headers or "authorization" in headers for headers in server.cdn_headers)
    assert server.tokens == {f"Bearer {TOKEN}"}


def test_a_connection_that_brings_nothing_ends_with_a_message(server):
    server.drop_after[WEIGHTS] = [1_000_000] + [0] * 20
    with pytest.raises(CheckpointError, match="what came is kept"):
        hub.resolve(WANTED, progress=False)
    kept = sum(path.stat().st_size for path in Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))
    assert 900_000 < kept <= 1_000_000
    assert hub.plan(hub.Repository(REPO, (WEIGHTS,))).missing_bytes() == 4_000_000 - kept
    server.drop_after.clear(), server.sent.clear()
    server.commits["2" * 40], server.main = contents(2), "2" * 40  # changed meanwhile: never mixed
    assert read(hub.resolve(WANTED, progress=False)) == needed(server)
    assert server.sent[WEIGHTS] < 3_200_000


def command(*arguments: str) -> list[str]:
    """``wan-jax download`` in a process of its own, where the environment alone configures the hub client."""
    return [sys.executable, "-m", "wan_jax.cli", "download", *arguments]


@pytest.mark.parametrize("end, status", [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_the_next_process_goes_on_where_one_was_stopped(server, end, status):
    server.delay = 0.1  # seconds are left when the signal is sent, on a busy machine too
    # What a shell starts in its background ignores Ctrl-C, and so does what that starts.
    heard = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)"
    run = f"{heard}; from wan_jax.cli import main; sys.exit(main())"
    arguments = [sys.executable, "-c", run, "download", "wan2.1-t2v-1.3b"]
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    blobs = Path(constants.HF_HUB_CACHE) / "models--Wan-AI--Wan2.1-T2V-1.3B" / "blobs"
    unfinished = blobs / (hashlib.sha256(server.commits["1" * 40][WEIGHTS]).hexdigest() + ".incomplete")
    while not unfinished.exists() or unfinished.stat().st_size < 1_000_000:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(end)
    _, errors = process.communicate()
    assert process.returncode == status
    assert "Traceback" not in errors and TOKEN not in errors
    kept = unfinished.stat().st_size
    assert 1_000_000 <= kept < 4_000_000
    server.delay = 0.0
    server.requests.clear()
    assert read(hub.resolve("wan2.1-t2v-1.3b", progress=False)) == needed(server)
    assert [r for path, r in server.requests if path.endswith(WEIGHTS)] == [f"bytes={kept}-"]
    assert not unfinished.exists()


def test_two_processes_share_one_download(server):
    server.delay = 0.005
    both = [subprocess.Popen(command(REPO), stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
    folders = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0] and len(folders) == 1
    assert server.sent[WEIGHTS] == 4_000_000


def test_a_full_disk_is_told_before_the_transfer(server, monkeypatch):
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=4_100_000))
    with pytest.raises(CheckpointError, match=r"4\.2 MB needed.*4\.1 MB free.*HF_HOME"):
        hub.resolve(WANTED, progress=False)
    assert [path for path, _ in server.requests if "resolve" in path] == []
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=4_300_000))
    hub.resolve(WANTED, progress=False)


def test_short_memory_is_logged(tmp_path, caplog):
    assert hub.resolve(tmp_path, needed_bytes=1) == tmp_path and not caplog.records
    assert hub.resolve(tmp_path, needed_bytes=10**15) == tmp_path
    if Path("/proc/meminfo").exists():
        assert "1000000.00 GB of host memory" in caplog.text


def test_offline_uses_the_cache_and_lists_what_is_missing(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"\*\.safetensors(?s:.*)wan-jax download " + REPO):
        hub.resolve(WANTED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = hub.resolve(WANTED, progress=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    assert hub.resolve(WANTED) == folder
    (folder / WEIGHTS).resolve().unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(WANTED, offline=True)
    first, *listed, fix = str(caught.value).splitlines()
    assert str(folder.parent.parent) in first and listed == [f"  {WEIGHTS}"]
    assert f"wan-jax download {REPO}" in fix
    assert not server.requests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="offline mode is enabled"):
        hub.resolve(WANTED, offline=False, revision="main")
    assert not server.requests


def test_offline_accepts_what_another_program_left(server):
    folder = Path(constants.HF_HUB_CACHE) / "models--Wan-AI--Wan2.1-T2V-1.3B" / "snapshots" / ("4" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder.parent.parent / "refs").mkdir()
    (folder.parent.parent / "refs" / "main").write_text("4" * 40)
    assert hub.resolve(WANTED, offline=True) == folder
    assert not hub.Record.path(REPO).exists()


def test_the_warm_path_writes_nothing(server, tmp_path):
    folder = hub.resolve(WANTED, progress=False)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert hub.resolve(WANTED, progress=False) == folder
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


@pytest.mark.parametrize(
    "status, message", [(401, "refuses access.*HF_TOKEN"), (403, "refuses access"), (503, "status 503")]
)
def test_refusals_of_the_hub_are_explained(server, status, message):
    server.status[WEIGHTS] = status
    with pytest.raises(CheckpointError, match=message) as caught:
        hub.resolve(WANTED, progress=False)
    assert caught.value.__suppress_context__  # no traceback of the client under the message
    assert len([path for path, _ in server.requests if path.endswith(WEIGHTS)]) == (6 if status == 503 else 1)


def test_unreachable_hub_and_wrong_names_are_explained(server, monkeypatch):
    with pytest.raises(CheckpointError, match="no such repository, did you mean wan-ai/wan2.1-t2v-1.3b"):
        hub.resolve(hub.Repository("Wan-AI/Wan2.1-T2V-1.3"))
    with pytest.raises(InputError, match="no folder 'wan2.1-t2v-1.4b' here.*did you mean.*wan2.1-t2v-1.3b"):
        hub.resolve("wan2.1-t2v-1.4b")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="no usable answer from http://127.0.0.1:9.*HF_HUB_OFFLINE"):
        hub.resolve(WANTED)


def test_a_hostile_listing_is_refused(server, tmp_path):
    server.commits["1" * 40]["../../../victim.pth"] = b"x"
    with pytest.raises(CheckpointError, match="victim.*refused"):
        hub.resolve(WANTED, progress=False)
    assert not list(tmp_path.rglob("*victim*"))


def test_a_damaged_record_is_named(server):
    path = hub.Record.path(REPO)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="delete it"):
        hub.resolve(WANTED)


def test_local_folders_and_files(tmp_path):
    assert hub.resolve(str(tmp_path)) == tmp_path
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=f"is a file.*try {tmp_path}"):
        hub.resolve(tmp_path / "model.safetensors")


def test_names_of_both_layouts():
    official, diffusers = (
        hub.repositories("WAN2.2-T2V-A14B")[0],
        hub.repositories("wan-ai/wan2.2-t2v-a14b-diffusers")[0],
    )
    assert official.repo_id == "Wan-AI/Wan2.2-T2V-A14B" and "high_noise_model/*" in official.patterns
    assert diffusers.repo_id == "Wan-AI/Wan2.2-T2V-A14B-Diffusers" and "transformer*/*" in diffusers.patterns


def test_a_model_of_several_repositories_is_one_folder(server, tmp_path, capsys):
    parts = hub.repositories("ovi-10s")
    assert [part.folder for part in parts] == ["Ovi", "Wan2.2-TI2V-5B", "MMAudio"]
    server.repositories = {part.repo_id for part in parts}
    names = ["model_960x960.safetensors", "model_960x960_10s.safetensors", "Wan2.2_VAE.pth", "ext_weights/v1-16.pth"]
    names += ["models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", "ext_weights/best_netG.pt"]
    server.commits["1" * 40] = {name: name.encode() for name in names}

    assert cli.main(["download", "ovi-10s", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert all(part.repo_id in listed for part in parts) and "model_960x960.safetensors" not in listed
    file = hub.resolve("ovi-10s", progress=False)
    assert file.read_bytes() == b"model_960x960_10s.safetensors"
    folder = file.parents[1]
    assert {path.relative_to(folder).as_posix() for path in folder.glob("*/**/*.p*t*")} == {
        "Wan2.2-TI2V-5B/Wan2.2_VAE.pth", "Wan2.2-TI2V-5B/models_t5_umt5-xxl-enc-bf16.pth",
        "MMAudio/ext_weights/v1-16.pth", "MMAudio/ext_weights/best_netG.pt",
    }  # fmt: skip
    assert (folder / "Wan2.2-TI2V-5B/google/umt5-xxl/tokenizer.json").is_file()
    sent = sum(server.sent.values())
    assert hub.resolve("ovi-10s", offline=True) == hub.resolve(file) == file and sum(server.sent.values()) == sent


def test_the_token_is_stored_nowhere(server, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    hub.resolve(WANTED)
    server.status[WEIGHTS] = 401
    with pytest.raises(CheckpointError) as caught:
        hub.resolve(WANTED, cache_dir=tmp_path / "other")
    stored = b"".join(p.read_bytes() for p in tmp_path.rglob("*") if p.is_file())
    assert TOKEN.encode() not in stored
    assert TOKEN not in caplog.text + "".join(capfd.readouterr()) + str(caught.value)


def test_dry_run_lists_without_transfer(server, tmp_path, capsys):
    arguments = ["download", "wan2.1-t2v-1.3b", "--dry-run"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in NEEDED) and "README" not in text and "xlm-roberta" not in text
    assert re.search(r"4 MB +missing +" + WEIGHTS, text) and "4 MB to transfer" in text
    assert set(server.sent) == {""} and not list(tmp_path.iterdir())
    hub.resolve(WANTED, progress=False)
    assert cli.main(arguments) == 0
    assert re.search(r"4 MB +present +" + WEIGHTS, capsys.readouterr().out)


def test_the_command_prints_the_folder_or_what_to_do(server, capsys):
    assert cli.main(["download", "wan2.1-t2v-1.3b", "--offline"]) == 1
    assert f"wan-jax download {REPO}" in capsys.readouterr().err
    assert cli.main(["download", REPO, "--revision", "main"]) == 0
    assert capsys.readouterr().out.strip() == str(hub.resolve(WANTED, offline=True))
    assert cli.main(["download", "wan2.1-t2v-1.4b"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    "count, text", [(999, "999 B"), (1000, "1 kB"), (5_680_000_000, "5.68 GB"), (2e12, "2000.00 GB")]
)
def test_format_bytes(count, text):
    assert hub.format_bytes(count) == text
