"""What can be measured of a clip of a real person by arithmetic alone, offline: sync, drift, loudness, pitch, timbre.

No learned embedding is used, so who a face or a voice belongs to is out of reach. `likeness` and `timbre_distance`
compare clips that were made with one reference; they do not tell people apart.

Axes: ``T`` frames, ``H W`` rows, columns, ``n`` samples. Pixels are uint8, sound is float32 mono at 16 kHz.
"""

from __future__ import annotations

import numpy as np

from wan_jax.media import Clip, resample
from wan_jax.references import face_detector, is_silent

RATE = 16_000
LAGS = range(-12, 13)  # frames
_MOUTH = np.array([0.25, 0.60, 0.75, 1.0])  # left, top, right, bottom within the box of a face
_FACE = 96  # rows and columns of a face that is compared
_CELLS = 6  # of them each way
_PITCHES = (65, 450)  # Hz
_QUIET = 10 ** (-45 / 20)  # amplitude of full scale; a frame below is silent


def gauge(
    clip: Clip,
    picture: np.ndarray | None = None,
    voice: np.ndarray | None = None,
    *,
    boxes_T4: np.ndarray | None = None,
) -> dict[str, float]:
    """The rows that can be measured.

    Args:
        picture: the reference, uint8 [h, w, 3]. voice: the reference, float32 [n] at 16 kHz.
        boxes_T4: left, top, right and bottom of the face in pixels; default: `find_faces`, with the extra `faces`.
    """
    rows: dict[str, float] = {}
    if clip.video is not None:
        rows |= {"colour drift, LAB": drift(clip.video), "flicker, levels": flicker(clip.video)}
        if boxes_T4 is None and (found := find_faces(clip.video)) is not None:
            boxes_T4, share = found
            rows["frames with a face"] = share
        if boxes_T4 is not None and picture is not None and (other := find_faces(picture[None])) is not None:
            if other[0] is not None:
                rows["likeness to the reference"] = likeness(_cut(picture, other[0][0]), clip.video, boxes_T4)
    if clip.audio is None:
        return rows
    audio = resample(clip.audio, clip.sample_rate, RATE)
    rows |= {"loudness, dBFS": loudness_db(audio), "silence": silence(audio)}
    if boxes_T4 is not None:
        lag, strength = sync(mouth_darkness(clip.video, boxes_T4), envelope(audio, clip.num_frames))
        rows |= {"sync": strength, "sound is late by frames": float(lag)}
    if not is_silent(audio):
        rows["pitch, Hz"] = pitch(audio)
        if voice is not None and not is_silent(voice):
            rows["pitch error, cents"] = float(abs(1200 * np.log2(rows["pitch, Hz"] / pitch(voice))))
            rows["timbre distance, dB"] = timbre_distance(audio, voice)
    return rows


# ---- picture -----------------------------------------------------------------------------------------------


def find_faces(video: np.ndarray) -> tuple[np.ndarray | None, float] | None:
    """The largest face of every frame, uint8 [T, H, W, 3].

    Returns:
        Boxes [T, 4] (left, top, right, bottom; frames without a face take the nearest ones) or None where no frame has
        one, and the share of frames with a face. None without the extra `faces`.
    """
    detect = face_detector()
    if detect is None:
        return None
    boxes = np.full((len(video), 4), np.nan)
    for box, frame in zip(boxes, video, strict=True):
        found = detect(frame)
        if len(found):
            x, y, w, h = max(found, key=lambda face: face[2] * face[3])
            box[:] = x, y, x + w, y + h
    seen = ~np.isnan(boxes[:, 0])
    if not seen.any():
        return None, 0.0
    frames = np.arange(len(video))
    return np.stack([np.interp(frames, frames[seen], side[seen]) for side in boxes.T], axis=1), float(seen.mean())


def mouth_darkness(video: np.ndarray, boxes_T4: np.ndarray) -> np.ndarray:
    """How far the lower middle of the face is darker than at rest, per frame, [T]: an open mouth shows its inside.

    Rest is the clip's brighter frames, pixel by pixel; speech leaves pauses.
    """
    sizes = (boxes_T4[:, 2:] - boxes_T4[:, :2])[:, [0, 1, 0, 1]]
    places = boxes_T4[:, [0, 1, 0, 1]] + _MOUTH * sizes
    mouths = np.stack([_grey(_cut(frame, place)) for frame, place in zip(video, places, strict=True)])
    return np.clip(np.quantile(mouths, 0.7, axis=0) - mouths, 0, None).mean(axis=(1, 2))


def likeness(face: np.ndarray, video: np.ndarray, boxes_T4: np.ndarray) -> float:
    """0 to 1: overlap of the histograms of local binary patterns in the cells of two faces, median over the frames.

    Source: Ahonen, Hadid and Pietikainen, 2006, with eight neighbours and all 256 patterns.
    """
    wanted, faces = _patterns(face), map(_cut, video, boxes_T4)
    return float(np.median([np.minimum(wanted, _patterns(other)).sum(-1).mean() for other in faces]))


def _patterns(face: np.ndarray) -> np.ndarray:
    """Histograms [cells, 256], each with sum 1."""
    grey = _grey(face)
    middle, code = grey[1:-1, 1:-1], 0
    around = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    for bit, (row, column) in enumerate(around):
        code = code + ((grey[row : row + _FACE - 2, column : column + _FACE - 2] >= middle) << bit)
    cells = [cell for band in np.array_split(code, _CELLS) for cell in np.array_split(band, _CELLS, axis=1)]
    return np.stack([np.bincount(cell.ravel(), minlength=256) / cell.size for cell in cells])


def _cut(frame: np.ndarray, box: np.ndarray) -> np.ndarray:
    """A box of uint8 [H, W, 3] at a common size, [_FACE, _FACE, 3]."""
    from PIL import Image

    cut = Image.fromarray(frame).resize((_FACE, _FACE), Image.Resampling.BILINEAR, box=_inside(box, frame.shape))
    return np.asarray(cut)


def _inside(box: np.ndarray, shape: tuple[int, ...]) -> tuple[float, ...]:
    """A box that lies within a frame and holds at least one pixel."""
    left, top = np.clip(box[:2], 0, (shape[1] - 1, shape[0] - 1))
    right, bottom = np.clip(box[2:], (left + 1, top + 1), (shape[1], shape[0]))
    return left, top, right, bottom


def _grey(pixels: np.ndarray) -> np.ndarray:
    return pixels @ np.float32([0.299, 0.587, 0.114])


def drift(video: np.ndarray, windows: int = 3) -> float:
    """Largest distance in CIELAB of the mean colour of a later part of the clip from that of its first part."""
    means = [_lab(part.mean(axis=(0, 1, 2)) / 255) for part in np.array_split(video, min(windows, len(video)))]
    return float(max(np.linalg.norm(mean - means[0]) for mean in means))


def flicker(video: np.ndarray) -> float:
    """Mean change of the whole picture's brightness from frame to frame, in levels of 255."""
    return float(np.abs(np.diff(_grey(video.mean(axis=(1, 2))))).mean()) if len(video) > 1 else 0.0


def _lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [3] in [0, 1] to CIELAB under D65. Source: IEC 61966-2-1 and CIE 15."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = to_xyz @ linear / to_xyz.sum(axis=1)
    x, y, z = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


# ---- sound -------------------------------------------------------------------------------------------------


def envelope(audio: np.ndarray, frames: int) -> np.ndarray:
    """Root mean square over the time of each video frame, [frames]."""
    return np.sqrt([np.square(part).mean() if len(part) else 0.0 for part in np.array_split(audio, frames)])


def sync(opening_T: np.ndarray, loudness_T: np.ndarray) -> tuple[int, float]:
    """The lag of the sound in frames at which the two correlate best (over those they share), and that correlation."""
    frames, best = len(opening_T), (0, -1.0)
    for lag in (lag for lag in LAGS if frames - abs(lag) >= max(8, frames // 2)):
        mouth = opening_T[max(-lag, 0) : frames - max(lag, 0)]
        sound = loudness_T[max(lag, 0) : frames + min(lag, 0)]
        if mouth.std() > 1e-9 and sound.std() > 1e-9:
            best = max(best, (lag, float(np.corrcoef(mouth, sound)[0, 1])), key=lambda pair: pair[1])
    return best


def loudness_db(audio: np.ndarray) -> float:
    """Root mean square of the frames that are not silent, in dB of full scale; -99 for silence."""
    frames = envelope(audio, max(len(audio) * 50 // RATE, 1))
    loud = frames[frames > _QUIET]
    return float(20 * np.log10(np.sqrt(np.square(loud).mean()))) if len(loud) else -99.0


def silence(audio: np.ndarray) -> float:
    """Share of the time below -45 dBFS: near 1 where no sound was asked for."""
    return float((envelope(audio, max(len(audio) * 50 // RATE, 1)) <= _QUIET).mean())


def pitch(audio: np.ndarray) -> float:
    """Median fundamental of the voiced frames in Hz; NaN where nothing is voiced."""
    import librosa

    hz, voiced, _ = librosa.pyin(audio, fmin=_PITCHES[0], fmax=_PITCHES[1], sr=RATE, frame_length=1024)
    return float(np.median(hz[voiced])) if voiced.any() else float("nan")


def timbre_distance(audio: np.ndarray, voice: np.ndarray) -> float:
    """Root mean square difference of two mean spectral envelopes of the loud frames, in dB, level aside.

    An envelope is 12 mel cepstral coefficients. What is said and the room count too: two halves of one speech are the
    yardstick.
    """
    import librosa

    def mean(sound: np.ndarray) -> np.ndarray:
        power = librosa.feature.melspectrogram(y=sound, sr=RATE, n_fft=1024, hop_length=320, n_mels=40)
        level = power.sum(axis=0)
        bands = librosa.power_to_db(power[:, level > 0.05 * level.max()], top_db=60)
        return librosa.feature.mfcc(S=bands, n_mfcc=13)[1:].mean(axis=1)

    return float(np.linalg.norm(mean(audio) - mean(voice)) / np.sqrt(40))
