"""Open checkpoints as lazy tensors: safetensors, sharded checkpoints and torch files, without PyTorch.

Nothing in a checkpoint is trusted. Headers, indexes and offsets are checked before a tensor is handed out. Tensors are
read-only views of the mapped file: opening costs no memory, and a caller that releases what it has copied stays near
one tensor. Torch files are read by `wan_jax.weights.pth`. Source: the safetensors format.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from wan_jax.errors import nearest
from wan_jax.weights.lazy import (
    MAX_RANK,
    SAFETENSORS_DTYPES,
    Checkpoint,
    LazyTensor,
    MappedFile,
    are_sizes,
    bad,
    unreadable,
)
from wan_jax.weights.pth import read_torch

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library; used for index files too

_FORMATS = ("safetensors", "pth", "pt", "bin")  # the first wins where one stem exists in several
_FILE_NAME = re.compile(
    rf"(?P<stem>[^.].*?)(-\d{{5}}-of-(?P<total>\d{{5}}))?\.(?P<format>{'|'.join(_FORMATS)})(?P<index>\.index\.json)?"
)


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
        raise unreadable(path, error) from error
    if got != expected.lower():
        problem = f"SHA-256 is {got}, expected {expected.lower()}"
        raise bad(path, f"{problem}: damaged, or another version; download it again")


def _files_in_folder(folder: Path, stem: str | None) -> list[Path]:
    """The index, or else all files, of the family called ``stem`` (None: of the only family there is)."""
    families: dict[str, dict[str, list[re.Match[str]]]] = {}
    for name in sorted(entry.name for entry in folder.iterdir() if entry.is_file()):
        if match := _FILE_NAME.fullmatch(name):
            families.setdefault(match["stem"], {}).setdefault(match["format"], []).append(match)
    found = ", ".join(f"{name!r} ({'/'.join(formats)})" for name, formats in families.items()) or "none"
    if not families:
        raise bad(folder, f"no checkpoint in this folder, expected a file ending .{', .'.join(_FORMATS)}")
    if stem is None and len(families) > 1:
        raise bad(folder, f"several checkpoints, choose one with stem=; found {found}")
    if stem is not None and stem not in families:
        raise bad(folder, f"no checkpoint with stem {stem!r}{nearest(stem, families)}; found {found}")
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
        raise bad(folder, f"{len(missing)} shard(s) missing, download them again: {', '.join(missing)}")


def _join(paths: Iterable[Path]) -> Checkpoint:
    """Open one or more files as one checkpoint; no tensor may be in two of them."""
    shards = [_read_file(path) for path in paths]
    tensors: dict[str, LazyTensor] = {}
    for tensor in itertools.chain.from_iterable(shard.values() for shard in shards):
        if (first := tensors.setdefault(tensor.name, tensor)) is not tensor:
            raise bad(tensor.file, f"also in {first.file.name}: one of the two is a stray file", tensor.name)
    return Checkpoint(
        [mapped for shard in shards for mapped in shard._mapped],
        tensors,
        {key: value for shard in shards for key, value in shard.metadata.items()},
        tuple(name for shard in shards for name in shard.skipped),
    )


def _read_file(path: Path) -> Checkpoint:
    mapped = MappedFile(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(mapped)
    if path.suffix[1:] in _FORMATS:
        return read_torch(mapped)
    raise bad(path, f"unknown ending {path.suffix!r}, expected .{', .'.join(_FORMATS)} or .index.json")


def _read_index(path: Path) -> Checkpoint:
    mapped = MappedFile(path)
    if mapped.size > _MAX_HEADER_BYTES:
        raise bad(path, f"index of {mapped.size:,} bytes, at most {_MAX_HEADER_BYTES:,}")
    places = _parse_json(path, mapped.view()[:]).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise bad(path, "no 'weight_map': expected an object of tensor name to file name")
    for tensor, name in places.items():
        # Only plain names beside the index: a hostile index must not reach other files of the machine.
        if not isinstance(name, str) or not re.fullmatch(r"[^./\\:\0][^/\\:\0]*", name):
            raise bad(path, f"file name {name!r:.200} is not a plain name without folders", tensor)
    names = dict.fromkeys(places.values())
    _require_shards(path.parent, [name for name in names if not (path.parent / name).is_file()])
    checkpoint = _join(path.parent / name for name in names)
    for tensor, name in places.items():
        if tensor not in checkpoint or checkpoint[tensor].file.name != name:
            raise bad(path.parent / name, f"absent, though {path.name} lists it here", tensor)
    for tensor in checkpoint:
        if tensor not in places:
            raise bad(checkpoint[tensor].file, f"not listed in {path.name}: files of two versions?", tensor)
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
        raise bad(path, f"header is not valid JSON ({error}): damaged, or not a checkpoint") from error
    if not isinstance(value, dict):
        raise bad(path, f"header is a JSON {type(value).__name__}, expected an object")
    return value


def _read_safetensors(mapped: MappedFile) -> Checkpoint:
    path, view = mapped.path, mapped.view()
    length = int.from_bytes(view[:8], "little")
    if length > _MAX_HEADER_BYTES:
        raise bad(path, f"header of {length:,} bytes, at most {_MAX_HEADER_BYTES:,}: not a safetensors file")
    start = 8 + length
    if mapped.size < start:
        raise bad(path, f"truncated: {mapped.size:,} bytes, the header needs {start:,}; download it again")
    header = _parse_json(path, view[8:start])
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise bad(path, "__metadata__ must map text to text")
    found = [_safetensor(mapped, name, entry, start) for name, entry in header.items()]
    found.sort(key=lambda tensor: (tensor._offset, tensor._extent))
    end = start
    for tensor in found:
        if tensor._offset != end:
            fault = "overlaps the one before it" if tensor._offset < end else "leaves a hole before it"
            raise bad(path, f"begins at byte {tensor._offset:,}, expected {end:,}: {fault}", tensor.name)
        end += tensor._extent
    if mapped.size != end:
        fault = "truncated" if mapped.size < end else "bytes after the last tensor"
        raise bad(path, f"{fault}: {mapped.size:,} bytes, the header says {end:,}; download it again")
    return Checkpoint([mapped], {tensor.name: tensor for tensor in found}, metadata)


def _safetensor(mapped: MappedFile, name: str, entry: object, start: int) -> LazyTensor:
    match entry:
        case {"dtype": str(kind), "shape": shape, "data_offsets": [_, _] as span, **rest} if not rest:
            if not are_sizes(shape) or not are_sizes(span) or span[0] > span[1]:
                problem = f"shape must be integers >= 0 (at most {MAX_RANK}), data_offsets rising ones"
                raise bad(mapped.path, problem, name)
        case _:
            raise bad(mapped.path, "expected exactly dtype, shape and data_offsets [begin, end]", name)
    if kind not in SAFETENSORS_DTYPES:
        problem = f"unknown dtype {kind!r:.40}, expected one of {', '.join(SAFETENSORS_DTYPES)}"
        raise bad(mapped.path, problem, name)
    tensor = LazyTensor(name, tuple(shape), SAFETENSORS_DTYPES[kind], mapped, start + span[0], span[1] - span[0])
    if tensor.nbytes != tensor._extent:
        problem = f"{kind} {tensor.shape} needs {tensor.nbytes:,} bytes, data_offsets hold {tensor._extent:,}"
        raise bad(mapped.path, problem, name)
    return tensor
