"""Streaming writers of checkpoints: safetensors, sharded safetensors and torch ``.pth``, without PyTorch.

Tensors are produced and written one at a time, so that exporting needs the memory of one tensor. A file gets
its final name only when it is complete and on disk.

Sources: the safetensors format; PyTorch's zip serialisation (``torch.save``, pickle protocol 2).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from wan_jax.errors import CheckpointError
from wan_jax.weights.lazy import SAFETENSORS_DTYPES, TORCH_STORAGES

_SAFETENSORS_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
_STORAGE_NAMES = {dtype: name for name, dtype in TORCH_STORAGES.items()}
_ALIGNMENT = 64  # torch's, for storages in a .pth


class TensorSource(NamedTuple):
    """A tensor to write: its description, and the function that produces its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    produce: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


TensorRow = tuple[str, tuple[int, ...], DTypeLike, Callable[[], np.ndarray]]
Tensors = Mapping[str, np.ndarray] | Iterable[TensorRow]


def write_safetensors(
    path: str | os.PathLike[str], tensors: Tensors, metadata: Mapping[str, str] | None = None
) -> None:
    """Write one safetensors file.

    Args:
        path: the file; an existing one is replaced when the new one is complete.
        tensors: arrays by name, or (name, shape, dtype, produce) rows. ``produce`` is called once, in the
            order of the file: widest element type first, so that every tensor is aligned, else as given.
        metadata: text pairs for the header.

    Raises:
        CheckpointError: a name twice, a type without a safetensors name, metadata that is no text, or
            produced values without the announced shape and type. Nothing is left behind.
    """
    path = Path(path)
    sources = sorted(_sources(path, tensors), key=lambda source: -np.dtype(source.dtype).itemsize)
    header: dict[str, object] = {}
    if metadata:
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            raise CheckpointError(f"{path}: metadata must map text to text, got {dict(metadata)!r:.200}")
        header["__metadata__"] = dict(metadata)
    end = 0
    for source in sources:
        start, end = end, end + source.nbytes
        kind = _SAFETENSORS_NAMES[np.dtype(source.dtype)]
        header[source.name] = {"dtype": kind, "shape": source.shape, "data_offsets": [start, end]}
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    with _complete_file(path) as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        for source in sources:
            file.write(_bytes(path, source))


def write_sharded_safetensors(
    folder: str | os.PathLike[str],
    stem: str,
    tensors: Tensors,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write ``stem-00001-of-0000N.safetensors`` shards and their index, or one file when everything fits.

    Shards are filled in the given order; a tensor larger than ``max_shard_bytes`` gets a shard of its own.
    The index is written last. Other arguments and errors as in :func:`write_safetensors`.

    Returns:
        The safetensors files, in order.

    Raises:
        CheckpointError: also if the folder holds files of this stem that would be mixed up with the new ones.
    """
    folder = Path(folder)
    shards: list[list[TensorSource]] = [[]]
    room = max_shard_bytes
    for source in _sources(folder / f"{stem}.safetensors", tensors):
        if shards[-1] and source.nbytes > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(source)
        room -= source.nbytes

    index = folder / f"{stem}.safetensors.index.json"
    paths = [folder / f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    targets = [*paths, index]
    if len(shards) == 1:
        paths = targets = [folder / f"{stem}.safetensors"]
    family = re.compile(re.escape(stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    folder.mkdir(parents=True, exist_ok=True)
    present = {entry.name for entry in folder.iterdir() if family.fullmatch(entry.name)}
    if stale := sorted(present - {target.name for target in targets}):
        raise CheckpointError(f"{folder}: {', '.join(stale)} of another export; remove, or use a new folder")

    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard, metadata)
    if len(shards) > 1:
        pairs = [(path, source) for path, shard in zip(paths, shards, strict=True) for source in shard]
        content = {
            "metadata": {"total_size": sum(source.nbytes for _, source in pairs)},
            "weight_map": {source.name: path.name for path, source in pairs},
        }
        with _complete_file(index) as file:
            file.write(json.dumps(content, indent=2).encode())
    return paths


def write_pth(path: str | os.PathLike[str], tensors: Tensors) -> None:
    """Write a flat state dict as ``torch.save`` does; PyTorch reads it with ``weights_only=True``.

    Arguments and errors as in :func:`write_safetensors`; the order is kept. Storages are aligned for mmap.
    """
    path = Path(path)
    sources = _sources(path, tensors)
    with _complete_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        _write_entry(file, archive, "data.pkl", _state_dict_pickle(sources))
        _write_entry(file, archive, "byteorder", b"little")
        for key, source in enumerate(sources):
            _write_entry(file, archive, f"data/{key}", _bytes(path, source))
        _write_entry(file, archive, "version", b"3\n")


def _sources(path: Path, tensors: Tensors) -> list[TensorSource]:
    if isinstance(tensors, Mapping):
        rows = ((name, np.shape(a), a.dtype, lambda a=a: a) for name, a in tensors.items())
    else:
        rows = tensors
    sources = [TensorSource(name, tuple(map(int, shape)), dtype, make) for name, shape, dtype, make in rows]
    seen = {"__metadata__"}  # not a possible name in safetensors
    for source in sources:
        if source.name in seen:
            raise CheckpointError(f"{path}: tensor {source.name!r} twice, or a reserved name")
        seen.add(source.name)
        if np.dtype(source.dtype) not in _SAFETENSORS_NAMES:
            known = ", ".join(dtype.name for dtype in _SAFETENSORS_NAMES)
            problem = f"tensor {source.name!r} has type {source.dtype}, expected one of {known}"
            raise CheckpointError(f"{path}: {problem}")
    return sources


def _bytes(path: Path, source: TensorSource) -> memoryview:
    array = np.asarray(source.produce())
    if array.shape != source.shape or array.dtype != np.dtype(source.dtype):
        got, expected = f"{array.dtype} {array.shape}", f"{np.dtype(source.dtype)} {source.shape}"
        raise CheckpointError(f"{path}: tensor {source.name!r} came as {got}, announced was {expected}")
    # By way of uint8, since bfloat16 and float8 arrays offer no buffer of their own.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _complete_file(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes its name when the block ends well, and disappears when it does not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_entry(file: IO[bytes], archive: zipfile.ZipFile, name: str, data: bytes | memoryview) -> None:
    """Store an entry with its bytes at a multiple of 64, padded as torch does: by an extra field named FB."""
    entry = zipfile.ZipInfo(f"archive/{name}")  # dated 1980: equal tensors give equal files
    header = file.tell() + 30 + len(entry.filename) + 20 + 4  # local header, name, zip64 field, head of FB
    padding = -header % _ALIGNMENT
    entry.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(entry, "w", force_zip64=True) as stream:
        stream.write(data)


def _state_dict_pickle(sources: list[TensorSource]) -> bytes:
    """The opcodes that ``torch.save`` gives for an OrderedDict of plain tensors, without its memo."""

    def text(value: str) -> bytes:
        encoded = value.encode("utf-8")
        return pickle.BINUNICODE + struct.pack("<I", len(encoded)) + encoded

    def integer(value: int) -> bytes:
        if value < 2**31:
            return pickle.BININT + struct.pack("<i", value)
        return pickle.LONG1 + bytes([8]) + value.to_bytes(8, "little", signed=True)

    def group(*parts: bytes) -> bytes:
        return pickle.MARK + b"".join(parts) + pickle.TUPLE

    def name(module: str, attribute: str) -> bytes:
        return pickle.GLOBAL + f"{module}\n{attribute}\n".encode()

    empty_dict = name("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE

    def tensor(key: int, source: TensorSource) -> bytes:
        dtype = np.dtype(source.dtype)
        count = math.prod(source.shape)
        strides = [math.prod(source.shape[axis + 1 :]) for axis in range(len(source.shape))]
        if dtype in _STORAGE_NAMES:
            version, storage, kind = "v2", name("torch", _STORAGE_NAMES[dtype]), b""
        else:  # the storage is bytes then, and the type an argument
            version, storage, kind = "v3", name("torch.storage", "UntypedStorage"), name("torch", dtype.name)
            count *= dtype.itemsize
        identity = group(text("storage"), storage, text(str(key)), text("cpu"), integer(count))
        shape, steps = (group(*map(integer, values)) for values in (source.shape, strides))
        stored = identity + pickle.BINPERSID
        arguments = group(stored, integer(0), shape, steps, pickle.NEWFALSE, empty_dict, kind)
        return name("torch._utils", f"_rebuild_tensor_{version}") + arguments + pickle.REDUCE

    items = b"".join(text(source.name) + tensor(key, source) for key, source in enumerate(sources))
    return pickle.PROTO + b"\x02" + empty_dict + pickle.MARK + items + pickle.SETITEMS + pickle.STOP
