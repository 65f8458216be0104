"""Where arrays live: the mesh, which axis of which parameter is cut, and the constraint used inside the networks.

A mesh has four axes. ``data`` cuts the batch (the guidance pair, several clips), ``fsdp`` and ``seq`` cut tokens or
rows of the picture, ``fsdp`` and ``tensor`` cut weights. Layers know nothing of this: every network has one ordered
table *parameter path -> logical axes* (first match wins, a parameter without a rule is an error), and one dictionary
says on which mesh axes a logical axis lies. An axis that does not divide evenly stays whole.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from wan_jax.errors import InputError, WanError, nearest

MESH_AXES = ("data", "fsdp", "seq", "tensor")

# Logical axis -> mesh axis. The contracted width of a weight is cut by fsdp, the wide side by tensor.
WEIGHT_AXES: dict[str | None, str | tuple[str, ...] | None] = {
    "layer": None,
    "in": "fsdp",
    "out": "tensor",
    "row": ("tensor", "fsdp"),  # of a quantised matrix: rows are gathered as they lie, columns would be turned for it
    "vocab": "tensor",
    None: None,
}
# Activations at block borders. Tokens and picture rows follow fsdp too, so that an fsdp-only mesh shares the work.
ACTIVATION_AXES: dict[str | None, tuple[str, ...]] = {
    "B": ("data",), "L": ("fsdp", "seq"), "H": ("fsdp", "seq"), "N": ("tensor",), None: (),
}  # fmt: skip

_REPLICATED: tuple[None, ...] = ()
_STREAM = r"((video|audio)\.)?"  # the twin-stream transformer holds the parts of a DiT twice
RULES: dict[str, tuple[tuple[str, tuple[str | None, ...]], ...]] = {
    "dit": (
        (rf"{_STREAM}blocks\.(self|cross)_attn\.(q(_fusion)?|[kv](_img|_fusion)?)\.kernel", ("layer", "in", "out")),
        (rf"{_STREAM}blocks\.(self|cross)_attn\.(q(_fusion)?|[kv](_img|_fusion)?)\.bias", ("layer", "out")),
        (rf"{_STREAM}blocks\.(self|cross)_attn\.o(_fusion)?\.kernel", ("layer", "out", "in")),
        (rf"{_STREAM}blocks\.ffn\.fc1\.kernel", ("layer", "in", "out")),
        (rf"{_STREAM}blocks\.ffn\.fc1\.bias", ("layer", "out")),
        (rf"{_STREAM}blocks\.ffn\.fc2\.kernel", ("layer", "out", "in")),
        (rf"{_STREAM}blocks\.(.*\.bias|.*norm.*|modulation|.*\.(gate|reach)_fusion.*)", _REPLICATED),
        (rf"{_STREAM}(text_embedding|time_embedding|img_emb)\.fc[12]\.kernel", ("in", "out")),
        (rf"{_STREAM}time_projection\.kernel", ("in", "out")),
        (rf"{_STREAM}patch_embedding\.kernel", (None, "in")),
        (r"audio\.patch_embedding\.(conv|mlp\.w[13])\.kernel", (None, "in", "out")),
        (r"audio\.patch_embedding\.mlp\.w2\.kernel", (None, "out", "in")),
        (rf"{_STREAM}head\.head\.kernel", ("in", None)),
        (r"(identity|voice)_adapter\.(blocks\.[kv]|.*layers\.(attn\.[qkv]|mlp\.fc1))\.kernel", ("layer", "in", "out")),
        (r"(identity|voice)_adapter\.(blocks\.o|.*layers\.(attn\.o|mlp\.fc2))\.kernel", ("layer", "out", "in")),
        (r"(identity_adapter\.proj|voice_adapter\.summary)\.kernel", ("in", "out")),
        (r"voice_adapter\.conv[12]\.kernel", (None, "in", "out")),
        (r"(identity|voice)_adapter\.(.*norm\w*\.weight|slots|resampler\.queries)", _REPLICATED),
        (rf".*\.bias|{_STREAM}(img_emb\.(norm[12]\.weight|emb_pos)|head\.modulation)", _REPLICATED),
    ),
    # Small, and its convolutions are shared by every row of the picture: the picture is cut, not the weights.
    "vae": ((r".*\.(kernel|bias|gamma)", _REPLICATED),),
    # Small too, and a clip of sound is short: every device does all of it.
    "audio_vae": ((r".*\.(kernel|learnable_gain)|data_(mean|std)", _REPLICATED),),
    "vocoder": ((r".*\.(kernel|bias|alpha|beta)", _REPLICATED),),
    "reader": ((r"kernel|bias", _REPLICATED),),  # of the image encoder's training
    "lora": ((r".*\.(down|up)", _REPLICATED),),  # factors in training: small
    "text_encoder": (
        (r"token_embedding\.embedding", ("vocab", "in")),
        (r"blocks\.attn\.[qkv]\.kernel", ("layer", "in", "out")),
        (r"blocks\.attn\.o\.kernel", ("layer", "out", "in")),
        (r"blocks\.ffn\.(gate|fc1)\.kernel", ("layer", "in", "out")),
        (r"blocks\.ffn\.fc2\.kernel", ("layer", "out", "in")),
        (r".*norm.*\.weight|blocks\.pos_embedding\.embedding", _REPLICATED),
    ),
    "image_encoder": (
        (r"transformer\.(attn\.to_qkv|mlp\.fc1)\.kernel", ("layer", "in", "out")),
        (r"transformer\.(attn\.proj|mlp\.fc2)\.kernel", ("layer", "out", "in")),
        (r"patch_embedding\.kernel|(cls|pos)_embedding|transformer\..*|(pre|post)_norm\..*|head", _REPLICATED),
    ),
}  # fmt: skip


def make_mesh(axes: Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Build a mesh with the four axes of this package.

    Args:
        axes: sizes by name, ``{"fsdp": 4, "seq": 2}``; missing ones are 1; one may be -1 (what is left).
            None puts every device on ``fsdp``.
        devices: default ``jax.devices()``.
    Raises:
        InputError: unknown axis, or sizes that do not multiply to the number of devices.
    """
    devices = list(devices or jax.devices())
    sizes = {name: 1 for name in MESH_AXES} | dict(axes or {"fsdp": -1})
    for name in sizes.keys() - set(MESH_AXES):
        raise InputError(f"unknown mesh axis {name!r}: use {', '.join(MESH_AXES)}{nearest(name, MESH_AXES)}")
    fixed = int(np.prod([n for n in sizes.values() if n != -1]))
    open_axes = [name for name, n in sizes.items() if n == -1]
    if len(open_axes) == 1 and len(devices) % fixed == 0:
        sizes[open_axes[0]] = len(devices) // fixed
    shape = tuple(sizes[name] for name in MESH_AXES)
    if int(np.prod(shape)) != len(devices):
        raise InputError(
            f"mesh {dict(zip(MESH_AXES, shape, strict=True))} needs {np.prod(shape)} devices, found {len(devices)}"
        )
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def parse_mesh(text: str) -> dict[str, int]:
    """Read ``"fsdp=4,seq=2"``."""
    try:
        return {name.strip(): int(size) for name, size in (part.split("=") for part in text.split(","))}
    except ValueError as error:
        raise InputError(f"mesh {text!r}: expected name=size pairs such as fsdp=4,seq=2") from error


def use_mesh(mesh: Mesh | None):
    """Context in which `constrain` acts; without a mesh it does nothing."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def _spec(shape: Sequence[int], axes: Sequence[Any], sizes: Mapping[str, int]) -> PartitionSpec:
    """Drop mesh axes that are absent or do not divide their dimension."""
    spec = []
    for size, names in zip(shape, axes, strict=True):
        kept, left = [], size
        for name in (names,) if isinstance(names, str) else names or ():
            if sizes.get(name, 1) > 1 and left % sizes[name] == 0:
                kept.append(name)
                left //= sizes[name]
        spec.append(tuple(kept) or None)
    return PartitionSpec(*spec)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Fix how an activation lies on the current mesh, one letter of `ACTIVATION_AXES` (or None) per dimension."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, activation_spec(x.shape, *axes))


def activation_spec(shape: Sequence[int], *axes: str | None) -> PartitionSpec:
    """How an activation of this shape lies on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return _spec(shape, [ACTIVATION_AXES[a] for a in axes], dict(mesh.shape))


def whole(weights: Any) -> Any:
    """The weights of one layer, gathered from the devices that share them over ``fsdp``; gradients stay where they are.

    Left to itself, the partitioner of TPUs may multiply piece by piece, as the pieces come round: by the figures of its
    compiler 2.5 times the time. Weights that ``tensor`` cuts as well are left to it.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if sizes.get("fsdp", 1) == 1 or sizes.get("tensor", 1) > 1:
        return weights
    return jax.tree.map(_gathered, weights)


@jax.custom_vjp
def _gathered(x: jax.Array) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


_gathered.defvjp(lambda x: (_gathered(x), None), lambda _, slope: (slope,))


def param_sharding(network: str, path: str, shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Sharding of the parameter at ``path`` of ``network`` (a key of `RULES`).

    A quantised kernel is held turned, [out, in], and cut by rows for ``fsdp``; its scales follow the rows.

    Raises:
        WanError: no rule matches, or the rule has another number of axes than the parameter.
    """
    turned = path.endswith((".kernel.values", ".kernel.scale"))
    kernel = path.rpartition(".")[0] if turned else path
    for pattern, axes in RULES[network]:
        if re.fullmatch(pattern, kernel):
            axes = axes or (None,) * len(shape)
            if turned:
                axes = (*axes[:-2], *(("row", None) if axes[-2:] == ("in", "out") else ("in", "out")))
            if len(axes) != len(shape):
                raise WanError(
                    f"sharding rule {pattern!r} has {len(axes)} axes, {network} {path} has shape {tuple(shape)}"
                )
            return NamedSharding(mesh, _spec(shape, [WEIGHT_AXES[a] for a in axes], dict(mesh.shape)))
    raise WanError(f"no sharding rule for {network} parameter {path}: add one to wan_jax.parallel.RULES")


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def free_host_memory() -> int | None:
    """Bytes of host memory that a process may still take, or None where nothing portable tells it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def memory_budget(mesh: Mesh | None) -> int:
    """Bytes that weights may use: of the mesh's devices together, or the free host memory on CPU."""
    devices = list(mesh.devices.flat) if mesh is not None else jax.local_devices()[:1]
    here = next((d for d in devices if d.process_index == jax.process_index()), devices[0])  # others tell nothing here
    stats = here.memory_stats() if here.platform != "cpu" else None
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] * len(devices)
    return free_host_memory() or 16 * 2**30  # unknown: assume a common laptop


def compiler_options(platform: str | None = None) -> dict[str, str]:
    """Options for `jax.jit` of a program with a scanned stack; ``platform``: "cpu", "cuda", "tpu", default this one's.

    XLA:CPU has no bfloat16 products: it converts the weights to float32 and hoists that conversion out of the scan,
    which keeps a float32 copy of *all* layers alive. Without the hoisting pass only one layer is converted at a
    time. Other platforms multiply bfloat16 directly.

    XLA:GPU makes one product of small ones that share an input, such as the keys and values of the text, but writes
    their weights side by side for it in every layer, and no longer sees that they are of 8 bits.
    """
    options = {
        "cpu": {"xla_disable_hlo_passes": "while-loop-invariant-code-motion"},
        "gpu": {"xla_gpu_dot_merger_threshold_mb": "0"},
    }
    platform = (platform or jax.default_backend()).replace("cuda", "gpu")
    return {name: value for name, value in options.get(platform, {}).items() if _is_known(name, value)}


@functools.cache
def _is_known(option: str, value: str) -> bool:
    """Whether this compiler has an option: XLA drops them as it changes."""
    try:
        jax.jit(lambda: 0, compiler_options={option: value}).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
