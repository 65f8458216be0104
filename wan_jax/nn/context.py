"""Attention on a mesh: the tokens of a clip lie on several devices, and each of its queries meets all of its keys.

Two exchanges, and the two combined, inside `jax.shard_map`, so that a kernel sees whole arrays of one device:

* Ulysses: tokens are traded for heads, each device attends with some heads to the whole clip, and trades back. Least
  traffic, and the longest rows for the kernel; the number of devices must divide that of heads.
* Ring: each device keeps its queries; keys and values go round, and what each part of them gives is merged by the
  logarithms of its sums (a softmax in instalments). Any number of heads. A kernel that does not give those logarithms
  has all keys and values gathered instead: the same traffic, more memory.

Of P devices and N heads, ``u = gcd(N, P)`` neighbours trade heads and a ring joins the P / u groups: Ulysses alone
where it can be, a ring alone only where nothing divides. So every mesh works, and none is refused or left to the
partitioner, but by force: ``WAN_JAX_CONTEXT`` or `use_context`. "partitioner" lets XLA gather keys and values.

Axes: ``B`` batch, ``L`` queries, ``S`` keys, ``N`` heads, ``K`` head size, ``D`` width.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from wan_jax.errors import InputError
from wan_jax.nn.attention import attention, attention_to_part
from wan_jax.nn.kernels import tile
from wan_jax.nn.quant import TILE
from wan_jax.nn.setting import Setting
from wan_jax.parallel import ACTIVATION_AXES, activation_spec

Array = jax.Array
log = logging.getLogger(__name__)

SETTING = Setting("context parallelism", "WAN_JAX_CONTEXT", ["ulysses", "ring", "combined", "partitioner"])
use_context = SETTING.use


class Tokens(NamedTuple):
    """A stream of tokens: how many are there (before those that `even` adds), and whether devices share them."""

    count: int
    shared: bool = False


def even(x_BLD: Array, axis: int = 1, chunk: int = 0) -> Array:
    """Add zeros so that the devices of the mesh can share the tokens evenly, and that the tiles of the kernels cover
    them; they must be `Tokens.shared`. Or so that they are whole chunks, see `chunk_of`.
    """
    widths = [(0, 0)] * x_BLD.ndim
    widths[axis] = (0, -x_BLD.shape[axis] % (chunk or tile(x_BLD.shape[axis], _devices()[1])))
    return jnp.pad(x_BLD, widths) if widths[axis][1] else x_BLD


def chunk_of(count: int, most: int) -> int:
    """How long the fewest equal chunks of ``count`` tokens are that are no longer than ``most``.

    Returns:
        A multiple of `TILE`; 0 for all at once: ``most`` is 0 or covers them, or devices share the tokens, whose shares
        are chunks already.
    """
    if not 0 < most < count or _devices()[1] > 1:
        return 0
    chunk = -(-count // -(-count // most))
    return -(-chunk // TILE) * TILE


def attend(q_BLNK: Array, k_BSNK: Array, v_BSNK: Array, queries: Tokens, keys: Tokens) -> Array:
    """`nn.attention.attention` on the current mesh, or on one device without one.

    Shared queries meet shared keys by the exchange above. Keys that all devices have need none, nor do queries that all
    have: the keys are gathered for them.

    Returns:
        [B, L, N, K], with L as it came: what tokens beyond ``queries.count`` get is of no meaning.
    Raises:
        InputError: the exchange that was forced does not fit the heads and the mesh.
    """
    S, mesh = k_BSNK.shape[1], jax.sharding.get_abstract_mesh()
    length = None if keys.count == S else keys.count
    if mesh.empty or mesh.size == 1 or SETTING.get() == "partitioner":
        return _alone(q_BLNK, k_BSNK, v_BSNK, length=length)
    across = queries.shared and keys.shared
    place = activation_spec(q_BLNK.shape, "B", "L" if queries.shared else None, "N", None)
    key_place = activation_spec(k_BSNK.shape, "B", "L" if across else None, "N", None)
    axes, devices = _devices()
    local = functools.partial(_alone, length=length)
    if across and devices > 1:
        num_heads = q_BLNK.shape[2] // (mesh.shape["tensor"] if place[2] else 1)
        sides = split(num_heads, devices)
        _tell(num_heads, devices, *sides)
        local = functools.partial(_exchange, length=length, axes=axes, sides=sides)
    # The kernels and the groups of devices are beyond what shard_map can check.
    run = jax.shard_map(local, in_specs=(place, key_place, key_place), out_specs=place, check_vma=False)
    return run(q_BLNK, k_BSNK, v_BSNK)


def split(num_heads: int, devices: int) -> tuple[int, int]:
    """How many neighbours trade heads, and how many groups of them form a ring.

    Args:
        num_heads: of one device, after ``tensor`` has cut them.
    Raises:
        InputError: `SETTING` forces what does not fit.
    """
    forced = SETTING.get()
    traded = _neighbours(forced, num_heads, devices)
    if traded is None:
        near = [n for n in range(2, 2 * devices + 1) if _neighbours(forced, num_heads, n)]
        near = sorted(sorted(near, key=lambda n: abs(n - devices))[:2])
        meshes = f"share tokens (fsdp x seq) over {' or '.join(map(str, near))} devices, or " if near else ""
        raise InputError(f"{SETTING.variable}={forced}: {num_heads} heads, {devices} devices; {meshes}leave it to auto")
    return traded, devices // traded


def _neighbours(forced: str, num_heads: int, devices: int) -> int | None:
    """How many trade heads; None where that cannot be."""
    fits = [n for n in range(1, devices + 1) if devices % n == num_heads % n == 0]
    allowed = {"ulysses": [devices], "ring": [1], "combined": range(2, devices)}
    return max((n for n in fits if n in allowed.get(forced, fits)), default=None)


def _devices() -> tuple[tuple[str, ...], int]:
    """Mesh axes that cut tokens, and how many devices they are."""
    sizes = jax.sharding.get_abstract_mesh().shape
    axes = tuple(name for name in ACTIVATION_AXES["L"] if sizes.get(name, 1) > 1)
    return axes, math.prod(sizes[name] for name in axes)


@functools.cache  # once
def _tell(num_heads: int, devices: int, traded: int, ring: int) -> None:
    log.info("%d heads, tokens on %d devices: Ulysses over %d, ring of %d", num_heads, devices, traded, ring)


def _alone(q: Array, k: Array, v: Array, *, length: int | None) -> Array:
    """Attention of these queries to these keys, of which the first ``length`` are there."""
    return attention(q, k, v, lengths=None if length is None else jnp.full(len(q), length, jnp.int32))


def _exchange(
    q: Array, k: Array, v: Array, *, length: int | None, axes: Sequence[str], sides: tuple[int, int]
) -> Array:
    """Attention of the queries of this device to all keys, [B, L / devices, N, K] each."""
    traded, ring = sides
    groups = [[traded * i + j for j in range(traded)] for i in range(ring)]
    trade = functools.partial(jax.lax.all_to_all, axis_name=axes, axis_index_groups=groups, tiled=True)
    if traded > 1:
        q, k, v = (trade(x, split_axis=2, concat_axis=1) for x in (q, k, v))
    if ring == 1:
        out = _alone(q, k, v, length=length)
    else:
        out = _ring(q, k, v, length=length, axes=axes, sides=sides)
    return trade(out, split_axis=1, concat_axis=2) if traded > 1 else out


def _ring(q: Array, k: Array, v: Array, *, length: int | None, axes: Sequence[str], sides: tuple[int, int]) -> Array:
    """Keys and values visit every group; each sends on what it has while it works on it."""
    traded, ring = sides
    here, size = jax.lax.axis_index(axes) // traded, k.shape[1]
    following = [(i, (i + traded) % (traded * ring)) for i in range(traded * ring)]
    merged = None
    for step in range(ring):
        origin = (here - step) % ring
        there = None if length is None else jnp.broadcast_to(jnp.clip(length - origin * size, 0, size), len(q))
        part = attention_to_part(q, k, v, lengths=there)
        if part is None:
            lines = [[i + traded * j for j in range(ring)] for i in range(traded)]
            gather = functools.partial(jax.lax.all_gather, axis_name=axes, axis=1, axis_index_groups=lines, tiled=True)
            return _alone(q, gather(k), gather(v), length=length)
        merged = part if merged is None else _merge(*merged, *part)
        if step < ring - 1:
            k, v = jax.lax.ppermute((k, v), axes, following)
    return merged[0].astype(q.dtype)


def _merge(out: Array, total: Array, part: Array, part_total: Array) -> tuple[Array, Array]:
    """Two results of attention to disjoint keys as one; totals are logarithms [B, L, N]."""
    both = jnp.logaddexp(total, part_total)
    weight, part_weight = (jnp.exp(x - both)[..., None] for x in (total, part_total))
    return out * weight + part * part_weight, both
