"""Apply a table of names to an abstract model: official or diffusers checkpoints -> parameters, and back.

A table (``weights/maps``) is a list of `Row`: our module path, a kind, and the module's name in each layout. A
kind is a closed set of transforms with inverses, so one table serves import, export and the coverage check. The
engine is strict: every source key is used exactly once or ignored with a reason, every target leaf is filled exactly
once, shapes agree; all faults are reported together. It streams: read one tensor, transform, cast, place on its
shards, drop its pages. What is quantised is so a few layers at a time, on the devices.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.errors import CheckpointError
from wan_jax.nn.layers import quantized
from wan_jax.nn.quant import quantize as quantize_kernel
from wan_jax.nn.stack import in_host_memory, is_streamed
from wan_jax.parallel import param_sharding

Array = np.ndarray

# Tensors read at once; each holds its mapped pages in memory meanwhile.
READ_THREADS = min(4, os.cpu_count() or 1)
BUFFER_BYTES = 2 << 20  # of what is cast and turned at once; it stays in the cache between the two
_ALIGNMENT = 64  # bytes: a line of the cache, and what XLA:CPU asks of a buffer that it does not copy


class Row(NamedTuple):
    """One module: our path, how its arrays are laid out, and its name in the two published layouts.

    ``{i}`` in a source name runs over the layer axis of a stacked module. A tuple of names is concatenated along the
    output axis (Hugging Face keeps q, k, v apart where the official file fuses them); an empty tuple says that the
    layout has no such array. ``shape`` gives the source shape in each layout where ours does not determine it
    (singleton axes, patches); one entry may be -1.
    """

    path: str
    kind: str
    official: str | tuple[str, ...]
    diffusers: str | tuple[str, ...]
    shape: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def names(self, layout: str) -> tuple[str, ...]:
        names = self.official if layout == "official" else self.diffusers
        return (names,) if isinstance(names, str) else names

    def source_shape(self, layout: str) -> tuple[int, ...] | None:
        return self.shape and self.shape[LAYOUTS.index(layout)]


LAYOUTS = ("official", "diffusers")


def _same(x: Array) -> Array:
    return x


class Transform(NamedTuple):
    """``load`` turns the source array into ours; ``save`` inverts it, given the row's source shape if it has one.

    Both only move axes. ``fold`` changes values, in our layout and behind ``load``; ``unfold`` inverts it.
    """

    load: Callable[[Array], Array]
    save: Callable[[Array, tuple[int, ...] | None], Array]
    fold: Callable[[Array], Array] = _same
    unfold: Callable[[Array], Array] = _same


def _reshape(x: Array, shape: tuple[int, ...] | None) -> Array:
    return x if shape is None else x.reshape(shape)


def _patch_out(x: Array, shape: tuple[int, ...] | None) -> Array:
    _, channels, *patch = shape
    return np.moveaxis(x.reshape(*patch, channels, -1), (-1, -2), (0, 1))


def _unit_filters(w: Array) -> Array:
    """Filters [size, in, out] as the audio VAE applies them: a root mean square r gives the norm r / (1e-4 + r)."""
    w, root = w.astype(np.float64), math.sqrt(math.prod(w.shape[:-1]))
    return w / (1e-4 + np.linalg.norm(w, axis=(0, 1)) / root) / root


def _free_filters(w: Array) -> Array:
    """Filters that `_unit_filters` turns into these; what it never gives, a norm of one or more, is shortened."""
    w, root = w.astype(np.float64), math.sqrt(math.prod(w.shape[:-1]))
    norm, longest = np.linalg.norm(w, axis=(0, 1)), 1 - 1e-8  # closer to one than float32 can tell
    return w * (longest / np.maximum(norm, longest)) * root * 1e-4 / (1 - np.minimum(norm, longest))


_KEEP = Transform(_same, _reshape)
# [out, in, ...] <-> [..., in, out]: matrices and convolutions of any rank.
_CONV = Transform(
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x, shape: np.moveaxis(x, (-1, -2), (0, 1))
)
_UNIT_CONV = Transform(_CONV.load, _CONV.save, _unit_filters, _free_filters)
# [in, out, size] <-> [size, in, out]: an upsampling convolution.
_TRANSPOSED = Transform(lambda x: np.moveaxis(x, -1, 0), lambda x, shape: np.moveaxis(x, 0, -1))
# [out, in, *patch] <-> matrix [patch * in, out], channels fastest.
_PATCH = Transform(lambda x: np.moveaxis(x, (0, 1), (-1, -2)).reshape(-1, x.shape[0]), _patch_out)
# kind -> (our leaf, source leaf, transform); leaves that our module does not have are skipped. "" is the name itself.
KINDS: dict[str, tuple[tuple[str, str, Transform], ...]] = {
    "linear": (("kernel", "weight", _CONV), ("bias", "bias", _KEEP)),
    "conv": (("kernel", "weight", _CONV), ("bias", "bias", _KEEP)),
    "unit_conv": (("kernel", "weight", _UNIT_CONV),),
    "transposed_conv": (("kernel", "weight", _TRANSPOSED), ("bias", "bias", _KEEP)),
    "patch": (("kernel", "weight", _PATCH), ("bias", "bias", _KEEP)),
    "norm": (("weight", "weight", _KEEP), ("bias", "bias", _KEEP)),
    "gamma": (("gamma", "gamma", _KEEP),),
    "snake": (("alpha", "alpha", _KEEP), ("beta", "beta", _KEEP)),
    "embed": (("embedding", "weight", _KEEP),),
    "array": (("", "", _KEEP),),
}


class Piece(NamedTuple):
    """Where a part of one of our leaves comes from: rows ``[layer]`` and output columns ``start:stop`` of the leaf."""

    source: str
    layer: int | None
    part: int
    parts: int


@dataclass
class Leaf:
    path: str
    shape: tuple[int, ...]
    dtype: Any
    transform: Transform
    pieces: list[Piece]
    source_shape: tuple[int, ...] | None = None


def _join(prefix: str, leaf: str) -> str:
    return f"{prefix}.{leaf}" if leaf else prefix


def plan(abstract: Any, rows: Iterable[Row], layout: str) -> tuple[dict[str, Leaf], list[str]]:
    """Match the rows with the leaves of a model (arrays or shapes). Returns the leaves by path, and the faults."""
    shapes = flatten_params(abstract)
    leaves: dict[str, Leaf] = {}
    faults = []
    for row in rows:
        names = row.names(layout)
        found = False
        for ours, theirs, transform in KINDS[row.kind]:
            path = _join(row.path, ours)
            if path not in shapes:
                continue
            found = True
            if path in leaves:
                faults.append(f"{path}: filled by two rows of the table")
                continue
            shape, dtype = tuple(shapes[path].shape), shapes[path].dtype
            layers = range(shape[0]) if any("{i}" in name for name in names) else (None,)
            pieces = [
                Piece(_join(name.replace("{i}", str(i)), theirs), i, part, len(names))
                for i in layers
                for part, name in enumerate(names)
            ]
            source_shape = row.source_shape(layout) if ours != "bias" else None
            leaves[path] = Leaf(path, shape, dtype, transform, pieces, source_shape)
        if not found:
            faults.append(f"{row.path}: in the table, not in the model")
    faults += [f"{path}: in the model, without a row in the table" for path in shapes.keys() - leaves.keys()]
    return leaves, sorted(faults)


@dataclass
class Coverage:
    """What `check` found. ``faults`` is empty when the checkpoint fits the model exactly."""

    used: dict[str, str] = field(default_factory=dict)  # source key -> our path
    ignored: dict[str, str] = field(default_factory=dict)  # source key -> reason
    faults: list[str] = field(default_factory=list)

    def raise_faults(self, what: str) -> None:
        if self.faults:
            count = len(self.faults)
            shown = self.faults[:40] + [f"... and {count - 40} more"] * (count > 40)
            raise CheckpointError(f"{what} does not fit the model ({count} faults):\n  " + "\n  ".join(shown))


def check(
    abstract: Any,
    rows: Iterable[Row],
    source: Mapping[str, Any],
    *,
    layout: str = "official",
    ignore: Iterable[tuple[str, str]] = (),
) -> Coverage:
    """Compare names and shapes of a checkpoint with a model, reading no data.

    Args:
        abstract: the model, or its abstract evaluation.
        source: name -> anything with ``.shape`` and ``.dtype``.
        ignore: (regular expression, reason) for source keys that the model does not use.
    """
    leaves, faults = plan(abstract, rows, layout)
    coverage = Coverage(faults=faults)
    for leaf in leaves.values():
        if not leaf.pieces:
            coverage.faults.append(f"{leaf.path}: has no place in the {layout} layout")
        for piece in leaf.pieces:
            if piece.source not in source:
                coverage.faults.append(f"{piece.source}: missing in the checkpoint (for {leaf.path})")
                continue
            if piece.source in coverage.used:
                coverage.faults.append(f"{piece.source}: used twice, for {coverage.used[piece.source]} and {leaf.path}")
            coverage.used[piece.source] = leaf.path
            tensor = source[piece.source]
            got, expected = tuple(tensor.shape), piece_shape(leaf)
            if int(np.prod(got)) != int(np.prod(expected)) or _loaded_shape(got, leaf) != expected:
                coverage.faults.append(f"{piece.source}: shape {got} does not give {leaf.path} {expected}")
            if not jax.numpy.issubdtype(tensor.dtype, np.floating):
                coverage.faults.append(f"{piece.source}: dtype {tensor.dtype}, expected floating point")
    for key in source:
        if key not in coverage.used:
            reason = next((why for pattern, why in ignore if re.fullmatch(pattern, key)), None)
            if reason:
                coverage.ignored[key] = reason
            else:
                coverage.faults.append(f"{key}: in the checkpoint, unknown to the model")
    return coverage


def piece_shape(leaf: Leaf) -> tuple[int, ...]:
    """Shape of one piece in our layout."""
    first = leaf.pieces[0]
    shape = leaf.shape if first.layer is None else leaf.shape[1:]
    return (*shape[:-1], shape[-1] // first.parts) if shape else shape


def _loaded_shape(shape: tuple[int, ...], leaf: Leaf) -> tuple[int, ...]:
    """Shape that the transform gives for a source shape, without data."""
    if leaf.transform is _KEEP:
        return piece_shape(leaf)  # singleton axes may differ; the element count is compared by the caller
    if len(shape) < 2:
        return shape
    return leaf.transform.load(np.broadcast_to(np.int8(0), shape)).shape


def host_array(tensor: Any) -> Array:
    """The values of a `LazyTensor`, or of any array."""
    return tensor.numpy() if hasattr(tensor, "numpy") else np.asarray(tensor)


def _empty(shape: Iterable[int], dtype: Any) -> Array:
    """An array that begins at a multiple of 64 bytes: JAX then takes it over on CPU, where it else copies."""
    shape, dtype = tuple(shape), np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def _copy(out: Array, x: Array) -> None:
    """``out[...] = x``, cast. Where axes change places, by way of a buffer in the order of the source.

    Rows of the buffer are padded: columns of a matrix as wide as a power of two would all fall on the same few lines
    of the cache, and turning it would take four times as long.
    """
    order = sorted(range(x.ndim), key=lambda axis: -x.strides[axis])
    if order == list(range(x.ndim)):
        out[...] = x
        return
    x, out = x.transpose(order), out.transpose(order)
    width = math.prod(x.shape[1:])
    rows = max(1, BUFFER_BYTES // (width * out.itemsize))
    buffer = np.empty((rows, width + _ALIGNMENT // out.itemsize), out.dtype)[:, :width]
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        turned = buffer[: len(part)].reshape(part.shape)
        turned[...] = part
        out[start : start + rows] = turned


def _read(leaf: Leaf, source: Mapping[str, Any], bounds: tuple[tuple[int, int], ...]) -> Array:
    """The block of a leaf between ``bounds``, (start, stop) of each axis, in our layout and dtype."""
    out = _empty((stop - start for start, stop in bounds), leaf.dtype)
    shape = piece_shape(leaf)

    def read(piece: Piece) -> None:
        block, inner = out, list(bounds)
        if piece.layer is not None:
            start, stop = inner.pop(0)
            if not start <= piece.layer < stop:
                return
            block = out[piece.layer - start]
        if inner:  # columns of this piece that lie inside the block
            first, (start, stop) = piece.part * shape[-1], inner[-1]
            a, b = max(start, first), min(stop, first + shape[-1])
            if a >= b:
                return
            block = block[..., a - start : b - start]
            inner[-1] = a - first, b - first
        tensor = source[piece.source]
        ours = leaf.transform.fold(leaf.transform.load(host_array(tensor)).reshape(shape))
        _copy(block, ours[tuple(slice(*bound) for bound in inner)])
        if hasattr(tensor, "release"):
            tensor.release()

    with ThreadPoolExecutor(READ_THREADS) as pool:
        list(pool.map(read, leaf.pieces))  # the list raises what a thread raised
    return out


def fill(
    abstract: Any,
    rows: Iterable[Row],
    source: Mapping[str, Any],
    *,
    network: str,
    layout: str = "official",
    mesh: jax.sharding.Mesh | None = None,
    quantize: str | None = None,
    stream: bool = False,
    ignore: Iterable[tuple[str, str]] = (),
    what: str = "checkpoint",
    progress: Callable[[int], None] | None = None,
) -> Any:
    """Build the model: every leaf read, transformed, cast to its dtype and placed on its shards, one at a time.

    Args:
        abstract: the model as `jax.eval_shape` gives it; its leaves state shapes and dtypes.
        quantize: a key of `wan_jax.nn.quant.KINDS`: kernels become `Quantized` as they are read.
        stream: kernels of stacks stay in the memory of the host, see `wan_jax.nn.stack`.
        source: a `Checkpoint`, or any mapping name -> array.
        network: key of `wan_jax.parallel.RULES`.
        mesh: None places everything on the default device.
        what: named in errors.
        progress: called with the number of bytes placed after each leaf.
    Raises:
        CheckpointError: the checkpoint does not fit; lists every fault.
    """
    rows = list(rows)
    check(abstract, rows, source, layout=layout, ignore=ignore).raise_faults(what)
    leaves, _ = plan(abstract, rows, layout)
    model = quantized(abstract, quantize) if quantize else abstract
    targets, filled = flatten_params(model), {}
    for path, leaf in leaves.items():
        if path in targets:
            placed = {path: _place(leaf, source, network, mesh, stream=stream)}
        else:
            pair = {name: targets[name] for name in (f"{path}.values", f"{path}.scale")}
            placed = _place_quantized(leaf, source, pair, quantize, network, mesh)
            if stream:
                placed = {name: _to_host(x) if is_streamed(name) else x for name, x in placed.items()}
        jax.block_until_ready(placed)  # so that the host buffer of one leaf is free before the next is read
        filled |= placed
        if progress:
            progress(sum(x.nbytes for x in placed.values()))
    return unflatten_like(model, filled)


def _to_host(x: jax.Array) -> jax.Array:
    return jax.device_put(x, in_host_memory(x.sharding))


def _place(
    leaf: Leaf, source: Mapping[str, Any], network: str, mesh: jax.sharding.Mesh | None, start: int = 0,
    stop: int | None = None, *, stream: bool = False,
) -> jax.Array:  # fmt: skip
    """A leaf on its shards, or its rows from ``start`` to ``stop``."""
    shape = leaf.shape if stop is None else (stop - start, *leaf.shape[1:])
    read = functools.cache(functools.partial(_read, leaf, source))  # replicas of a block are read once

    def block(index: tuple[slice, ...]) -> Array:
        bounds = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        if bounds:
            bounds[0] = bounds[0][0] + start, bounds[0][1] + start
        return read(tuple(bounds))

    place = None if mesh is None else param_sharding(network, leaf.path, shape, mesh)
    if stream and is_streamed(leaf.path):
        place = in_host_memory(place or jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    if mesh is None:
        return jax.device_put(block((slice(None),) * len(shape)), place)
    return jax.make_array_from_callback(shape, place, block)


def _place_quantized(
    leaf: Leaf,
    source: Mapping[str, Any],
    pair: Mapping[str, jax.ShapeDtypeStruct],
    kind: str,
    network: str,
    mesh: jax.sharding.Mesh | None,
) -> dict[str, jax.Array]:
    """The two arrays of a `Quantized` kernel, by path: as many layers at a time as are read at once."""
    places = tuple(mesh and param_sharding(network, path, x.shape, mesh) for path, x in pair.items())
    pairs = zip(pair.values(), places, strict=True)
    arrays = tuple(jax.numpy.zeros(x.shape, x.dtype, device=place) for x, place in pairs)
    for start in range(0, leaf.shape[0], READ_THREADS):
        kernel = _place(leaf, source, network, mesh, start, min(start + READ_THREADS, leaf.shape[0]))
        arrays = _quantizer(kind, places)(arrays, kernel, start)
        arrays[0].block_until_ready()
    return dict(zip(pair, arrays, strict=True))


@functools.cache
def _quantizer(kind: str, places: tuple[Any, Any]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Program that quantises kernels [layers, in, out] into those of a stack, from layer ``start`` on."""

    def put(arrays: tuple[jax.Array, jax.Array], kernel: jax.Array, start: jax.Array) -> tuple[jax.Array, ...]:
        parts = quantize_kernel(kernel, kind)
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(whole, part, start, axis=0)
            for whole, part in zip(arrays, parts, strict=True)
        )

    return jax.jit(put, donate_argnums=0, out_shardings=None if None in places else places)


def export(
    model: Any, rows: Iterable[Row], *, layout: str, dtype: Any = None
) -> Iterator[tuple[str, tuple[int, ...], np.dtype, Callable[[], Array]]]:
    """The inverse of `fill`: yields (name, shape, dtype, function that gives the array) in a published layout.

    Args:
        dtype: cast every tensor to it; default: as in the model.
    """
    leaves, faults = plan(model, rows, layout)
    if faults:
        raise CheckpointError("cannot export:\n  " + "\n  ".join(faults))
    values = flatten_params(model)
    for leaf in leaves.values():
        if not leaf.pieces:
            continue  # the layout has no place for it
        out_dtype = np.dtype(dtype or leaf.dtype)
        shape = leaf.transform.save(np.broadcast_to(np.int8(0), piece_shape(leaf)), leaf.source_shape).shape
        for piece in leaf.pieces:

            def produce(leaf: Leaf = leaf, piece: Piece = piece, out_dtype: np.dtype = out_dtype) -> Array:
                value = values[leaf.path]
                value = np.asarray(value if piece.layer is None else value[piece.layer])
                if piece.parts > 1:
                    value = np.split(value, piece.parts, axis=-1)[piece.part]
                theirs = leaf.transform.save(leaf.transform.unfold(value), leaf.source_shape)
                return np.asarray(theirs, out_dtype, order="C")

            yield piece.source, shape, out_dtype, produce
