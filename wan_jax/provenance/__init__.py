"""Marks that say that a clip was generated: a watermark in the picture, one in the sound, a signed manifest.

`mark` a clip once, before any file is written; `sign` a saved file; `verify` any file. What the marks withstand, and
what not, is measured in ``docs/watermark.md``. With the public key anyone can verify, and so anyone can forge.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wan_jax import ffmpeg
from wan_jax.config import MODELS
from wan_jax.errors import InputError
from wan_jax.media import Clip, read_audio, read_image, read_settings, read_video
from wan_jax.provenance import audio, video
from wan_jax.provenance.manifest import Manifest, read, sign
from wan_jax.provenance.payload import PUBLIC_KEY, SMALL, VERSION, Mark, Message, decode, encode, payload_hex

__all__ = ["Finding", "Manifest", "Report", "mark", "sign", "verify"]

RECORD = "provenance"  # the entry of a clip's settings that `mark` makes
SOUND_RATE = 16_000  # Hz, at which sound without a picture is read
LONG_SOUND = 3.0  # seconds, from which the measured robustness holds


def mark(clip: Clip, *, model: str, key: str | None = None, badge: bool = False) -> Clip:
    """The clip with watermarks in picture and sound, and a record of them in its settings under ``provenance``.

    Frames of 256 x 256 pixels and more carry 64 bits: version, model, hash of the settings, check. Smaller ones and the
    sound carry 16: version, model, check. The record says what was read back from the marked arrays, and why when
    nothing was: too small, too short, or too plain or silent to hide anything in.

    Args:
        model: name of the model that made the clip.
        key: a secret; by default the public key, with which anyone can verify.
        badge: also write "AI" into the lower right corner, for people to see.

    Raises:
        InputError: the clip has been marked already.
    """
    if RECORD in clip.settings:
        raise InputError(f"the clip's settings have {RECORD!r}: it was marked when it was generated, once is enough")
    picture = marked_video = None
    if clip.video is not None:
        shown = _with_badge(clip.video) if badge else clip.video
        picture, marked_video = _mark_picture(shown, model, clip.settings, key)
    sound, marked_audio = _mark_sound(clip.audio, clip.sample_rate, model, key)
    record = {
        "version": VERSION,
        "key": "private" if key else "public",
        "model": model,
        "settings_sha256": hashlib.sha256(json.dumps(clip.settings, sort_keys=True).encode()).hexdigest(),
        "picture": picture,
        "sound": sound,
        "badge": badge,
    }
    return dataclasses.replace(clip, video=marked_video, audio=marked_audio, settings={**clip.settings, RECORD: record})


@dataclass(frozen=True)
class Finding:
    """A watermark in a picture or a sound. ``evidence`` is -log10 of its probability by chance at one place; it counts
    from `MIN_EVIDENCE` on, if the payload's check holds too. ``models`` are the known names that fit the payload.
    ``settings_match``: whether the payload fits the file's settings, None where it has no hash or the file no settings.
    """

    found: bool
    bits: int
    evidence: float
    payload: str | None = None
    models: list[str] = dataclasses.field(default_factory=list)
    settings_match: bool | None = None

    def __str__(self) -> str:
        if not self.found:
            return f"no watermark of this key (evidence {self.evidence:.1f})"
        match = {None: "", True: ", fits the settings", False: ", DOES NOT FIT the settings"}[self.settings_match]
        model = " or ".join(self.models) or "of an unknown model"
        return f"{self.bits} bits {self.payload}: {model}{match} (chance 1 in 10^{self.evidence:.0f})"


@dataclass(frozen=True)
class Report:
    """What `verify` found in a file; picture and sound are None where the file has none, or cannot be decoded."""

    path: str
    manifest: Manifest
    picture: Finding | None
    sound: Finding | None
    settings: dict[str, Any] | None
    consent: Any
    problems: list[str]

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1)

    def __str__(self) -> str:
        signer = f" by {self.manifest.signer!a}" if self.manifest.signer else ""  # escaped, like the rest below
        reasons = f" ({'; '.join(self.manifest.reasons)})" if self.manifest.reasons else ""
        rows = [
            ("manifest", f"{self.manifest.state}{signer}{reasons}"),
            ("picture", self.picture or "none"),
            ("sound", self.sound or "none"),
            ("settings", "none" if self.settings is None else json.dumps(self.settings)),
            ("consent", "no record" if self.consent is None else json.dumps(self.consent)),
            *(("problem", problem) for problem in self.problems),
        ]
        return "\n".join(f"{name:9s} {value}" for name, value in rows)


def verify(path: str | Path, key: str | None = None, *, trust: str | Path | None = None) -> Report:
    """Look for the manifest, the watermarks and the settings of a video, picture or sound file.

    Args:
        key: the secret that the clip was marked with; by default the public key.
        trust: PEM file of certificate authorities to trust.

    Raises:
        InputError: the file is missing. One that cannot be decoded is a `Report` with problems, since a manifest may
            still tell that it was tampered with.
    """
    path, secret, problems = Path(path), key or PUBLIC_KEY, []
    if not path.is_file():
        raise InputError(f"{path} is missing: give the path of a local file")
    manifest = read(path, trust)
    settings = picture = sound = None
    try:
        settings = read_settings(path)
    except InputError as error:
        problems.append(str(error))
    try:
        frames, heard, sample_rate = _read(path)
        if frames is not None and min(frames.shape[1:3]) >= video.MIN_SIDE:
            picture = _finding(video.detect(frames, secret), settings)
        if heard is not None and sample_rate >= audio.MIN_RATE:
            sound = _finding(audio.detect(heard, sample_rate, secret), settings)
    except InputError as error:
        problems.append(str(error))
    consent = manifest.claims.get("consent", (settings or {}).get("consent"))
    return Report(str(path), manifest, picture, sound, settings, consent, problems)


def _mark_picture(
    frames: np.ndarray, model: str, settings: dict[str, Any], key: str | None
) -> tuple[dict[str, Any], np.ndarray]:
    layout, _ = video.layout_of(*frames.shape[1:3])
    if min(frames.shape[1:3]) < video.MIN_SIDE:
        return {"bits": 0, "note": f"frames under {video.MIN_SIDE} pixels carry nothing"}, frames
    signs = encode(Message.of(layout, model, settings), layout)
    marked = video.embed(frames, key or PUBLIC_KEY, signs)
    note = "frames under 256 x 256 pixels carry no hash of the settings" if layout is SMALL else None
    return _record(video.detect(marked, key or PUBLIC_KEY, search=False), signs, note), marked


def _mark_sound(
    samples: np.ndarray | None, sample_rate: int | None, model: str, key: str | None
) -> tuple[dict[str, Any] | None, np.ndarray | None]:
    if samples is None:
        return None, None
    seconds = len(samples) / sample_rate
    if sample_rate < audio.MIN_RATE or seconds < audio.PERIOD:
        limits = f"{audio.PERIOD} s and {audio.MIN_RATE / 1000:.0f} kHz"
        return {"bits": 0, "note": f"sound under {limits} carries nothing"}, samples
    signs = encode(Message.of(SMALL, model, {}), SMALL)
    marked = audio.embed(samples, sample_rate, key or PUBLIC_KEY, signs)
    short = f"{seconds:.1f} s of sound: under {LONG_SOUND:.0f} s the mark withstands less than documented"
    note = short if seconds < LONG_SOUND else None
    return _record(audio.detect(marked, sample_rate, key or PUBLIC_KEY), signs, note), marked


def _record(found: Mark, signs: np.ndarray, note: str | None) -> dict[str, Any]:
    """What the settings say about a mark that was embedded."""
    readable = found.message == decode(signs, found.layout)
    note = note if readable else "the mark cannot be read back: there is too little to hide it in"
    record = {"bits": len(signs) if readable else 0, "payload": payload_hex(signs)}
    return record | {"evidence": round(found.evidence, 1)} | ({"note": note} if note else {})


def _finding(found: Mark, settings: dict[str, Any] | None) -> Finding:
    layout, message = found.layout, found.message
    if message is None:
        return Finding(False, layout.bits, found.evidence)
    given = {name: value for name, value in (settings or {}).items() if name != RECORD}
    record = (settings or {}).get(RECORD)
    named = record.get("model") if isinstance(record, dict) else None
    names = [*MODELS, *([named] if isinstance(named, str) and named.isprintable() else [])]
    models = [name for name in dict.fromkeys(names) if Message.of(layout, name, {}).model == message.model]
    match = None
    if settings is not None and layout.settings:
        match = Message.of(layout, "", given).settings == message.settings
    return Finding(True, layout.bits, found.evidence, payload_hex(encode(message, layout)), models, match)


def _read(path: Path) -> tuple[np.ndarray | None, np.ndarray | None, int | None]:
    kind = ffmpeg.container(path, {*ffmpeg.VIDEO, *ffmpeg.SOUND})
    if kind is None:
        return read_image(path)[None], None, None
    if kind not in ffmpeg.VIDEO:
        return None, read_audio(path), SOUND_RATE
    clip = read_video(path)
    return clip.video, clip.audio, clip.sample_rate


def _with_badge(frames: np.ndarray) -> np.ndarray:
    """White "AI" on a dark half-transparent box, a twelfth of the frame's shorter side high."""
    from PIL import Image, ImageDraw, ImageFont

    height, width = frames.shape[1:3]
    size = max(8, min(height, width) // 12)
    badge = Image.new("L", (2 * size, round(1.4 * size)), 0)
    font = ImageFont.load_default(size)
    ImageDraw.Draw(badge).text((badge.width / 2, badge.height / 2), "AI", fill=255, font=font, anchor="mm")
    text = np.asarray(badge, np.float32)[:height, :width, None]
    corner = (slice(None), slice(height - len(text), None), slice(width - text.shape[1], None))
    result = frames.copy()
    result[corner] = np.round(np.maximum(frames[corner] * 0.4, text))
    return result
