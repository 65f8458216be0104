"""From a name to a folder: published models are downloaded once, kept at one commit, and verified.

The files live in the hub client's cache (``HF_HOME``, ``HF_HUB_CACHE``), in its layout, shared with other
programs. ``WAN_JAX_HOME`` (default ``~/.cache/wan_jax``) holds one record a repository: the commit of the
first download, the size and digest of its files, the contents already hashed, the licence already shown.

Listing, addresses, connections, redirects and ``HF_TOKEN`` are the hub client's business. The transfer is
not: the client compares lengths only, and when a process ends, the next one starts its unfinished files from
the beginning (huggingface_hub issue 4196), which for Wan means up to 11 GB each.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from wan_jax.config import MODELS, find_model
from wan_jax.errors import CheckpointError, InputError, nearest
from wan_jax.home import home

_log = logging.getLogger(__name__)

# What is read of each layout. As in the hub client, "*" also matches "/".
OFFICIAL_FILES = ("config.json", "*.safetensors", "*.safetensors.index.json", "*.pth", "google/umt5-xxl/*")
OFFICIAL_FILES += ("high_noise_model/*", "low_noise_model/*")
DIFFUSERS_FILES = ("model_index.json", "transformer*/*", "vae/*", "text_encoder/*", "tokenizer/*")
DIFFUSERS_FILES += ("image_encoder/*", "scheduler/*.json")

ASSETS = Path(__file__).parent.parent / "assets"  # models that ship with the package have a folder there
_STREAMS = 4  # files at a time, when transferring and when hashing
_CHUNK = 2**20  # bytes between two looks at the stop signal
_HEADROOM = 1.05  # times the bytes to transfer must be free: a full disk harms more than this download
_RETRIES = 5  # requests in a row that bring nothing
_RETRY_SECONDS = 0.5  # doubled at each of them


@dataclass(frozen=True)
class Repository:
    """A hub repository ``owner/name``, the patterns of the files needed, and the licence to show once.

    ``folder`` is its name beside the others of a model whose parts come from several repositories.
    """

    repo_id: str
    patterns: tuple[str, ...] = ("*",)
    licence: str = ""
    folder: str = ""


@dataclass(frozen=True)
class RemoteFile:
    """Size in bytes and hexadecimal digest: sha256 of large files; git's sha1, 40 digits, of small ones."""

    size: int
    digest: str


@dataclass
class Record:
    """What is remembered of a repository. ``verified``: digest -> [size, mtime_ns] of the hashed file."""

    repo_id: str
    revision: str
    files: dict[str, RemoteFile]
    licence: str = ""
    verified: dict[str, list[int]] = field(default_factory=dict)

    @staticmethod
    def path(repo_id: str) -> Path:
        return home() / "hub" / f"{repo_id.replace('/', '--')}.json"

    @classmethod
    def read(cls, repo_id: str) -> Record | None:
        path = cls.path(repo_id)
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            stored["files"] = {name: RemoteFile(**file) for name, file in stored["files"].items()}
            return cls(**stored)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{path} is no download record ({error}): delete it and try again"
            ) from None

    def write(self) -> None:
        path = self.path(self.repo_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")
        temporary.replace(path)


@dataclass(frozen=True)
class Plan:
    """The files that are needed of one commit, and where the hub cache keeps them."""

    record: Record
    files: dict[str, RemoteFile]
    storage: Path

    @property
    def folder(self) -> Path:
        return self.storage / "snapshots" / self.record.revision

    def blob(self, name: str) -> Path:
        return self.storage / "blobs" / self.files[name].digest

    def missing(self) -> list[str]:
        return [name for name in self.files if not (self.folder / name).is_file()]

    def missing_bytes(self) -> int:
        """Bytes to transfer: not those of unfinished files, nor contents that another commit has as well."""
        absent = {self.blob(name): self.files[name].size for name in self.missing()}
        return sum(size - _size(_unfinished(blob)) for blob, size in absent.items() if not blob.is_file())

    def unverified(self) -> list[str]:
        """Files that are present but were never hashed, or have changed since."""
        present = [name for name in self.files if (self.folder / name).is_file()]
        known = self.record.verified
        return [name for name in present if known.get(self.files[name].digest) != _stamp(self.folder / name)]


def ships(name: str) -> bool:
    """Whether the weights of a model of this name are part of the package."""
    return name in MODELS and (ASSETS / name).is_dir()


def repositories(name: str) -> tuple[Repository, ...]:
    """Return the repositories of a published model, by model name or by hub id (official or diffusers layout).

    Raises:
      InputError: not in the table of published models (the text has the nearest names), or without weights.
    """
    spec = find_model(name)
    if not spec.repository:
        raise InputError(f"{spec.name} has no published weights: give the folder of a model trained by you")
    if name.lower() == spec.diffusers_repository.lower():
        return (Repository(spec.diffusers_repository, DIFFUSERS_FILES, spec.licence),)
    if not spec.companions:
        return (Repository(spec.repository, OFFICIAL_FILES, spec.licence),)
    path = PurePosixPath(spec.file)
    main = Repository(spec.repository, (path.name,), spec.licence, path.parent.name)
    return main, *(
        Repository(repo_id, patterns, spec.licence, repo_id.split("/")[1]) for repo_id, patterns in spec.companions
    )


def resolve(
    source: str | Path | Repository,
    *,
    revision: str | None = None,
    offline: bool | None = None,
    cache_dir: str | Path | None = None,
    needed_bytes: int = 0,
    progress: bool = True,
) -> Path:
    """Return the folder that holds a checkpoint; download first what is missing of it.

    Args:
      source: a local folder (returned as it is), the file of a model with sound in one, a name that
        ``repositories`` knows, or a ``Repository``.
      revision: branch, tag or commit; it replaces the recorded one, and that is logged. Default: the recorded
        one, or ``main`` at the first download.
      offline: use only what the cache holds. Default: whether ``HF_HUB_OFFLINE`` is set.
      cache_dir: the hub cache. Default: the hub client's.
      needed_bytes: host memory that loading will take; a shortage is only logged.
      progress: draw a progress bar.

    Raises:
      InputError: neither a folder nor a published model.
      CheckpointError: no connection, no room on the disk, files missing offline, or contents that differ from
        the hub's digest; these are deleted, so that another call downloads them again.
    """
    _warn_if_memory_is_short(needed_bytes)
    if not isinstance(source, Repository):
        path = Path(source).expanduser()
        if ships(str(source)):
            return ASSETS / str(source)
        if path.is_dir() or (path.is_file() and any(path.match(spec.file) for spec in MODELS.values() if spec.file)):
            return path
        if path.exists():
            raise CheckpointError(f"{path} is a file: expected the folder of a checkpoint, try {path.parent}")
        try:
            parts = repositories(str(source))
        except InputError as error:
            raise InputError(f"no folder {str(source)!r} here, and {error}") from None
        if len(parts) > 1:
            options = dict(revision=revision, offline=offline, cache_dir=cache_dir, progress=progress)
            # A revision is one repository's: that of the transformer, which is the first.
            folders = [resolve(part, **options | ({"revision": None} if i else {})) for i, part in enumerate(parts)]
            return _linked(find_model(str(source)).file, {p.folder: f for p, f in zip(parts, folders, strict=True)})
        source = parts[0]

    from huggingface_hub import is_offline_mode
    from huggingface_hub.utils import WeakFileLock

    offline = is_offline_mode() if offline is None else offline
    repo_id, storage = source.repo_id, _storage(source.repo_id, cache_dir)
    stored = Record.read(repo_id)
    on_record = stored is not None and revision in (None, stored.revision)
    if offline and not on_record:
        return _left_by_others(source, revision, storage)
    with _explained(repo_id, storage):
        if on_record:
            found = plan(source, cache_dir=cache_dir)
            missing = found.missing()
            if offline and missing:
                raise _absent(repo_id, storage, missing)
            if not missing and not found.unverified():
                return found.folder  # nothing was written: the cache and the record may be read-only
        lock = storage.parent / ".locks" / storage.name / "wan_jax.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):  # of several processes one does the work, the others then find it done
            found = plan(source, revision=revision, cache_dir=cache_dir)
            if stored and stored.revision != found.record.revision:
                _log.warning("%s: commit %s replaces %s", repo_id, found.record.revision, stored.revision)
            if found.missing():
                _download(found, source.licence, progress)
            _verify(found)
    return found.folder


def _linked(file: str, folders: dict[str, Path]) -> Path:
    """The file in a folder of links to several snapshots: the folder that the official programs expect."""
    root = home() / "models"
    for name, folder in folders.items():
        link = root / name
        if link.resolve() == folder.resolve():
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        temporary = link.with_name(f"{name}.{os.getpid()}.tmp")
        temporary.symlink_to(folder, target_is_directory=True)
        temporary.replace(link)
    return root / file


def plan(source: Repository, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Plan:
    """Return what ``resolve`` needs. Transfers and writes nothing; a recorded commit needs no network.

    Raises:
      CheckpointError: no connection, no such repository or revision, or no file matches the patterns.
    """
    from huggingface_hub import HfApi, constants

    repo_id, storage = source.repo_id, _storage(source.repo_id, cache_dir)
    record = Record.read(repo_id)
    if record is None or revision not in (None, record.revision):
        options = dict(files_metadata=True, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
        with _explained(repo_id, storage):
            info = HfApi().model_info(repo_id, revision=revision or "main", **options)
        listed = info.siblings or []
        files = {f.rfilename: RemoteFile(f.size, f.lfs.sha256 if f.lfs else f.blob_id) for f in listed}
        for name, digest in [("", info.sha), *((name, file.digest) for name, file in files.items())]:
            path = PurePosixPath(name)  # all of these become local paths
            if path.is_absolute() or ".." in path.parts or not re.fullmatch("[0-9a-f]{40,64}", str(digest)):
                raise CheckpointError(f"{repo_id}: the hub lists {name!r} with digest {digest!r}: refused")
        remembered = (record.licence, record.verified) if record else ()
        record = Record(repo_id, info.sha, files, *remembered)
    matches = [name for name in record.files if any(fnmatchcase(name, p) for p in source.patterns)]
    if not matches:
        raise CheckpointError(
            f"{repo_id} is not a Wan checkpoint: it has none of {', '.join(source.patterns)}"
        )
    return Plan(record, {name: record.files[name] for name in matches}, storage)


def format_bytes(count: float) -> str:
    """``5680000000`` -> ``5.68 GB``: decimal units, as the hub and the makers of disks count."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def _download(found: Plan, licence: str, progress: bool) -> None:
    """Transfer the missing contents, ``_STREAMS`` at a time, and link them into the snapshot folder."""
    from tqdm.auto import tqdm

    repo_id, total = found.record.repo_id, found.missing_bytes()
    disk = next(folder for folder in found.storage.parents if folder.exists())
    free = shutil.disk_usage(disk).free
    if total * _HEADROOM > free:
        need = f"{format_bytes(total * _HEADROOM)} needed (5 % headroom included), {format_bytes(free)} free"
        fix = "free some space, or set HF_HOME to a folder on a larger disk"
        raise CheckpointError(f"{repo_id}: {need} on the disk of {disk}: {fix}")
    if licence and licence != found.record.licence:
        # A warning, though nothing is wrong, because it must be seen where no logging was set up.
        _log.warning("%s is published under %s: https://huggingface.co/%s", repo_id, licence, repo_id)
        found.record.licence = licence
    found.record.write()  # before the first byte: a download that is interrupted keeps to its commit

    (found.storage / "blobs").mkdir(parents=True, exist_ok=True)
    absent = {found.blob(name): name for name in found.missing() if not found.blob(name).is_file()}
    stop = threading.Event()
    bar = tqdm(total=total, unit="B", unit_scale=True, desc=repo_id, disable=not progress)
    with bar, ThreadPoolExecutor(_STREAMS) as pool:
        transfers = [pool.submit(_transfer, found, name, bar.update, stop) for name in absent.values()]
        try:
            for transfer in as_completed(transfers):
                transfer.result()
        except BaseException:  # also Ctrl-C: leaving this block waits for the threads
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    for name in found.missing():
        link, blob = found.folder / name, found.blob(name)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # it may be there, without the content
        try:
            link.symlink_to(os.path.relpath(blob, link.parent))
        except OSError:  # a file system without links: a copy, as the client makes
            shutil.copyfile(blob, link)


def _transfer(found: Plan, name: str, advance: Callable[[int], object], stop: threading.Event) -> None:
    """Fetch one content, from where an earlier connection or process ended; ``stop`` leaves it for later."""
    from huggingface_hub import constants, get_session, hf_hub_url, hf_raise_for_status
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(found.record.repo_id, name, revision=found.record.revision)
    size, blob, failures = found.files[name].size, found.blob(name), 0
    with _unfinished(blob).open("ab") as out:
        while (start := out.tell()) < size:
            # Identity: a range of a compressed answer would not count the bytes of the file.
            headers = build_hf_headers() | {"Range": f"bytes={start}-", "Accept-Encoding": "identity"}
            options = dict(headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT)
            failure = HTTPError("the connection ended early")
            try:
                with get_session().stream("GET", url, **options) as response:
                    hf_raise_for_status(response)
                    if response.status_code != 206:  # no range, but the whole file
                        advance(-start)
                        out.seek(0)
                        out.truncate()
                    for chunk in response.iter_bytes(_CHUNK):
                        if stop.is_set():
                            return
                        out.write(chunk)
                        advance(len(chunk))
            except HTTPError as error:
                if (status := _status(error)) and status < 500 and status not in (408, 429):
                    raise
                failure = error
            failures = 0 if out.tell() > start else failures + 1
            if failures > _RETRIES:
                raise failure
            if out.tell() < size and stop.wait(_RETRY_SECONDS * 2**failures):
                return
    _unfinished(blob).replace(blob)


def _verify(found: Plan) -> None:
    """Hash what was not hashed before, and remember it; delete what differs from the hub's digest."""
    names, faults = found.unverified(), []
    with ThreadPoolExecutor(_STREAMS) as pool:
        digests = list(pool.map(lambda name: _digest(found.folder / name, found.files[name]), names))
    for name, digest in zip(names, digests, strict=True):
        path, expected = found.folder / name, found.files[name]
        if digest == expected.digest:
            found.record.verified[digest] = _stamp(path)
        else:
            sizes = f"({_size(path)} bytes instead of {expected.size})"
            faults.append(f"{name}: got {digest}, expected {expected.digest} {sizes}")
            path.unlink(missing_ok=True)
            found.blob(name).unlink(missing_ok=True)
    found.record.write()
    if faults:
        text = f"{found.record.repo_id}: damaged, and now deleted; call again to download anew:"
        raise CheckpointError("\n  ".join([text, *faults]))


def _digest(path: Path, file: RemoteFile) -> str:
    with path.open("rb") as content:
        if len(file.digest) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        data = content.read()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _left_by_others(source: Repository, revision: str | None, storage: Path) -> Path:
    """Offline and without a record: the snapshot that another program left, whose digests are not known."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    options = dict(revision=revision, cache_dir=storage.parent, allow_patterns=list(source.patterns))
    try:
        return Path(snapshot_download(source.repo_id, local_files_only=True, **options))
    except LocalEntryNotFoundError:
        raise _absent(source.repo_id, storage, source.patterns) from None


def _absent(repo_id: str, storage: Path, names: Iterable[str]) -> CheckpointError:
    fix = f"on a connected machine run `wan-jax download {repo_id}`, then copy HF_HOME and WAN_JAX_HOME here"
    return CheckpointError("\n  ".join([f"{repo_id}: offline, and {storage} lacks:", *names]) + "\n" + fix)


@contextmanager
def _explained(repo_id: str, storage: Path) -> Iterator[None]:
    """Turn what the hub client, the network or the disk raise into a CheckpointError with the nearest fix."""
    from huggingface_hub import constants, errors

    try:
        yield
        return
    except errors.GatedRepoError:
        fix = f"the hub wants its terms accepted at https://huggingface.co/{repo_id}, then HF_TOKEN set"
    except errors.RepositoryNotFoundError:
        known = (i.lower() for spec in MODELS.values() for i in (spec.repository, spec.diffusers_repository))
        fix = f"the hub has no such repository{nearest(repo_id, known)}; a private one needs HF_TOKEN"
    except errors.RevisionNotFoundError:
        fix = "the hub does not have this revision (any more): try revision='main'"
    except (errors.HTTPError, ConnectionError) as error:
        if (status := _status(error)) in (401, 403):
            fix = f"the hub refuses access (status {status}): set HF_TOKEN, or renew it"
        else:
            reason = f"status {status}" if status else f"{type(error).__name__}: {error}"
            fix = (
                f"no usable answer from {constants.ENDPOINT} ({reason}): check network and HF_ENDPOINT, "
                f"call again, what came is kept; HF_HUB_OFFLINE=1 uses only what is in {storage}"
            )
    except (OSError, ValueError) as error:
        fix = f"{error}: is there room, and permission to write, in {storage} and WAN_JAX_HOME?"
    raise CheckpointError(f"{repo_id}: {fix}") from None


def _status(error: Exception) -> int:
    """The status of the hub's answer; 0 if there was none."""
    return getattr(getattr(error, "response", None), "status_code", 0)


def _storage(repo_id: str, cache_dir: str | Path | None) -> Path:
    """The folder of a repository in the hub cache, whose layout is documented: blobs, snapshots, refs."""
    from huggingface_hub import constants

    cache = Path(cache_dir or constants.HF_HUB_CACHE).expanduser().resolve()
    return cache / f"models--{repo_id.replace('/', '--')}"


def _unfinished(blob: Path) -> Path:
    return blob.with_suffix(".incomplete")  # a name that `hf cache prune` knows


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _stamp(path: Path) -> list[int]:
    return [path.stat().st_size, path.stat().st_mtime_ns]


def _warn_if_memory_is_short(needed_bytes: int) -> None:
    from wan_jax.parallel import free_host_memory  # brings in JAX, which listing files does not need

    free = free_host_memory()
    if free is not None and needed_bytes > free:
        text = "loading takes about %s of host memory, %s are available: expect swapping or a killed process"
        _log.warning(text, format_bytes(needed_bytes), format_bytes(free))
