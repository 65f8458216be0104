"""The watermark in the picture: a keyed tile of square chips, the same in all frames, added to all three colours.

Where it hides: the amplitude follows the contrast around a pixel so that structural similarity falls alike
everywhere, and is scaled down frame by frame to hold 41 dB (39.5 in small frames). Chips are as large as the frame
allows: 8 pixels match the transform blocks of video codecs, which keep their means longest. The detector averages
whitened frames over time, so a cut clip reads like a whole one, and folds the average modulo a tile of any chip size,
so a scaled one does too.

Axes: ``T`` frames, ``H W`` height and width in pixels; tiles are [n, n] chips.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.provenance.payload import FULL, SMALL, Layout, Mark, carriers, evidence

if TYPE_CHECKING:
    from scipy import sparse

LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
SIDE = {FULL: 32, SMALL: 16}  # chips along a tile
MIN_SIDE = SIDE[SMALL] * 2  # pixels; below, not even one small tile fits

# By the pixels along a chip: few pixels of small frames leave no room for less.
_SSIM_LOSS = {2: 0.06, 4: 0.017, 8: 0.017}  # per pixel before rounding and the limit of PSNR
_SSIM_C2 = (0.03 * 255) ** 2  # Wang et al. 2004
_PSNR = {2: 39.7, 4: 41.2, 8: 41.2}  # dB, a little over the 39.5 and 41 promised, for rounding
_MAX_LEVELS = 3.0  # more would only pile up at edges, where it is seen and cannot be read
_HEADROOM = 8  # levels
_CHUNK = 8  # frames at a time, for memory
_WINDOWS = (3, 7)  # pixels along the windows of the detector; by trial, both together read all chip sizes best
_COARSE, _FINE = 4, 8  # samples per chip along each axis, in a search and when the scale is known


def layout_of(height: int, width: int) -> tuple[Layout, int]:
    """The payload that a frame carries, and the pixels along a chip."""
    if height * width < 256**2:
        return SMALL, 2
    return FULL, 4 if height * width < 512**2 else 8


def tile(key: str, signs: np.ndarray, layout: Layout) -> np.ndarray:
    """One period of the mark, float32 [n, n] with a mean square of 1; ``signs`` is the payload [bits]."""
    side = SIDE[layout]
    chips = signs @ _carriers(key, layout).reshape(layout.bits, -1)
    return (chips / np.sqrt(layout.bits)).reshape(side, side)


@functools.partial(jax.jit, static_argnames="chip")
def watermark(frames_THWC: jax.Array, tile: jax.Array, chip: int) -> jax.Array:
    """Frames with the mark, each by itself, so frames may be sharded.

    Args:
        frames_THWC: uint8, or floating in [-1, 1] as the VAE decodes.
        tile: [n, n] of `tile`.
        chip: pixels along a chip.

    Returns:
        The same shape and dtype, within its range; uint8 is rounded.
    """
    whole = frames_THWC.dtype == jnp.uint8
    x_THWC = frames_THWC.astype(jnp.float32)
    x_THWC = x_THWC if whole else (x_THWC + 1) * 127.5
    y_THW = x_THWC @ jnp.array(LUMA)
    height, width = y_THW.shape[1:]
    mark_HW = tile[(jnp.arange(height) // chip % len(tile))[:, None], jnp.arange(width) // chip % len(tile)]
    mean_THW = _box(y_THW, 9)
    variance = _box((y_THW - mean_THW) ** 2, 9)
    # SSIM loses about m^2 / (2 v + C2) where a mark of variance m^2 is added to a picture of variance v.
    amplitude = jnp.minimum(jnp.sqrt(_SSIM_LOSS[chip] * (2 * variance + _SSIM_C2)), _MAX_LEVELS)
    # Near black and white half of the mark would be clipped, which shifts the mean.
    amplitude *= jnp.clip(jnp.minimum(mean_THW, 255 - mean_THW) / _HEADROOM, 0, 1)
    mark_THW = amplitude * mark_HW
    rms = jnp.sqrt(jnp.mean(mark_THW**2, axis=(1, 2), keepdims=True))
    mark_THW *= jnp.minimum(1, 255 * 10 ** (-_PSNR[chip] / 20) / rms)
    x_THWC = jnp.clip(x_THWC + mark_THW[..., None], 0, 255)
    return jnp.round(x_THWC).astype(jnp.uint8) if whole else (x_THWC / 127.5 - 1).astype(frames_THWC.dtype)


def embed(video: np.ndarray, key: str, signs: np.ndarray) -> np.ndarray:
    """`watermark` for uint8 [T, H, W, 3] in host memory, a few frames at a time; ``signs`` as `layout_of` has them."""
    layout, chip = layout_of(*video.shape[1:3])
    mark = tile(key, signs, layout)
    result = np.empty_like(video)
    for part in _chunks(len(video)):
        result[part] = watermark(video[part], mark, chip)
    return result


def detect(video: np.ndarray, key: str, *, search: bool = True) -> Mark:
    """The likeliest mark in uint8 [T, H, W, 3]; its ``message`` is None when there is none.

    Any shift (crop) and any part of the clip is found at once; other scales only by the ``search``: chips of 2 to 12
    pixels for the full payload, 1.5 to 4 for the small one.
    """
    height, width = video.shape[1:3]
    layout, chip = layout_of(height, width)
    mean_HW = whitened_mean(video)
    best = read_tile(fold(mean_HW, chip, layout), key, layout)[1]
    if best.message or not search:
        return best
    layouts = (FULL, SMALL) if min(height, width) <= 512 else (FULL,)  # 256 squared, scaled by 1.5, and some room
    found = [_search(mean_HW, key, one) for one in layouts]
    return next((mark for mark in found if mark.message), best)


def fold(mean_HW: np.ndarray, chip: float | tuple[float, float], layout: Layout, phases: int = _FINE) -> np.ndarray:
    """The mean over all periods of the tile, [n p, n p] with ``phases`` samples per chip; chips may be fractional, and
    differ in height and width."""
    rows, columns = (
        _fold_matrix(size, SIDE[layout], one, phases)
        for size, one in zip(mean_HW.shape, np.broadcast_to(chip, 2), strict=True)
    )
    weight = np.maximum(np.outer(rows.sum(1), columns.sum(1)), 1e-6)
    return (columns @ (rows @ mean_HW).T).T / weight


def _search(mean_HW: np.ndarray, key: str, layout: Layout) -> Mark:
    """Over chip sizes, at a step that moves the far edge of the frame by about half a chip; then closer around the best
    three, with height and width apart, since sizes are rounded to whole pixels."""
    low, high = (2.0, 12.0) if layout is FULL else (1.5, 4.0)
    chips = [low]
    while chips[-1] < high:
        chips.append(chips[-1] + 1.2 * chips[-1] ** 2 / max(mean_HW.shape))
    folded = ((read_tile(fold(mean_HW, chip, layout, _COARSE), key, layout, _COARSE), chip) for chip in chips)
    coarse = sorted(folded, key=lambda one: -one[0][0])[:3]
    best = coarse[0][0]
    for _, chip in coarse:
        steps = chip * (1 + 0.4 * chip / max(mean_HW.shape) * np.arange(-2, 3))
        near = (read_tile(fold(mean_HW, (row, column), layout), key, layout) for row in steps for column in steps)
        best = max(best, *near, key=lambda one: one[0])
    return best[1]


def read_tile(folded: np.ndarray, key: str, layout: Layout, phases: int = _FINE) -> tuple[float, Mark]:
    """The share of the energy and the mark, at the likeliest shift."""
    share, signs = _correlate(folded, _spectra(key, layout), phases)
    return float(share), Mark(layout, np.asarray(signs), evidence(float(share), layout.bits, SIDE[layout] ** 2))


@functools.partial(jax.jit, static_argnames="phases")
def _correlate(folded: jax.Array, spectra: jax.Array, phases: int) -> tuple[jax.Array, jax.Array]:
    side = len(folded) // phases
    folded = folded - jnp.mean(folded)
    rows = sum(jnp.roll(folded, -i, 0) for i in range(phases))
    chips = sum(jnp.roll(rows, -i, 1) for i in range(phases)) / phases**2
    chips = chips.reshape(side, phases, side, phases).transpose(1, 3, 0, 2).reshape(-1, 1, side, side)
    dots = jnp.fft.irfft2(jnp.fft.rfft2(chips) * spectra, s=(side, side))  # [phases^2, bits, n, n]
    energy = jnp.maximum(jnp.sum(chips**2, axis=(2, 3)), 1e-12)
    share = jnp.sum(dots**2, axis=1) / (side**2 * energy[:, 0, None, None])
    place = jnp.unravel_index(jnp.argmax(share), share.shape)
    return share[place], dots[place[0], :, place[1], place[2]]


@functools.lru_cache(maxsize=8)
def _spectra(key: str, layout: Layout) -> np.ndarray:
    return np.fft.rfft2(_carriers(key, layout)).conj().astype(np.complex64)


def _carriers(key: str, layout: Layout) -> np.ndarray:
    side = SIDE[layout]
    return carriers(key, f"picture {layout.bits}", layout.bits, side**2).reshape(-1, side, side)


def _fold_matrix(size: int, side: int, chip: float, phases: int) -> sparse.csr_array:
    """[n p, size]: adds up pixels at their place in the period, shared between the two nearest samples."""
    from scipy import sparse  # two entries per pixel: 20 times faster than a dense product

    place = (np.arange(size) + 0.5) / chip * phases - 0.5
    lower = np.floor(place).astype(int)
    upper_part = (place - lower).astype(np.float32)
    entries = np.concatenate([1 - upper_part, upper_part])
    rows = np.concatenate([lower, lower + 1]) % (side * phases)
    return sparse.csr_array((entries, (rows, np.tile(np.arange(size), 2))), (side * phases, size))


def whitened_mean(video: np.ndarray) -> np.ndarray:
    """The mean of all frames, [H, W], with the picture suppressed and the mark left."""
    return sum(np.asarray(_whitened_sum(video[part])) for part in _chunks(len(video))) / len(video)


@jax.jit
def _whitened_sum(frames_THWC: jax.Array) -> jax.Array:
    """Luma less its local mean, over its local contrast, limited so that no edge outweighs a patch: fine and coarse."""
    y_THW = frames_THWC.astype(jnp.float32) @ jnp.array(LUMA)
    total = 0.0
    for size in _WINDOWS:
        detail_THW = y_THW - _box(y_THW, size)
        contrast_THW = jnp.sqrt(_box(detail_THW**2, 7) + 1)
        total += jnp.sum(jnp.clip(detail_THW / contrast_THW, -2.5, 2.5), axis=0)
    return total


def _box(x_THW: jax.Array, size: int) -> jax.Array:
    """Mean over size x size pixels; the border repeats its last pixel."""
    for axis in (1, 2):
        widths = [(size // 2 * (a == axis),) * 2 for a in range(3)]
        padded, length = jnp.pad(x_THW, widths, mode="edge"), x_THW.shape[axis]
        x_THW = sum(jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size)) / size
    return x_THW


def _chunks(length: int) -> list[slice]:
    return [slice(start, start + _CHUNK) for start in range(0, length, _CHUNK)]
