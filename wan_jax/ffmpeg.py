"""Video and sound files through the ffmpeg program that imageio-ffmpeg carries. `wan_jax.media` is the only user.

Files to read are not trusted. The container is told by its first bytes, and ffmpeg is held to that demuxer (a
playlist named .mp4 would otherwise open other files), to local reads, a frame size and a time limit.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from wan_jax.errors import InputError, WanError

if TYPE_CHECKING:
    from wan_jax.media import Clip

_MAGIC = {  # ffmpeg's demuxer -> first bytes
    "mov": rb".{4}(ftyp|moov|mdat|wide|free|skip)",
    "matroska": rb"\x1a\x45\xdf\xa3",
    "avi": rb"RIFF.{4}AVI ",
    "gif": rb"GIF8[79]a",
    "wav": rb"RIFF.{4}WAVE",
    "flac": rb"fLaC",
    "ogg": rb"OggS",
    "mp3": rb"ID3|\xff[\xe2\xe3\xf2\xf3\xfa\xfb]",
}
MOVIES = ("mov", "matroska", "avi")  # may hold picture and sound
VIDEO = (*MOVIES, "gif")
SOUND = (*MOVIES, "wav", "flac", "ogg", "mp3")
_SCALE_FLAGS = "flags=accurate_rnd+full_chroma_int"
_MAX_SOUND_BYTES = 64_000_000  # decoded; 40 s at 384 kHz
_READ_TIMEOUT = 120  # seconds; the largest clips that `media.read_video` accepts take about 10


class Probe(NamedTuple):
    """What ffmpeg finds in a video file."""

    width: int  # as shown: rotation applied
    height: int
    fps: Fraction
    duration: float  # seconds, as the header claims
    channels: int  # 1 or 2; more are mixed to stereo
    sample_rate: int | None  # None without sound
    num_frames: int  # decoded
    num_samples: int  # decoded


class Sound(NamedTuple):
    """The start of a sound track, and what the file claims of it."""

    audio: np.ndarray  # float32 [n], mixed to mono
    sample_rate: int
    duration: float | None  # seconds, of the whole file
    alone: bool  # in its file: no picture, so the duration is that of the sound


def container(path: Path, among: Iterable[str] = VIDEO) -> str | None:
    """ffmpeg's name of the container that ``path`` is, or None."""
    with path.open("rb") as file:
        head = file.read(16)
    return next((name for name in among if re.match(_MAGIC[name], head, re.DOTALL)), None)


def probe(path: Path, *, decode_all: bool = False) -> Probe:
    """Streams and sizes of ``path``, after decoding its first frame or all of it.

    The wheel has no ffprobe. The ``framecrc`` format lists streams and frames in a fixed syntax; only the
    duration has to come from the log, where ffmpeg indents any text of the file deeper than its own.
    """
    tracks = ["-map", "0:v:0", "-map", "0:a:0?", "-fps_mode", "passthrough"]
    extent = [] if decode_all else ["-frames:v", "1", "-frames:a", "1"]
    listing, log = _read(path, "-loglevel", "info", *tracks, *extent, "-f", "framecrc", "pipe:1")
    text = listing.decode("ascii", "replace")
    head = dict(re.findall(r"^#(\w+ \d): (.+)$", text, re.MULTILINE))
    rows = [[int(number) for number in row.split(",")[:4]] for row in text.splitlines() if row[:1].isdigit()]
    try:
        width, height = map(int, head["dimensions 0"].split("x"))
        fps = 1 / Fraction(head["tb 0"])
        if (duration := _stated_duration(log)) is None:
            raise ValueError("no duration")
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise InputError(f"{path} does not state its size, rate and duration: convert it to mp4") from error
    return Probe(
        width=width,
        height=height,
        fps=fps,
        duration=duration,
        channels=1 if head.get("channel_layout_name 1") == "mono" else 2,
        sample_rate=int(head["sample_rate 1"]) if "sample_rate 1" in head else None,
        num_frames=sum(row[0] == 0 for row in rows),
        num_samples=sum(row[3] for row in rows if row[0] == 1),
    )


def decode(path: Path, found: Probe, num_frames: int) -> tuple[np.ndarray, np.ndarray | None]:
    """The first frames, uint8 [T, H, W, 3] at a constant rate, and just their sound, float32 [n] or [n, 2].

    Colour follows the tags of the file; an untagged one is taken as BT.601, ffmpeg's default.
    """
    # The size is the file's own, and given all the same: a hostile stream may change it half-way.
    picture = f"scale={found.width}:{found.height}:out_range=pc:{_SCALE_FLAGS},format=rgb24"
    extent = ["-frames:v", str(num_frames), "-r", str(found.fps), "-fps_mode", "cfr"]
    data, _ = _read(path, "-map", "0:v:0", "-vf", picture, *extent, "-f", "rawvideo", "pipe:1")
    video = np.frombuffer(data, np.uint8).reshape(-1, found.height, found.width, 3)
    if found.sample_rate is None:
        return video, None

    duration = len(video) / found.fps
    # first_pts=0: sound that starts after the picture gets silence in front.
    sound = ["-af", "aresample=async=1:first_pts=0", "-ac", str(found.channels), "-t", f"{float(duration):f}"]
    data, _ = _read(path, "-map", "0:a:0", *sound, "-f", "f32le", "pipe:1")
    heard = np.frombuffer(data, "<f4").reshape(-1, found.channels)
    audio = np.zeros((round(duration * found.sample_rate), found.channels), np.float32)
    audio[: len(heard)] = heard[: len(audio)]
    return video, audio[:, 0] if found.channels == 1 else audio


def decode_sound(path: Path, seconds: float) -> Sound:
    """The first sound track up to ``seconds``, at its own rate. Source of the header: Sun's AU format."""
    # Left alone, ffmpeg mixes floats by power and stereo gains 3 dB.
    mix = ["-af", "aresample=ochl=mono:rematrix_maxval=1"]
    output = ["-map", "0:a:0", "-t", f"{seconds:f}", "-fs", str(_MAX_SOUND_BYTES), *mix, "-c:a", "pcm_f32be"]
    try:
        data, log = _read(path, "-loglevel", "info", *output, "-f", "au", "pipe:1", sound=True)
    except InputError as error:
        if "matches no streams" in str(error):
            raise InputError(f"{path} has no sound track: give a file that has one") from error
        raise
    _, start, _, _, sample_rate, _ = struct.unpack(">4s5I", data[:24])
    audio = np.frombuffer(data, ">f4", offset=start).astype(np.float32)
    alone = not re.search(r"^  Stream #0:\d+.*: Video:", log, re.MULTILINE)
    return Sound(audio, sample_rate, _stated_duration(log), alone)


def read_comment(path: Path) -> str:
    """The ``comment`` of a video or sound file, or an empty string."""
    listing, _ = _read(path, "-f", "ffmetadata", "pipe:1", sound=container(path) is None)
    # Lines key=value, in which = ; # \ and newline are escaped by a backslash.
    line = re.search(r"^comment=(.*)$", listing.decode("utf-8", "replace"), re.MULTILINE)
    return re.sub(r"\\(.)", r"\1", line[1]) if line else ""


def write_mp4(path: Path, clip: Clip, *, comment: str, crf: int, preset: str) -> None:
    """H.264 and AAC, converted to and tagged as BT.709 limited range; then read back. See `media.save`."""
    num_frames, height, width = clip.video.shape[:3]
    pixels = "yuv420p" if height % 2 == width % 2 == 0 else "yuv444p"
    # Left alone, ffmpeg uses the BT.601 matrix, writes no tags and darkens by about a level. Tags are given
    # twice: ffmpeg 9 takes primaries and transfer from the frames (setparams), older ones from the options.
    convert = (
        f"scale=out_color_matrix=bt709:out_range=tv:{_SCALE_FLAGS},format={pixels},"
        "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
    )
    tags = ["-colorspace", "bt709", "-color_primaries", "bt709", "-color_trc", "bt709", "-color_range", "tv"]
    codecs = ["-c:v", "libx264", "-crf", str(crf), "-preset", preset, "-c:a", "aac", "-b:a", "192k"]
    rate = str(Fraction(clip.fps).limit_denominator(1001))  # 23.976... is 24000/1001
    picture = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-framerate", rate]
    with tempfile.TemporaryDirectory() as folder:
        sound: list[str] = []
        if clip.audio is not None:
            raw = Path(folder, "sound.f32")
            clip.audio.astype("<f4").tofile(raw)
            channels = str(clip.audio.size // len(clip.audio))
            sound = ["-f", "f32le", "-ar", str(clip.sample_rate), "-ac", channels, "-i", f"file:{raw}"]
        extras = ["-movflags", "+faststart", "-metadata", f"comment={comment}"]
        feed = np.ascontiguousarray(clip.video).data.cast("B")
        output = ["-vf", convert, *codecs, *tags, *extras, f"file:{path}"]
        _run(*picture, "-i", "pipe:0", *sound, *output, feed=feed)

    found = probe(path, decode_all=True)
    if (found.num_frames, found.height, found.width) != (num_frames, height, width):
        got = f"{found.num_frames} frames of {found.width}x{found.height}"
        raise WanError(f"the mp4 reads back as {got}, written were {num_frames} of {width}x{height}")
    written = len(clip.audio) / clip.sample_rate if clip.audio is not None else 0.0
    heard = found.num_samples / found.sample_rate if found.sample_rate else 0.0
    if abs(heard - written) > 1 / clip.fps:
        raise WanError(f"the mp4 reads back with {heard:.3f} s of sound, written were {written:.3f} s")


def write_wav(path: Path, audio: np.ndarray, sample_rate: int, *, comment: str) -> None:
    """16-bit PCM of float32 [n] or [n, channels]; then read back."""
    channels = str(audio.size // len(audio))
    source = ["-f", "f32le", "-ar", str(sample_rate), "-ac", channels, "-i", "pipe:0"]
    feed = np.ascontiguousarray(audio, "<f4").data.cast("B")
    _run(*source, "-c:a", "pcm_s16le", "-metadata", f"comment={comment}", f"file:{path}", feed=feed)
    found = decode_sound(path, len(audio) / sample_rate + 1)
    if len(found.audio) != len(audio):
        raise WanError(f"the wav reads back with {len(found.audio)} samples, written were {len(audio)}")


def _stated_duration(log: str) -> float | None:
    clock = re.search(r"^  Duration: (\d+):(\d+):(\d+\.\d+)", log, re.MULTILINE)
    return sum(float(part) * unit for part, unit in zip(clock.groups(), (3600, 60, 1), strict=True)) if clock else None


def _read(path: Path, *args: str, sound: bool = False) -> tuple[bytes, str]:
    good = "wav" if sound else "mp4"
    if (kind := container(path, SOUND if sound else VIDEO)) is None:
        others = ", m4a, wav, flac, mp3, ogg or opus" if sound else " or gif"
        raise InputError(f"{path} is not an mp4, mov, mkv, webm, avi{others} file: convert it to {good}")
    limits = ["-protocol_whitelist", "file,pipe", "-format_whitelist", kind, "-max_pixels", "64000000"]
    try:
        return _run(*limits, "-f", kind, "-i", f"file:{path}", *args, timeout=_READ_TIMEOUT)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"{path} took over {_READ_TIMEOUT} s to decode: convert it to {good}") from error
    except WanError as error:
        raise InputError(f"{path} cannot be decoded, get an intact copy or remake it: {error}") from error


def _run(*args: str, feed: memoryview | None = None, timeout: float | None = None) -> tuple[bytes, str]:
    """Standard output and log of one run, without a shell."""
    import imageio_ffmpeg

    quiet = ["-hide_banner", "-loglevel", "error", "-nostats", "-nostdin"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), *quiet, "-xerror", "-y", *args]
    # Without a feed the input is empty, not the terminal of the caller.
    done = subprocess.run(command, input=feed or b"", capture_output=True, timeout=timeout)
    log = done.stderr.decode("utf-8", "replace")
    if done.returncode:
        raise WanError("\n  ".join(["ffmpeg failed:", *log.strip().splitlines()[-12:]]))
    return done.stdout, log
