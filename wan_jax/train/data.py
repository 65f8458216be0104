"""A folder of clips as a source of training: what the model's own encoders make of them, computed once and kept.

``NAME.mp4`` is a clip, ``NAME.txt`` its caption; its sound is in the clip or in ``NAME.wav``. For models that take
references, ``NAME.ref1.png`` with ``NAME.ref1.wav``, ``NAME.ref2.png`` ... are who appears in it.

The order is Grain's: a permutation per epoch, a function of the seed and the step alone, so that a run resumes by its
step. The files of the next steps are read ahead.

Axes: ``T H W C`` latents, ``A`` audio latents, ``S`` text tokens, ``R`` references.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from wan_jax.captions import mark_speech, ovi_prompt, structured_caption
from wan_jax.conditions import compiled, crop_to_aspect, encode_image, encode_text, fit_picture, video_condition
from wan_jax.config import ModelSpec
from wan_jax.errors import InputError
from wan_jax.media import read_audio, read_video, resample, to_unit
from wan_jax.model import Model
from wan_jax.models.vae import to_uint8
from wan_jax.pipeline import encode
from wan_jax.references import CONSENT, Reference, resolve_references
from wan_jax.request import resolve
from wan_jax.sound import encode_voices
from wan_jax.weights.readers import open_checkpoint
from wan_jax.weights.writers import write_safetensors

log = logging.getLogger(__name__)

Sample = dict[str, np.ndarray]
Pair = tuple[Path, Path | None]  # files of one reference: look and voice
AHEAD = 16  # samples that are read before they are needed
VERSION = 1  # of what is kept: a change of the encoding below makes what is on disk worthless


class Format(NamedTuple):
    """What every clip is brought to: pixels, and frames at the model's rate."""

    width: int
    height: int
    num_frames: int

    @classmethod
    def of(cls, spec: ModelSpec, size: Sequence[int] | None = None, num_frames: int | None = None) -> Format:
        """Check, and fill with the model's defaults.

        Args:
            size: (width, height).
        Raises:
            InputError: names the nearest that fits the model.
        """
        (width, height), frames = size or spec.sizes[0], num_frames or spec.num_frames
        multiple, stride = spec.size_multiple, spec.vae.temporal_stride
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        if near != [width, height]:
            raise InputError(f"size {width}x{height}: need multiples of {multiple}, try {near[0]}x{near[1]}")
        if frames < 1 or (frames - 1) % stride:
            raise InputError(f"num_frames={frames}: need {stride}n+1, try {max(0, frames // stride) * stride + 1}")
        return cls(width, height, frames)


class Source(NamedTuple):
    """The files of one clip."""

    video: Path
    caption: str
    sound: Path | None
    references: tuple[Pair, ...]

    def digest(self, *about: Any) -> str:
        """SHA-256 of the contents of all files, and of the text of ``about``."""
        found = hashlib.sha256(repr((VERSION, self.caption, *about)).encode())
        for path in (self.video, self.sound, *(path for pair in self.references for path in pair)):
            content = b"" if path is None else path.read_bytes()
            found.update(len(content).to_bytes(8, "little") + content)
        return found.hexdigest()


def find_clips(folder: str | Path) -> tuple[list[Source], int]:
    """The clips of a folder by name; those without a caption are reported, left out, and counted.

    Raises:
        InputError: no such folder, no clips in it, or none that has a caption.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; need one with clips NAME.mp4 and captions NAME.txt")
    videos = sorted(folder.glob("*.mp4"))
    if not videos:
        raise InputError(f"{folder} holds no clips: need NAME.mp4 and NAME.txt for each")
    found = []
    for video in videos:
        text = video.with_suffix(".txt")
        try:
            caption = text.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            log.warning("%s: left out: %s cannot be read as UTF-8 (%s)", video, text.name, type(error).__name__)
            continue
        if not caption:
            log.warning("%s: left out: %s is empty", video, text.name)
            continue
        looks = sorted(folder.glob(f"{video.stem}.ref[1-9].png"))
        pairs = ((look, _existing(look.with_suffix(".wav"))) for look in looks)
        found.append(Source(video, caption, _existing(video.with_suffix(".wav")), tuple(pairs)))
    if not found:
        raise InputError(f"{folder}: {len(videos)} clips and no caption: write NAME.txt beside each NAME.mp4")
    return found, len(videos) - len(found)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def read_frames(source: Source, spec: ModelSpec, to: Format) -> tuple[np.ndarray, np.ndarray | None]:
    """The first frames of a clip, uint8 [T, H, W, 3], and for models with sound as much of it, float32 [n].

    Frames are taken at the model's rate, the largest centre crop of the wanted aspect is resized.

    Raises:
        InputError: unreadable, too short, or without sound for a model with sound.
    """
    clip = read_video(source.video)
    index = np.rint(np.arange(to.num_frames) * clip.fps / spec.fps).astype(int)
    if index[-1] >= clip.num_frames:
        need = f"{to.num_frames} at {spec.fps} ({to.num_frames / spec.fps:.2f} s)"
        raise InputError(f"{source.video} has {clip.num_frames} frames at {clip.fps:g} per second: need {need}")
    size = to.height, to.width
    frames = np.stack([np.asarray(to_uint8(fit_picture(crop_to_aspect(f, *size), *size))) for f in clip.video[index]])
    if spec.sound is None:
        return frames, None
    rate = spec.sound.mel.sample_rate
    if source.sound is not None:
        wave = read_audio(source.sound, sample_rate=rate)
    elif clip.audio is not None:
        wave = resample(clip.audio, clip.sample_rate, rate)
    else:
        name = source.video.with_suffix(".wav").name
        raise InputError(f"{source.video} has no sound, which {spec.name} learns too: add {name}, or take the clip out")
    usual = to.num_frames == spec.num_frames
    latents = spec.sound.num_latents if usual else max(1, round(to.num_frames / spec.fps * rate / spec.sound.hop))
    wave = wave[: latents * spec.sound.hop]
    return frames, np.pad(wave, (0, latents * spec.sound.hop - len(wave)))


def encode_clip(model: Model, source: Source, to: Format) -> Sample:
    """Everything of a clip but its text and its references, under the names of `wan_jax.train.flow.draw_examples`."""
    spec = model.spec
    frames, wave = read_frames(source, spec, to)
    run = compiled("clip", lambda vae, video: vae.encode_stream(video))
    found = {"video": run(model.vae, jnp.asarray(to_unit(frames))[None])}
    if wave is not None:
        found["audio"] = encode_voices(model.audio_vae, [wave], spec.sound.mel)
    if spec.task in ("i2v", "flf2v"):
        known = [0, to.num_frames - 1][: 2 if spec.task == "flf2v" else 1]
        pictures = {i: jnp.asarray(to_unit(frames[i])) for i in known}
        found["condition"] = video_condition(model.vae, pictures, to.num_frames, to.height, to.width)
        if spec.clip is not None:
            found["image"] = encode_image(model.image_encoder, [frames[i] for i in known])
    return {name: np.asarray(x[0]) for name, x in found.items()}


def encode_captions(model: Model, captions: Sequence[str]) -> np.ndarray:
    """Features [N, S, C], zero rows up to the text length; the model remembers them."""
    for caption in captions:
        if caption not in model.prompt_cache:
            tokens = model.tokenizer([caption], model.spec.dit.text_len)
            model.prompt_cache[caption] = encode_text(model.text_encoder, *tokens)
    return np.concatenate([model.prompt_cache[caption] for caption in captions])


def full_caption(spec: ModelSpec, source: Source) -> str:
    """The caption in the form that `generate` gives to this model."""
    if spec.sound is None:
        return source.caption
    if spec.sound.caption == "structured":
        return structured_caption(source.caption, [None] * len(source.references))
    return ovi_prompt(mark_speech(source.caption), spec.sound.caption)


def encode_references(
    model: Model, caption: str, pairs: Sequence[Pair], to: Format, *, consent: bool
) -> Sample:
    """The references of a clip as `generate` encodes them, each [R, ...]."""
    if len({voice is None for _, voice in pairs}) > 1:
        raise InputError(f"{pairs[0][0].parent}: of the references of one clip all have a voice, or none")
    request = resolve(
        model.spec, caption, size=(to.width, to.height), num_frames=to.num_frames, guidance_scale=1.0,
        audio_guidance_scale=1.0, consent=CONSENT if consent else "",
        references=resolve_references([Reference(image=look, voice=voice) for look, voice in pairs]),
    )  # fmt: skip
    condition = encode(model, request)
    found = {f"{stream}_references": x for stream, x in condition.references.items()}
    found |= {"identity": condition.identity_BRIC, "voice": condition.voice_BRTF}
    return {name: np.asarray(x[0]) for name, x in found.items() if x is not None}


class ClipFolder:
    """A feed of batches from a folder: see `wan_jax.train.loop.Feed`. The encoders run here, on what is not yet kept.

    Every step has its own batch, arrays [batch, ...] as `wan_jax.train.flow.draw_examples` takes them; "null_text" is
    shared. Clips that cannot be used are reported and left out; ``skipped`` counts them.

    Args:
        folder: of the clips. cache: where encoded clips are kept, a file each, named by contents, model and format.
        consent: whether every person in the references agreed; needed where there are any and the model takes them. A
            clip with fewer references than another has zeros, as a dropped one.
    Raises:
        InputError: no captions, or no clip that can be used, with the reasons.
    """

    def __init__(
        self,
        folder: str | Path,
        model: Model,
        cache: str | Path,
        to: Format,
        *,
        batch: int,
        seed: int = 0,
        consent: bool = False,
    ):
        try:
            import grain
        except ImportError as error:
            raise InputError('training on a folder of clips needs Grain: pip install "wan_jax[train]"') from error
        sources, self.skipped = find_clips(folder)
        self._cache, self._batch = Path(cache), batch
        self._read_options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=AHEAD)
        self._cache.mkdir(parents=True, exist_ok=True)
        about = model.spec, jnp.dtype(model.dtype).name, to, _fingerprint(model)
        names = {source: source.digest(*about) for source in sources}
        new = [source for source in sources if not self._file(names[source]).exists()]
        captions = {source: full_caption(model.spec, source) for source in new}
        texts = {caption: encode_captions(model, [caption])[0] for caption in dict.fromkeys(captions.values())}
        self._shared = {"null_text": encode_captions(model, [""])}
        if model.offload:
            model.release("text_encoder")
        faults = {}
        for source in new:
            try:
                sample = {"text": texts[captions[source]]} | encode_clip(model, source, to)
                if source.references and model.spec.takes_references:
                    sample |= encode_references(model, source.caption, source.references, to, consent=consent)
                write_safetensors(self._file(names[source]), sample)
            except InputError as error:
                faults[source] = str(error)
                log.warning("%s: left out: %s", source.video, error)
        self.skipped += len(faults)
        self._names = [names[source] for source in sources if source not in faults]
        if not self._names:
            raise InputError(f"{folder}: no clip can be used:\n  " + "\n  ".join(list(faults.values())[:5]))
        log.info("%s: %d clips, %d encoded now, %d left out", folder, len(self), len(new) - len(faults), self.skipped)
        if model.offload:
            model.release()
        self._clips = grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()
        self._next, self._ahead = -1, iter(())  # the step that is read ahead, and its samples
        self._shapes: dict[str, tuple[int, ...]] = {}  # of every array, the longest that any clip has
        for name in self._names:
            with open_checkpoint(self._file(name)) as tensors:
                for key, x in tensors.items():
                    self._shapes[key] = max(self._shapes.get(key, ()), tuple(x.shape))

    def __len__(self) -> int:
        return len(self._names)

    def __call__(self, step: int, count: int) -> tuple[Any, Any]:
        if step != self._next:
            clips = self._clips.slice(slice(step * self._batch, None)).map(self._sample)
            self._ahead = iter(clips.to_iter_dataset(self._read_options))
        rows = [next(self._ahead) for _ in range(count * self._batch)]
        self._next = step + count
        stacked = {key: np.stack([row[key] for row in rows]) for key in self._shapes}
        return self._shared, {key: x.reshape(count, self._batch, *x.shape[1:]) for key, x in stacked.items()}

    def order(self, i: int) -> int:
        """Which clip the ``i``-th sample of training is: every epoch takes each once, in an order of its own."""
        return int(self._clips[i])

    def position(self) -> dict[str, Any]:
        return {"clips": self._names}  # the step tells the rest

    def seek(self, position: dict[str, Any]) -> None:
        if position["clips"] != self._names:
            log.warning("the clips, the model or the format are not those of the run so far: the order is a new one")

    def _file(self, name: str) -> Path:
        return self._cache / f"{name}.safetensors"

    def _sample(self, index: int) -> Sample:
        with open_checkpoint(self._file(self._names[index])) as tensors:
            found = {key: np.array(x.numpy()) for key, x in tensors.items()}
        sample = {}
        for key, shape in self._shapes.items():
            x = found.get(key)
            x = np.zeros((0, *shape[1:]), np.float32) if x is None else x
            sample[key] = np.pad(x, [(0, shape[0] - len(x))] + [(0, 0)] * (x.ndim - 1))
        return sample


def _fingerprint(model: Model) -> list[tuple[str, int, int]]:
    """The files of the encoders: name, size and time of change."""
    parts = [part for part in model.parts if not part.startswith("dit") and part != "vocoder"]
    found = []
    for part in parts:
        path = model.files.parts[part]
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            found.append((str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns))
    return found
