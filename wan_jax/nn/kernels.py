"""Attention kernels behind the door `nn.attention.attention`, each with its limits.

A kernel takes arrays as the door does, ``[B, L, N, K]``, and works on one device: under a mesh it stands inside
`jax.shard_map` (``nn/context.py``). All of them mask by length, never by a matrix of the size of the scores.

Axes: ``B`` batch, ``L`` queries, ``S`` keys, ``N`` heads, ``K`` head size.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
HALVES = (jnp.bfloat16, jnp.float16)


def platform_and_kind() -> tuple[str, str]:
    """What the program being traced is for, "tpu", "cuda", "cpu" or another, and the name of the device.

    That is the device of the current mesh, which need not exist (``aot.py``), or the default one.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        device = jax.config.jax_default_device
        device = device if isinstance(device, jax.Device) else jax.devices(device)[0]
    nvidia = device.platform in ("gpu", "cuda") and device.device_kind.startswith("NVIDIA")
    return "cuda" if nvidia else device.platform, device.device_kind


# ---- cuDNN -------------------------------------------------------------------------------------------------


def cudnn(q_BLNK: Array, k_BSNK: Array, v_BSNK: Array, lengths: Array | None, *, scale: float) -> Array:
    """cuDNN's flash attention, forward and backward, on NVIDIA cards from Ampere on."""
    return jax.nn.dot_product_attention(
        q_BLNK, k_BSNK, v_BSNK, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )


# ---- splash attention --------------------------------------------------------------------------------------

LANES = 128  # of a TPU's vector unit: tiles are multiples of it


class Tiles(NamedTuple):
    """Largest tiles in tokens: queries at once, keys loaded at once, keys multiplied at once; queries and keys of the
    backward pass.
    """

    q: int
    kv: int
    compute: int
    back: int


# By the beginning of JAX's name of the chip. v6e and v7x: of the tiles whose bundles were counted the best, 38 % of the
# peak against 32 % with 1024. They are too large for the vector memory of v5e and v5p.
TILES = {"TPU v6": Tiles(2048, 2048, 1024, 1024), "TPU7": Tiles(2048, 2048, 1024, 1024)}
SMALL_TILES = Tiles(1024, 1024, 512, 512)


def tiles_of(kind: str) -> Tiles:
    return next((tiles for name, tiles in TILES.items() if kind.startswith(name)), SMALL_TILES)


def splash(
    q_BLNK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    lengths: Array | None,
    *,
    scale: float,
    sums: bool = False,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Any:
    """JAX's splash attention for TPU. Queries carry the scale, rounded to their dtype.

    Args:
        sums: return the logarithm of the sum of exponentials [B, L, N] too; that form has no backward pass.
        tiles: default those of the chip.
        interpret: run on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    class Everywhere(pallas.FullMask):
        """The kernel asks of a block of a mask only whether all or some of it is set; one element answers that."""

        def __getitem__(self, _: Any) -> np.ndarray:
            return np.ones((1, 1), bool)

    (_, L, N, _), S = q_BLNK.shape, k_BSNK.shape[1]
    tiles = tiles or tiles_of(platform_and_kind()[1])
    q_tile, kv_tile = _even_tile(L, tiles.q), _even_tile(S, tiles.kv)
    q_back, kv_back = _part(q_tile, tiles.back), _part(kv_tile, tiles.back)
    blocks = pallas.BlockSizes(
        block_q=q_tile, block_kv=kv_tile, block_kv_compute=_part(kv_tile, tiles.compute),
        block_q_dkv=q_back, block_kv_dkv=kv_back, block_kv_dkv_compute=kv_back,
        block_q_dq=q_back, block_kv_dq=kv_back,
    )  # fmt: skip
    q, k, v = (
        jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, -x.shape[1] % tile), (0, 0)))
        for x, tile in (((q_BLNK * scale).astype(q_BLNK.dtype), q_tile), (k_BSNK, kv_tile), (v_BSNK, kv_tile))
    )
    mask = pallas.MultiHeadMask([Everywhere((q.shape[2], k.shape[2]))] * N)
    kernel = pallas.make_splash_mha_single_device(
        mask=mask, block_sizes=blocks, save_residuals=sums, interpret=interpret
    )
    if lengths is None and k.shape[2] > S:
        lengths = jnp.full(len(k), S)
    if lengths is None:
        out = jax.vmap(kernel)(q, k, v)
    else:  # segment 0 of the keys is there, segment 1 is not
        absent = (jnp.arange(k.shape[2]) >= lengths[:, None]).astype(jnp.int32)
        out = jax.vmap(kernel)(q, k, v, pallas.SegmentIds(jnp.zeros((len(q), q.shape[2]), jnp.int32), absent))
    out, *rest = out if sums else (out,)
    out = jnp.swapaxes(out, 1, 2)[:, :L]
    return (out, jnp.swapaxes(rest[0][0], 1, 2)[:, :L]) if sums else out


def tile(length: int, devices: int) -> int:
    """What the padded length of tokens that ``devices`` share should be a multiple of."""
    platform, kind = platform_and_kind()
    return _even_tile(length, tiles_of(kind).q, math.lcm(LANES, devices)) if platform == "tpu" else devices


def _even_tile(length: int, most: int, unit: int = LANES) -> int:
    """The smallest tile that covers ``length`` as often as the largest would: the last one carries little padding."""
    if length % unit == 0 and (whole := _part(length, most)) > most // 8:
        return whole
    tile = -(-length // -(-length // most))
    return -(-tile // unit) * unit


def _part(tile: int, most: int) -> int:
    """The largest multiple of `LANES` up to ``most`` that divides ``tile``."""
    return LANES * max(n for n in range(1, most // LANES + 1) if tile // LANES % n == 0)


# ---- our own kernel for wide matrix units ------------------------------------------------------------------


def transposed(
    q_BLNK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    lengths: Array | None,
    *,
    scale: float,
    tiles: Any = None,
    interpret: bool = False,
) -> Array:
    """``nn/tpu_attention.py`` where its fixed maximum is safe, `splash` where it is not and for gradients.

    Never automatic: its bundles were counted, 58 % of the peak of a v6e, but it has not run on a device.

    Args:
        tiles: default `tpu_attention.TILES`.
    """
    from wan_jax.nn import tpu_attention

    tiles = tiles or tpu_attention.TILES
    other = functools.partial(splash, scale=scale, interpret=interpret)
    (B, L, N, K), S = q_BLNK.shape, k_BSNK.shape[1]

    def heads(x: Array, tile: int) -> Array:
        x = jnp.swapaxes(x, 1, 2).reshape(B * N, -1, K)
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % tile), (0, 0)))

    @jax.custom_vjp
    def run(q_BLNK: Array, k_BSNK: Array, v_BSNK: Array, lengths: Array) -> Array:
        here = tiles._replace(q=_even_tile(L, tiles.q))
        q = heads((q_BLNK * (scale * math.log2(math.e))).astype(q_BLNK.dtype), here.q)
        k, v = heads(k_BSNK, here.kv), heads(v_BSNK, here.kv)
        bounds = tpu_attention.bounds(q, k)

        def ours(*_: Array) -> Array:
            out = tpu_attention.attend(q, k, v, bounds, jnp.repeat(lengths, N), tiles=here, interpret=interpret)
            return jnp.swapaxes(out[:, :L].reshape(B, N, L, K), 1, 2)

        return jax.lax.cond(tpu_attention.fits(bounds), ours, other, q_BLNK, k_BSNK, v_BSNK, lengths)

    def backward(args: Any, slope: Array) -> Any:
        *qkv, lengths = args
        return *jax.vjp(lambda *qkv: other(*qkv, lengths), *qkv)[1](slope), None

    run.defvjp(lambda *args: (run(*args), args), backward)
    return run(q_BLNK, k_BSNK, v_BSNK, jnp.full(B, S, jnp.int32) if lengths is None else lengths.astype(jnp.int32))


# ---- tokamax -----------------------------------------------------------------------------------------------


def tokamax(q_BLNK: Array, k_BSNK: Array, v_BSNK: Array, lengths: Array | None, *, scale: float) -> Array:
    """OpenXLA's library of tuned kernels, which chooses among its own. Never automatic."""
    from tokamax import dot_product_attention

    return dot_product_attention(q_BLNK, k_BSNK, v_BSNK, scale=scale, key_value_seq_lengths=lengths)


# ---- the table ---------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """What the door must know.

    Attributes:
        platforms: of `platform_and_kind`.
        packages: one of them must be installed; ``extra`` installs them.
        head: which head sizes it takes.
        sums: gives the logarithm of the sum of exponentials, so that attention to parts of the keys can be merged.
            (cuDNN's comes out of JAX rounded to the dtype of the queries, too coarse for that.)
        automatic: taken without being asked for.
    """

    run: Callable[..., Array]
    platforms: tuple[str, ...]
    packages: tuple[str, ...]
    extra: str
    head: Callable[[int], bool] = lambda K: True
    sums: Callable[..., tuple[Array, Array]] | None = None
    automatic: bool = True

    @property
    def installed(self) -> bool:
        return any(map(importlib.util.find_spec, self.packages))

    def takes(self, q_BLNK: Array) -> bool:
        return q_BLNK.dtype in HALVES and self.head(q_BLNK.shape[3])


KERNELS = {
    "cudnn": Kernel(
        cudnn, ("cuda",), ("jax_cuda13_plugin", "jax_cuda12_plugin"), "cuda13", lambda K: K <= 128 and not K % 8
    ),
    "splash": Kernel(
        splash, ("tpu",), ("libtpu",), "tpu", lambda K: not K % LANES, functools.partial(splash, sums=True)
    ),
    "transposed": Kernel(transposed, ("tpu",), ("libtpu",), "tpu", lambda K: K == LANES, automatic=False),
    "tokamax": Kernel(tokamax, ("cuda", "tpu"), ("tokamax",), "tokamax", automatic=False),
}
