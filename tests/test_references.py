"""`wan_jax.references`: files and arrays become looks and voices, wrong ones are refused before anything is loaded."""

from __future__ import annotations

import logging
import struct
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wan_jax import references
from wan_jax.errors import InputError
from wan_jax.media import Clip, read_image
from wan_jax.references import Reference, best_frame, clean_voice, letterbox, resolve_references, voice_crop

RATE = 16_000
RNG = np.random.default_rng(0)
PHOTO = RNG.integers(0, 256, (12, 20, 3), np.uint8)


def sine(seconds: float, frequency: float = 200, amplitude: float = 0.3) -> np.ndarray:
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def speech(seconds: float, pitch: float = 120, amplitude: float = 0.3) -> np.ndarray:
    """Pulses at the pitch of a voice, with its overtones: voiced, unlike noise."""
    return amplitude * sum(sine(seconds, pitch * k, 0.5 / k) for k in range(1, 20)).astype(np.float32)


def noise(seconds: float, amplitude: float) -> np.ndarray:
    return (amplitude * RNG.standard_normal(round(seconds * RATE))).clip(-1, 1).astype(np.float32)


def silence(seconds: float) -> np.ndarray:
    return np.zeros(round(seconds * RATE), np.float32)


VOICE = sine(2.5)


def blurred(picture: np.ndarray, times: int) -> np.ndarray:
    """Mean of every pixel and its right and lower neighbours, again and again."""
    values = picture.astype(float)
    for _ in range(times):
        values = (values + np.roll(values, 1, 0) + np.roll(values, 1, 1)) / 3
    return values.round().astype(np.uint8)


def smooth(seed: int) -> np.ndarray:
    """A grey picture with detail that a codec keeps."""
    picture = np.random.default_rng(seed).integers(0, 256, (8, 12, 1), np.uint8)
    return np.kron(picture, np.ones((8, 8, 3), np.uint8))


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 frames at 8 a second; the sharp one is 13, sharper still are the first and the last. With a stereo voice."""
    frames = [blurred(smooth(k), 12) for k in range(20)]
    for k in (0, 13, 19):
        frames[k] = smooth(k)
    sound = np.repeat(sine(2.5)[:, None], 2, axis=1)
    return Clip(np.stack(frames), 8, sound, RATE).save(tmp_path_factory.mktemp("movie") / "friend.mp4", crf=4)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(PHOTO).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


# ---- Reference ---------------------------------------------------------------------------------------------


def test_a_photo_and_a_voice_in_every_form(photo: Path, tmp_path: Path) -> None:
    voice = Clip(np.zeros((20, 16, 16, 3), np.uint8), 8, VOICE, RATE).save(tmp_path / "voice.mp4")
    given = (
        Reference(photo, voice=voice, description="a man"),
        Reference(str(photo), voice=(VOICE, RATE)),
        Reference(Image.open(photo), voice=(np.repeat(VOICE[:, None], 2, 1), RATE)),
        Reference(PHOTO),
    )
    found = resolve_references(given)
    for reference in found:
        assert np.array_equal(reference.image, PHOTO) and reference.image.dtype == np.uint8
        assert len(reference.image_sha256) == 64 and reference.image_sha256 == found[0].image_sha256
    assert [reference.description for reference in found] == ["a man", None, None, None]
    for reference in found[:3]:
        assert reference.voice.dtype == np.float32 and abs(len(reference.voice) - len(VOICE)) < 1200
        assert np.abs(reference.voice[4000:30_000] - VOICE[4000:30_000]).max() < 0.02
        assert np.array_equal(reference.voice_second, reference.voice[RATE : 2 * RATE])
    assert found[1].voice_sha256 != found[0].voice_sha256
    assert (found[3].voice, found[3].voice_second, found[3].voice_sha256) == (None, None, None)


def test_voices_of_other_rates_are_resampled() -> None:
    wave = (0.3 * np.sin(2 * np.pi * 200 * np.arange(44_100 * 2) / 44_100)).astype(np.float32)
    (found,) = resolve_references([Reference(PHOTO, voice=(wave, 44_100))])
    assert np.abs(found.voice[1000:-1000] - sine(2)[1000:-1000]).max() < 1e-3


def test_a_video_gives_look_and_voice(movie: Path) -> None:
    (found,) = resolve_references([Reference.open(movie)])
    assert np.abs(found.image.astype(int) - smooth(13)).mean() < 4
    assert abs(len(found.voice) - 40_000) < 1200
    assert np.abs(found.voice[4000:30_000] - VOICE[4000:30_000]).max() < 0.02
    (other,) = resolve_references([Reference(video=movie, voice=(sine(1, 300), RATE))])
    assert np.array_equal(other.voice, sine(1, 300)), "a voice goes before the sound of the video"
    silent = Clip(np.stack([PHOTO] * 3), 8)
    (mute,) = resolve_references([Reference(video=silent)])
    assert mute.voice is None and np.array_equal(mute.image, PHOTO)


def test_a_long_video_is_thinned_not_refused(movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(references, "VIDEO_PIXELS", 10 * 64 * 96)
    (found,) = resolve_references([Reference(video=movie)])
    assert found.image.shape == (64, 96, 3) and abs(len(found.voice) - 40_000) < 3000


def test_open_looks_into_the_file(photo: Path, movie: Path, tmp_path: Path) -> None:
    disguised = photo.rename(tmp_path / "photo.mp4")
    assert Reference.open(disguised).image == disguised
    reference = Reference.open(movie, voice="x.wav", description="a dog")
    assert (reference.image, reference.video, reference.voice, reference.description) == (None, movie, "x.wav", "a dog")
    (tmp_path / "voice.jpg").write_bytes(b"RIFF\0\0\0\0WAVE")
    with pytest.raises(InputError, match="is a sound: give it as the voice"):
        Reference.open(tmp_path / "voice.jpg")
    with pytest.raises(InputError, match="is missing"):
        Reference.open(tmp_path / "none.png")


# ---- what is refused, and what is only said ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "0 references: need 1 to 5"),
        ([Reference(PHOTO)] * 6, "6 references: need 1 to 5"),
        ([Reference(PHOTO), Reference(voice=(VOICE, RATE))], "reference 2 has a voice but no image or video"),
        ([Reference(description="a man")], "reference 1 has no image or video"),
        ([Reference(PHOTO, video="a.mp4")], "reference 1 has an image and a video"),
        ([Reference(PHOTO, voice=(sine(0.49), RATE))], "voice of reference 1 lasts 0.49 s: need 0.5 to 30"),
        ([Reference(PHOTO, voice=(sine(30.1), RATE))], "lasts 30.10 s"),
        ([Reference(PHOTO, voice=(VOICE * 5, RATE))], "voice of reference 1 has a peak of 1.5"),
        ([Reference(PHOTO, voice=((VOICE * 9).astype(np.int16), RATE))], "is int16"),
        ([Reference(PHOTO, voice=(VOICE, 100))], "sample_rate=100"),
        ([Reference(PHOTO, voice="none.wav")], "none.wav is missing"),
        ([Reference("none.png")], "none.png is missing"),
    ],
)
def test_wrong_references_are_refused(given: list[Reference], message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_references(given)


@pytest.mark.parametrize("seconds", [0.5, 30])
def test_the_shortest_and_the_longest_voice(seconds: float) -> None:
    (found,) = resolve_references([Reference(PHOTO, voice=(sine(seconds), RATE))])
    assert len(found.voice) == seconds * RATE and found.voice_second.shape == (RATE,)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_120_megapixels_is_refused(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", 12_000, 10_000, 8, 2, 0, 0, 0))
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(bytes(9999))) + chunk(b"IEND", b""))
    start = time.monotonic()
    with pytest.raises(InputError, match="120.0 Mpixel, the limit is 64"):
        resolve_references([Reference.open(path)])
    assert time.monotonic() - start < 1


@pytest.mark.parametrize(
    ("voice", "clean", "said"),
    [
        (silence(2), False, "the voice of reference 1 is silent"),
        (noise(3, 1e-4), True, "the voice of reference 1 is silent"),
        (np.concatenate([sine(1), silence(2)]), False, "is silent from 1 to 2 s"),
        (np.concatenate([sine(1), silence(2)]), True, ""),
        (VOICE, False, ""),
    ],
)
def test_a_silent_voice_is_a_warning(voice: np.ndarray, clean: bool, said: str, caplog) -> None:
    resolve_references([Reference(PHOTO, voice=(voice, RATE))], clean=clean)
    assert said in caplog.text and bool(caplog.records) == bool(said)


def test_many_references_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        resolve_references([Reference(PHOTO)] * 2)
        assert not caplog.records
        resolve_references([Reference(PHOTO)] * 5)
    assert "5 references: the released weights were trained on one or two" in caplog.text


# ---- pictures ----------------------------------------------------------------------------------------------


def test_the_sharpest_frame_is_chosen() -> None:
    video = np.stack([blurred(PHOTO, k % 7 + 2) for k in range(60)])
    video[[2, 57]] = PHOTO  # in the first and the last 5 %
    video[[31, 44]] = blurred(PHOTO, 1)
    assert best_frame(video) == 31
    assert best_frame(video[:1]) == 0
    glow = np.linspace(0, 255, 16).astype(np.uint8)[:, None, None].repeat(16, 1).repeat(3, 2)
    grain = 100 + RNG.integers(0, 30, (16, 16, 3), np.uint8)
    assert best_frame(np.stack([glow, grain])) == 1, "contrast is not sharpness"
    colour = np.zeros((3, 16, 16, 3), np.uint8)
    colour[1, ::2, :, 2], colour[2, ::2, :, 1] = 255, 255  # stripes of blue and of green: luma counts
    assert best_frame(colour) == 2


def test_letterbox_keeps_the_whole_picture() -> None:
    white = np.full((40, 30, 3), 255, np.uint8)
    assert (letterbox(white, 64, 96) == 255).all()
    boxed = letterbox(np.zeros((40, 30, 3), np.uint8), 64, 96)
    assert boxed.shape == (64, 96, 3) and (boxed[:, 24:72] == 0).all() and (boxed[:, :24] == 255).all()
    assert np.array_equal(letterbox(PHOTO, 12, 20), PHOTO)
    assert letterbox(np.zeros((1, 900, 3), np.uint8), 64, 96)[31:33].min() == 0


# ---- voices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 8000, 12_000, 16_000, 24_000, 31_999, 32_000, 80_000])
def test_the_official_second(length: int) -> None:
    wave = np.arange(length, dtype=np.float32)
    expected = np.arange(16_000, 32_000)
    assert np.array_equal(voice_crop(wave), expected % length if length < 32_000 else expected)
    assert voice_crop(wave).dtype == np.float32
    assert np.array_equal(voice_crop(np.arange(100), 40), np.arange(40, 80))


def test_clean_voice_finds_the_voiced_second() -> None:
    hum = sine(1.5, 100, 0.002)
    parts = [silence(1), noise(1.5, 0.3), hum, silence(0.5), speech(1.2), silence(0.4), noise(2, 0.3), speech(0.3)]
    wave = np.concatenate(parts)
    found = clean_voice(wave)
    assert found.shape == (RATE,) and found.dtype == np.float32
    begin = round(4.5 * RATE)  # of the 1.2 s of speech
    start = np.correlate(wave, found).argmax() - begin
    assert -160 <= start <= 0.2 * RATE + 160
    assert np.sqrt(np.mean(found**2)) == pytest.approx(0.1, rel=1e-3), "-20 dBFS"


@pytest.mark.parametrize("gain", [0.05, 0.3, 3])
def test_clean_voice_evens_the_loudness(gain: float) -> None:
    quiet = clean_voice((gain * speech(2)).clip(-1, 1))
    assert np.sqrt(np.mean(quiet**2)) == pytest.approx(0.1, rel=1e-3)
    click = silence(1)
    click[8000:8010] = gain / 3
    assert np.abs(clean_voice(click)).max() <= 0.9901


def test_clean_voice_loops_short_ones_and_lets_silence_be() -> None:
    short = clean_voice(np.concatenate([silence(0.6), speech(0.5), silence(0.6)]))
    assert short.shape == (RATE,) and (np.abs(short.reshape(10, -1)).max(axis=1) > 0.05).all(), "silence was left"
    assert np.array_equal(clean_voice(silence(3)), silence(1))


def test_a_voice_without_a_face_is_a_warning(caplog, monkeypatch):
    voice = (np.float32(0.3) * np.sin(np.arange(32_000, dtype=np.float32) / 20), 16_000)
    for found, warned in ((None, False), (True, False), (False, True)):
        caplog.clear()
        monkeypatch.setattr(references, "shows_face", lambda picture, found=found: found)
        resolve_references([Reference(image=np.zeros((8, 8, 3), np.uint8), voice=voice)])
        assert ("no face was found" in caplog.text) == warned


def test_faces_are_found():
    pytest.importorskip("cv2")
    folder = Path(pytest.importorskip("skimage").__file__).parent / "data"
    assert references.shows_face(read_image(folder / "astronaut.png"))
    assert not references.shows_face(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8))
