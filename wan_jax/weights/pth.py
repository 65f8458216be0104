"""Torch ``.pth`` state dicts without PyTorch and without unpickling.

The pickle is interpreted by a small machine that builds dicts, lists, tuples, text, numbers and tensor descriptions
and nothing else: it imports nothing and calls nothing. Source: PyTorch's zip serialisation (``torch.save`` since 1.6,
pickle protocol 2).
"""

from __future__ import annotations

import math
import pickle
import struct
import zipfile
from dataclasses import dataclass
from typing import Any

from wan_jax.weights.lazy import (
    MAX_RANK,
    TORCH_DTYPES,
    TORCH_STORAGES,
    Checkpoint,
    LazyTensor,
    MappedFile,
    are_sizes,
    bad,
)

# A tensor costs about 40 opcodes and 250 bytes of pickle; official checkpoints hold up to 1,100 tensors.
# Within these limits no pickle takes a second or 100 MB.
_MAX_PICKLE_BYTES = 16_000_000
_MAX_PICKLE_OPCODES = 200_000


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


def read_torch(mapped: MappedFile) -> Checkpoint:
    path, resave = mapped.path, "convert it to safetensors where it was made"
    if mapped.view()[:4] != b"PK\x03\x04":
        raise bad(path, f"not a torch zip file: legacy format (PyTorch < 1.6) or no checkpoint; {resave}")
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            if len(entries) != len(archive.infolist()):
                raise bad(path, "two entries of the same name in the archive")
            roots = [name for name in entries if f"/{name}".endswith("/data.pkl")]
            if len(roots) != 1:
                raise bad(path, f"{len(roots)} entries data.pkl in the archive, expected one")
            prefix = roots[0].removesuffix("data.pkl")
            order = entries.get(f"{prefix}byteorder")
            if order and _read_entry(mapped, archive, order, limit=16) != b"little":
                raise bad(path, f"byteorder is not 'little': made on a big-endian machine; {resave}")
            data = _read_entry(mapped, archive, entries[roots[0]], limit=_MAX_PICKLE_BYTES)
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, struct.error, RuntimeError) as error:
        raise bad(path, f"truncated or damaged archive ({error}); download it again") from error
    try:
        state, skipped = _split_state(_unpickle(data))
    except _PickleError as error:
        raise bad(path, f"refused, only a dict of plain tensors is read: {error}; {resave}") from error
    except (IndexError, KeyError, ValueError, struct.error) as error:
        raise bad(path, f"damaged pickle ({type(error).__name__}); download it again") from error
    tensors = {
        name: _torch_tensor(mapped, name, tensor, entries.get(f"{prefix}data/{tensor.storage.key}"))
        for name, tensor in state.items()
    }
    return Checkpoint([mapped], tensors, skipped=skipped)


def _entry_offset(mapped: MappedFile, entry: zipfile.ZipInfo) -> int:
    """Where the bytes of an entry begin: behind its local header, whose length only that header tells."""
    what, local = f"entry {entry.filename!r:.200}", struct.Struct("<4s22xHH")
    stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
    if not stored or entry.flag_bits & 1:
        raise bad(mapped.path, f"{what} is compressed or encrypted; torch stores entries as they are")
    if 0 <= entry.header_offset <= mapped.size - local.size:
        magic, *lengths = local.unpack_from(mapped.view(), entry.header_offset)
        begin = entry.header_offset + local.size + sum(lengths)
        if magic == b"PK\x03\x04" and begin + entry.file_size <= mapped.size:
            return begin
    raise bad(mapped.path, f"{what} is not where the archive says: damaged, download it again")


def _read_entry(mapped: MappedFile, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, limit: int) -> bytes:
    _entry_offset(mapped, entry)
    if entry.file_size > limit:
        raise bad(mapped.path, f"{entry.filename!r:.200} has {entry.file_size:,} bytes, at most {limit:,}")
    return archive.read(entry)  # checks the CRC


def _torch_tensor(mapped: MappedFile, name: str, tensor: _TorchTensor, entry: zipfile.ZipInfo | None) -> LazyTensor:
    """Check a tensor description against the archive entry of its storage."""
    path, storage = mapped.path, tensor.storage
    untyped = storage.kind == "UntypedStorage"
    dtype = TORCH_DTYPES.get(tensor.dtype) if untyped else TORCH_STORAGES.get(storage.kind)
    if dtype is None or untyped != (tensor.dtype is not None):
        raise bad(path, f"storage {storage.kind} with element type {tensor.dtype} is not known", name)
    if entry is None:
        raise bad(path, f"storage {storage.key!r:.100} is not in the archive", name)
    begin, size = _entry_offset(mapped, entry), dtype.itemsize
    if entry.file_size != storage.count * (1 if untyped else size):
        problem = f"{storage.kind} of {storage.count:,} elements does not fit its {entry.file_size:,} bytes"
        raise bad(path, problem, name)

    shape, strides, offset = tensor.shape, tensor.strides, tensor.offset
    if not all(map(are_sizes, (shape, strides, [offset]))) or len(shape) != len(strides):
        raise bad(path, f"size, stride and offset must be integers >= 0, at most {MAX_RANK} axes", name)
    shape, empty, available = tuple(shape), 0 in shape, entry.file_size // size
    extent = 0 if empty else 1 + sum((axis - 1) * stride for axis, stride in zip(shape, strides, strict=True))
    # Repeated elements (an expanded tensor) are refused too: they would let a few bytes claim any memory.
    if max(offset + extent, math.prod(shape)) > available:
        problem = f"size {shape}, stride {strides}, offset {offset} exceed the {available:,} elements stored"
        raise bad(path, problem, name)
    steps = None if empty else tuple(stride * size for stride in strides)
    return LazyTensor(name, shape, dtype, mapped, begin + offset * size, extent * size, steps)
