"""Pictures, video and sound in and out of files: `read_image`, `read_video`, `read_audio`, `Clip`, `save`.

What is read is not trusted: formats are an explicit list, sizes are checked before anything is decoded. What
is written appears under its final name only when it is complete and has been read back.

Axes: ``T`` frames, ``H W`` height and width in pixels. Pixels are uint8 sRGB, sound is float32 in [-1, 1].
"""

from __future__ import annotations

import base64
import itertools
import json
import math
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from wan_jax import ffmpeg
from wan_jax.errors import InputError, WanError, nearest

if TYPE_CHECKING:
    from PIL import Image

STILLS = (".png", ".jpg", ".jpeg")
SUFFIXES = (".mp4", ".gif", ".webp", *STILLS, ".wav")
PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow")
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # not EPS and others that start programs
MAX_SETTINGS_BYTES = 64_000  # of JSON; a JPEG segment holds 65,533 bytes

_NUMBER = re.compile(r"%0(\d)d")  # the frame number in the name of a picture sequence
_EXIF_IFD, _USER_COMMENT, _ASCII = 0x8769, 0x9286, b"ASCII\0\0\0"  # Exif 2.3, section 4.6.5


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames, sound or both, and the settings that made them. Shown as a player in a notebook.

    Args:
        video: uint8 [T, H, W, 3], sRGB, at least one frame; None for sound alone.
        fps: frames per second, 0.1 to 240.
        audio: float32 [n] or [n, channels] in [-1, 1], one or two channels; it starts with the first frame.
        sample_rate: samples per second, given exactly when there is sound.
        settings: a JSON object, written into every file that is saved.

    Raises:
        InputError: for another shape, dtype or range.
    """

    video: np.ndarray | None
    fps: float
    audio: np.ndarray | None = None
    sample_rate: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        video, audio = self.video, self.audio
        if video is None and audio is None:
            raise InputError("a clip needs video or audio")
        if video is not None and (
            video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3 or not video.size
        ):
            raise InputError(f"video is {video.dtype} {list(video.shape)}: need uint8 [T, H, W, 3], none 0")
        if not 0.1 <= self.fps <= 240:
            raise InputError(f"fps={self.fps}: need 0.1 to 240, for example 16")
        if (audio is None) != (self.sample_rate is None):
            raise InputError("audio and sample_rate: give both or neither")
        if audio is not None:
            check_audio("audio", audio)

    @property
    def num_frames(self) -> int:
        """0 for sound alone."""
        return 0 if self.video is None else len(self.video)

    @property
    def duration(self) -> float:
        """Length of the picture in seconds, or of sound alone."""
        return len(self.audio) / self.sample_rate if self.video is None else self.num_frames / self.fps

    def save(self, path: str | Path, **encoding: Any) -> Path:
        """Write the clip to ``path``; see `save`."""
        return save(self, path, **encoding)

    def _repr_html_(self) -> str:
        tag, suffix = ("audio", "wav") if self.video is None else ("video", "mp4")
        with tempfile.TemporaryDirectory() as folder:
            data = base64.b64encode(self.save(Path(folder, f"clip.{suffix}")).read_bytes()).decode()
        return f'<{tag} controls loop src="data:{tag}/{suffix};base64,{data}"></{tag}>'


def check_audio(name: str, audio: np.ndarray) -> None:
    """Refuse all but float32 [n] or [n, 1 or 2] in [-1, 1]."""
    if audio.dtype != np.float32 or audio.shape[1:] not in ((), (1,), (2,)) or not audio.size:
        raise InputError(f"{name} is {audio.dtype} {list(audio.shape)}: need float32 [n] or [n, 1 or 2]")
    if not (peak := float(np.abs(audio).max())) <= 1:  # so written, NaN fails too
        raise InputError(f"{name} has a peak of {peak:.3g}: need [-1, 1], so scale or clip it")


# ---- in ----------------------------------------------------------------------------------------------------


def read_image(
    source: str | Path | np.ndarray | Image.Image,
    *,
    max_pixels: int = 64_000_000,
    max_bytes: int = 20_000_000,
) -> np.ndarray:
    """One picture as it is meant to be seen: upright (EXIF), transparent parts on white, 8 bits.

    Args:
        source: a PNG, JPEG, WebP, GIF (first frame), BMP or TIFF file, a Pillow image, or a uint8 array
            [H, W], [H, W, 3] or [H, W, 4] (the fourth channel is opacity).
        max_pixels, max_bytes: limits that are checked before decoding.

    Returns:
        uint8 [H, W, 3]. Colour profiles are not applied, as in the official code, which also uses Pillow.

    Raises:
        InputError: missing, not a picture, truncated, or over a limit.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        fits = source.ndim >= 2 and source.shape[2:] in ((), (3,), (4,)) and source.size
        if source.dtype != np.uint8 or not fits:
            raise InputError(f"image array is {source.dtype} {list(source.shape)}: need uint8 [H, W, 3]")
        return _to_rgb(Image.fromarray(source), max_pixels)
    if isinstance(source, Image.Image):
        with _pillow_errors("image"):
            return _to_rgb(source, max_pixels)
    path = _existing_file(source, max_bytes)
    with _pillow_errors(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        return _to_rgb(image, max_pixels)


def read_video(
    path: str | Path,
    *,
    max_frames: int | None = None,
    max_duration: float = 30,
    max_pixels: int = 500_000_000,
    max_bytes: int = 100_000_000,
    thin: bool = False,
) -> Clip:
    """The first picture and sound tracks of an mp4, mov, mkv, webm, avi or gif file.

    A variable frame rate becomes constant, rotation flags are applied, more than two sound channels are mixed
    to stereo, sound is cut or padded to the frames. An untagged file is taken as BT.601, ffmpeg's default.

    Args:
        max_frames: read only this many frames from the start.
        max_duration, max_pixels, max_bytes: limits of the stated length in seconds, of frames x height x
            width to be read, and of the file's size; checked before decoding.
        thin: keep to ``max_pixels`` by a lower frame rate, instead of refusing.

    Returns:
        The clip, with the settings of `read_settings` if there are any.

    Raises:
        InputError: missing, of another container (playlists too), damaged, or over a limit.
    """
    if max_frames is not None and max_frames < 1:
        raise InputError(f"max_frames={max_frames}: need at least 1")
    path = _existing_file(path, max_bytes)
    found = ffmpeg.probe(path)
    if found.duration > max_duration:
        raise InputError(f"{path} lasts {found.duration:.1f} s, the limit is {max_duration} s: cut it first")
    num_frames = math.ceil((found.duration + 0.01) * found.fps)  # durations are stated to 0.01 s
    num_frames = min(num_frames, max_frames or num_frames)
    fitting = max_pixels // (found.height * found.width)
    if thin and 0 < fitting < num_frames:
        rate = (found.fps * fitting / num_frames).limit_denominator(1001)
        found, num_frames = found._replace(fps=rate), fitting
    if num_frames > fitting:
        got, limit = f"{num_frames} frames of {found.width}x{found.height}", f"{max_pixels / 1e6:.0f} Mpixel"
        raise InputError(f"{path} has {got}, the limit is {limit} in all: shrink it or use max_frames")
    video, audio = ffmpeg.decode(path, found, num_frames)
    audio = None if audio is None else audio.clip(-1, 1)  # lossy codecs overshoot
    settings = {}
    with suppress(InputError):
        settings = read_settings(path)
    return Clip(video, float(found.fps), audio, found.sample_rate, settings)


def read_audio(
    path: str | Path,
    *,
    sample_rate: int = 16_000,
    max_duration: float = 30,
    max_bytes: int = 15_000_000,
) -> np.ndarray:
    """The sound of a wav, flac, mp3, ogg or opus file, or the first sound track of an m4a, mp4, mov, mkv, webm or avi.

    Args:
        sample_rate: samples per second of the result; see `resample`.
        max_duration, max_bytes: limits of the length in seconds and of the file's size. No more than a second beyond
            the limit is ever decoded, whatever the file states.

    Returns:
        float32 [n] in [-1, 1], channels mixed to one.

    Raises:
        InputError: missing, of another container (playlists too), damaged or cut off, without sound, or over a limit.
            An ogg file that was cut off between two pages is not recognised.
    """
    path = _existing_file(path, max_bytes)
    found = ffmpeg.decode_sound(path, max_duration + 1)
    heard = len(found.audio) / found.sample_rate
    stated = heard if found.duration is None else found.duration
    if max(heard, stated) > max_duration:
        raise InputError(f"{path} lasts {max(heard, stated):.1f} s, the limit is {max_duration} s: cut it first")
    if not heard or found.alone and stated - heard > 0.25:  # codecs and headers disagree by frames of up to 0.1 s
        raise InputError(f"{path} states {stated:.2f} s of sound and holds {heard:.2f} s: get an intact copy")
    if not np.isfinite(found.audio).all():
        raise InputError(f"{path} holds samples that are not finite: get an intact copy")
    return resample(found.audio, found.sample_rate, sample_rate)


def resample(audio: np.ndarray, sample_rate: int, to: int = 16_000) -> np.ndarray:
    """float32 [n] or [n, channels] as mono [n] at another rate, clipped to [-1, 1].

    Band-limited: what the new rate cannot hold is removed, not folded back (soxr's high quality, through librosa).
    """
    if not 4000 <= sample_rate <= 384_000:
        raise InputError(f"sample_rate={sample_rate}: need 4000 to 384000, for example {to}")
    mono = audio.mean(axis=1) if audio.ndim == 2 else audio
    if sample_rate != to:
        import librosa

        mono = librosa.resample(mono, orig_sr=sample_rate, target_sr=to, res_type="soxr_hq")
    return mono.clip(-1, 1)


def file_kind(path: str | Path) -> str:
    """"image", "video" or "sound", by the first bytes. Moving gifs count as images, sound in mp4 (m4a) as video."""
    kind = ffmpeg.container(_existing_file(path, max_bytes=sys.maxsize), ffmpeg.SOUND)
    return "image" if kind is None else "video" if kind in ffmpeg.MOVIES else "sound"


def to_unit(image_u8: np.ndarray) -> np.ndarray:
    """uint8 [0, 255] to float32 [-1, 1], rounded like torchvision's ``to_tensor(x).sub_(0.5).div_(0.5)``."""
    return (image_u8.astype(np.float32) / 255 - np.float32(0.5)) / np.float32(0.5)


def _existing_file(path: str | Path, max_bytes: int) -> Path:
    path = Path(path)
    try:
        size = path.stat().st_size if path.is_file() and os.access(path, os.R_OK) else None
    except (OSError, ValueError) as error:  # a name too long, or holding NUL
        raise InputError(f"{str(path)[:200]!r} is not a usable file name: {error}") from error
    if size is None:
        state = "not a readable file" if path.exists() else "missing"
        raise InputError(f"{path} is {state}: give the path of a local file")
    if size > max_bytes:
        limit = f"the limit is {max_bytes / 1e6:.1f} MB"
        raise InputError(f"{path} has {size / 1e6:.1f} MB, {limit}: shrink it or raise max_bytes")
    return path


@contextmanager
def _pillow_errors(name: str | Path) -> Iterator[None]:
    """Pillow's parsers raise many types on a damaged or hostile file; all of them become InputError."""
    try:
        yield
    except WanError:
        raise
    except Exception as error:
        known = ", ".join(IMAGE_FORMATS)
        raise InputError(f"{name} is not an intact {known} picture, convert it to PNG: {error}") from error


def _to_rgb(image: Image.Image, max_pixels: int) -> np.ndarray:
    from PIL import Image, ImageOps

    width, height = image.size
    if width * height > max_pixels:
        name = getattr(image, "filename", "") or "image"
        got, limit = f"{width}x{height} = {width * height / 1e6:.1f} Mpixel", f"{max_pixels / 1e6:.1f} Mpixel"
        raise InputError(f"{name} has {got}, the limit is {limit}: shrink it or raise max_pixels")
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion saturates at 255
        grey = np.clip(np.asarray(image), 0, 65535) / 257
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image.convert("RGB"))


# ---- out ---------------------------------------------------------------------------------------------------


def check_writable(path: str | Path, num_frames: int | None = None) -> Path:
    """Check a place to save to before any work is done for it. Creates nothing.

    Args:
        path: a file name with a known suffix, a name of numbered pictures such as ``shot-%05d.png``, or a
            folder written with a final ``/`` (``shot/`` stands for ``shot/shot-%05d.png``).
        num_frames: of the clip to come, if known; 0 for sound alone.

    Returns:
        The path for `save`.

    Raises:
        InputError: with the reason.
    """
    target = Path(path)
    if str(path).endswith(("/", os.sep)):
        target /= f"{os.path.basename(os.path.abspath(path))}-%05d.png"
    suffix = target.suffix.lower()
    numbered = _NUMBER.search(target.name)
    if suffix not in SUFFIXES:
        hint = nearest(suffix, SUFFIXES) or "; end the name of a folder for pictures with '/'"
        raise InputError(f"cannot write {target}: its suffix is none of {', '.join(SUFFIXES)}{hint}")
    if num_frames is not None and (suffix == ".wav") != (num_frames == 0):
        fix = "there is no picture: name it .wav" if num_frames == 0 else "a .wav holds no picture: name it .mp4"
        raise InputError(f"cannot write {target}: {fix}")
    if numbered and suffix not in STILLS:
        raise InputError(f"cannot write {target}: numbered files are for {', '.join(STILLS)}")
    if not numbered and suffix in STILLS and (num_frames or 1) > 1:
        pattern = f"{target.stem}-%05d{target.suffix}"
        raise InputError(f"cannot write {num_frames} frames to {target}: name it {pattern}, or .mp4")
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            target.lstat()  # raises for a name that the file system refuses
        reason = "it is a folder, end it with '/' for numbered pictures" if target.is_dir() else None
        parent = next(folder for folder in target.absolute().parents if folder.exists())
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            state = "write-protected" if parent.is_dir() else "not a folder"
            reason = f"{parent} is {state}, choose another place"
    except (OSError, ValueError) as error:
        reason = str(error)
    if reason:
        raise InputError(f"cannot write {str(target)[:200]!r}: {reason}")
    return target


def save(clip: Clip, path: str | Path, *, crf: int = 12, preset: str = "medium") -> Path:
    """Write ``clip``, with its settings inside, in the format of the suffix. An older file of that name is
    replaced in one step, and only after the new one has been read back.

    ``.mp4``: H.264 converted to and tagged as BT.709 limited range, AAC sound. An odd width or height keeps
    full colour resolution (yuv444p, which some players lack), since yuv420p needs even sides. ``.wav``: sound
    alone, 16 bits. ``.gif``,
    ``.webp``: animation without sound. ``.png``, ``.jpg``: one frame, or numbered files named as in
    `check_writable`, which replace an older and longer sequence of the same name whole.

    Args:
        crf: quality of the mp4, 0 (lossless) to 51; at 12 coding is not visible.
        preset: effort of the mp4, one of `PRESETS`.

    Returns:
        The path written; numbered files keep their ``%05d``.

    Raises:
        InputError: path, settings or options cannot be used.
        WanError: encoding or the check of the result failed. Nothing is left, an older file is untouched.
    """
    target = check_writable(path, clip.num_frames)
    text = _settings_text(clip.settings)
    if not 0 <= crf <= 51 or preset not in PRESETS:
        raise InputError(f"crf={crf}, preset={preset!r}: need 0 to 51 and one of {', '.join(PRESETS)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if _NUMBER.search(target.name):
            _save_numbered(clip, target, text)
        else:
            with _replacing(target) as temp:
                if temp.suffix == ".mp4":
                    ffmpeg.write_mp4(temp, clip, comment=text, crf=crf, preset=preset)
                elif temp.suffix == ".wav":
                    ffmpeg.write_wav(temp, clip.audio, clip.sample_rate, comment=text)
                else:
                    _write_pictures(temp, clip.video, clip.fps, text)
    except (OSError, WanError) as error:
        raise WanError(f"could not write {target}: {error}") from error
    return target


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    """A new name in the same folder, which takes the place of ``final`` if the block succeeds."""
    temp = final.with_name(f".wan_jax-{secrets.token_hex(8)}{final.suffix.lower()}")
    try:
        yield temp
        with temp.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, final)
    finally:
        temp.unlink(missing_ok=True)


def _save_numbered(clip: Clip, pattern: Path, text: str) -> None:
    def numbered(index: int) -> Path:
        return pattern.with_name(_NUMBER.sub(lambda match: f"{index:0{match[1]}d}", pattern.name))

    with ExitStack() as stack:  # no picture takes its name before all are written
        for index in range(clip.num_frames):
            temp = stack.enter_context(_replacing(numbered(index)))
            _write_pictures(temp, clip.video[index : index + 1], clip.fps, text)
    for index in itertools.count(clip.num_frames):
        if not numbered(index).exists():
            break
        numbered(index).unlink()


def _write_pictures(path: Path, video: np.ndarray, fps: float, text: str) -> None:
    """One picture or an animation, by the suffix; then read back."""
    from PIL import Image, ImageSequence, PngImagePlugin

    frames = [Image.fromarray(frame) for frame in video]
    comment = text.encode("ascii")
    info = PngImagePlugin.PngInfo()
    info.add_text("wan_jax", text)
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + comment
    # Times are rounded, not delays, so that errors do not add up.
    tick = 10 if path.suffix == ".gif" else 1  # ms
    delays = tick * np.diff(np.rint(np.arange(len(video) + 1) * 1000 / fps / tick)).astype(int)
    motion = {"save_all": True, "duration": delays.tolist(), "loop": 0}
    match path.suffix:
        case ".gif":  # one palette for all, from 16 of the frames, so that colours do not flicker
            sample = video[np.linspace(0, len(video) - 1, min(len(video), 16)).astype(int)]
            sample = Image.fromarray(sample.reshape(-1, video.shape[2], 3))
            palette = sample.quantize(256, method=Image.Quantize.MAXCOVERAGE)
            frames = [frame.quantize(palette=palette) for frame in frames]
            frames[0].save(path, append_images=frames[1:], comment=comment, **motion)
        case ".webp":
            frames[0].save(path, append_images=frames[1:], exif=exif, quality=90, **motion)
        case ".png":
            frames[0].save(path, pnginfo=info)
        case _:
            frames[0].save(path, exif=exif, quality=95, subsampling=0)

    with Image.open(path, formats=IMAGE_FORMATS) as image:
        for frame in ImageSequence.Iterator(image):
            frame.load()
        if image.size != frames[0].size:
            raise WanError(f"the picture reads back as {image.size}, written was {frames[0].size}")


def contact_sheet(clip: Clip, *, columns: int = 4, rows: int = 3, gap: int = 4) -> np.ndarray:
    """Up to columns x rows evenly spaced frames, the first and the last among them, row by row on white with
    ``gap`` pixels between: uint8 [H, W, 3]."""
    if columns < 1 or rows < 1 or gap < 0:
        raise InputError(f"columns={columns}, rows={rows}, gap={gap}: need at least 1, 1 and 0")
    count = min(columns * rows, clip.num_frames)
    columns, rows = min(columns, count), -(-count // columns)
    height, width = clip.video.shape[1:3]
    sheet = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    for place, index in enumerate(np.linspace(0, clip.num_frames - 1, count).round().astype(int)):
        top, left = place // columns * (height + gap), place % columns * (width + gap)
        sheet[top : top + height, left : left + width] = clip.video[index]
    return sheet


# ---- settings in the file ----------------------------------------------------------------------------------


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings inside a file that `save` wrote (of numbered pictures, any one).

    They are data of unknown origin: show them escaped, and do not follow paths or addresses in them.

    Raises:
        InputError: the file is missing, unreadable, or holds no settings.
    """
    path = _existing_file(path, max_bytes=sys.maxsize)
    if ffmpeg.container(path, (*ffmpeg.SOUND, "gif")) in (None, "gif"):
        text = _picture_comment(path)
    else:
        text = ffmpeg.read_comment(path)
    try:
        if not 0 < len(text) <= MAX_SETTINGS_BYTES:
            raise ValueError(f"its comment has {len(text)} characters, expected 1 to {MAX_SETTINGS_BYTES}")
        settings = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(settings, dict):
            raise ValueError(f"its comment is a JSON {type(settings).__name__}, expected an object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} holds no settings of wan_jax: {error}") from error
    return settings


def _picture_comment(path: Path) -> str:
    from PIL import Image

    with _pillow_errors(path), Image.open(path, formats=IMAGE_FORMATS) as image:
        if image.format == "PNG":
            return image.info.get("wan_jax", "")
        comment = image.info.get("comment", b"")
        if image.format != "GIF":
            comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"").removeprefix(_ASCII)
        return comment.decode("ascii", "replace")


def _settings_text(settings: dict[str, Any]) -> str:
    """Settings as ASCII JSON, which has no newline or control character that a container could interpret."""
    try:
        text = json.dumps(settings, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"settings are strings, finite numbers, lists and objects: {error}") from error
    if len(text) > MAX_SETTINGS_BYTES:
        raise InputError(f"settings take {len(text)} bytes of JSON, the limit is {MAX_SETTINGS_BYTES}")
    return text


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")
