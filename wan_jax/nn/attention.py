"""One door to attention: `attention(q, k, v)`.

Behind it stand an exact reference that runs everywhere, and the kernels of ``nn/kernels.py``. Which one a program gets
is chosen while it is traced, for the platform it is for, and kept when it is lowered for another: that gets the
reference. ``WAN_JAX_ATTENTION`` or `use_attention` choose by name.

Axes: ``B`` batch, ``L`` queries, ``S`` keys, ``N`` heads, ``K`` head size.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from wan_jax.errors import InputError
from wan_jax.nn.kernels import KERNELS, Kernel, platform_and_kind
from wan_jax.nn.layers import matmul_precision
from wan_jax.nn.setting import AUTO, Setting

Array = jax.Array
log = logging.getLogger(__name__)

REFERENCE = "xla"
SETTING = Setting("attention", "WAN_JAX_ATTENTION", [REFERENCE, *KERNELS])
use_attention = SETTING.use

# Float32 scores of the reference that may exist at once: what a CPU's cache holds, a fair share of an accelerator's
# memory. Larger problems are cut along the queries, never along the keys, so that each softmax stays exact in one pass.
SCORE_BYTES = {"cpu": 8 * 2**20}
SCORE_BYTES_ACCELERATOR = 256 * 2**20
MIN_ROWS = 64  # fewer queries at once would starve the matrix unit
MASKED = -1e30  # score of a key that is not there: finite, so that a sample without any key is no NaN


def attention(
    q_BLNK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    *,
    scale: float | None = None,
    bias: Array | None = None,
    lengths: Array | None = None,
) -> Array:
    """Softmax attention; scores and softmax in float32, the two products in the dtype of ``q``.

    Args:
        scale: positive factor on the scores, default ``K ** -0.5``.
        bias: [B or 1, N, L or 1, S] float32 added to the scores: position bias, any mask. The reference alone takes it.
        lengths: [B] int, how many of the keys are there, at least one; default all.
    Returns:
        [B, L, N, K] in the dtype of ``q``. The full matrix of scores never exists: the reference stays below
        `SCORE_BYTES`, in the backward pass too (each chunk is recomputed).
    Raises:
        InputError: the kernel that was asked for is not installed, or is for another platform.
    """
    scale = q_BLNK.shape[-1] ** -0.5 if scale is None else scale
    kernel = choose(q_BLNK, bias)
    if kernel is None:
        return _reference(q_BLNK, k_BSNK, v_BSNK, lengths, bias, scale=scale)
    run, reference = (functools.partial(function, scale=scale) for function in (kernel.run, _reference))
    return _on_platforms(kernel, run, reference)(q_BLNK, k_BSNK, v_BSNK, lengths)


def attention_to_part(
    q_BLNK: Array, k_BSNK: Array, v_BSNK: Array, *, lengths: Array | None = None
) -> tuple[Array, Array] | None:
    """Attention to some of the keys, with what it takes to merge it with that to others.

    Args:
        lengths: [B] int, how many of these keys are there; may be 0.
    Returns:
        [B, L, N, K], and the logarithm of the sum of exponentials of the scores, [B, L, N] float32: very small where
        no key is there. Or None if the kernel for this program does not give it.
    """
    scale = q_BLNK.shape[-1] ** -0.5
    kernel, reference = choose(q_BLNK, None), functools.partial(_reference, scale=scale, sums=True)
    if kernel is None:
        return reference(q_BLNK, k_BSNK, v_BSNK, lengths)
    if kernel.sums is None:
        return None

    # No kernel has a gradient with respect to the logarithm: the backward pass is that of the reference.
    run = jax.custom_vjp(functools.partial(kernel.sums, scale=scale))

    def backward(args: Any, cotangents: Any) -> Any:
        *qkv, lengths = args
        return *jax.vjp(lambda *qkv: reference(*qkv, lengths), *qkv)[1](cotangents), None

    run.defvjp(lambda *args: (run(*args), args), backward)
    return _on_platforms(kernel, run, reference)(q_BLNK, k_BSNK, v_BSNK, lengths)


def choose(q_BLNK: Array, bias: Array | None) -> Kernel | None:
    """The kernel for these queries in the program being traced; None is the reference.

    A kernel sees one device. Under a mesh the reference is taken, which the partitioner can cut, but in
    `jax.shard_map` (``nn/context.py``).
    """
    wanted = SETTING.get()
    platform, kind = platform_and_kind()
    name = REFERENCE
    if wanted != REFERENCE:
        names = [name for name, kernel in KERNELS.items() if kernel.automatic] if wanted == AUTO else [wanted]
        if wanted != AUTO:
            _check(wanted, platform, kind)
        fits = (name for name in names if platform in KERNELS[name].platforms and KERNELS[name].takes(q_BLNK))
        if bias is None and _on_one_device():
            name = next(fits, REFERENCE)
            _tell(name, kind)
    return KERNELS.get(name)


def _check(name: str, platform: str, kind: str) -> None:
    kernel = KERNELS[name]
    if not kernel.installed:
        raise InputError(f'attention {name!r} is not installed: pip install "wan_jax[{kernel.extra}]"')
    if platform not in kernel.platforms:
        fits = [REFERENCE, *(other for other in KERNELS if platform in KERNELS[other].platforms)]
        platforms = " and ".join(kernel.platforms)
        raise InputError(f"attention {name!r} is for {platforms}, this program for {kind}: use {', '.join(fits)}")


def _on_one_device() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.size == 1 or all(kind == AxisType.Manual for kind in mesh.axis_types)


@functools.cache  # once
def _tell(name: str, kind: str) -> None:
    log.info("attention on %s: %s", kind, name)


def _on_platforms(kernel: Kernel, run: Any, reference: Any) -> Any:
    """``run`` on the platforms of the kernel, ``reference`` should the program be lowered for another one."""
    return functools.partial(jax.lax.platform_dependent, default=reference, **dict.fromkeys(kernel.platforms, run))


def _reference(
    q_BLNK: Array,
    k_BSNK: Array,
    v_BSNK: Array,
    lengths: Array | None,
    bias: Array | None = None,
    *,
    scale: float,
    sums: bool = False,
) -> Any:
    """Exact attention in plain XLA, in chunks of queries; ``sums`` as of `attention_to_part`."""
    B, L, N, _ = q_BLNK.shape
    if lengths is not None:
        absent = jnp.arange(k_BSNK.shape[1]) >= lengths[:, None]
        absent = jnp.where(absent, MASKED, 0.0)[:, None, None]
        bias = absent if bias is None else bias + absent
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))  # heads first: plain batched matmuls
    core = functools.partial(_attend, k=k, v=v, scale=scale, sums=sums)
    room = SCORE_BYTES.get(platform_and_kind()[0], SCORE_BYTES_ACCELERATOR)
    rows = max(MIN_ROWS, room // (4 * B * N * k.shape[2]))
    chunks = -(-L // rows)
    rows = -(-L // chunks)  # even chunks: the last one carries little padding

    def split(x: Array) -> Array:
        """[B, N, L, ...] -> [chunks, B, N, rows, ...]."""
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * rows - L), (0, 0)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, rows, x.shape[3]), 2, 0)

    def join(x: Array) -> Array:
        """[chunks, B, N, rows, ...] -> [B, L, N, ...]."""
        x = jnp.moveaxis(x, 0, 1).swapaxes(2, 3)
        return x.reshape(B, chunks * rows, N, *x.shape[4:])[:, :L]

    if chunks == 1:
        out = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), core(q, bias))
    elif bias is None or bias.shape[2] == 1:
        out = jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda q: core(q, bias)), split(q)))
    else:
        out = jax.tree.map(join, jax.lax.map(jax.checkpoint(lambda part: core(*part)), (split(q), split(bias))))
    return out


def _attend(q: Array, bias: Array | None, *, k: Array, v: Array, scale: float, sums: bool) -> Any:
    """Heads-first attention of some queries to all keys; the softmax is normalised after the second product."""
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("BNLK,BNSK->BNLS", q, k, precision=precision, preferred_element_type=jnp.float32)
    if bias is not None:
        scores, scale = scores * scale + bias, 1.0
    highest = scores.max(-1, keepdims=True)
    weights = jnp.exp((scores - highest) * scale)
    out = jnp.einsum(
        "BNLS,BNSK->BNLK", weights.astype(q.dtype), v, precision=precision, preferred_element_type=jnp.float32
    )
    total = weights.sum(-1)
    out = (out / total[..., None]).astype(q.dtype)
    return (out, jnp.log(total) + highest[..., 0] * scale) if sums else out
