"""The puppet world and the detectors of its scores: what is rendered is what was planned, and it is found again."""

from __future__ import annotations

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wan_jax
from wan_jax.captions import structured_caption
from wan_jax.checkpoint import flatten_params
from wan_jax.config import NANO
from wan_jax.errors import InputError
from wan_jax.evaluate import looks, puppets, sounds
from wan_jax.media import read_audio, read_image
from wan_jax.models.vae import VAE
from wan_jax.train import codec
from wan_jax.train.puppets import faces, scripts, voices, world

COUNT = 16


FAST_COMPILE = {"xla_backend_optimization_level": 1}


@functools.cache
def render():
    return jax.jit(jax.vmap(world.render), compiler_options=FAST_COMPILE)


@functools.cache
def clips(people: int):
    """Plans of held-out people and what is rendered of them, NumPy leaves."""
    keys = jax.random.split(jax.random.key(5), COUNT)
    draw = jax.jit(jax.vmap(lambda key: world.draw(key, "test", people)), compiler_options=FAST_COMPILE)
    plans = draw(keys)
    return jax.tree.map(np.asarray, (plans, render()(plans)))


def one(tree, k: int):
    return jax.tree.map(lambda leaf: leaf[k], tree)


def test_a_clip_depends_on_its_plan_alone():
    plans, made = clips(1)
    order = np.random.default_rng(0).permutation(COUNT)
    again = jax.tree.leaves(render()(one(plans, order)))
    assert all(map(np.array_equal, jax.tree.leaves(one(made, order)), again))
    assert len({clip.tobytes() for clip in made.video}) == len({sound.tobytes() for sound in made.audio}) == COUNT


def test_shapes_and_ranges():
    for people in (1, 2):
        _, made = clips(people)
        size = (world.SIZE, world.SIZE, 3)
        assert made.video.shape == (COUNT, world.FRAMES, *size) and made.video.dtype == np.uint8
        assert made.pictures.shape == (COUNT, people, *size) and made.voices.shape == (COUNT, people, 16_000)
        assert made.audio.shape[1] / voices.RATE == made.video.shape[1] / world.FPS
        assert 0.05 < np.abs(made.audio).max(axis=1).min() and np.abs(made.audio).max() < 0.9


def test_test_people_are_a_disjoint_region():
    keys = jax.random.split(jax.random.key(0), 4000)
    for split, want in (("train", False), ("test", True)):
        face, voice = jax.jit(jax.vmap(lambda key, split=split: world.sample_identity(key, split)))(keys)
        assert (jax.vmap(world.held_out)(face.skin, face.hair_hue) == want).all()
        assert (jax.vmap(world.held_out)(voice.pitch, voice.size) == want).all()
        for axis in (face.skin, face.hair_hue, voice.pitch, voice.size):  # but every single attribute is in both
            assert np.histogram(axis, 4, (0, 1))[0].min() > 850
        assert abs(np.corrcoef(voice.pitch, voice.size)[0, 1]) < 0.15
    pair = clips(2)[0].people.voice
    assert jax.vmap(jax.vmap(world.held_out))(pair.pitch, pair.size).all()
    assert np.abs(np.diff(pair.pitch, axis=1)).min() >= 0.299  # and one can hear who speaks


def test_scripts_fit_the_clip():
    draw = jax.jit(jax.vmap(lambda key: scripts.draw_script(key, world.FRAMES / world.FPS, speakers=2)))
    script = jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(1), 2000)))
    on = script.on
    assert set(on.sum(1)) == {2, 3, 4} and (script.start[on] > 0.1).all()
    assert ((script.start + script.length)[on] < world.FRAMES / world.FPS).all()
    gaps = script.start[:, 1:] - (script.start + script.length)[:, :-1]
    assert gaps[on[:, 1:]].min() > 0.089  # room for the consonant
    assert script.start[:, 0].std() > 0.08  # the text does not tell the timing
    turns = (np.diff(script.speaker, axis=1) != 0) & on[:, 1:]
    assert turns.sum(1).max() == 1 and 0.5 < turns.any(1).mean() < 0.9


def test_captions_say_what_is_rendered():
    for people in (1, 2):
        plans, _ = clips(people)
        for k in range(COUNT):
            plan = one(plans, k)
            prompt, caption = world.prompt(plan), world.caption(plan)
            assert caption == structured_caption(prompt, ["a puppet"] * people)
            said = [word for speech in caption.split("<S>")[1:] for word in speech.split("<E>")[0].split()]
            assert [scripts.VOWELS.index(word[-1]) for word in said] == plan.script.vowel[plan.script.on].tolist()
            assert set(said) <= set(scripts.SYLLABLES)
            assert f"{world.PATTERNS[plan.pattern]} {world.WALLS[plan.wall]} wall" in prompt
            assert all(world.MOTIONS[motion] in prompt for motion in plan.motion)
            assert all(f"<img{n + 1}>: a puppet, <sub{n + 1}>" in caption for n in range(people))
            described = world.prompt(plan, described=True)
            assert faces.words(one(plan.people.face, 0)) in described and "character" not in described


def test_truth_agrees_with_picture_and_sound():
    plans, made = clips(1)
    for k in range(COUNT):
        truth = one(made.truth, k)
        heard = sounds.loudness(made.audio[k], world.FRAMES)
        assert np.corrcoef(heard, truth.loudness)[0, 1] > 0.97
        assert np.corrcoef(truth.opening[0], truth.loudness)[0, 1] > 0.75
        pixels = made.video[k].astype(np.float32) / 255
        is_mouth = np.linalg.norm(pixels - faces.MOUTH, axis=-1) < 0.03
        amount = is_mouth.sum(axis=(1, 2))
        wide = truth.opening[0] > 0.05  # narrower ones are all soft edge
        assert amount[wide].min(initial=9) > 3 and amount[truth.opening[0] == 0].max() == 0
        left, top, right, bottom = np.moveaxis(truth.mouth[0] * world.SIZE, -1, 0)
        for t in range(world.FRAMES):
            rows, columns = np.nonzero(is_mouth[t])
            assert ((rows >= top[t] - 1) & (rows <= bottom[t])).all()
            assert ((columns >= left[t] - 1) & (columns <= right[t])).all()
        assert np.abs(truth.pitch / voices.pitch_hz(one(plans.people.voice, k)) - 1).max() < 0.021


def test_detectors_find_the_truth():
    plans, made = clips(1)
    table = puppets.score(plans, made.pictures, made.video, made.audio)
    for name in ("wall colour", "wall pattern", "motion", "identity, first of 8", "voice heard", "syllable count"):
        assert table[name] == 1, name
    assert table["vowel error rate"] <= 0.05 < 0.5 < table["vowel error rate, shuffled"]
    assert table["pitch error, cents"] < 15 and table["pitch within 100 cents"] == 1
    assert table["pitch error, shuffled"] > 250
    assert min(table["formant scale, correlation"], table["roll-off, correlation"]) > 0.95
    assert table["sync"] > 0.85 and abs(table["sync, shuffled"]) < 0.25
    assert table["best lag 0"] == 1 and table["right sound of 8"] >= 0.9
    assert table["wall spread"] < 1e-6 and table["wall flicker"] < 1e-6


def test_detectors_see_what_is_wrong():
    plans, made = clips(1)
    others, late = np.roll(made.video, 1, axis=0), np.roll(made.audio, 2 * voices.RATE // world.FPS, axis=1)
    noisy = np.clip(others + np.random.default_rng(0).normal(size=others.shape) * 5, 0, 255).astype(np.uint8)
    table = puppets.score(plans, made.pictures, noisy, late)
    assert table["identity, first of 8"] < 0.3 and table["wall colour"] < 0.5 and table["motion"] < 0.75
    assert table["sync"] < 0.4 and table["right sound of 8"] < 0.5
    assert table["wall spread"] > 0.01 and table["wall flicker"] > 0.01
    table = puppets.score(plans, made.pictures, made.video, late)
    assert table["best lag 0"] == 0 and table["identity, first of 8"] == 1


def test_two_people_take_turns():
    plans, made = clips(2)
    table = puppets.score(plans, made.pictures, made.video, made.audio)
    assert min(table[name] for name in ("wall colour", "motion", "identity, first of 8 (both)")) > 0.93
    assert table["right face for the voice"] >= 0.89 and table["syllable count"] == 1
    mirrored = puppets.score(plans, made.pictures, made.video[:, :, :, ::-1], made.audio)
    assert mirrored["right face for the voice"] <= 0.09 and mirrored["identity, first of 8 (both)"] < 0.2


def test_nothing_to_see_or_hear_is_scored_as_such():
    plans, made = clips(1)
    noise = np.random.default_rng(0).integers(0, 256, made.video.shape, dtype=np.uint8)
    table = puppets.score(plans, made.pictures, noise, np.zeros_like(made.audio))
    assert table["voice heard"] == 0 and table["vowel error rate"] == 1 and table["pitch within 100 cents"] == 0
    assert table["sync"] == 0 and table["identity, first of 8"] < 0.5
    with pytest.raises(InputError, match="8 or more"):
        puppets.score(one(plans, slice(3)), made.pictures[:3], made.video[:3], made.audio[:3])


def test_the_video_autoencoder_starts_as_a_linear_code():
    _, made = clips(1)
    video = (made.video / np.float32(127.5)) - 1
    fresh = VAE(NANO.vae, rngs=nnx.Rngs(0))
    code = jax.jit(codec.linear_vae)(fresh, video[:12], jnp.ones(video[:12].shape[:-1]))
    latents = code.encode(video[12:])
    assert latents.shape == (4, 5, 6, 6, 64)
    again = np.asarray(code.decode(latents))
    error = np.square(again.clip(-1, 1) - video[12:]).mean((0, 2, 3, 4)) / 4  # of each frame
    assert -10 * np.log10(error.mean()) > 22 and -10 * np.log10(error[0]) > 25  # of people that it has not seen
    np.testing.assert_allclose(code.decode_stream(latents), again, atol=1e-3)

    flat = flatten_params(code)  # silent branches, but not dead ones
    assert not flat["decoder.middle.block1.conv2.kernel"].any() and flat["decoder.middle.block1.conv1.kernel"].any()
    folded = codec.fold_statistics(code, latents.mean((0, 1, 2, 3)), latents.std())
    np.testing.assert_allclose(folded.decode(folded.encode(video[12:])), again, atol=2e-3)
    assert abs(float(folded.encode(video[12:]).std()) - 1) < 0.1


def test_small_measures():
    time = np.arange(1024) / voices.RATE
    for hz in (95.0, 171.3, 310.0):
        wave = sum(np.sin(2 * np.pi * hz * n * time) / n for n in range(1, 6))
        assert abs(1200 * np.log2(sounds.pitch_track(wave[None])[0] / hz)) < 5
    assert np.isnan(sounds.pitch_track(np.random.default_rng(0).normal(size=(1, 1024)))[0])
    assert sounds.edit_distance((1, 2, 3), (1, 3)) == 1 and sounds.edit_distance((), (0, 0)) == 2
    grey = np.full((2, 16, 16, 3), 100, np.uint8)
    assert puppets.psnr(grey, grey) == 99 and abs(puppets.psnr(grey, grey + 10) - 28.13) < 0.01
    assert looks.spread(grey / 255) == looks.flicker(grey / 255) == 0


def test_the_puppet_that_ships_is_of_this_world():
    """Its picture and voice are a held-out person's, so a trained model has not seen them."""
    clip = jax.jit(world.render)(world.draw(jax.random.key(3), "test"))
    folder = Path(wan_jax.__file__).parent / "assets"
    picture = read_image(folder / "puppet.png").astype(int)
    assert np.abs(picture - np.asarray(clip.pictures[0])).max() <= 1
    np.testing.assert_allclose(read_audio(folder / "puppet.wav"), clip.voices[0], atol=1e-3)
