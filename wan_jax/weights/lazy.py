"""What every checkpoint reader hands out: tensors that are views of a mapped file, described but not yet read."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

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

MAX_RANK = 16


@dataclass(frozen=True, slots=True, eq=False)
class LazyTensor:
    """One tensor of a checkpoint: its description, and on request a view of its bytes in the mapped file."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    _mapped: MappedFile
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
        mapped: list[MappedFile],
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


class MappedFile:
    """A file mapped read-only, shared by its tensors."""

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                # An empty file cannot be mapped; empty bytes then fail the same checks as any short file.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else b""
        except OSError as error:
            raise unreadable(path, error) from error
        if self._map[:24] == b"version https://git-lfs.":
            raise bad(path, "only a Git LFS pointer: run `git lfs pull` or download the file itself")

    def view(self) -> mmap.mmap | bytes:
        if self._map is None:
            raise bad(self.path, "the checkpoint is closed: read tensors before close(), or open it again")
        return self._map

    def release(self, start: int, length: int) -> None:
        # Whole pages, rounded outwards: a neighbour that loses an edge page just reads it again.
        first = start - start % mmap.PAGESIZE
        if self._map and length and hasattr(mmap, "MADV_DONTNEED"):  # absent on Windows
            self._map.madvise(mmap.MADV_DONTNEED, first, start + length - first)

    def close(self) -> None:
        # Not mmap.close(), which refuses while arrays exist: the map goes with the last of them.
        self._map = None


def bad(path: Path, problem: str, tensor: str | None = None) -> CheckpointError:
    where = "" if tensor is None else f"tensor {tensor!r:.300}: "
    return CheckpointError(f"{path}: {where}{problem}")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    if not isinstance(error, FileNotFoundError):
        return bad(path, f"cannot be read: {error.strerror}")
    folder = path.absolute().parent
    if not folder.is_dir():
        return bad(path, f"not found: there is no folder {folder}")
    siblings = [entry.name for entry in folder.iterdir()]
    return bad(path, f"not found in {folder}{nearest(path.name, siblings)}")


def are_sizes(values: object) -> bool:
    """Whether values is a short list or tuple of integers >= 0; a bool is no integer here."""
    return (
        isinstance(values, (list, tuple))
        and len(values) <= MAX_RANK
        and all(type(value) is int and value >= 0 for value in values)
    )
