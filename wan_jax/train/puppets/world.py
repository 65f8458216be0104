"""Clips of talking puppets: people, scenes, what is said, and the captions of all that.

A clip is planned (`draw`, a few hundred numbers), rendered (`render`, pure and jittable, seeded by the plan alone) and
put into words (`prompt`, `caption`; on the host). Sizes: 17 frames of 96 x 96 at 8 per second are 5 latents of the
causal VAE, a syllable is two or three frames, and a mouth is up to 16 x 12 pixels: about one cell of a 16-fold code.

People who are held out: the cube of faces is cut into quarters along skin and hue of the hair, that of voices along
pitch and size. For each quarter of the first axis, one quarter of the second belongs to the test people alone
(`HELD_OUT`). So the two regions are disjoint, every single attribute is seen in training, and in neither split does
one attribute tell the other.

Axes: ``P`` people, ``T`` frames, ``H W C``; other letters as in the modules beside this one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.captions import structured_caption
from wan_jax.train.puppets import faces, scripts, voices
from wan_jax.train.puppets.faces import Face, Pose
from wan_jax.train.puppets.scripts import Script
from wan_jax.train.puppets.voices import RATE, STEP, Voice

Array = jax.Array

SIZE, FRAMES, FPS = 96, 17, 8
SAMPLES = FRAMES * RATE // FPS
REFERENCE_SAMPLES = RATE  # of a reference voice: one second, as DreamID-Omni takes
HELD_OUT = (2, 0, 3, 1)  # the test quarter of the second axis, for each quarter of the first

WALLS = ("blue", "green", "yellow", "purple", "red", "grey")
PATTERNS = ("plain", "striped", "dotted")
MOTIONS = ("stays still", "nods", "moves to the left", "moves to the right")
STILL, NODS, LEFT, RIGHT = range(4)

_WALLS = np.float32(
    [
        [0.43, 0.63, 0.90],
        [0.50, 0.77, 0.52],
        [0.97, 0.86, 0.45],
        [0.67, 0.54, 0.85],
        [0.87, 0.44, 0.40],
        [0.60, 0.62, 0.66],
    ]
)
HEAD_SCALE = {1: 1.15, 2: 0.76}  # by the number of people in the picture
PAPER = np.float32([0.90, 0.90, 0.88])  # behind reference pictures


class Person(NamedTuple):
    face: Face
    voice: Voice


class Plan(NamedTuple):
    """All that a clip is made of. Leaves are numbers or small arrays; ``[P]`` where there is one per person."""

    people: Person  # fields [P]
    script: Script
    samples: Script  # of the reference voices, [P, S]
    wall: Array  # index into WALLS
    pattern: Array  # index into PATTERNS
    motion: Array  # [P], index into MOTIONS
    left: Array  # which person stands on the left
    chance: Array  # [P, 12] in [0, 1]: places, extents of motions, blinks, poses of the reference pictures
    seed: Array  # uint32, of the noise in the sounds


class Clip(NamedTuple):
    """One rendered clip. Pixels are uint8, sound is float32 in [-1, 1] at `voices.RATE`."""

    video: Array  # [T, H, W, 3] at FPS
    audio: Array  # [SAMPLES]
    pictures: Array  # [P, H, W, 3]: each person elsewhere, in another pose, mouth shut, on plain paper
    voices: Array  # [P, REFERENCE_SAMPLES]: each person saying something else
    truth: Truth


class Truth(NamedTuple):
    """What the renderer knows, per frame."""

    opening: Array  # [P, T] half-height of the open mouth, in sides of the picture
    mouth: Array  # [P, T, 4] left, top, right, bottom of the place of the mouth, in sides of the picture
    loudness: Array  # [T] root mean square of the voice, about 0 to 0.1
    pitch: Array  # [T] Hz, of whoever speaks or spoke last
    speaker: Array  # [T] index of that person


# ---- plans -------------------------------------------------------------------------------------------------


def sample_identity(key: Array, split: str = "train") -> Person:
    """One person of the world. ``split`` is "train" or "test"; see above for the rule."""
    faces_end = len(Face._fields)
    u = jax.random.uniform(key, (faces_end + len(Voice._fields) + 2,))
    face, voice = Face(*u[:faces_end]), Voice(*u[faces_end:-2])
    face = face._replace(hair_hue=_partner(face.skin, face.hair_hue, u[-2], split))
    return Person(face, voice._replace(size=_partner(voice.pitch, voice.size, u[-1], split)))


def held_out(first: Array, second: Array) -> Array:
    """Whether a point of two axes belongs to the test people."""
    return scripts.one_of(4, second) == jnp.asarray(HELD_OUT)[scripts.one_of(4, first)]


def _partner(first: Array, place: Array, which: Array, split: str) -> Array:
    """Coordinate of the second axis: ``place`` within a quarter that the split owns, all three numbers in [0, 1]."""
    away = {"train": 1 + scripts.one_of(3, which), "test": 0}[split]
    quarter = jnp.asarray(HELD_OUT)[scripts.one_of(4, first)]
    return ((quarter + away) % 4 + place) / 4


def draw(key: Array, split: str = "train", people: int = 1) -> Plan:
    """Plan a clip of one or two people. Pure; ``split`` and ``people`` are static.

    The pitches of two voices are at least 6.5 semitones apart, so that one can hear who speaks.
    """
    keys = jax.random.split(key, 5)
    cast = jax.vmap(lambda key: sample_identity(key, split))(jax.random.split(keys[0], people))
    u = jax.random.uniform(keys[1], (people, 18))
    if people == 2:
        voice, first = cast.voice, cast.voice.pitch[0]
        pitch = voice.pitch.at[1].set((first + 0.3 + 0.4 * u[0, 0]) % 1)
        size = voice.size.at[1].set(_partner(pitch[1], voice.size[1] * 4 % 1, u[0, 1], split))
        cast = cast._replace(voice=voice._replace(pitch=pitch, size=size))
    return Plan(
        people=cast,
        script=scripts.draw_script(keys[2], FRAMES / FPS, speakers=people),
        samples=jax.vmap(lambda key: scripts.draw_script(key, REFERENCE_SAMPLES / RATE, most=2))(
            jax.random.split(keys[3], people)
        ),
        wall=scripts.one_of(len(WALLS), u[0, 2]),
        pattern=scripts.one_of(len(PATTERNS), u[0, 3]),
        motion=scripts.one_of(len(MOTIONS), u[:, 4]),
        left=scripts.one_of(people, u[0, 5]),
        chance=u[:, 6:],
        seed=jax.random.bits(keys[4], dtype=jnp.uint32),
    )


# ---- pictures and sounds -----------------------------------------------------------------------------------


def render(plan: Plan, size: int = SIZE) -> Clip:
    """Picture, sound, references and truth of one plan. Pure; ``vmap`` it over plans; ``size`` is static."""
    people = plan.motion.shape[0]
    keys = jax.random.split(jax.random.key(plan.seed), 1 + people)
    controls, mouth, speaker = scripts.perform(plan.script, SAMPLES // STEP)
    speaking = jax.tree.map(lambda x: x[speaker], plan.people.voice)
    audio, pitch = voices.speak(keys[0], speaking, controls)

    per_frame = SAMPLES // STEP // FRAMES
    shown = jnp.arange(FRAMES) * per_frame + per_frame // 2
    stands_left = jnp.arange(people) == plan.left
    opens = speaker == jnp.arange(people)[:, None]
    opening = _frame_means(jnp.where(opens, mouth.height, 0))
    width = _frame_means(jnp.where(opens, mouth.width, scripts.SHUT_WIDTH))

    poses = jax.vmap(lambda *person: pose(*person, people))(plan.chance, plan.motion, stands_left, opening, width)
    behind = jnp.broadcast_to(wall(plan.wall, plan.pattern, size), (FRAMES, size, size, 3))
    frames, _ = jax.lax.scan(lambda frames, x: (faces.paint(frames, *x), None), behind, (plan.people.face, poses))

    pictures = jax.vmap(lambda face, chance: portrait(face, chance, size))(plan.people.face, plan.chance)
    samples = jax.vmap(sample_voice)(keys[1:], plan.people.voice, plan.samples)
    truth = Truth(
        opening=poses.scale * opening,
        mouth=faces.mouth_box(poses),
        loudness=voices.LEVEL * jnp.sqrt(_frame_means(jnp.square(controls.loudness_K))),
        pitch=pitch[shown],
        speaker=speaker[shown],
    )
    return Clip(_to_pixels(frames), audio, _to_pixels(pictures), samples, truth)


def wall(colour: Array, pattern: Array, size: int = SIZE) -> Array:
    """The background alone, [H, W, 3] in [0, 1]. The pattern is a lighter tone of the colour."""
    base = jnp.asarray(_WALLS)[colour]
    cell = ((jnp.arange(size) + 0.5) * 6 / size) % 1 - 0.5  # six periods, each 1 wide
    edge = 1 / (6 * faces.SOFT)
    stripes = jnp.clip((0.25 - jnp.abs(cell)) * edge + 0.5, 0, 1)[None, :]
    dots = jnp.clip((0.28 - jnp.hypot(cell[:, None], cell)) * edge + 0.5, 0, 1)
    light = jnp.stack([jnp.zeros((size, size)), jnp.broadcast_to(stripes, (size, size)), dots])[pattern]
    return base + 0.4 * light[..., None] * (1 - base)


def pose(chance: Array, motion: Array, stands_left: Array, opening_T: Array, width_T: Array, people: int) -> Pose:
    """How one of ``people`` stands, moves, blinks and opens the mouth, frame by frame."""
    alone = people == 1
    time = jnp.arange(FRAMES) / FPS
    glide = 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.arange(FRAMES) / (FRAMES - 1))
    way = (motion == RIGHT) * 1.0 - (motion == LEFT) * 1.0
    distance = (0.14 + 0.06 * chance[2]) if alone else (0.07 + 0.02 * chance[2])
    nod = (0.032 + 0.012 * chance[2]) * jnp.sin(2 * jnp.pi * (1.5 + 0.5 * chance[3]) * time)
    place = 0.5 if alone else jnp.where(stands_left, 0.27, 0.73)
    scale = jnp.full(FRAMES, HEAD_SCALE[people])
    blink = 1 - jnp.abs(time - 2.6 * chance[4]) * 9  # one in three never blinks
    return Pose(
        x=place + (chance[0] - 0.5) * (0.05 if alone else 0.02) + way * distance * (glide - 0.5),
        y=jnp.full(FRAMES, 0.47 if alone else 0.51) + (chance[1] - 0.5) * 0.04,
        scale=scale,
        nod=nod * scale * (motion == NODS),
        tilt=jnp.zeros(FRAMES),
        mouth_height=opening_T,
        mouth_width=width_T,
        lids=jnp.clip(2 * blink, 0, 1),
        brows=jnp.zeros(FRAMES),
    )


def portrait(face: Face, chance: Array, size: int = SIZE) -> Array:
    """Reference picture, [H, W, 3]: alone on paper, elsewhere, the head tilted, brows raised, mouth shut."""
    u = chance[6:].reshape(-1, 1)
    still = Pose(
        x=0.47 + 0.06 * u[0],
        y=0.45 + 0.04 * u[1],
        scale=jnp.full(1, HEAD_SCALE[1]),
        nod=jnp.zeros(1),
        tilt=0.16 * (u[2] - 0.5),
        mouth_height=jnp.zeros(1),
        mouth_width=scripts.SHUT_WIDTH + 0.012 * (u[3] - 0.5),
        lids=jnp.zeros(1),
        brows=0.02 * u[4],
    )
    return faces.paint(jnp.broadcast_to(PAPER, (1, size, size, 3)), face, still)[0]


def sample_voice(key: Array, voice: Voice, script: Script) -> Array:
    """Reference voice, [REFERENCE_SAMPLES] float32."""
    frames = REFERENCE_SAMPLES // STEP
    controls, _, _ = scripts.perform(script, frames)
    return voices.speak(key, jax.tree.map(lambda x: jnp.full(frames, x), voice), controls)[0]


def _one(tree, person: int):
    return jax.tree.map(lambda x: x[person], tree)


def _frame_means(x_K: Array) -> Array:
    """Control frames -> means over the time of each video frame, [..., T]."""
    return x_K.reshape(*x_K.shape[:-1], FRAMES, -1).mean(-1)


def _to_pixels(x: Array) -> Array:
    return jnp.round(jnp.clip(x, 0, 1) * 255).astype(jnp.uint8)


# ---- words -------------------------------------------------------------------------------------------------


def prompt(plan: Plan, *, described: bool = False) -> str:
    """What a user would write for this clip; ``plan`` is of one clip, with NumPy leaves.

    Args:
        described: name people by their looks, for text alone; otherwise ``character1`` and ``character2``, the
            references in order.
    """
    people = len(plan.motion)
    names = [f"character{k + 1}" for k in range(people)]
    if described:
        names = [faces.words(_one(plan.people.face, person)) for person in range(people)]
    scene = f"in front of a {PATTERNS[plan.pattern]} {WALLS[plan.wall]} wall"
    does = [MOTIONS[motion] for motion in plan.motion]
    if people == 1:
        return f'{names[0]} {does[0]} {scene} and says "{scripts.spell(plan.script, plan.script.on)}".'
    sides = ["left" if person == plan.left else "right" for person in range(2)]
    parts = [f"{names[k]} on the {sides[k]} {does[k]}" for k in range(2)]
    first = int(plan.script.speaker[0])
    said = [scripts.spell(plan.script, plan.script.on & (plan.script.speaker == k)) for k in range(2)]
    turns = [f'{names[k]} says "{said[k]}"' for k in (first, 1 - first) if said[k]]
    return f"{parts[0]} and {parts[1]}, {scene}. {', then '.join(turns)}."


def caption(plan: Plan, *, described: bool = False) -> str:
    """The same as the model with references sees it: a line per reference, subjects and speech as tags.

    Args:
        described: the lines of the references tell what the people look like; otherwise just that they are puppets.
    """
    cast = [faces.words(_one(plan.people.face, k)) if described else "a puppet" for k in range(len(plan.motion))]
    return structured_caption(prompt(plan), cast)
