"""`wan_jax.evaluate`: the truth scores as truth, shuffled clips score as chance, a tiny model runs in every variant."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax import load
from wan_jax.cli import main
from wan_jax.config import CouplingConfig
from wan_jax.conversion import tiny_spec
from wan_jax.errors import InputError
from wan_jax.evaluate import gauges, run, variants
from wan_jax.evaluate.puppets import Row
from wan_jax.evaluate.sheet import talking_sheet
from wan_jax.evaluate.variants import VARIANTS
from wan_jax.media import Clip, read_image, read_video
from wan_jax.models.fusion import Fusion
from wan_jax.train.puppets import voices, world

COUNT, SEED = 10, 3
RATE = gauges.RATE


@pytest.fixture(scope="module")
def model(tiny_folder):
    """Tiny random weights that claim the frame rate of the puppets."""
    model = load(tiny_folder("wan2.6"), dtype="float32")
    model.spec = dataclasses.replace(model.spec, fps=world.FPS)
    return model


@pytest.fixture
def lossless(monkeypatch):
    """Codecs that leave everything as it is, and no time for watermarks."""
    monkeypatch.setattr(run, "round_trip", lambda model, video, audio: (video, audio))
    monkeypatch.setattr(run, "_marks", lambda clip, model: {"marked": True})


def rendered(turn: int = 0):
    """A maker of the clips that were asked for, or with ``turn`` of those of other people."""

    def make(model, request, change) -> Clip:
        index = (request.seeds[0] - SEED + turn) % COUNT
        _, clip = variants.held_out(SEED, index, max(len(request.sound.references), 1))
        return Clip(clip.video, world.FPS, clip.audio, voices.RATE, {"index": index})

    return make


def test_the_truth_scores_as_truth(model, lossless):
    report = run.evaluate(model, variants=("full", "two"), clips=COUNT, seed=SEED, make=rendered(), progress=False)
    tables = {name: table for name, _, table in report.tables()}
    assert list(tables) == ["codec", "full", "two"]
    full, two = tables["full"], tables["two"]
    marked = full.pop("marked")
    assert marked.value == 1 and np.isnan(marked.truth)
    assert all(s.value == s.truth == s.codec for table in (full, two) for s in table.values())
    for row in ("identity, first of 8", "wall colour", "motion", "voice heard"):
        assert full[row].value == 1 and full[row].interval == pytest.approx((0.722, 1), abs=1e-3)  # Wilson, 10 of 10
    assert full["identity, first of 8"].shuffled < 0.4 and full["wall colour"].shuffled < 0.6
    assert full["sync over shuffled"].value > 0.6 and abs(full["sync over shuffled"].shuffled) < 0.3
    assert full["pitch error, cents"].value < 15 and full["pitch error, cents"].shuffled > 150
    assert two["identity, first of 8 (both)"].value == 1 and two["right face for the voice"].value > 0.9
    assert tables["codec"]["reconstruction, dB"].value == 99

    data = json.loads(report.to_json())
    assert data["tables"]["full"]["clips"] == COUNT and data["seconds"].keys() == {"first", "later"}
    assert data["tables"]["codec"]["reconstruction, dB"]["truth"] is None
    assert "full: text, picture and voice; 10 clips" in str(report)


def test_clips_of_others_score_as_chance(model, lossless):
    report = run.evaluate(model, variants=("full",), clips=COUNT, seed=SEED, make=rendered(-1), progress=False)
    full = report.table("full", 1)
    assert full["identity, first of 8"].value < 0.4 and full["identity, first of 8"].truth == 1
    assert full["pitch error, cents"].value > 150 and full["vowel error rate"].value > 0.5
    assert full["sync over shuffled"].value > 0.6  # their own sound goes with their own picture
    assert set(report.timing()) == {"first", "later"}


def interrupted(after: int):
    """A maker that is interrupted at clip ``after``."""

    def make(model, request, change) -> Clip:
        if request.seeds[0] == SEED + after:
            raise KeyboardInterrupt
        return rendered()(model, request, change)

    return make


def test_ctrl_c_keeps_what_is_done(model, lossless):
    report = run.evaluate(model, variants=("full",), clips=COUNT, seed=SEED, make=interrupted(8), progress=False)
    ((_, count, _), (name, made, table)) = report.tables()
    assert report.interrupted and (name, made, count) == ("full", 8, 8) and table["wall colour"].value == 1


def test_what_is_kept_in_a_folder(model, lossless, tmp_path):
    report = run.evaluate(
        model, variants=("full", "two"), clips=8, seed=SEED, folder=tmp_path, make=interrupted(1), progress=False
    )
    assert report.interrupted and not list(report.tables()) and json.loads(report.to_json())["tables"] == {}
    lines = [json.loads(line) for line in (tmp_path / "clips.jsonl").read_text().splitlines()]
    assert [(x["variant"], x["clip"]) for x in lines] == [("full", 0), ("two", 0)]
    assert lines[0]["wall"] in lines[0]["prompt"] and lines[0]["motions"][0] in lines[0]["prompt"]
    assert read_image(tmp_path / "two" / "0000.png").shape[1] == 7 * (world.SIZE + 4) - 4
    again = read_video(tmp_path / "full" / "0000.mp4")
    assert again.num_frames == world.FRAMES and again.settings == {"index": 0}


def test_marks_are_looked_for_in_files():
    _, made = variants.held_out(SEED, 2, 1)
    clip = Clip(made.video, world.FPS, made.audio, voices.RATE, {run.RECORD: {"watermark": False}})
    assert all(run._marks(clip, "wan2.6-nano").values())
    silent = dataclasses.replace(clip, audio=np.zeros_like(clip.audio))
    assert not run._marks(silent, "wan2.6-nano")["watermark in the sound"]


def test_every_variant_of_a_model(model):
    """All run, at a size of seconds, and each gives another clip."""
    plan, truth = variants.held_out(SEED, 0, 1)
    clips = {}
    for name in ("full", "no-picture", "no-voice", "adapters", "tokens", "uncoupled"):
        asked = variants.request(model.spec, VARIANTS[name], plan, truth, SEED, {"num_steps": 2})
        assert (asked.width, asked.height, asked.num_frames) == (world.SIZE, world.SIZE, world.FRAMES)
        assert len(asked.sound.references) == 1 and "character1" in asked.prompt
        asked = dataclasses.replace(asked, width=32, height=32, num_frames=5)
        asked = dataclasses.replace(asked, sound=dataclasses.replace(asked.sound, num_latents=20))
        clips[name] = clip = variants.make_clip(model, asked, VARIANTS[name].change)
        assert clip.video.shape == (5, 32, 32, 3) and clip.settings["seed"] == SEED
        assert clip.audio.shape == (5 * voices.RATE // world.FPS,)
    asked = variants.request(model.spec, VARIANTS["text"], plan, truth, SEED, {})
    assert not asked.sound.references and "a puppet with" in asked.prompt
    full = clips.pop("full")
    for name, clip in clips.items():
        assert not np.array_equal(clip.video, full.video), name
        assert not np.array_equal(clip.audio, full.audio), name


def test_the_codec_keeps_shapes(model):
    _, truth = variants.held_out(SEED, 0, 1)
    seen, heard = variants.round_trip(model, truth.video[:5, :32, :32], truth.audio[:5000])
    assert seen.shape == (5, 32, 32, 3) and heard.shape == (5000,)


def test_without_coupling_streams_do_not_hear_each_other():
    cfg = dataclasses.replace(tiny_spec("ovi").dit, coupling=CouplingConfig(), in_dim=4, out_dim=4, num_layers=1)
    fusion = jax.jit(lambda: Fusion(cfg, rngs=nnx.Rngs(0)))()
    key = jax.random.key(0)
    latents = {"video": jax.random.normal(key, (1, 2, 4, 4, 4)), "audio": jax.random.normal(key, (1, 6, cfg.audio_dim))}
    text = dict.fromkeys(latents, jax.random.normal(key, (1, 3, cfg.text_dim)))
    other = latents | {"audio": -latents["audio"]}
    predict = jax.jit(lambda fusion, latents: fusion(latents, jnp.full(1, 500.0), text)["video"])
    for module, same in ((fusion, False), (variants.without_coupling(fusion), True)):
        first, second = (predict(module, x) for x in (latents, other))
        assert np.allclose(first, second, atol=1e-6) == same


def test_held_out_clips_do_not_depend_on_their_number():
    (plan, clip), (again, _) = variants.held_out(SEED, 4, 1), variants.held_out(SEED, 4, 1)
    assert jax.tree.all(jax.tree.map(np.array_equal, plan, again))
    assert bool(world.held_out(plan.people.face.skin, plan.people.face.hair_hue).all())
    assert not np.array_equal(clip.video, variants.held_out(SEED + 1, 4, 1)[1].video)


def test_intervals():
    assert Row(np.array([True] * 58 + [False] * 6)).interval() == pytest.approx((0.810, 0.956), abs=1e-3)  # Wilson
    x = np.random.default_rng(0).normal(size=400)
    low, high = Row(x).interval()
    assert (low, high) == pytest.approx((x.mean() - 1.96 * x.std() / 20, x.mean() + 1.96 * x.std() / 20), abs=0.02)
    assert np.isnan(Row(np.array([])).value) and np.isnan(Row(np.array([1.0])).interval()[0])


def test_what_is_refused(tiny_folder, model, capsys):
    with pytest.raises(InputError, match="did you mean 'uncoupled'|did you mean uncoupled"):
        run.check(model.spec, ["uncouple"], 8)
    with pytest.raises(InputError, match="7 clips: need 8"):
        run.check(model.spec, ["full"], 7)
    for arguments, said in (
        (["--model", str(tiny_folder("wan2.6"))], "8 frames per second"),
        (["--model", "wan2.1-t2v-1.3b"], "cannot be scored on puppets"),
        (["--model", str(tiny_folder("wan2.6")), "--voice", "v.wav"], "belong to --clip"),
    ):
        assert main(["evaluate", *arguments]) == 2
        assert said in capsys.readouterr().err


# ---- clips of real people ----------------------------------------------------------------------------------


def boxes(truth) -> np.ndarray:
    """Of the face, around what the renderer knows of the mouth, as a detector of faces would give them; pixels."""
    left, top, right, bottom = np.moveaxis(truth.mouth[0] * world.SIZE, -1, 0)
    wide, tall = right - left, bottom - top
    return np.stack([left - wide / 2, top - 1.5 * tall, right + wide / 2, bottom], axis=1)


def test_sync_and_its_offset():
    lags, strengths, shuffled = [], [], []
    for index in range(6):
        _, clip = variants.held_out(SEED, index, 1)
        opening = gauges.mouth_darkness(clip.video, boxes(clip.truth))
        for late in (0, 3, -3):
            heard = gauges.envelope(np.roll(clip.audio, late * RATE // world.FPS), world.FRAMES)
            lag, strength = gauges.sync(opening, heard)
            lags.append(abs(lag - late) <= 1)
            strengths.append(strength)
        _, other = variants.held_out(SEED, index + 20, 1)
        heard = gauges.envelope(other.audio, world.FRAMES)
        shuffled.append(np.corrcoef(opening, heard)[0, 1])
    assert np.mean(lags) >= 0.9 and np.mean(strengths) > 0.6 > 0.3 > np.mean(shuffled)


def test_gauges_of_one_clip(tmp_path, capsys):
    _, made = variants.held_out(SEED, 1, 1)
    clip = Clip(made.video, world.FPS, made.audio, voices.RATE)
    rows = gauges.gauge(clip, made.pictures[0], made.voices[0], boxes_T4=boxes(made.truth))
    assert rows["pitch error, cents"] < 50 and rows["sync"] > 0.5 and abs(rows["sound is late by frames"]) <= 1
    assert rows["colour drift, LAB"] < 3 and 0.1 < rows["silence"] < 0.9 and -50 < rows["loudness, dBFS"] < -5
    _, other = variants.held_out(SEED, 2, 1)
    assert gauges.timbre_distance(made.audio, made.voices[0]) < gauges.timbre_distance(made.audio, other.voices[0])

    path = clip.save(tmp_path / "clip.mp4")
    assert main(["evaluate", "--clip", str(path), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["pitch, Hz"] == pytest.approx(rows["pitch, Hz"], rel=0.05) and "pitch error, cents" not in printed
    quiet = gauges.gauge(dataclasses.replace(clip, audio=np.zeros_like(clip.audio)), voice=made.voices[0])
    assert quiet["silence"] == 1 and "pitch, Hz" not in quiet and "timbre distance, dB" not in quiet


def test_drift_flicker_and_likeness_see_what_is_wrong():
    _, clip = variants.held_out(SEED, 0, 1)
    place = boxes(clip.truth)
    ramp = (np.linspace(0, 40, world.FRAMES)[:, None, None, None] * [1, 0, 0]).astype(np.int16)
    tinted = np.clip(clip.video + ramp, 0, 255).astype(np.uint8)
    assert gauges.drift(tinted) > 5 > gauges.drift(clip.video)
    blink = (clip.video * np.where(np.arange(world.FRAMES) % 2, 0.9, 1)[:, None, None, None]).astype(np.uint8)
    assert gauges.flicker(blink) > 5 * gauges.flicker(clip.video)
    face = gauges._cut(clip.video[0], place[0])
    _, other = variants.held_out(SEED, 5, 1)
    assert gauges.likeness(face, clip.video, place) > gauges.likeness(face, other.video, boxes(other.truth)) + 0.1


def test_faces_are_found_where_opencv_is():
    pytest.importorskip("cv2")
    assert gauges.find_faces(np.full((2, 64, 64, 3), 128, np.uint8)) == (None, 0.0)
    data = pytest.importorskip("skimage.data")
    boxes, share = gauges.find_faces(np.stack([data.astronaut()] * 3))
    left, top, right, bottom = boxes.mean(axis=0)
    assert share == 1 and left < 220 < right and top < 110 < bottom  # the nose


def test_a_sheet_shows_references_frames_and_time():
    frames = np.full((33, 24, 32, 3), 90, np.uint8)
    hill = np.sin(np.linspace(0, np.pi, 33))
    audio = (np.repeat(hill, RATE // 16) * np.sin(np.arange(33 * RATE // 16))).astype(np.float32)
    picture = np.full((48, 64, 3), [200, 10, 10], np.uint8)
    sheet = talking_sheet(Clip(frames, 16, audio, RATE), [picture], [hill])
    assert sheet.shape == (2 * 28 - 4 + 4 + 56, 7 * 36 - 4, 3) and (sheet[2, 2] == picture[0, 0]).all()
    assert (sheet[30, 2] == 255).all() and (sheet[30, 40] == 90).all()  # one reference, two rows of frames
    strip = sheet[-56:].astype(int)
    grey = (strip == 190).all(-1).sum(axis=0)
    line = np.argmax(np.abs(strip - [200, 30, 60]).sum(-1) == 0, axis=0)
    assert grey[5] < 10 and grey[strip.shape[1] // 2] > 40  # the hill, and the line along its outline
    assert np.abs(56 - line - grey)[20:-20].max() < 12
    silent = talking_sheet(Clip(frames, 16), [])
    assert silent.shape == (52, 6 * 36 - 4, 3)
