"""`wan_jax.media`: what is written comes back, hostile files are refused, no file is ever half-written."""

from __future__ import annotations

import struct
import subprocess
import time
import zlib
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from wan_jax import ffmpeg, media
from wan_jax.errors import InputError, WanError
from wan_jax.media import Clip, read_image, read_settings, read_video, save

ODD_TEXT = "a\n[CHAPTER]\ntitle=x;#\\ tab\t nul\0 'quote\" rtl\u202e mark\u200f 猫 😀 lone\ud800 %05d $(id)"
SETTINGS = {"prompt": ODD_TEXT, "seed": 2**60, "shift": 5.5, "size": [832, 480], "a=b\n": {"": [True, None]}}


def run_ffmpeg(*args: object) -> str:
    """ffmpeg's log; its exit status is not looked at, since ``-i`` alone counts as a failure."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-hide_banner", "-nostdin", "-y", *map(str, args)]
    return subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL).stderr.decode()


def moving(num_frames: int = 9, height: int = 32, width: int = 48) -> np.ndarray:
    """A smooth gradient that drifts, so that every frame differs: uint8 [T, H, W, 3]."""
    t, y, x = np.mgrid[:num_frames, :height, :width]
    return np.stack([x * 4 + t * 6, y * 6, (x + y) * 2 + 9 * t], -1).clip(0, 255).astype(np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(int) - b).mean())


def blocks(picture: np.ndarray) -> np.ndarray:
    """Means of 4x4 pixels, which dithering should keep."""
    height, width = picture.shape[:2]
    return picture.reshape(height // 4, 4, width // 4, 4, 3).mean((1, 3))


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 frames at 16 a second with stereo sound and settings."""
    audio = np.random.default_rng(0).uniform(-0.3, 0.3, (27_000 // 3, 2)).astype(np.float32)
    clip = Clip(moving(), 16, audio, 16_000, SETTINGS)
    return clip.save(tmp_path_factory.mktemp("movie") / "clip.mp4")


# ---- Clip --------------------------------------------------------------------------------------------------


def test_clip_knows_its_length() -> None:
    clip = Clip(moving(33), 16)
    assert (clip.num_frames, clip.duration) == (33, 2.0625)


SILENCE = np.zeros(10, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((moving() / 255, 16), r"float64 \[9, 32, 48, 3\]"),
        ((moving()[0], 16), r"need uint8 \[T, H, W, 3\]"),
        ((moving()[:0], 16), "none 0"),
        ((moving(), float("nan")), "fps=nan"),
        ((moving(), 0), "fps=0"),
        ((moving(), 16, SILENCE), "both or neither"),
        ((moving(), 16, None, 16_000), "both or neither"),
        ((moving(), 16, np.zeros((2, 3), np.float32), 16_000), r"float32 \[2, 3\]"),
        ((moving(), 16, SILENCE + 1.5, 16_000), "peak of 1.5"),
        ((moving(), 16, SILENCE * np.nan, 16_000), "peak of nan"),
    ],
)
def test_clip_refuses_other_shapes_and_ranges(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Clip(*arguments)


def test_clip_shows_itself_in_a_notebook() -> None:
    page = Clip(moving(2, 16, 16), 8)._repr_html_()
    assert page.startswith("<video controls") and "data:video/mp4;base64,AAAA" in page


# ---- mp4 ---------------------------------------------------------------------------------------------------


def test_mp4_keeps_colour(tmp_path: Path) -> None:
    """A card of 108 flat patches: no patch moves by more than 2 levels, their mean by at most 0.2."""
    levels = (0, 64, 128, 192, 255)
    colours = [(r, g, b) for r in levels for g in levels for b in (0, 128, 255)]
    card = np.array([*colours, *((grey, grey, grey) for grey in range(0, 264, 8))]).clip(0, 255)
    frame = np.repeat(np.repeat(card.reshape(12, 9, 3), 16, 0), 16, 1).astype(np.uint8)
    back = read_video(Clip(np.stack([frame] * 3), 16).save(tmp_path / "card.mp4")).video
    shift = (back.astype(float) - frame).reshape(3, 12, 16, 9, 16, 3)[:, :, 4:12, :, 4:12].mean((0, 2, 4))
    assert np.abs(shift).max() <= 2
    assert np.abs(shift.mean((0, 1))).max() <= 0.2


def test_mp4_holds_bt709_luma(tmp_path: Path) -> None:
    """Without trusting the reader: Y' = 16 + 219 (0.2126 R' + 0.7152 G' + 0.0722 B'), Rec. ITU-R BT.709."""
    colours = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (90, 160, 40)], np.uint8)
    video = np.repeat(np.repeat(colours, 32, 0)[None, None], 32, 1)
    path, raw = Clip(video, 16).save(tmp_path / "luma.mp4"), tmp_path / "luma.yuv"
    run_ffmpeg("-i", path, "-f", "rawvideo", "-pix_fmt", "yuv420p", raw)
    luma = np.fromfile(raw, np.uint8)[: 32 * 160].reshape(32, 5, 32)[8:24, :, 8:24].mean((0, 2))
    assert luma == pytest.approx(16 + 219 / 255 * colours @ (0.2126, 0.7152, 0.0722), abs=1)


def test_mp4_is_tagged_as_bt709(movie: Path) -> None:
    log = run_ffmpeg("-i", movie)
    assert "yuv420p(tv, bt709, progressive)" in log  # so short if matrix, primaries and transfer agree
    moov = movie.read_bytes().index(b"moov")
    assert moov < movie.read_bytes().index(b"mdat"), "not ready for streaming"


@pytest.mark.parametrize(("height", "width"), [(1, 1), (15, 16), (16, 17), (31, 47)])
def test_mp4_takes_odd_sizes(tmp_path: Path, height: int, width: int) -> None:
    video = moving(2, height, width)
    path = Clip(video, 16).save(tmp_path / "odd.mp4")
    assert difference(read_video(path).video, video) < 2
    assert "yuv444p(tv, bt709" in run_ffmpeg("-i", path)


@pytest.mark.parametrize("fps", [0.5, 16, 24_000 / 1001, 30, 240])
def test_mp4_keeps_frame_rate_and_count(tmp_path: Path, fps: float) -> None:
    back = read_video(Clip(moving(13, 16, 16), fps).save(tmp_path / "rate.mp4"))
    assert (back.num_frames, back.fps) == (13, pytest.approx(fps, rel=1e-9))


@pytest.mark.parametrize(("sample_rate", "channels"), [(16_000, 0), (44_100, 1), (48_000, 2)])
def test_mp4_keeps_sound_in_time(tmp_path: Path, sample_rate: int, channels: int) -> None:
    """White flashes and beeps on three frames: at most 5 ms apart, in files of the right length."""
    video = np.zeros((49, 16, 16, 3), np.uint8)
    audio = np.zeros(round(49 / 16 * sample_rate), np.float32)
    events = (5, 20, 41)
    for frame in events:
        video[frame] = 255
        start = frame * sample_rate // 16
        beep = slice(start, start + sample_rate // 16)
        audio[beep] = 0.7 * np.sin(2 * np.pi * 1000 / sample_rate * np.arange(sample_rate // 16))
    sound = np.repeat(audio[:, None], channels, 1) if channels else audio
    path = Clip(video, 16, sound, sample_rate).save(tmp_path / "sync.mp4")

    back = read_video(path)
    assert tuple(np.flatnonzero(back.video.mean((1, 2, 3)) > 128)) == events
    assert back.sample_rate == sample_rate
    assert back.audio.shape == (sound if channels == 2 else audio).shape
    heard = back.audio.mean(-1) if channels == 2 else back.audio
    reach = sample_rate // 50
    for frame in events:
        start = frame * sample_rate // 16
        window = slice(start - reach, start + sample_rate // 16 + reach)
        lag = np.correlate(heard[window], audio[start : start + sample_rate // 16]).argmax() - reach
        assert abs(lag) / sample_rate <= 0.005
    found = ffmpeg.probe(path, decode_all=True)
    assert abs(found.num_samples / found.sample_rate - 49 / 16) <= 1 / 16
    assert abs(found.duration - 49 / 16) <= 1 / 16


# ---- other formats -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animations_keep_frames_and_length(tmp_path: Path, suffix: str) -> None:
    video = moving(17)
    path = Clip(video, 16, settings=SETTINGS).save(tmp_path / f"clip{suffix}")
    with Image.open(path) as image:
        assert image.n_frames == 17 and image.info["loop"] == 0
        total = 0
        for index in range(17):
            image.seek(index)
            image.load()
            total += image.info["duration"]
            assert difference(blocks(np.asarray(image.convert("RGB"))), blocks(video[index])) < 3
    assert abs(total - 17 * 1000 / 16) <= 10
    assert difference(blocks(read_image(path)), blocks(video[0])) < 3, "the first frame is the picture"


def test_gif_can_be_read_as_video(tmp_path: Path) -> None:
    back = read_video(Clip(moving(10), 10, settings=SETTINGS).save(tmp_path / "clip.gif"))
    assert (back.num_frames, back.fps, back.settings) == (10, 10, SETTINGS)


@pytest.mark.parametrize(
    "suffix, within", [(".png", 0), (".jpg", 2), (".JPEG", 2), (".webp", 3), (".gif", 5)]
)
def test_single_pictures(tmp_path: Path, suffix: str, within: float) -> None:
    path = Clip(moving(1), 16).save(tmp_path / f"one{suffix}")
    assert difference(read_image(path), moving(1)[0]) <= within


def test_still_clips_become_animations_too(tmp_path: Path) -> None:
    for suffix in (".gif", ".webp"):  # encoders merge equal frames
        path = Clip(np.zeros((5, 16, 16, 3), np.uint8), 8).save(tmp_path / f"still{suffix}")
        assert not read_image(path).any()


def test_numbered_pictures_replace_a_longer_sequence(tmp_path: Path) -> None:
    folder = tmp_path / "shot"
    assert save(Clip(moving(6), 16), f"{folder}/") == folder / "shot-%05d.png"
    (folder / "note.txt").touch()
    save(Clip(moving(4)[::-1], 16, settings=SETTINGS), folder / "shot-%05d.png")
    names = [f"shot-{index:05d}.png" for index in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == ["note.txt", *names]
    assert np.array_equal([read_image(folder / name) for name in names], moving(4)[::-1])
    assert read_settings(folder / names[3]) == SETTINGS


# ---- settings in the file ----------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".webp", ".png", ".jpg"])
@pytest.mark.parametrize("prompt", [ODD_TEXT, "😀" * 5000], ids=["odd", "20 kB"])
def test_settings_come_back_from_every_format(tmp_path: Path, suffix: str, prompt: str) -> None:
    settings = SETTINGS | {"prompt": prompt}
    path = Clip(moving(1, 16, 16), 8, settings=settings).save(tmp_path / f"s{suffix}")
    assert read_settings(path) == settings


def test_settings_travel_with_the_clip(movie: Path) -> None:
    assert read_video(movie).settings == SETTINGS


@pytest.mark.parametrize(
    "comment", ["", "a cat", "[1]", '{"cfg": NaN}', '{"a": 1} {"b": 2}', "[" * 20_000, "1" + "0" * 70_000]
)
def test_settings_of_others_are_refused(tmp_path: Path, comment: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "other.gif", comment=comment.encode())
    with pytest.raises(InputError, match="no settings"):
        read_settings(tmp_path / "other.gif")


def test_settings_cannot_hide_in_another_field(tmp_path: Path, movie: Path) -> None:
    path = tmp_path / "title.mp4"
    title = 'title=x\ncomment={"lora": "/etc/passwd"}\n'
    run_ffmpeg("-i", movie, "-c", "copy", "-map_metadata", "-1", "-metadata", title, path)
    assert b"/etc/passwd" in path.read_bytes()
    with pytest.raises(InputError, match="no settings"):
        read_settings(path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"a": Path("x")}, "PosixPath"), ({"a": float("inf")}, "finite"), ({"a": "x" * 70_000}, "the limit")],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Clip(moving(1), 16, settings=settings).save(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


# ---- writing whole or not at all ---------------------------------------------------------------------------


def failing(error: BaseException):
    def fail(path: Path, *args: object, **kwargs: object) -> None:
        path.write_bytes(b"half a file")
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [OSError("full"), WanError("bad codec"), KeyboardInterrupt("stop")], ids=repr
)
@pytest.mark.parametrize("suffix", [".mp4", ".png"])
def test_failure_leaves_the_old_file(tmp_path: Path, monkeypatch, suffix: str, error: BaseException) -> None:
    path = tmp_path / f"clip{suffix}"
    path.write_bytes(b"old")
    monkeypatch.setattr(ffmpeg, "write_mp4", failing(error))
    monkeypatch.setattr(media, "_write_pictures", failing(error))
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else WanError
    with pytest.raises(expected, match=str(error)):
        Clip(moving(1), 16).save(path)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_failure_of_one_picture_leaves_the_old_sequence(tmp_path: Path, monkeypatch) -> None:
    pattern = Clip(moving(3), 16).save(tmp_path / "f-%05d.png")
    write, calls = media._write_pictures, []

    def fail_at_third(*args: object) -> None:
        calls.append(args)
        if len(calls) == 3:
            raise OSError("disk full")
        write(*args)

    monkeypatch.setattr(media, "_write_pictures", fail_at_third)
    with pytest.raises(WanError, match="disk full"):
        Clip(255 - moving(3), 16).save(pattern)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"f-{index:05d}.png" for index in range(3)]
    assert np.array_equal(read_image(tmp_path / "f-00000.png"), moving(3)[0])


def test_ffmpeg_failure_says_why(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(media, "PRESETS", ("warp",))
    with pytest.raises(WanError, match=r"(?s)could not write .*clip\.mp4.*warp"):
        Clip(moving(), 16).save(tmp_path / "clip.mp4", preset="warp")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lost", "message"),
    [({"num_frames": 8}, "back as 8 frames"), ({"sample_rate": None}, "0.000 s of sound, written were")],
)
def test_an_incomplete_mp4_is_not_kept(tmp_path: Path, monkeypatch, lost: dict, message: str) -> None:
    probe = ffmpeg.probe
    monkeypatch.setattr(ffmpeg, "probe", lambda path, **kwargs: probe(path, **kwargs)._replace(**lost))
    with pytest.raises(WanError, match=message):
        Clip(moving(), 16, np.zeros(9000, np.float32), 16_000).save(tmp_path / "clip.mp4")
    assert not list(tmp_path.iterdir())


def test_encoding_options_are_checked(tmp_path: Path) -> None:
    clip = Clip(moving(), 16)
    coarse = read_video(clip.save(tmp_path / "a.mp4", crf=40))
    fine = read_video(clip.save(tmp_path / "b.mp4", crf=1, preset="ultrafast"))
    assert difference(fine.video, clip.video) < 1.5 < difference(coarse.video, clip.video)
    for options in ({"crf": 52}, {"preset": "-y"}):
        with pytest.raises(InputError, match="need 0 to 51 and one of ultrafast"):
            clip.save(tmp_path / "c.mp4", **options)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("clip.mpg", r"none of \.mp4, \.gif, \.webp, \.png, \.jpg, \.jpeg"),
        ("clip.mp", r"did you mean \.mp4"),
        ("clip", "folder for pictures with '/'"),
        ("clip-%05d.mp4", "numbered files are for"),
        ("clip.png", r"81 frames to .*name it clip-%05d\.png"),
        ("folder.mp4", "it is a folder"),
        ("file.txt/clip.mp4", "not a folder"),
        ("x" * 300 + ".mp4", "too long"),
        ("nul\0.mp4", "null"),
    ],
)
def test_check_writable_gives_the_reason(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(InputError, match=message):
        media.check_writable(tmp_path / name, 81)


def test_check_writable_creates_nothing(tmp_path: Path) -> None:
    for name in ("new/folder/clip.MP4", "clip.gif", "-y.webp", "猫.jpg"):
        assert media.check_writable(tmp_path / name) == tmp_path / name
    assert media.check_writable(f"{tmp_path}/shots/", 81) == tmp_path / "shots" / "shots-%05d.png"
    assert not list(tmp_path.iterdir())
    assert save(Clip(moving(1), 16), tmp_path / "new" / "folder" / "-y.mp4").exists()


# ---- reading pictures --------------------------------------------------------------------------------------


def test_to_unit_rounds_as_torchvision() -> None:
    unit = media.to_unit(np.arange(256, dtype=np.uint8))
    assert unit.dtype == np.float32 and (unit[0], unit[-1]) == (-1, 1)
    # zlib.crc32 of torch.arange(256, dtype=torch.uint8).float().div(255).sub_(0.5).div_(0.5), torch 2.13
    assert zlib.crc32(unit.astype("<f4").tobytes()) == 0xB62C8544


@pytest.mark.parametrize("orientation", range(1, 9))
def test_read_image_turns_upright(tmp_path: Path, orientation: int) -> None:
    upright = moving(1, 16, 24)[0]
    mirrored = upright.transpose(1, 0, 2)
    stored = {  # EXIF 2.3: where the first row and column of the stored picture lie in the scene
        1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1],
        5: mirrored, 6: mirrored[::-1], 7: mirrored[::-1, ::-1], 8: mirrored[:, ::-1],
    }[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), upright)


def test_read_image_handles_every_mode(tmp_path: Path) -> None:
    def through_file(image: Image.Image, suffix: str = ".png", **options: object) -> list[int]:
        image.save(tmp_path / f"mode{suffix}", **options)
        pixels = read_image(tmp_path / f"mode{suffix}")
        assert pixels.shape == (4, 6, 3) and pixels.dtype == np.uint8
        return pixels[0, 0].tolist()

    def flat(mode: str, colour: object) -> Image.Image:
        return Image.new(mode, (6, 4), colour)

    assert through_file(flat("RGBA", (255, 0, 0, 0))) == [255, 255, 255]
    assert through_file(flat("RGBA", (200, 0, 100, 128))) == [227, 127, 177]
    assert through_file(flat("LA", (0, 0))) == [255, 255, 255]
    assert through_file(flat("L", 77)) == [77, 77, 77]
    assert through_file(flat("1", 1)) == [255, 255, 255]
    assert through_file(flat("RGB", (1, 2, 3)).quantize(4)) == [1, 2, 3]
    assert through_file(flat("P", 0), transparency=0) == [255, 255, 255]
    assert through_file(flat("RGB", (1, 2, 3)), transparency=(1, 2, 3)) == [255, 255, 255]
    assert through_file(Image.fromarray(np.full((4, 6), 77 * 257, np.uint16))) == [77, 77, 77]
    assert through_file(flat("I", 65_535), ".tif") == [255, 255, 255]
    assert through_file(flat("CMYK", (0, 255, 255, 0)), ".tif") == [255, 0, 0]
    assert through_file(flat("CMYK", (0, 0, 0, 255)), ".jpg", quality=100) == [0, 0, 0]
    with pytest.raises(InputError, match="floating-point"):
        through_file(flat("F", 0.5), ".tif")


def test_read_image_takes_arrays_and_pillow_images() -> None:
    picture = moving(1)[0]
    assert np.array_equal(read_image(picture), picture)
    assert np.array_equal(read_image(Image.fromarray(picture)), picture)
    assert np.array_equal(read_image(picture[..., 0]), picture[..., [0, 0, 0]])
    transparent = np.concatenate([picture, np.zeros_like(picture[..., :1])], -1)
    assert (read_image(transparent) == 255).all()
    for wrong in (picture / 255, picture[..., :2], picture[0, :, 0], picture[:0]):
        with pytest.raises(InputError, match="image array"):
            read_image(wrong)
    with pytest.raises(InputError, match="limit is 0.0 Mpixel"):
        read_image(picture, max_pixels=1000)


def test_read_image_says_what_is_wrong(tmp_path: Path) -> None:
    good, path = tmp_path / "good.png", tmp_path / "bad.png"
    Image.effect_noise((64, 64), 50).save(good)
    for content, message in (
        (b"", "not an intact"),
        (b"just text", "not an intact"),
        (b"P6 1 1 255\n\0\0\0", "not an intact PNG, JPEG, WEBP, GIF, BMP, TIFF"),
        (good.read_bytes()[:2000], "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=message):
            read_image(path)
    with pytest.raises(InputError, match="missing"):
        read_image(tmp_path / "none.png")
    with pytest.raises(InputError, match="not a readable file"):
        read_image(tmp_path)
    with pytest.raises(InputError, match="limit is 0.0 MB"):
        read_image(good, max_bytes=1000)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("side", "message"), [(12_000, "120.0 Mpixel, the limit is 64"), (40_000, "4000000")]
)
def test_read_image_refuses_a_bomb_by_its_header(tmp_path: Path, side: int, message: str) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, 10_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + body)
    start = time.monotonic()
    with pytest.raises(InputError, match=message):
        read_image(path)
    assert time.monotonic() - start < 1


# ---- reading video -----------------------------------------------------------------------------------------


def test_read_video_of_other_containers(tmp_path: Path, movie: Path) -> None:
    for name, codecs in (
        ("a.mkv", ["-c", "copy"]),
        ("a.webm", ["-c:v", "libvpx", "-b:v", "2M", "-c:a", "libopus"]),
        ("a.avi", ["-c:v", "mjpeg", "-c:a", "pcm_s16le"]),
        ("a.mov", ["-c", "copy", "-f", "mov"]),
    ):
        run_ffmpeg("-i", movie, *codecs, tmp_path / name)
        clip = read_video(tmp_path / name)
        assert clip.video.shape == (9, 32, 48, 3) and clip.fps == 16 and clip.audio.shape[1] == 2, name
        assert difference(clip.video, moving()) < 6, name


def test_read_video_applies_rotation_and_late_sound(tmp_path: Path, movie: Path) -> None:
    path = tmp_path / "phone.mp4"
    tracks = ["-map", "0:v", "-map", "1:a", "-c", "copy", "-t", "1"]
    run_ffmpeg("-display_rotation", 90, "-i", movie, "-itsoffset", "0.25", "-i", movie, *tracks, path)
    clip = read_video(path)
    assert clip.video.shape == (9, 48, 32, 3) and difference(clip.video, np.rot90(moving(), axes=(1, 2))) < 3
    assert abs(np.flatnonzero(np.abs(clip.audio[:, 0]) > 0.05)[0] / 16_000 - 0.25) < 0.02
    first = read_video(path, max_frames=2)
    assert np.array_equal(first.video, clip.video[:2])
    assert first.audio.shape == (2000, 2) and not first.audio.any()


def test_read_video_pads_short_sound(tmp_path: Path) -> None:
    path = Clip(moving(), 16, np.full(4000, 0.25, np.float32), 16_000).save(tmp_path / "short.mp4")
    audio = read_video(path).audio
    assert audio.shape == (9000,) and audio[1000:3000].mean() > 0.2 and not audio[5000:].any()


def test_read_video_keeps_to_its_limits(tmp_path: Path, movie: Path) -> None:
    for limit, message in (
        ({"max_duration": 0.5}, r"lasts 0\.6 s, the limit is 0\.5"),
        ({"max_pixels": 10_000}, "frames of 48x32"),
        ({"max_bytes": 1000}, "MB"),
        ({"max_frames": 0}, "at least 1"),
    ):
        with pytest.raises(InputError, match=message):
            read_video(movie, **limit)
    assert read_video(movie, max_frames=3, max_pixels=3 * 32 * 48).num_frames == 3
    endless = tmp_path / "endless.mp4"
    run_ffmpeg("-f", "lavfi", "-i", "color=s=16x16:r=1:d=3000", "-preset", "ultrafast", endless)
    with pytest.raises(InputError, match=r"lasts 3000\.0 s"):
        read_video(endless)


def test_read_video_refuses_playlists_in_disguise(tmp_path: Path, movie: Path) -> None:
    (tmp_path / "secret.mp4").write_bytes(movie.read_bytes())
    disguises = {
        "ffconcat": "ffconcat version 1.0\nfile secret.mp4\n",
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{movie}\n#EXT-X-ENDLIST\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
        "signed": "1234ftyp\nffconcat version 1.0\nfile secret.mp4\n",
        "text": "hello",
        "empty": "",
    }
    for name, text in disguises.items():
        path = tmp_path / f"{name}.mp4"
        path.write_text(text)
        assert name != "ffconcat" or "Video: h264" in run_ffmpeg("-i", path), (
            "plain ffmpeg no longer falls for it"
        )
        with pytest.raises(InputError, match="not an mp4|cannot be decoded"):
            read_video(path)
    for name in (f"concat:{movie}", "testsrc=d=1", "data:video/mp4;base64,AA", "/dev/zero", "f-%03d.png"):
        with pytest.raises(InputError, match="give the path of a local file"):
            read_video(name)


def test_read_video_refuses_damage(tmp_path: Path, movie: Path) -> None:
    path, data = tmp_path / "damaged.mp4", movie.read_bytes()
    noise = np.random.default_rng(0).bytes(400)
    middle = data.index(b"mdat") + 400
    for damaged in (data[: len(data) * 2 // 3], data[:middle] + noise + data[middle + 400 :], data[:100]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="cannot be decoded"):
            read_video(path)
    run_ffmpeg("-i", movie, "-vn", "-c:a", "copy", tmp_path / "sound.mp4")
    with pytest.raises(InputError, match="matches no streams"):
        read_video(tmp_path / "sound.mp4")


# ---- contact sheet -----------------------------------------------------------------------------------------


def test_contact_sheet_spreads_frames_evenly() -> None:
    video = np.repeat(np.arange(21, dtype=np.uint8), 4 * 6 * 3).reshape(21, 4, 6, 3)
    sheet = media.contact_sheet(Clip(video, 16), columns=3, rows=2, gap=1)
    assert sheet.shape == (2 * 4 + 1, 3 * 6 + 2, 3) and sheet.dtype == np.uint8
    assert sheet[::5, ::7, 0].tolist() == [[0, 4, 8], [12, 16, 20]]
    assert (sheet[4] == 255).all() and (sheet[:, 6] == 255).all()
    few = media.contact_sheet(Clip(video[:5], 16), columns=4, rows=3, gap=0)
    assert few[::4, ::6, 0].tolist() == [[0, 1, 2, 3], [4, 255, 255, 255]]
    assert media.contact_sheet(Clip(video[:1], 16)).shape == (4, 6, 3)
    with pytest.raises(InputError, match="columns=0"):
        media.contact_sheet(Clip(video, 16), columns=0)
