"""References of a clip: who or what appears, and with which voice. From files to checked arrays.

Source of the picture's frame and the voice's second: ``load_image_latent_ref_ip_video`` of DreamID-Omni's engine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from wan_jax.errors import InputError
from wan_jax.media import Clip, check_audio, file_kind, read_audio, read_image, read_video, resample
from wan_jax.request import array_hash

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)

# What is recorded in a clip that was made with references.
CONSENT = "the user states that every person shown or heard in the references agreed to this use"

SAMPLE_RATE = 16_000  # Hz, of every voice
MAX_REFERENCES = 5
TRAINED_REFERENCES = 2
VOICE_SECONDS = (0.5, 30.0)
SILENCE = 10 ** (-50 / 20)  # a peak of -50 dBFS, below the noise of a room
LOUDNESS = 10 ** (-20 / 20)  # -20 dBFS RMS, usual for speech
VIDEO_PIXELS = 200_000_000  # of a reference video; 600 MB


@dataclass(frozen=True, eq=False)
class Reference:
    """A person, an animal or a thing that appears in the clip. Nothing is opened before `resolve_references`.

    Args:
        image: file, Pillow image or uint8 [H, W, 3]: the look.
        video: file or `Clip`, instead of ``image``: its sharpest frame is the look, its sound the voice.
        voice: file (of sound or with a sound track), or float32 [n] or [n, 2] in [-1, 1] and its samples per second;
            0.5 to 30 s. Goes before the sound of ``video``.
        description: such as "a woman with short red hair"; for models that read captions.
    """

    image: str | Path | Image.Image | np.ndarray | None = None
    video: str | Path | Clip | None = None
    voice: str | Path | tuple[np.ndarray, int] | None = None
    description: str | None = None

    @classmethod
    def open(cls, path: str | Path, voice: str | Path | None = None, description: str | None = None) -> Reference:
        """A picture or a video, whichever the file is."""
        kind = file_kind(path)
        if kind == "sound":
            raise InputError(f"{path} is a sound: give it as the voice of a reference that has a picture or a video")
        return cls(voice=voice, description=description, **{kind: path})


@dataclass(frozen=True, eq=False)
class ResolvedReference:
    """What the models get of a `Reference`.

    Args:
        image: uint8 [H, W, 3], of any size.
        voice: float32 [n] in [-1, 1] at 16 kHz, 0.5 to 30 s; None without.
        voice_second: float32 [16000], the part that DreamID-Omni hears.
        description: None for a neutral phrase.
    """

    image: np.ndarray
    voice: np.ndarray | None = None
    voice_second: np.ndarray | None = None
    description: str | None = None

    @property
    def image_sha256(self) -> str:
        return array_hash(self.image)

    @property
    def voice_sha256(self) -> str | None:
        return None if self.voice is None else array_hash(self.voice)


def resolve_references(references: Sequence[Reference], *, clean: bool = False) -> tuple[ResolvedReference, ...]:
    """Open and check all references, in their order.

    Args:
        clean: take the second of each voice by `clean_voice` instead of `voice_crop`.
    Raises:
        InputError: none or more than five, a voice without a look, a voice of another length, or a file that `media`
            refuses. A silent voice and more references than the weights were trained on are warnings in the log.
    """
    if not 1 <= len(references) <= MAX_REFERENCES:
        raise InputError(f"{len(references)} references: need 1 to {MAX_REFERENCES}")
    for k, reference in enumerate(references, 1):  # all of them before the first file
        if reference.image is not None and reference.video is not None:
            raise InputError(f"reference {k} has an image and a video: give one; a voice= may come beside either")
        if reference.image is None and reference.video is None:
            has = "a voice but no" if reference.voice is not None else "no"
            raise InputError(f"reference {k} has {has} image or video: give one, a voice belongs to a look")
    if len(references) > TRAINED_REFERENCES:
        log.warning("%d references: the released weights were trained on one or two", len(references))
    return tuple(_resolve(reference, k, clean) for k, reference in enumerate(references, 1))


def _resolve(reference: Reference, k: int, clean: bool) -> ResolvedReference:
    image, voice, name = reference.image, reference.voice, f"the voice of reference {k}"
    if (clip := reference.video) is not None:
        if not isinstance(clip, Clip):
            clip = read_video(clip, max_pixels=VIDEO_PIXELS, thin=True)
        image = clip.video[best_frame(clip.video)]
        if voice is None and clip.audio is not None:
            voice = clip.audio, clip.sample_rate
    resolved = ResolvedReference(read_image(image), description=reference.description)
    if voice is None:
        return resolved

    if isinstance(voice, tuple):
        check_audio(name, voice[0])
        voice = resample(*voice, SAMPLE_RATE)
    else:
        voice = read_audio(voice, sample_rate=SAMPLE_RATE)
    shortest, longest = VOICE_SECONDS
    if not shortest <= len(voice) / SAMPLE_RATE <= longest:
        raise InputError(f"{name} lasts {len(voice) / SAMPLE_RATE:.2f} s: need {shortest} to {longest} s of speech")
    second = clean_voice(voice) if clean else voice_crop(voice)
    if is_silent(voice):
        log.warning("%s is silent (peak below -50 dBFS): it will have no effect", name)
    elif is_silent(second):
        log.warning("%s is silent from 1 to 2 s, all that the model hears: cut it or clean it", name)
    if shows_face(resolved.image) is False:
        log.warning("reference %d has a voice, but no face was found in it: a person should look at the camera", k)
    return replace(resolved, voice=voice, voice_second=second)


# ---- pictures ----------------------------------------------------------------------------------------------


def best_frame(video: np.ndarray) -> int:
    """Index of the sharpest frame of uint8 [T, H, W, 3], the first and the last 5 % left out.

    Sharp is a large variance of the Laplacian (four neighbours) of BT.709 luma, at full size. Of equals, the first.
    """
    margin = len(video) // 20
    return margin + int(np.argmax([_sharpness(frame) for frame in video[margin : len(video) - margin]]))


def _sharpness(frame: np.ndarray) -> float:
    luma = np.pad(frame @ np.array([0.2126, 0.7152, 0.0722], np.float32), 1, mode="edge")
    around = luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:]
    return float(np.var(around - 4 * luma[1:-1, 1:-1]))


def letterbox(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fit uint8 [h, w, 3] into uint8 [height, width, 3], centred on white: Lanczos, the short side truncated.

    The official code then crops to multiples of 32, which ``height`` and ``width`` already are.
    """
    from PIL import Image

    h, w = picture.shape[:2]
    aspect = w / h
    wide = aspect > width / height
    size = (width, max(1, int(width / aspect))) if wide else (max(1, int(height * aspect)), height)
    inner = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    top, left = (height - inner.shape[0]) // 2, (width - inner.shape[1]) // 2
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[top : top + inner.shape[0], left : left + inner.shape[1]] = inner
    return canvas


def face_detector() -> Callable[[np.ndarray], np.ndarray] | None:
    """Frontal faces of uint8 [H, W, 3] as [N, 4] left, top, width, height in pixels; None without the extra `faces`.

    OpenCV's cascade of Haar features (Viola and Jones, 2001) misses turned, covered and drawn faces.
    """
    try:
        import cv2

        cascade = cv2.CascadeClassifier(str(Path(cv2.data.haarcascades, "haarcascade_frontalface_default.xml")))
    except (ImportError, AttributeError):
        return None

    def detect(picture: np.ndarray) -> np.ndarray:
        grey = cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)
        return np.reshape(cascade.detectMultiScale(grey, scaleFactor=1.1, minNeighbors=4), (-1, 4))

    return detect


def shows_face(picture: np.ndarray) -> bool | None:
    """Whether uint8 [H, W, 3] shows a face from the front; None without the extra `faces`."""
    detect = face_detector()
    if detect is None:
        return None
    from PIL import Image

    small = Image.fromarray(picture)
    small.thumbnail((640, 640))  # faces are large in a reference; the time is in the pixels
    return len(detect(np.asarray(small))) > 0


# ---- voices ------------------------------------------------------------------------------------------------


def is_silent(wave: np.ndarray) -> bool:
    """Nothing above -50 dBFS."""
    return not np.abs(wave).max() >= SILENCE


def voice_crop(wave: np.ndarray, sample_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Seconds 1.0 to 2.0 of float32 [n], as the official code cuts it; a shorter wave is looped to two seconds."""
    return np.resize(wave, 2 * sample_rate)[sample_rate:]  # repeats or cuts


def clean_voice(wave: np.ndarray) -> np.ndarray:
    """The second of a voice at 16 kHz that says most about it, at the loudness of speech: float32 [16000].

    Silence at the ends is cut (40 dB below the peak); of all seconds that begin at multiples of 10 ms the one with most
    voiced speech is taken, by the periodicity of its loud frames; it is scaled to -20 dBFS RMS, or less where the peak
    would pass 0.99. What is shorter than a second is looped.
    """
    import librosa

    wave, _ = librosa.effects.trim(wave, top_db=40)
    if len(wave) > SAMPLE_RATE:
        hop = SAMPLE_RATE // 100
        voiced = np.convolve(_voicing(wave, hop), np.ones(100), "valid")[: (len(wave) - SAMPLE_RATE) // hop + 1]
        wave = wave[hop * int(np.argmax(voiced)) :]
    wave = np.resize(wave, SAMPLE_RATE)
    if is_silent(wave):
        return wave
    return wave * np.float32(min(LOUDNESS / np.sqrt(np.mean(wave**2)), 0.99 / np.abs(wave).max()))


def _voicing(wave: np.ndarray, hop: int, size: int = 1024) -> np.ndarray:
    """How periodic each frame is at the pitch of a voice (60 to 400 Hz): 0 to 1, [len(wave) // hop + 1].

    The largest autocorrelation at those lags, as a part of the energy; 0 for frames 30 dB below the loudest.
    """
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, size // 2), size)[::hop]
    correlation = np.fft.irfft(np.abs(np.fft.rfft(frames, 2 * size)) ** 2)
    energy = correlation[:, 0]
    lags = np.arange(SAMPLE_RATE // 400, SAMPLE_RATE // 60)
    overlap = 1 - lags / size  # fewer samples meet at longer lags
    periodicity = (correlation[:, lags] / overlap).max(axis=1) / np.maximum(energy, 1e-9)
    return np.where(energy > 1e-3 * energy.max(), periodicity.clip(0, 1), 0)
