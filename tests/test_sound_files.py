"""Sound in and out of files: every container gives the same voice, hostile ones are refused, mp4 keeps it in time."""

from __future__ import annotations

import struct
import subprocess
import sys
import time
import wave
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest

from wan_jax import ffmpeg
from wan_jax.errors import InputError
from wan_jax.media import Clip, file_kind, read_audio, read_video, resample

RATE, SECONDS, PITCH = 44_100, 2, 440.0
CONTAINERS = {  # name -> codec and options
    "a.wav": ["-c:a", "pcm_s16le"],
    "a24.wav": ["-c:a", "pcm_s24le"],
    "afloat.wav": ["-c:a", "pcm_f32le"],
    "a.flac": ["-c:a", "flac"],
    "a.mp3": ["-c:a", "libmp3lame", "-b:a", "128k"],
    "bare.mp3": ["-c:a", "libmp3lame", "-b:a", "128k", "-id3v2_version", "0", "-write_xing", "0"],
    "a.ogg": ["-c:a", "libvorbis"],
    "a.opus": ["-c:a", "libopus"],
    "a.m4a": ["-c:a", "aac"],
    "a.mov": ["-c:a", "aac"],
    "a.mkv": ["-c:a", "flac"],
    "a.webm": ["-c:a", "libopus"],
    "a.avi": ["-c:a", "pcm_s16le"],
}


def run_ffmpeg(*args: object) -> None:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-nostdin", "-y", *map(str, args)]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def tone(frequency: float, rate: int, seconds: float = SECONDS) -> np.ndarray:
    """A sine of amplitude 0.5."""
    return (0.5 * np.sin(2 * np.pi * frequency / rate * np.arange(round(rate * seconds)))).astype(np.float32)


def level(signal: np.ndarray, frequency: float, rate: int = 16_000) -> float:
    """Amplitude of a sine in a signal, its first and last tenth left out."""
    signal = signal[len(signal) // 10 : -len(signal) // 10]
    window = np.hanning(len(signal))
    wave = np.exp(-2j * np.pi * frequency / rate * np.arange(len(signal)))
    return 2 * abs(np.sum(signal * window * wave)) / window.sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same two seconds of stereo sound, in phase, in every container."""
    folder = tmp_path_factory.mktemp("sounds")
    raw = folder / "stereo.f32"
    np.repeat(tone(PITCH, RATE)[:, None], 2, axis=1).astype("<f4").tofile(raw)
    for name, options in CONTAINERS.items():
        run_ffmpeg("-f", "f32le", "-ar", RATE, "-ac", 2, "-i", raw, *options, folder / name)
    return folder


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_voice(folder: Path, name: str) -> None:
    voice = read_audio(folder / name)
    assert voice.dtype == np.float32 and voice.ndim == 1
    assert abs(len(voice) / 16_000 - SECONDS) < 0.06  # codecs pad by frames
    scale = 0.95 if name.endswith(".mp3") else 1  # LAME lowers what it encodes
    assert level(voice, PITCH) == pytest.approx(0.5 * scale, rel=0.02)
    spectrum = np.abs(np.fft.rfft(voice[:16_000] * np.hanning(16_000)))
    assert spectrum.argmax() == PITCH  # of a second: Hz
    movie = Path(name).suffix in (".m4a", ".mov", ".mkv", ".webm", ".avi")
    assert file_kind(folder / name) == ("video" if movie else "sound")


def test_the_voice_of_a_video_comes_without_its_picture(tmp_path: Path) -> None:
    frames = np.zeros((33, 16, 16, 3), np.uint8)
    path = Clip(frames, 16, tone(PITCH, 48_000, 1), 48_000).save(tmp_path / "short.mp4")  # sound ends before picture
    assert len(read_audio(path)) == pytest.approx(16_000, abs=1100)
    assert level(read_audio(path), PITCH) == pytest.approx(0.5, rel=0.02)
    with pytest.raises(InputError, match=r"silent\.mp4 has no sound track"):
        read_audio(Clip(frames, 16).save(tmp_path / "silent.mp4"))


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000, 96_000])
def test_resampling_keeps_level_and_pitch(rate: int) -> None:
    voice = resample(tone(1000, rate), rate)
    assert len(voice) == 16_000 * SECONDS
    assert level(voice, 1000) == pytest.approx(0.5, rel=1e-3)
    rest = voice[1600:-1600] - tone(1000, 16_000)[1600:-1600]
    assert np.abs(rest).max() < 1e-3  # and phase: no delay


def test_resampling_removes_what_does_not_fit() -> None:
    voice = resample(tone(11_000, 48_000) + tone(300, 48_000), 48_000)
    assert level(voice, 300) == pytest.approx(0.5, rel=1e-3)
    assert level(voice, 16_000 - 11_000) < 1e-4, "folded back"


def test_resampling_mixes_and_clips() -> None:
    left, right = tone(500, 16_000), tone(700, 16_000)
    np.testing.assert_allclose(resample(np.stack([left, right], 1), 16_000), (left + right) / 2, atol=1e-7)
    assert np.abs(resample(np.full(4800, 1, np.float32) * np.sign(tone(440, 48_000, 0.1)), 48_000)).max() == 1
    for rate in (0, 1, 10**9):
        with pytest.raises(InputError, match="need 4000 to 384000"):
            resample(left, rate)


# ---- damage and attacks ------------------------------------------------------------------------------------


def refused(path: Path, message: str) -> None:
    """Refused within a second."""
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        read_audio(path)
    assert time.monotonic() - start < 1


def silent_flac(path: Path, seconds: int) -> Path:
    """As an encoder would write it, but in no time: one constant block after the other. Source: RFC 9639."""

    def crc(data: bytes, width: int, polynomial: int) -> bytes:
        value = 0
        for byte in data:
            value ^= byte << width - 8
            for _ in range(8):
                value = value << 1 ^ (polynomial if value >> width - 1 else 0)
                value &= (1 << width) - 1
        return value.to_bytes(width // 8)

    block, rate = 32_768, 16_000
    count = -(-seconds * rate // block)
    info = struct.pack(">HH", block, block) + bytes(6) + (rate << 44 | 15 << 36 | count * block).to_bytes(8) + bytes(16)
    frames = []
    for number in range(count):  # at most 65,535: three bytes of UTF-8
        coded = chr(number).encode("utf-8", "surrogatepass")
        head = bytes([0xFF, 0xF8, 0xF5, 0x08]) + coded  # 32,768 samples of 16 kHz, mono, 16 bits
        frame = head + crc(head, 8, 0x07) + bytes(3)  # one constant subframe of zeros
        frames.append(frame + crc(frame, 16, 0x8005))
    path.write_bytes(b"fLaC" + bytes([0x80, 0, 0, 34]) + info + b"".join(frames))
    return path


def test_a_sound_of_ten_hours_is_refused(tmp_path: Path) -> None:
    assert len(read_audio(silent_flac(tmp_path / "short.flac", 4))) >= 64_000  # a real flac
    bomb = silent_flac(tmp_path / "bomb.flac", 36_000)
    assert bomb.stat().st_size < 300_000
    code = (
        "import resource, sys, time\nfrom wan_jax.media import read_audio\n"
        "def peak(): return sum(resource.getrusage(who).ru_maxrss for who in (0, -1))  # kB, this and its children\n"
        "before, start = peak(), time.monotonic()\n"
        "try: read_audio(sys.argv[1])\nexcept ValueError as error: print(error)\n"
        "print(time.monotonic() - start, (peak() - before) / 1000)"
    )
    said, numbers = subprocess.check_output([sys.executable, "-c", code, bomb], text=True).splitlines()
    seconds, megabytes = map(float, numbers.split())
    assert "lasts 3600" in said and "the limit is 30" in said
    assert seconds < 1 and megabytes < 200
    data = bytearray(bomb.read_bytes())
    for stated in (0, 16_000):  # samples; 0 is unknown. At most 31 s are decoded.
        data[21] &= 0xF0
        data[22:26] = stated.to_bytes(4)
        (tmp_path / "lying.flac").write_bytes(data)
        refused(tmp_path / "lying.flac", r"lasts .* s, the limit is 30 s: cut it first")


def test_a_wav_that_claims_too_much_is_refused(folder: Path, tmp_path: Path) -> None:
    path, data = tmp_path / "huge.wav", bytearray((folder / "a.wav").read_bytes())
    size, form = data.index(b"data") + 4, data.index(b"fmt ")
    for where, value in ((size, 2**31 - 256), (form + 12, 2**31 - 1), (form + 12, 1)):
        claims = data[:where] + struct.pack("<I", value) + data[where + 4 :]
        path.write_bytes(claims)
        refused(path, "cannot be decoded|need 4000 to 384000|the limit is 30 s|get an intact copy")


@pytest.mark.parametrize("name", [name for name in CONTAINERS if name not in ("a.ogg", "a.opus", "bare.mp3")])
def test_a_file_that_was_cut_off_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    data = (folder / name).read_bytes()
    path = tmp_path / name
    path.write_bytes(data[: len(data) * 2 // 5])
    refused(path, "cannot be decoded|get an intact copy")


def test_playlists_in_disguise_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret.wav").write_bytes((folder / "a.wav").read_bytes())
    texts = {
        "ffconcat": "ffconcat version 1.0\nfile secret.wav\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{folder}/a.wav\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=audio 5004 RTP/AVP 96\n",
        "signed": "1234ftyp\nffconcat version 1.0\nfile secret.wav\n",
        "tagged": "ID3\nffconcat version 1.0\nfile secret.wav\n",
        "text": "hello",
        "empty": "",
    }
    for name, text in texts.items():
        path = tmp_path / f"{name}.wav"
        path.write_text(text)
        refused(path, "is not an mp4, .*wav.* file: convert it to wav|cannot be decoded|no sound track")
    for name in (f"concat:{folder}/a.wav", "sine=d=1", "data:audio/wav;base64,UklGRg", "/dev/zero", "a-%03d.wav"):
        refused(name, "give the path of a local file")
    refused(folder / "stereo.f32", "is not an mp4")


def test_limits_and_bad_samples(folder: Path, tmp_path: Path) -> None:
    limits = ({"max_duration": 1}, r"lasts 2\.0 s, the limit is 1 s"), ({"max_bytes": 1000}, "limit is 0.0 MB")
    for limit, message in limits:
        with pytest.raises(InputError, match=message):
            read_audio(folder / "a.wav", **limit)
    data = bytearray((folder / "afloat.wav").read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    (tmp_path / "nan.wav").write_bytes(data)
    refused(tmp_path / "nan.wav", "not finite")
    with wave.open(str(tmp_path / "none.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
    refused(tmp_path / "none.wav", "cannot be decoded|holds 0.00 s")


# ---- mp4 with sound ----------------------------------------------------------------------------------------


def test_a_generated_clip_keeps_its_sound_in_time(tmp_path: Path) -> None:
    """121 frames at 24 a second and 157 audio latents of 512 samples, as Ovi and DreamID-Omni make them."""
    video, sound = np.zeros((121, 16, 16, 3), np.uint8), np.zeros(157 * 512, np.float32)
    beep, events = tone(1000, 16_000, 1 / 24), (10, 60, 110)
    for frame in events:
        video[frame] = 255
        sound[(start := round(frame * 16_000 / 24)) : start + len(beep)] = beep
    path = Clip(video, 24, sound, 16_000).save(tmp_path / "clip.mp4")

    back, heard = read_video(path), read_audio(path)
    assert tuple(np.flatnonzero(back.video.mean((1, 2, 3)) > 128)) == events
    for track in (back.audio, heard):
        for frame in events:
            start, reach = round(frame * 16_000 / 24), 320
            lag = np.correlate(track[start - reach : start + len(beep) + reach], beep).argmax() - reach
            assert abs(lag) / 16_000 <= 0.005
    found = ffmpeg.probe(path, decode_all=True)
    assert abs(found.num_samples / found.sample_rate - found.num_frames / found.fps) <= 1 / 24
    assert abs(found.duration - 121 / 24) <= 1 / 24
