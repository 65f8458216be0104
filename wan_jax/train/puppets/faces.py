"""Faces of puppets: seventeen continuous attributes, and a painter that is a pure function of pixels and attributes.

Everything is drawn back to front as soft-edged ellipses and boxes on one grid, so that a clip is one fused
elementwise program: no gathers, no branches, ready for ``vmap`` over clips.

Axes: ``T`` frames, ``H W`` rows and columns, ``C`` red, green, blue in [0, 1]. Positions and lengths are in units
of the picture's side, downwards and to the right, for a head of scale 1.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

MOUTH = np.float32([0.33, 0.02, 0.07])  # inside of an open mouth; no other part has a colour near it
HUES = ("red", "yellow", "green", "teal", "blue", "purple")  # names of equal sectors of hue, red centred on 0
GLASSES, HAT = 0.65, 0.70  # worn above this coordinate

_DARK, _PALE = np.float32([0.50, 0.32, 0.22]), np.float32([1.00, 0.87, 0.76])  # ends of the ramp of skin
_MOUTH_Y = 0.115  # below the centre of the head
SOFT = 0.042  # width of every edge, in sides of the picture: sharp ones are what a small code cannot hold


class Face(NamedTuple):
    """One face, a point of the unit cube. Each field is [...] float32 in [0, 1], and nearby points look alike."""

    skin: Array  # dark to pale
    hair_hue: Array
    hair_shade: Array  # dark to bright
    hair_length: Array  # ears to shoulders
    hair_volume: Array
    fringe: Array  # bare forehead to brows
    width: Array
    height: Array
    eye_hue: Array
    eye_spacing: Array
    eye_size: Array
    nose: Array
    blush: Array
    shirt_hue: Array
    shirt_shade: Array
    glasses: Array  # see GLASSES; its hue runs through the part of the axis above
    hat: Array  # see HAT; likewise


class Pose(NamedTuple):
    """How a head is held. Each field is [...] float32; ``x, y`` is the centre of the head."""

    x: Array
    y: Array
    scale: Array
    nod: Array  # of the head against the shoulders, downwards
    tilt: Array  # radians, clockwise
    mouth_height: Array  # half-height of the opening; 0 is closed
    mouth_width: Array  # half-width
    lids: Array  # 0 open, 1 closed eyes
    brows: Array  # raised by


def features(face: Face) -> Array:
    """What can be seen of a face as [n] numbers of about unit size: attributes, hues as points of a circle."""

    def hue(x: Array) -> list[Array]:
        return [jnp.cos(2 * jnp.pi * x), jnp.sin(2 * jnp.pi * x)]

    seen = []
    for name, x in face._asdict().items():
        seen += hue(x) if name.endswith("hue") else [] if name in ("glasses", "hat") else [2 * x - 1]
    for x, worn in ((face.glasses, GLASSES), (face.hat, HAT)):
        there = (x > worn).astype(jnp.float32)
        seen += [2 * there - 1, *(there * part for part in hue((x - worn) / (1 - worn)))]
    return jnp.stack(seen)


def words(face: Face) -> str:
    """What a person would say about a face, for captions: ``a puppet with red hair, glasses and a blue hat``."""
    parts = [f"{_hue_name(face.hair_hue)} hair"]
    if face.glasses > GLASSES:
        parts.append("glasses")
    if face.hat > HAT:
        parts.append(f"a {_hue_name((face.hat - HAT) / (1 - HAT))} hat")
    parts.append(f"a {_hue_name(face.shirt_hue)} shirt")
    return "a puppet with " + ", ".join(parts[:-1]) + " and " + parts[-1]


def _hue_name(hue: Array) -> str:
    return HUES[round(float(hue) * len(HUES)) % len(HUES)]


def mouth_box(pose: Pose) -> Array:
    """Left, top, right and bottom of the place that the mouth may take: [..., 4], in picture sides."""
    lean = jnp.stack([-jnp.sin(pose.tilt), jnp.cos(pose.tilt)], -1) * (_MOUTH_Y * pose.scale)[..., None]
    centre = jnp.stack([pose.x, pose.y + pose.nod], -1) + lean
    half = jnp.asarray([0.10, 0.085]) * pose.scale[..., None]
    return jnp.concatenate([centre - half, centre + half], -1)


def paint(canvas_THWC: Array, face: Face, pose: Pose) -> Array:
    """Paint one person over a canvas.

    Args:
        canvas_THWC: float32 [T, H, W, 3] in [0, 1], H = W.
        face: scalars. pose: [T] each.
    """
    size = canvas_THWC.shape[1]
    grid = (jnp.arange(size) + 0.5) / size
    pose = Pose(*(field[:, None, None] for field in pose))
    edge = SOFT / pose.scale
    body_x = (grid[None, None, :] - pose.x) / pose.scale
    body_y = (grid[None, :, None] - pose.y) / pose.scale
    head_x, head_y = body_x, body_y - pose.nod / pose.scale
    cos, sin = jnp.cos(pose.tilt), jnp.sin(pose.tilt)
    x, y = cos * head_x + sin * head_y, cos * head_y - sin * head_x
    side = jnp.abs(x)  # a face is symmetric: one shape on the folded axis paints both eyes

    def ellipse(u: Array, v: Array, a: Array, b: Array) -> Array:
        """Coverage in [0, 1], with a soft edge; what is thinner than the edge fades."""
        a, b = jnp.maximum(a, 1e-4), jnp.maximum(b, 1e-4)
        thin = jnp.minimum(a, b)
        inside = 1 - jnp.square(u / a) - jnp.square(v / b)
        return jnp.clip(0.5 * inside * thin / edge + 0.5, 0, 1) * jnp.clip(2 * thin / edge, 0, 1)

    def box(u: Array, v: Array, a: Array, b: Array) -> Array:
        inside = jnp.minimum(a - jnp.abs(u), b - jnp.abs(v))
        return jnp.clip(inside / edge + 0.5, 0, 1)

    def over(canvas: Array, cover: Array, colour: Array) -> Array:
        return [plane + cover * (tone - plane) for plane, tone in zip(canvas, colour, strict=True)]

    def outlined(canvas: Array, shape, u: Array, v: Array, a: Array, b: Array, colour: Array) -> Array:
        canvas = over(canvas, shape(u, v, a + 0.011, b + 0.011), colour * 0.42)
        return over(canvas, shape(u, v, a, b), colour)

    skin = _DARK + (_PALE - _DARK) * face.skin
    hair = _hsv(face.hair_hue, 0.62, 0.25 + 0.6 * face.hair_shade)
    shirt = _hsv(face.shirt_hue, 0.55, 0.45 + 0.5 * face.shirt_shade)
    a, b = 0.155 + 0.055 * face.width, 0.195 + 0.05 * face.height
    ramp = (face.glasses - GLASSES) / (1 - GLASSES), (face.hat - HAT) / (1 - HAT)
    wears_glasses, wears_hat = (ramp[0] > 0).astype(jnp.float32), (ramp[1] > 0).astype(jnp.float32)
    puff = 0.02 + 0.05 * face.hair_volume

    canvas = [canvas_THWC[..., channel] for channel in range(3)]  # planes, for the sake of vector units
    # Hair behind the head: a cap, and locks that hang down to the shoulders.
    length = 0.04 + 0.22 * face.hair_length
    for grow, tone in ((0.011, 0.42), (0.0, 0.85)):
        cap = ellipse(x, y + 0.04, a + puff + grow, b + puff + grow) * box(x, y + 0.2, 1.0, 0.24 + grow)
        locks = box(x, y - length / 2, a + puff * 0.8 + grow, length / 2 + 0.04 + grow)
        canvas = over(canvas, jnp.maximum(cap, locks), hair * tone)
    # Shirt, neck, ears, head.
    canvas = outlined(canvas, ellipse, body_x, body_y - 0.56, 0.30, 0.26, shirt)
    canvas = over(canvas, ellipse(body_x, body_y - 0.31, 0.105, 0.05), shirt * 0.7)
    canvas = over(canvas, box(body_x, body_y - 0.22, 0.06, 0.09), skin * 0.78)
    canvas = outlined(canvas, ellipse, side - a, y - 0.01, 0.028, 0.04, skin * 0.92)
    canvas = over(canvas, ellipse(x, y, a + 0.011, b + 0.011), skin * 0.42)
    light = 1.04 - 0.16 * jnp.square(y / b + 0.25) - 0.10 * jnp.square(x / a)  # a soft lamp above
    canvas = over(canvas, ellipse(x, y, a, b), jnp.clip(skin[:, None, None, None] * light, 0, 1))
    pink = skin * jnp.asarray([1.0, 0.62, 0.62])
    canvas = over(canvas, 0.65 * face.blush * ellipse(side - 0.62 * a, y - 0.065, 0.045, 0.032), pink)
    # Eyes, lids, brows, nose.
    spacing, eye = 0.062 + 0.028 * face.eye_spacing, 0.027 + 0.013 * face.eye_size
    eye_y = y + 0.035
    canvas = over(canvas, ellipse(side - spacing, eye_y, eye, eye * 1.12), jnp.asarray([0.98, 0.98, 0.97]))
    canvas = over(canvas, ellipse(side - spacing, eye_y, eye * 0.74, eye * 0.82), _hsv(face.eye_hue, 0.6, 0.7))
    canvas = over(canvas, ellipse(side - spacing, eye_y, eye * 0.45, eye * 0.50), jnp.zeros(3))
    canvas = over(canvas, pose.lids * ellipse(side - spacing, eye_y, eye * 1.1, eye * 1.2), skin * 0.9)
    canvas = over(canvas, pose.lids * box(side - spacing, eye_y - 0.3 * eye, eye, 0.006), skin * 0.3)
    brow = eye_y + eye * 1.12 + 0.022 + pose.brows
    canvas = over(canvas, box(side - spacing, brow, 0.036, 0.008), hair * 0.6)
    canvas = over(canvas, ellipse(x, y - 0.042, 0.020 + 0.016 * face.nose, 0.021), skin * 0.74)
    canvas = over(canvas, ellipse(x, y - 0.038, 0.014 + 0.013 * face.nose, 0.016), skin * 0.94)
    # Mouth: lips, then the opening; shut, the lips are a smile.
    lips = 0.45 * skin + jnp.asarray([0.47, 0.19, 0.21])
    smile = 4 * jnp.square(side) * (1 - jnp.clip(pose.mouth_height / 0.02, 0, 1))
    lip_y = y - _MOUTH_Y + smile
    canvas = over(canvas, ellipse(x, lip_y, pose.mouth_width + 0.014, pose.mouth_height + 0.013), lips)
    canvas = over(canvas, ellipse(x, y - _MOUTH_Y, pose.mouth_width, pose.mouth_height), MOUTH)
    # Fringe: the part of the hair that lies on the forehead. Hat and glasses last.
    line = -b * (0.80 - 0.38 * face.fringe)
    front = ellipse(x, y + 0.02, a + puff * 0.6, b + puff * 0.6) * jnp.clip((line + 0.5 * side - y) / edge + 0.5, 0, 1)
    canvas = over(canvas, front * (y < 0), hair)
    brim = y + b * 0.62
    hat = _hsv(ramp[1], 0.7, 0.8)
    dome = ellipse(x, brim, a + 0.02, b * 0.75 + puff) * (brim < 0)
    canvas = over(canvas, wears_hat * dome, hat)
    canvas = over(canvas, wears_hat * box(x, brim + 0.01, a + 0.075, 0.02), hat * 0.6)
    lens = ellipse(side - spacing - 0.008, eye_y, 0.064, 0.060) - ellipse(side - spacing - 0.008, eye_y, 0.049, 0.045)
    frame = jnp.maximum(lens, box(side - a * 0.95, eye_y, jnp.maximum(a * 0.95 - spacing - 0.065, 0.0), 0.007))
    return jnp.stack(over(canvas, wears_glasses * frame, _hsv(ramp[0], 0.8, 0.45)), axis=-1)


def _hsv(hue: Array, saturation: float, value: Array) -> Array:
    """[...] -> [..., 3]; the hue goes round once over [0, 1]."""
    hue, value = jnp.asarray(hue), jnp.asarray(value)
    ramps = jnp.abs((hue[..., None] * 6 - jnp.asarray([0.0, 2.0, 4.0]) + 3) % 6 - 3) - 1  # 0 within 60 degrees
    return value[..., None] * (1 - saturation * jnp.clip(ramps, 0, 1))
