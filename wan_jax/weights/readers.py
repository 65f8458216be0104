"""Checkpoints as lazy tensors: safetensors, sharded checkpoints and torch ``.pth``, without PyTorch.

Nothing in a checkpoint is trusted. Headers, indexes and offsets are checked before a tensor is handed out.
The pickle in a ``.pth`` is interpreted by a small machine that builds dicts, lists, tuples, text, numbers and
tensor descriptions and nothing else: it imports nothing and calls nothing. Tensors are read-only views of the
mapped file: opening costs no memory, and a caller that releases what it has copied stays near one tensor.

Sources: the safetensors format; PyTorch's zip serialisation (``torch.save`` since 1.6, pickle protocol 2).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import mmap
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from wan_jax.errors import CheckpointError, nearest

# Element types by safetensors name, with the torch storage class that carries them. Types younger than that
# torch scheme (None) are stored as untyped bytes, and their torch name is the name that numpy gives them too.
_TYPES = (
    ("F64", np.float64, "DoubleStorage"),
    ("F32", np.float32, "FloatStorage"),
    ("F16", np.float16, "HalfStorage"),
    ("BF16", ml_dtypes.bfloat16, "BFloat16Storage"),
    ("F8_E4M3", ml_dtypes.float8_e4m3fn, None),
    ("F8_E5M2", ml_dtypes.float8_e5m2, None),
    ("I64", np.int64, "LongStorage"),
    ("I32", np.int32, "IntStorage"),
    ("I16", np.int16, "ShortStorage"),
    ("I8", np.int8, "CharStorage"),
    ("U64", np.uint64, None),
    ("U32", np.uint32, None),
    ("U16", np.uint16, None),
    ("U8", np.uint8, "ByteStorage"),
    ("BOOL", np.bool_, "BoolStorage"),
)
SAFETENSORS_DTYPES = {name: np.dtype(kind) for name, kind, _ in _TYPES}
TORCH_STORAGES = {storage: np.dtype(kind) for _, kind, storage in _TYPES if storage}
TORCH_DTYPES = {np.dtype(kind).name: np.dtype(kind) for _, kind, storage in _TYPES if not storage}

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library; used for index files too
# A tensor costs about 40 opcodes and 250 bytes of pickle; official checkpoints hold up to 1,100 tensors.
# Within these limits no pickle takes a second or 100 MB.
_MAX_PICKLE_BYTES = 16_000_000
_MAX_PICKLE_OPCODES = 500_000
_MAX_RANK = 16

_FORMATS = ("safetensors", "pth", "pt", "bin")  # the first wins where one stem exists in several
_FILE_NAME = re.compile(
    rf"(?P<stem>[^.].*?)(-\d{{5}}-of-(?P<total>\d{{5}}))?\.(?P<format>{'|'.join(_FORMATS)})(?P<index>\.index\.json)?"
)


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """One tensor of a checkpoint: its description, and on request a view of its bytes in the mapped file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    _mapped: _MappedFile
    _offset: int  # of the first element in the file, in bytes
    _extent: int  # from the first element to the end of the last, in bytes
    _strides: tuple[int, ...] | None = None  # in bytes; None: C order

    @property
    def file(self) -> Path:
        """The file that holds the tensor."""
        return self._mapped.path

    @property
    def nbytes(self) -> int:
        """Bytes of the values, as in a contiguous copy."""
        return math.prod(self.shape) * self.dtype.itemsize

    def numpy(self) -> np.ndarray:
        """Return a read-only view of the mapped file, with its strides. Nothing is read until it is used."""
        return np.ndarray(self.shape, self.dtype, self._mapped.view(), self._offset, self._strides)

    def release(self) -> None:
        """Drop the tensor's pages from resident memory. Views stay valid: pages are read again on use."""
        self._mapped.release(self._offset, self._extent)


class Checkpoint(Mapping[str, LazyTensor]):
    """The tensors of one checkpoint by name, in file order. A context manager; see :func:`open_checkpoint`.

    Attributes:
        metadata: text pairs of the safetensors headers (merged over the shards); empty for torch files.
        files: the files that hold the tensors.
        skipped: names in a torch state dict whose values are no tensors.
    """

    def __init__(
        self,
        mapped: list[_MappedFile],
        tensors: dict[str, LazyTensor],
        metadata: dict[str, str] | None = None,
        skipped: tuple[str, ...] = (),
    ):
        self.metadata = metadata or {}
        self.files = [one.path for one in mapped]
        self.skipped = skipped
        self._mapped = mapped
        self._tensors = tensors

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def release(self) -> None:
        """Drop every page of the checkpoint from resident memory; tensors and views stay usable."""
        for one in self._mapped:
            one.release(0, one.size)

    def close(self) -> None:
        """Give the files back. Arrays already handed out stay valid and keep their file until they go."""
        for one in self._mapped:
            one.close()


def open_checkpoint(path: str | os.PathLike[str], stem: str | None = None) -> Checkpoint:
    """Open a checkpoint without reading its values.

    Args:
        path: a ``.safetensors`` file; a torch ``.pth``, ``.pt`` or ``.bin`` file (zip format); an
            ``*.index.json`` beside its shards; or a folder with one of these, where an index comes first.
        stem: which family of files to take from a folder that holds several, for example
            ``"diffusion_pytorch_model"``. Where one stem exists in several formats, safetensors wins.

    Raises:
        CheckpointError: something is missing, ambiguous, truncated, corrupt, or not allowed in a checkpoint.
            The text names the file and, where known, the tensor.
    """
    path = Path(path)
    files = _files_in_folder(path, stem) if path.is_dir() else [path]
    return _read_index(files[0]) if files[0].name.endswith(".index.json") else _join(files)


def verify_sha256(path: str | os.PathLike[str], expected: str) -> None:
    """Hash a file in chunks; raise CheckpointError unless its SHA-256 is ``expected`` (64 hex digits)."""
    path = Path(path)
    try:
        with open(path, "rb") as file:
            got = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from error
    if got != expected.lower():
        problem = f"SHA-256 is {got}, expected {expected.lower()}"
        raise _bad(path, f"{problem}: damaged, or another version; download it again")


# --- files ---


class _MappedFile:
    """A file mapped read-only, shared by its tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                # An empty file cannot be mapped; empty bytes then fail the same checks as any short file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise _unreadable(path, error) from error
        if self._map[:24] == b"version https://git-lfs.":
            raise _bad(path, "only a Git LFS pointer: run `git lfs pull` or download the file itself")

    def view(self) -> mmap.mmap | bytes:
        if self._map is None:
            raise _bad(self.path, "the checkpoint is closed: read tensors before close(), or open it again")
        return self._map

    def release(self, start: int, length: int) -> None:
        # Whole pages, rounded outwards: a neighbour that loses an edge page just reads it again.
        first = start - start % mmap.PAGESIZE
        if self._map and length and hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
            self._map.madvise(mmap.MADV_DONTNEED, first, start + length - first)

    def close(self) -> None:
        # Not mmap.close(), which refuses while arrays exist: the map goes with the last of them.
        self._map = None


def _bad(path: Path, problem: str, tensor: str | None = None) -> CheckpointError:
    where = "" if tensor is None else f"tensor {tensor!r:.300}: "
    return CheckpointError(f"{path}: {where}{problem}")


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    if not isinstance(error, FileNotFoundError):
        return _bad(path, f"cannot be read: {error.strerror}")
    folder = path.absolute().parent
    if not folder.is_dir():
        return _bad(path, f"not found: there is no folder {folder}")
    siblings = [entry.name for entry in folder.iterdir()]
    return _bad(path, f"not found in {folder}{nearest(path.name, siblings)}")


def _files_in_folder(folder: Path, stem: str | None) -> list[Path]:
    """The index, or else all files, of the family called ``stem`` (None: of the only family there is)."""
    families: dict[str, dict[str, list[re.Match[str]]]] = {}
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_file()):
        if match := _FILE_NAME.fullmatch(name):
            families.setdefault(match["stem"], {}).setdefault(match["format"], []).append(match)
    found = ", ".join(f"{name!r} ({'/'.join(formats)})" for name, formats in families.items()) or "none"
    if not families:
        raise _bad(folder, f"no checkpoint in this folder, expected a file ending .{', .'.join(_FORMATS)}")
    if stem is None and len(families) > 1:
        raise _bad(folder, f"several checkpoints, choose one with stem=; found {found}")
    if stem is not None and stem not in families:
        raise _bad(folder, f"no checkpoint with stem {stem!r}{nearest(stem, families)}; found {found}")
    formats = families[next(iter(families)) if stem is None else stem]
    matches = next(formats[kind] for kind in _FORMATS if kind in formats)
    if indexes := [match.string for match in matches if match["index"]]:
        return [folder / indexes[0]]
    names = [match.string for match in matches]
    shards = {match["total"]: match for match in matches if match["total"]}  # one of each count that is there
    expected = (
        f"{match['stem']}-{number:05d}-of-{total}.{match['format']}"
        for total, match in shards.items()
        for number in range(1, int(total) + 1)
    )
    _require_shards(folder, [name for name in expected if name not in names])
    return [folder / name for name in names]


def _require_shards(folder: Path, missing: list[str]) -> None:
    if missing:
        raise _bad(folder, f"{len(missing)} shard(s) missing, download them again: {', '.join(missing)}")


def _join(paths: Iterable[Path]) -> Checkpoint:
    """Open one or more files as one checkpoint; no tensor may be in two of them."""
    shards = [_read_file(path) for path in paths]
    tensors: dict[str, LazyTensor] = {}
    for tensor in itertools.chain.from_iterable(shard.values() for shard in shards):
        if (first := tensors.setdefault(tensor.name, tensor)) is not tensor:
            raise _bad(tensor.file, f"also in {first.file.name}: one of the two is a stray file", tensor.name)
    return Checkpoint(
        [mapped for shard in shards for mapped in shard._mapped],
        tensors,
        {key: value for shard in shards for key, value in shard.metadata.items()},
        tuple(name for shard in shards for name in shard.skipped),
    )


def _read_file(path: Path) -> Checkpoint:
    mapped = _MappedFile(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(mapped)
    if path.suffix[1:] in _FORMATS:
        return _read_torch(mapped)
    raise _bad(path, f"unknown ending {path.suffix!r}, expected .{', .'.join(_FORMATS)} or .index.json")


def _read_index(path: Path) -> Checkpoint:
    mapped = _MappedFile(path)
    if mapped.size > _MAX_HEADER_BYTES:
        raise _bad(path, f"index of {mapped.size:,} bytes, at most {_MAX_HEADER_BYTES:,}")
    places = _parse_json(path, mapped.view()[:]).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise _bad(path, "no 'weight_map': expected an object of tensor name to file name")
    for tensor, name in places.items():
        # Only plain names beside the index: a hostile index must not reach other files of the machine.
        if not isinstance(name, str) or not re.fullmatch(r"[^./\\:\0][^/\\:\0]*", name):
            raise _bad(path, f"file name {name!r:.200} is not a plain name without folders", tensor)
    names = dict.fromkeys(places.values())
    _require_shards(path.parent, [name for name in names if not (path.parent / name).is_file()])
    checkpoint = _join(path.parent / name for name in names)
    for tensor, name in places.items():
        if tensor not in checkpoint or checkpoint[tensor].file.name != name:
            raise _bad(path.parent / name, f"absent, though {path.name} lists it here", tensor)
    for tensor in checkpoint:
        if tensor not in places:
            raise _bad(checkpoint[tensor].file, f"not listed in {path.name}: files of two versions?", tensor)
    return checkpoint


# --- safetensors ---


def _parse_json(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise ValueError(f"duplicate key {key!r:.200}")
            result[key] = value
        return result

    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _bad(path, f"header is not valid JSON ({error}): damaged, or not a checkpoint") from error
    if not isinstance(value, dict):
        raise _bad(path, f"header is a JSON {type(value).__name__}, expected an object")
    return value


def _are_sizes(values: object) -> bool:
    """Whether values is a short list or tuple of integers >= 0; a bool is no integer here."""
    return (
        isinstance(values, (list, tuple))
        and len(values) <= _MAX_RANK
        and all(type(value) is int and value >= 0 for value in values)
    )


def _read_safetensors(mapped: _MappedFile) -> Checkpoint:
    path, view = mapped.path, mapped.view()
    length = int.from_bytes(view[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise _bad(path, f"header of {length:,} bytes, at most {_MAX_HEADER_BYTES:,}: not a safetensors file")
    start = 8 + length
    if mapped.size < start:
        raise _bad(path, f"truncated: {mapped.size:,} bytes, the header needs {start:,}; download it again")
    header = _parse_json(path, view[8:start])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _bad(path, "__metadata__ must map text to text")
    found = [_safetensor(mapped, name, entry, start) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor._offset, tensor._extent))
    end = start
    for tensor in found:
        if tensor._offset != end:
            fault = "overlaps the one before it" if tensor._offset < end else "leaves a hole before it"
            raise _bad(path, f"begins at byte {tensor._offset:,}, expected {end:,}: {fault}", tensor.name)
        end += tensor._extent
    if mapped.size != end:
        fault = "truncated" if mapped.size < end else "bytes after the last tensor"
        raise _bad(path, f"{fault}: {mapped.size:,} bytes, the header says {end:,}; download it again")
    return Checkpoint([mapped], {tensor.name: tensor for tensor in found}, metadata)


def _safetensor(mapped: _MappedFile, name: str, entry: object, start: int) -> LazyTensor:
    match entry:
        case {"dtype": str(kind), "shape": shape, "data_offsets": [_, _] as span, **rest} if not rest:
            if not _are_sizes(shape) or not _are_sizes(span) or span[0] > span[1]:
                problem = f"shape must be integers >= 0 (at most {_MAX_RANK}), data_offsets rising ones"
                raise _bad(mapped.path, problem, name)
        case _:
            raise _bad(mapped.path, "expected exactly dtype, shape and data_offsets [begin, end]", name)
    if kind not in SAFETENSORS_DTYPES:
        problem = f"unknown dtype {kind!r:.40}, expected one of {', '.join(SAFETENSORS_DTYPES)}"
        raise _bad(mapped.path, problem, name)
    tensor = LazyTensor(
        name, tuple(shape), SAFETENSORS_DTYPES[kind], mapped, start + span[0], span[1] - span[0]
    )
    if tensor.nbytes != tensor._extent:
        problem = f"{kind} {tensor.shape} needs {tensor.nbytes:,} bytes, data_offsets hold {tensor._extent:,}"
        raise _bad(mapped.path, problem, name)
    return tensor


# --- torch ---


@dataclass(frozen=True, slots=True)
class _Global:
    """A name that the pickle asked for. Only a name: nothing is ever imported."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    kind: str
    key: str
    count: int  # elements; bytes for UntypedStorage


@dataclass(frozen=True, slots=True)
class _TorchTensor:
    """Arguments of a torch rebuild function as the pickle gave them, not yet checked. Units: elements."""

    storage: _Storage
    offset: object
    shape: object
    strides: object
    dtype: str | None = None


_ALLOWED_GLOBALS = {
    _Global("collections", "OrderedDict"),
    _Global("torch._utils", "_rebuild_tensor_v2"),
    _Global("torch._utils", "_rebuild_tensor_v3"),
    _Global("torch._utils", "_rebuild_parameter"),
    _Global("torch.storage", "UntypedStorage"),
    *(_Global("torch", name) for name in (*TORCH_STORAGES, *TORCH_DTYPES)),
}
_OPERANDS = {
    **dict.fromkeys((pickle.PROTO, pickle.BINPUT, pickle.BINGET), struct.Struct("<B")),
    **dict.fromkeys((pickle.BININT1, pickle.LONG1), struct.Struct("<B")),
    **dict.fromkeys((pickle.LONG_BINPUT, pickle.LONG_BINGET, pickle.BINUNICODE), struct.Struct("<I")),
    pickle.BININT2: struct.Struct("<H"),
    pickle.BININT: struct.Struct("<i"),
    pickle.BINFLOAT: struct.Struct(">d"),
}


class _PickleError(Exception):
    """Why a pickle is refused."""


def _unpickle(data: bytes) -> object:
    """Interpret the protocol 2 opcodes of a state dict; raise _PickleError for everything else.

    Why not a ``pickle.Unpickler`` with a strict ``find_class``: a hostile pickle still makes that one
    allocate gigabytes (memo index 2^31), hang or crash (a nested tuple as key) or set attributes (BUILD).
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    pos = 0

    def pop_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    for _ in range(_MAX_PICKLE_OPCODES):
        opcode, value = data[pos : pos + 1], None
        pos += 1
        if operand := _OPERANDS.get(opcode):
            (value,) = operand.unpack_from(data, pos)
            pos += operand.size
        match opcode:
            case pickle.BINPUT | pickle.LONG_BINPUT:
                memo[value] = stack[-1]
            case pickle.BINGET | pickle.LONG_BINGET:
                stack.append(memo[value])
            case pickle.BININT1 | pickle.BININT2 | pickle.BININT | pickle.BINFLOAT:
                stack.append(value)
            case pickle.LONG1:
                stack.append(int.from_bytes(data[pos : pos + value], "little", signed=True))
                pos += value
            case pickle.BINUNICODE:
                stack.append(data[pos : pos + value].decode("utf-8"))
                pos += value
            case pickle.MARK:
                marks.append(len(stack))
            case pickle.TUPLE:
                stack.append(tuple(pop_mark()))
            case pickle.TUPLE1 | pickle.TUPLE2 | pickle.TUPLE3:
                count = 1 + (pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3).index(opcode)
                stack[-count:] = [tuple(stack[-count:])]
            case pickle.GLOBAL:
                module, name, _ = data[pos : pos + 256].split(b"\n", 2)
                pos += len(module) + len(name) + 2
                stack.append(_Global(module.decode("utf-8"), name.decode("utf-8")))
                if stack[-1] not in _ALLOWED_GLOBALS:
                    raise _PickleError(f"global {stack[-1].module}.{stack[-1].name} is not allowed")
            case pickle.BINPERSID:
                stack[-1] = _persistent_storage(stack[-1])
            case pickle.REDUCE:
                arguments = stack.pop()
                stack[-1] = _rebuild(stack[-1], arguments)
            case pickle.EMPTY_TUPLE:
                stack.append(())
            case pickle.NONE:
                stack.append(None)
            case pickle.NEWTRUE | pickle.NEWFALSE:
                stack.append(opcode == pickle.NEWTRUE)
            case pickle.EMPTY_DICT:
                stack.append({})
            case pickle.EMPTY_LIST:
                stack.append([])
            case pickle.SETITEM | pickle.SETITEMS:
                pairs = pop_mark() if opcode == pickle.SETITEMS else [stack.pop(-2), stack.pop()]
                _set_items(stack[-1], pairs)
            case pickle.APPEND | pickle.APPENDS:
                values = pop_mark() if opcode == pickle.APPENDS else [stack.pop()]
                if not isinstance(stack[-1], list):
                    raise _PickleError("APPEND to something that is no list")
                stack[-1].extend(values)
            case pickle.BUILD:
                # state_dict() carries its module versions this way; they are of no use here and dropped.
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise _PickleError("BUILD (setting attributes) of something that is no state dict")
            case pickle.PROTO:
                if value != 2:
                    raise _PickleError(f"pickle protocol {value}, expected 2 as torch.save writes")
            case pickle.STOP:
                return stack[-1]
            case _:
                names = {code: name for name, code in vars(pickle).items() if name.isupper()}
                raise _PickleError(f"opcode {names.get(opcode, opcode.hex() or 'missing')} is not allowed")
    raise _PickleError(f"more than {_MAX_PICKLE_OPCODES:,} opcodes")


def _persistent_storage(identity: object) -> _Storage:
    match identity:
        case ("storage", _Global("torch" | "torch.storage", kind), str(key), str(), int(count)):
            return _Storage(kind, key, count)
    raise _PickleError("persistent id is not ('storage', storage class, key, location, number of elements)")


def _rebuild(function: object, arguments: object) -> dict | _TorchTensor:
    """What the call of an allowed function gives. Gradient flags and the always empty hooks are dropped."""
    match function, arguments:
        case _Global("collections", "OrderedDict"), ():
            return {}
        case _Global(_, "_rebuild_tensor_v2"), (_Storage() as storage, offset, shape, strides, _, _):
            return _TorchTensor(storage, offset, shape, strides)
        case (
            _Global(_, "_rebuild_tensor_v3"),
            (_Storage() as storage, offset, shape, strides, _, _, _Global(_, dtype)),
        ):
            return _TorchTensor(storage, offset, shape, strides, dtype)
        case _Global(_, "_rebuild_parameter"), (_TorchTensor() as tensor, _, _):
            return tensor
        case _Global(module, name), _:
            raise _PickleError(f"call of {module}.{name} with arguments that no plain tensor has")
    raise _PickleError("REDUCE of something that is no function")


def _set_items(target: object, pairs: list[Any]) -> None:
    if not isinstance(target, dict):
        raise _PickleError("SETITEM on something that is no dict")
    for key, value in zip(pairs[::2], pairs[1::2], strict=True):
        if not isinstance(key, (str, int)):
            raise _PickleError(f"a key of type {type(key).__name__}, expected text")
        target[key] = value


def _split_state(state: object) -> tuple[dict[str, _TorchTensor], tuple[str, ...]]:
    """Tensors and names of everything else, of a state dict or of a wrapper such as ``{"model": state}``."""

    def tensors(values: object) -> dict[str, _TorchTensor]:
        items = values.items() if isinstance(values, dict) else ()
        return {key: tensor for key, tensor in items if isinstance(tensor, _TorchTensor) and type(key) is str}

    skipped: list[str] = []
    if isinstance(state, dict) and not tensors(state):
        inner = [key for key, value in state.items() if tensors(value)]
        if len(inner) != 1:
            what = f"several state dicts {inner[:8]}" if inner else "no tensors"
            raise _PickleError(f"{what:.300} in it")
        skipped = [str(key) for key in state if key != inner[0]]
        state = state[inner[0]]
    if not (found := tensors(state)):
        raise _PickleError(f"the top is a {type(state).__name__}")
    return found, (*skipped, *(str(key) for key in state if key not in found))


def _read_torch(mapped: _MappedFile) -> Checkpoint:
    path, resave = mapped.path, "convert it to safetensors where it was made"
    if mapped.view()[:4] != b"PK\x03\x04":
        raise _bad(path, f"not a torch zip file: legacy format (PyTorch < 1.6) or no checkpoint; {resave}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise _bad(path, "two entries of the same name in the archive")
            roots = [name for name in entries if f"/{name}".endswith("/data.pkl")]
            if len(roots) != 1:
                raise _bad(path, f"{len(roots)} entries data.pkl in the archive, expected one")
            prefix = roots[0].removesuffix("data.pkl")
            order = entries.get(f"{prefix}byteorder")
            if order and _read_entry(mapped, archive, order, limit=16) != b"little":
                raise _bad(path, f"byteorder is not 'little': made on a big-endian machine; {resave}")
            data = _read_entry(mapped, archive, entries[roots[0]], limit=_MAX_PICKLE_BYTES)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, struct.error, RuntimeError) as error:
        raise _bad(path, f"truncated or damaged archive ({error}); download it again") from error
    try:
        state, skipped = _split_state(_unpickle(data))
    except _PickleError as error:
        raise _bad(path, f"refused, only a dict of plain tensors is read: {error}; {resave}") from error
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise _bad(path, f"damaged pickle ({type(error).__name__}); download it again") from error
    tensors = {
        name: _torch_tensor(mapped, name, tensor, entries.get(f"{prefix}data/{tensor.storage.key}"))
        for name, tensor in state.items()
    }
    return Checkpoint([mapped], tensors, skipped=skipped)


def _entry_offset(mapped: _MappedFile, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its local header, whose length only that header tells."""
    what, local = f"entry {entry.filename!r:.200}", struct.Struct("<4s22xHH")
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    if not stored or entry.flag_bits & 1:
        raise _bad(mapped.path, f"{what} is compressed or encrypted; torch stores entries as they are")
    if 0 <= entry.header_offset <= mapped.size - local.size:
        magic, *lengths = local.unpack_from(mapped.view(), entry.header_offset)
        begin = entry.header_offset + local.size + sum(lengths)
        if magic == b"PK\x03\x04" and begin + entry.file_size <= mapped.size:
            return begin
    raise _bad(mapped.path, f"{what} is not where the archive says: damaged, download it again")


def _read_entry(mapped: _MappedFile, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    _entry_offset(mapped, entry)
    if entry.file_size > limit:
        raise _bad(mapped.path, f"{entry.filename!r:.200} has {entry.file_size:,} bytes, at most {limit:,}")
    return archive.read(entry)  # checks the CRC


def _torch_tensor(
    mapped: _MappedFile, name: str, tensor: _TorchTensor, entry: zipfile.ZipInfo | None
) -> LazyTensor:
    """Check a tensor description against the archive entry of its storage."""
    path, storage = mapped.path, tensor.storage
    untyped = storage.kind == "UntypedStorage"
    dtype = TORCH_DTYPES.get(tensor.dtype) if untyped else TORCH_STORAGES.get(storage.kind)
    if dtype is None or untyped != (tensor.dtype is not None):
        raise _bad(path, f"storage {storage.kind} with element type {tensor.dtype} is not known", name)
    if entry is None:
        raise _bad(path, f"storage {storage.key!r:.100} is not in the archive", name)
    begin, size = _entry_offset(mapped, entry), dtype.itemsize
    if entry.file_size != storage.count * (1 if untyped else size):
        problem = f"{storage.kind} of {storage.count:,} elements does not fit its {entry.file_size:,} bytes"
        raise _bad(path, problem, name)

    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if not all(map(_are_sizes, (shape, strides, [offset]))) or len(shape) != len(strides):
        raise _bad(path, f"size, stride and offset must be integers >= 0, at most {_MAX_RANK} axes", name)
    shape, empty, available = tuple(shape), 0 in shape, entry.file_size // size
    extent = 0 if empty else 1 + sum((axis - 1) * stride for axis, stride in zip(shape, strides, strict=True))
    # Repeated elements (an expanded tensor) are refused too: they would let a few bytes claim any memory.
    if max(offset + extent, math.prod(shape)) > available:
        problem = f"size {shape}, stride {strides}, offset {offset} exceed the {available:,} elements stored"
        raise _bad(path, problem, name)
    steps = None if empty else tuple(stride * size for stride in strides)
    return LazyTensor(name, shape, dtype, mapped, begin + offset * size, extent * size, steps)
