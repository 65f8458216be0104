"""Picture and sound together: conditions, guidance and velocity of the twin-stream models.

Latents are dictionaries, "video" [1, T, H, W, C] and "audio" [1, A, C]; a model may run with one of them.
Source: ``ovi_fusion_engine.py`` of Ovi, ``dreamid_omni_engine.py`` of DreamID-Omni.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.conditions import compiled, encode_image
from wan_jax.config import MelConfig, SoundSpec, VoiceConfig
from wan_jax.distributed import fetch
from wan_jax.errors import NonFiniteError
from wan_jax.media import to_unit
from wan_jax.models.identity import voice_features
from wan_jax.nn.mel import griffin_lim, mel_spectrogram
from wan_jax.nn.positions import reference_positions
from wan_jax.nn.reuse import Reuse
from wan_jax.references import letterbox
from wan_jax.sampling.guidance import guided
from wan_jax.sampling.sampler import Velocity

Array = jax.Array


class Passes(NamedTuple):
    """What distinguishes the passes of one step, G of them.

    text: per stream [G, S, C], features with zero rows up to the text length.
    keep: per stream [G], 1 or 0: whether that stream's references are shown.
    skip_G: int, a block that is left out, or -1.
    coupled_G: bool, whether the streams hear each other.
    """

    text: dict[str, Array]
    keep: dict[str, Array]
    skip_G: Array
    coupled_G: Array


class SoundCondition(NamedTuple):
    """Everything that steers one clip with sound, as arrays.

    weights: per stream [G], of the sum over the passes.
    references: per stream, clean latents that stand behind the noisy ones: [1, R, H, W, C] and [1, sum of K, C].
    identity_BRIC, voice_BRTF: what the adapters of the ``wan2.6`` family take.
    pin, token_time: the clean first frame, see `wan_jax.conditions.Condition`.
    """

    passes: Passes
    weights: dict[str, np.ndarray]
    references: dict[str, Array] | None = None
    identity_BRIC: Array | None = None
    voice_BRTF: Array | None = None
    pin: dict[str, Any] | None = None
    token_time: Array | None = None


def guidance_passes(
    text: dict[str, Array],
    scale: dict[str, float],
    *,
    image: float = 0.0,
    voice: float = 0.0,
    sync: float = 0.0,
    skip: int | None = None,
) -> tuple[Passes, dict[str, np.ndarray]]:
    """The passes that a guidance needs, and the weights of their sum.

    With P the prompt, N the negative prompt, I and A the prompt without the pictures and without the voices, and D the
    prompt with streams that are deaf to each other: ``N + scale (P - N) + image (P - I) + sync (P - D)`` for the video,
    ``N + scale (P - N) + voice (P - A) + sync (P - D)`` for the audio. A pass whose factors are all zero is left out.

    Args:
        text: per stream [2, S, C], prompt and negative prompt; a single row suffices where every scale is 1.
        scale: per stream, of the text.
        image, voice: of the references. sync: for a model whose streams were trained to do without each other.
        skip: block that N leaves out, so that guidance also leads away from a weaker model (Ovi).
    Returns:
        The passes, and per stream the weights [G] float32.
    """
    factors = {"video": (scale.get("video", 1.0), image, 0.0), "audio": (scale.get("audio", 1.0), 0.0, voice)}
    factors = {stream: f for stream, f in factors.items() if stream in text}
    sync = sync if len(factors) == 2 else 0.0
    weights = {s: np.array([c + i + v + sync, 1 - c, -i, -v, -sync], np.float32) for s, (c, i, v) in factors.items()}
    used = [0] + [g for g in (1, 2, 3, 4) if any(w[g] for w in weights.values())]
    table = np.array(  # row of the text, pictures, voices, block left out, coupled
        [
            [0, 1, 1, -1, 1],
            [1, 1, 1, -1 if skip is None else skip, 1],
            [0, 0, 1, -1, 1],
            [0, 1, 0, -1, 1],
            [0, 1, 1, -1, 0],
        ]
    )[used]
    rows, keep_video, keep_audio, skips, coupled = table.T
    keep = {"video": jnp.asarray(keep_video, jnp.float32), "audio": jnp.asarray(keep_audio, jnp.float32)}
    texts = {s: x[rows] for s, x in text.items()}
    passes = Passes(texts, keep, jnp.asarray(skips, jnp.int32), jnp.asarray(coupled, bool))
    return passes, {s: w[used] for s, w in weights.items()}


@functools.cache
def fusion_velocity(
    mode: str, video_times: tuple[float, ...] | None = None, audio_times: tuple[float, ...] | None = None
) -> Velocity:
    """The velocity function of a `Fusion` and a `SoundCondition`.

    Args:
        mode: of guidance, "batch", "sequential" or "none".
        video_times, audio_times: see `Fusion`; with references they tell whose face and whose voice they are.
    """
    times = {"video": video_times, "audio": audio_times}

    def velocity(
        args: tuple[Any, SoundCondition],
        latents: dict[str, Array],
        timestep: Array,
        weights: Any,
        reuse: Reuse | None = None,
    ) -> Any:
        fusion, condition = args

        def network(latents: dict[str, Array], timesteps: Array, passes: Passes, added: Any) -> tuple[Any, Any]:
            def shown(stream: str, x: Array) -> Array:
                """The references [1, ...] of a stream for every pass; zero where it does without."""
                return x * passes.keep[stream].reshape(-1, *[1] * (x.ndim - 1))

            seen = dict(latents)
            for stream, clean in (condition.references or {}).items():
                seen[stream] = jnp.concatenate([latents[stream], shown(stream, clean)], axis=1)
            identity, voice = condition.identity_BRIC, condition.voice_BRTF
            token_time = condition.token_time
            if token_time is not None:
                timesteps = jnp.stack([timesteps, jnp.zeros_like(timesteps)], axis=-1)
                per_frame = token_time.shape[1] // latents["video"].shape[1]
                behind = seen["video"].shape[1] - latents["video"].shape[1]  # references, at the clip's own timestep
                token_time = jnp.pad(token_time, ((0, 0), (0, behind * per_frame)))
            out = fusion(
                seen,
                timesteps,
                passes.text,
                times=times,
                token_time=token_time,
                identity_BRIC=None if identity is None else shown("video", identity),
                voice_BRTF=None if voice is None else shown("audio", voice),
                coupled_B=passes.coupled_G if fusion.cfg.coupling else None,
                skip_B=passes.skip_G,
                reuse=reuse and reuse._replace(added=added),
            )
            out, added = out if reuse else (out, None)
            return {stream: out[stream][:, : x.shape[1]] for stream, x in latents.items()}, added

        out = guided(network, latents, timestep, weights, condition.passes, mode, reuse and reuse.added)
        return out if reuse else out[0]

    return velocity


def reference_times(
    num_frames: int, num_latents: int, references: Sequence[Any], sound: SoundSpec
) -> dict[str, tuple[float, ...]]:
    """Positions in time of both streams with the references behind the clip; equal far-away places bind face and voice.

    Args:
        num_frames, num_latents: of the clip, latent ones.
        references: `wan_jax.references.ResolvedReference`.
    """
    lengths = [0 if r.voice is None else num_voice_latents(len(r.voice_second), sound) for r in references]
    video, audio, scale = reference_positions(num_frames, num_latents, len(references), lengths)
    return {"video": tuple(video.tolist()), "audio": tuple((audio * scale).tolist())}


def num_voice_latents(samples: int, sound: SoundSpec) -> int:
    """Latents that `encode_voices` gives for a voice of so many samples."""
    return (samples // sound.mel.hop) // sound.vae.stride


def encode_pictures(vae: Any, pictures: Sequence[np.ndarray]) -> Array:
    """Latents [1, R, h, w, z] of pictures uint8 [H, W, 3] of one size, each a video of one frame."""
    run = compiled("picture", lambda vae, video: vae.encode(video))
    return jnp.concatenate([run(vae, jnp.asarray(to_unit(picture))[None, None]) for picture in pictures], axis=1)


def encode_voices(audio_vae: Any, voices: Sequence[np.ndarray], mel: MelConfig) -> Array:
    """Latents [1, sum of K, z] of mono sound, float32 [n] each at the rate of ``mel``."""
    run = compiled(f"voice {mel}", lambda vae, wave: vae.encode(mel_spectrogram(wave, mel)))
    return jnp.concatenate([run(audio_vae, jnp.asarray(voice)[None]) for voice in voices], axis=1)


def encode_identities(encoder: Any, pictures: Sequence[np.ndarray]) -> Array:
    """Image-encoder tokens [1, R, I, C] of pictures uint8 [H, W, 3], whole and undistorted on a white square."""
    size = encoder.cfg.image_size
    return jnp.stack([encode_image(encoder, [letterbox(picture, size, size)]) for picture in pictures], axis=1)


def encode_speakers(voices: Sequence[np.ndarray | None], cfg: VoiceConfig) -> Array:
    """What the voice adapter takes: features [1, R, T, F] of voices float32 [n]; zero for those that are None.

    A voice is cut or looped to ``cfg.seconds``.
    """
    length = round(cfg.seconds * cfg.mel.sample_rate)
    waves = np.stack([np.zeros(length, np.float32) if v is None else np.resize(v[:length], length) for v in voices])
    heard = jnp.asarray([voice is not None for voice in voices], jnp.float32)
    run = compiled(f"speakers {cfg.mel}", lambda waves: voice_features(waves, cfg.mel))
    return run(jnp.asarray(waves)[None]) * heard[None, :, None, None]


def decode_audio(
    audio_vae: Any, vocoder: Any | None, latents_BAC: Array, num_samples: int, mel: MelConfig
) -> np.ndarray:
    """Waveform float32 [num_samples] in [-1, 1] of audio latents [1, A, z].

    A latent is a whole number of samples, a clip a whole number of frames: what differs is cut off or silent.
    Args:
        vocoder: None for `griffin_lim`.
    Raises:
        NonFiniteError: the sound holds NaN or infinity.
    """
    if vocoder is None:
        spectrum = fetch(compiled("spectrum", lambda vae, z: vae.decode(z))(audio_vae, latents_BAC))[0]
        wave = griffin_lim(spectrum, mel) if np.isfinite(spectrum).all() else spectrum.ravel()
    else:
        run = compiled("sound", lambda vae, vocoder, z: vocoder(vae.decode(z)))
        wave = fetch(run(audio_vae, vocoder, latents_BAC))[0]
    if not np.isfinite(wave).all():
        raise NonFiniteError("the decoded sound holds NaN or infinity: check the audio VAE and the vocoder")
    wave = wave[:num_samples].clip(-1, 1)
    return np.pad(wave, (0, num_samples - len(wave)))
