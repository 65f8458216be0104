"""Architectures and the table of published models.

Three kinds of settings are kept apart: *architecture* (the frozen dataclasses below, hashable, static under jit),
*recipes* (``configs/*.py``) and *runtime choices* (mesh, dtype, attention implementation: arguments with defaults).

Precision, stated once: matrices and matmuls run in the dtype a model is loaded with (bfloat16 by default); norms,
softmax, modulation and gates, rotary tables, the timestep embedding, the head, solver state and the VAE are float32.
Loading with ``dtype=jnp.float32`` makes everything float32 with full-precision matmuls: the parity mode.

Sources: Wan2.1 and Wan2.2 repositories, ``wan/configs/*`` and the ``config.json`` of each checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args, get_type_hints

from wan_jax.errors import InputError, nearest

# Official default negative prompts (wan/configs/shared_config.py), configuration constants used verbatim.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
NEGATIVE_PROMPT_I2V = "镜头晃动，" + NEGATIVE_PROMPT
NEGATIVE_PROMPT_FLF2V = "镜头切换，" + NEGATIVE_PROMPT_I2V

NUM_TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class DiTConfig:
    """Diffusion transformer. Source: ``wan/modules/model.py`` WanModel and the released ``config.json`` files."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    in_dim: int = 16  # channels after concatenating the condition: 36 = 16 noisy + 4 mask + 16 condition
    out_dim: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    image_tokens: int = 0  # CLIP tokens per sample that the cross-attention sees beside the text (Wan2.1 I2V, FLF2V)
    image_dim: int = 1280
    image_positions: bool = False  # learned position table over the image tokens (FLF2V)

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def num_params(self) -> int:
        """Parameters of the whole network, from the closed formula (checked against the checkpoint manifest)."""
        d, f, patch = self.dim, self.ffn_dim, self.patch_size[0] * self.patch_size[1] * self.patch_size[2]
        block = 6 * d + 2 * (4 * (d * d + d) + 2 * d) + 2 * d + (2 * d * f + f + d)
        image = 0
        if self.image_tokens:
            block += 2 * (d * d + d) + d
            i = self.image_dim
            image = 2 * i + i * i + i + i * d + d + 2 * d + (self.image_tokens * i if self.image_positions else 0)
        embeddings = (patch * self.in_dim * d + d) + (self.text_dim * d + d + d * d + d)
        embeddings += (self.freq_dim * d + d + d * d + d) + (6 * d * d + 6 * d)
        head = 2 * d + patch * self.out_dim * (d + 1)
        return self.num_layers * block + embeddings + image + head


LATENT_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
LATENT_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
LATENT_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """Causal video autoencoder. Source: ``wan/modules/vae.py`` (2.1) and ``wan/modules/vae2_2.py`` (2.2)."""

    version: str = "2.1"  # "2.2" adds the parameter-free stage shortcuts, and patches
    dim: int = 96
    dec_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    spatial_downsample: tuple[bool, ...] | None = None  # None: between all stages
    latents_mean: tuple[float, ...] = LATENT_MEAN_21
    latents_std: tuple[float, ...] = LATENT_STD_21
    patch: int | None = None  # side of the cells of pixels that become channels at first; None: as the version has it

    @property
    def patch_size(self) -> int:
        return self.patch or (2 if self.version == "2.2" else 1)

    @property
    def resamplings(self) -> tuple[tuple[bool, bool], ...]:
        """Whether the encoder halves time, and the picture, between its stages."""
        spatial = self.spatial_downsample or (True,) * len(self.temporal_downsample)
        return tuple(zip(self.temporal_downsample, spatial, strict=True))

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)

    @property
    def spatial_stride(self) -> int:
        return 2 ** sum(spatial for _, spatial in self.resamplings) * self.patch_size


@dataclass(frozen=True)
class UMT5Config:
    """umT5 encoder. Source: ``wan/modules/t5.py`` T5Encoder, umt5_xxl."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP visual tower. Source: ``wan/modules/clip.py`` VisionTransformer, xlm-roberta-large ViT-H/14."""

    image_size: int = 224
    patch_size: int = 14
    dim: int = 1280
    mlp_dim: int = 5120
    num_heads: int = 16
    num_layers: int = 32
    out_dim: int = 1024
    eps: float = 1e-5

    @property
    def num_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2 + 1


@dataclass(frozen=True)
class MelConfig:
    """Log-mel front-end of the audio codec. Source: MMAudio ``mmaudio/ext/mel_converter.py``, the 16 kHz variant."""

    sample_rate: int = 16000
    n_fft: int = 1024  # also the length of the Hann window
    hop: int = 256
    num_bins: int = 80
    fmin: float = 0.0
    fmax: float = 8000.0
    floor: float = 1e-5  # magnitudes below count as this; log10 follows


@dataclass(frozen=True)
class AudioVAEConfig:
    """Mel-spectrogram autoencoder. Source: MMAudio ``mmaudio/ext/autoencoder/vae.py``, ``VAE_16k``."""

    num_bins: int = 80
    dim: int = 384
    dim_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    z_dim: int = 20
    down_levels: tuple[int, ...] = (0,)  # levels that end in a downsampling by two
    clip: float = 256.0  # activations are held within +- this after each block

    @property
    def stride(self) -> int:
        """Mel frames per latent."""
        return 2 ** len(self.down_levels)


@dataclass(frozen=True)
class VocoderConfig:
    """BigVGAN, mel to waveform. Source: MMAudio ``mmaudio/ext/bigvgan/bigvgan_vocoder.yml``."""

    num_bins: int = 80
    dim: int = 1536
    rates: tuple[int, ...] = (4, 4, 2, 2, 2, 2)
    kernels: tuple[int, ...] = (8, 8, 4, 4, 4, 4)
    res_kernels: tuple[int, ...] = (3, 7, 11)
    res_dilations: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))


@dataclass(frozen=True)
class IdentityConfig:
    """Adapter of the ``wan2.6`` family that shows the video stream who the references are.

    Image-encoder tokens of each reference pass a resampler; every block of the video stream attends to the result.
    """

    feature_dim: int = 1280  # width of the image encoder's tokens
    dim: int = 1024  # width of the resampler and of its tokens
    num_tokens: int = 16  # per reference
    num_layers: int = 2
    num_heads: int = 16
    max_references: int = 5


@dataclass(frozen=True)
class VoiceConfig:
    """Adapter of the ``wan2.6`` family that lets the audio stream hear how the references speak.

    A convolution and transformer encoder over the log-mel of each voice, beside explicit pitch, energy and speaking
    rate, gives tokens that every block of the audio stream attends to.
    """

    mel: MelConfig = MelConfig()
    dim: int = 512
    num_tokens: int = 16  # per voice
    num_layers: int = 4
    num_heads: int = 8
    max_references: int = 5
    seconds: float = 4.0  # of each voice; a shorter one is looped


@dataclass(frozen=True)
class CouplingConfig:
    """Attention between the streams with maps and a sense of time of its own, for small models trained from nothing.

    A query looks around its own moment: scores fall with the square of the time between the two tokens, over a
    learned reach. The heads of video tokens look at the single frames of their latent in turn. Tokens of references
    take no part.
    """

    latent_frames: int = 4  # video frames of a latent after the first; the heads are a multiple of them
    fps: float = 16.0
    audio_latent: float = 0.032  # seconds of an audio latent
    reach: float = 0.09  # seconds, at the start of training


@dataclass(frozen=True)
class FusionConfig(DiTConfig):
    """Twin-stream transformer: a video and an audio stream of equal blocks, coupled in each of them.

    The inherited fields are the video stream's; widths, heads and depth are those of both. Source: Ovi
    ``ovi/configs/model/dit/{video,audio}.json``; DreamID-Omni has the same networks.
    """

    audio_dim: int = 20  # channels of an audio latent
    audio_kernel: int = 7  # of the convolutions of the audio stem
    audio_rope_scale: float = 0.19676  # latent frames per audio latent, as trained
    coupling: CouplingConfig | None = None  # None: as in Ovi, where the streams meet in the text's cross-attention
    identity: IdentityConfig | None = None
    voice: VoiceConfig | None = None

    @property
    def stem_dim(self) -> int:
        """Hidden width of the gated convolution of the audio stem: 8/3 of the width, in steps of 256."""
        return -(-(2 * 4 * self.dim // 3) // 256) * 256

    def num_params(self) -> int:
        """Parameters of both streams, without adapters, from the closed formula (checked against Ovi's count)."""
        d, k, n = self.dim, self.audio_kernel, self.num_heads
        own = 2 * (d * d + d) + d + (d * n + n) + n if self.coupling else 0
        coupling = self.num_layers * (2 * (d * d + d) + 2 * d + d + own)
        video_ends = (
            self.patch_size[0] * self.patch_size[1] * self.patch_size[2] * (self.in_dim * d + self.out_dim * (d + 1))
            + d
        )
        audio_ends = k * self.audio_dim * d + d + 3 * k * d * self.stem_dim + self.audio_dim * (d + 1)
        return 2 * (super().num_params() - video_ends + coupling) + video_ends + audio_ends


@dataclass(frozen=True)
class SoundSpec:
    """The sound side of a model that makes picture and sound together, and its official defaults.

    Source: Ovi ``configs/inference/inference_fusion.yaml``, DreamID-Omni ``configs/inference/inference_r2av.yaml``.
    """

    mel: MelConfig = MelConfig()
    vae: AudioVAEConfig = AudioVAEConfig()
    vocoder: VocoderConfig | None = VocoderConfig()  # None: phases by Griffin and Lim's iterations, no network
    num_latents: int = 157  # of a clip of `ModelSpec.num_frames`
    guidance_scale: float = 3.0
    negative_prompt: str = "robotic, muffled, echo, distorted"
    skip_layer: int | None = None  # block that the pass with the negative prompts leaves out
    image_guidance: float = 0.0  # by passes without the reference pictures, without the voices
    voice_guidance: float = 0.0
    sync_guidance: float = 0.0  # by a pass whose streams do not hear each other, of a model with `CouplingConfig`
    caption: str = "audio"  # form of prompt, see `wan_jax.captions`: audcap, audio, structured
    area: int = 960 * 960  # pixels, of a clip whose aspect alone is given, or whose first picture

    @property
    def hop(self) -> int:
        """Samples per audio latent."""
        return self.mel.hop * self.vae.stride


@dataclass(frozen=True)
class ModelSpec:
    """One model: its networks, where its files are, and the defaults it was released with.

    ``guidance_scale`` and ``shift`` are the official command-line defaults. For the two-expert models
    ``guidance_scale`` is ordered (low noise, high noise), as in the official configuration.
    """

    name: str
    task: str  # t2v | i2v | flf2v | ti2v; with sound: ti2av (text or picture), r2av (references)
    dit: DiTConfig
    vae: VAEConfig
    sizes: tuple[tuple[int, int], ...]  # (width, height) the model was trained on, the default first
    repository: str = ""
    diffusers_repository: str = ""
    text: UMT5Config = UMT5Config()
    clip: CLIPConfig | None = None
    sound: SoundSpec | None = None
    file: str = ""  # of the transformer in a folder of several repositories, which models with sound come in
    companions: tuple[tuple[str, tuple[str, ...]], ...] = ()  # other repositories of that folder, and what of them
    boundary: float | None = None  # two experts: the high-noise one serves timesteps >= boundary * 1000
    num_steps: int = 50
    shift: float = 5.0
    shift_480p: float | None = None  # official I2V default for areas up to 832 x 480
    guidance_scale: float | tuple[float, float] = 5.0
    num_frames: int = 81
    fps: int = 16
    negative_prompt: str = NEGATIVE_PROMPT
    licence: str = "Apache-2.0"

    @property
    def num_experts(self) -> int:
        return 1 if self.boundary is None else 2

    @property
    def size_multiple(self) -> int:
        """Pixels: width and height must be multiples of this (VAE stride times the DiT's patch)."""
        return self.vae.spatial_stride * self.dit.patch_size[1]

    @property
    def max_area(self) -> int:
        return max(w * h for w, h in self.sizes)

    @cached_property
    def num_params(self) -> int:
        return self.num_experts * self.dit.num_params()

    def distilled(self) -> ModelSpec:
        """The model with the defaults of its step-distilled releases. Source: LightX2V ``configs/distill``."""
        off = dict(guidance_scale=1.0, image_guidance=0.0, voice_guidance=0.0, sync_guidance=0.0)
        sound = self.sound and replace(self.sound, **off)
        return replace(self, num_steps=4, shift=5.0, shift_480p=None, guidance_scale=1.0, sound=sound)

    @property
    def takes_references(self) -> bool:
        return self.task == "r2av"

    @property
    def needs_references(self) -> bool:
        """Only the adapters of the ``wan2.6`` family were trained to do without."""
        return self.takes_references and self.dit.identity is None

    def takes_image(self) -> bool:
        return self.task != "t2v" and not self.needs_references


_480P = ((832, 480), (480, 832))
_720P = ((1280, 720), (720, 1280))
_14B = dict(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)
_VAE_21 = VAEConfig()
_VAE_22 = VAEConfig(
    version="2.2", dim=160, dec_dim=256, z_dim=48, latents_mean=LATENT_MEAN_22, latents_std=LATENT_STD_22
)
_DIT_14B = DiTConfig(**_14B)
_DIT_I2V_21 = DiTConfig(**_14B, in_dim=36, image_tokens=257)
_DIT_FLF2V = DiTConfig(**_14B, in_dim=36, image_tokens=514, image_positions=True)
_DIT_I2V_22 = DiTConfig(**_14B, in_dim=36)
_DIT_5B = DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)


def _spec(name: str, task: str, repository: str, **kw) -> ModelSpec:
    suffix = "-diffusers" if task == "flf2v" else "-Diffusers"
    return ModelSpec(
        name,
        task,
        repository=f"Wan-AI/{repository}",
        diffusers_repository=f"Wan-AI/{repository}{suffix}",
        **kw,
    )


_I2V_21 = dict(
    dit=_DIT_I2V_21, vae=_VAE_21, clip=CLIPConfig(), num_steps=40, shift_480p=3.0, negative_prompt=NEGATIVE_PROMPT_I2V
)
_FUSION = FusionConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, in_dim=48, out_dim=48)
_T5_AND_VAE = ("Wan-AI/Wan2.2-TI2V-5B", ("Wan2.2_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/*"))
_AUDIO_CODEC = ("hkchengrex/MMAudio", ("ext_weights/v1-16.pth", "ext_weights/best_netG.pt"))
_OVI_SIZES = ((1280, 704), (704, 1280), (960, 960), (992, 512), (512, 992), (960, 512), (512, 960), (1120, 448))
_WITH_SOUND = dict(
    vae=_VAE_22, companions=(_T5_AND_VAE, _AUDIO_CODEC), num_frames=121, fps=24,
    negative_prompt="jitter, bad hands, blur, distortion", licence="Apache-2.0; audio codec CC-BY-NC-4.0",
)  # fmt: skip
_OVI = _WITH_SOUND | dict(task="ti2av", dit=_FUSION, guidance_scale=4.0, repository="chetwinlow1/Ovi")
_REFERENCES = SoundSpec(guidance_scale=4.0, image_guidance=1.5, voice_guidance=2.0, caption="structured")
_DREAMID = _WITH_SOUND | dict(
    task="r2av", sizes=((1280, 704), (992, 512), (704, 1280), (512, 992)), guidance_scale=3.0, sound=_REFERENCES
)
_ADAPTERS = dict(identity=IdentityConfig(), voice=VoiceConfig())

MODELS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        _spec("wan2.1-t2v-1.3b", "t2v", "Wan2.1-T2V-1.3B", dit=DiTConfig(), vae=_VAE_21, sizes=_480P),
        _spec("wan2.1-t2v-14b", "t2v", "Wan2.1-T2V-14B", dit=_DIT_14B, vae=_VAE_21, sizes=_720P + _480P),
        _spec("wan2.1-i2v-14b-480p", "i2v", "Wan2.1-I2V-14B-480P", sizes=_480P, **_I2V_21),
        _spec("wan2.1-i2v-14b-720p", "i2v", "Wan2.1-I2V-14B-720P", sizes=_720P, **_I2V_21),
        _spec(
            "wan2.1-flf2v-14b-720p", "flf2v", "Wan2.1-FLF2V-14B-720P", dit=_DIT_FLF2V, vae=_VAE_21, clip=CLIPConfig(),
            sizes=_720P, shift=16.0, negative_prompt=NEGATIVE_PROMPT_FLF2V,
        ),
        _spec(
            "wan2.2-t2v-a14b", "t2v", "Wan2.2-T2V-A14B", dit=_DIT_14B, vae=_VAE_21, sizes=_720P + _480P,
            boundary=0.875, num_steps=40, shift=12.0, guidance_scale=(3.0, 4.0),
        ),
        _spec(
            "wan2.2-i2v-a14b", "i2v", "Wan2.2-I2V-A14B", dit=_DIT_I2V_22, vae=_VAE_21, sizes=_720P + _480P,
            boundary=0.9, num_steps=40, guidance_scale=(3.5, 3.5),
        ),
        _spec(
            "wan2.2-ti2v-5b", "ti2v", "Wan2.2-TI2V-5B", dit=_DIT_5B, vae=_VAE_22, sizes=((1280, 704), (704, 1280)),
            num_frames=121, fps=24,
        ),
        ModelSpec(
            "ovi-5s", file="Ovi/model_960x960.safetensors", sizes=_OVI_SIZES, sound=SoundSpec(skip_layer=11), **_OVI
        ),
        ModelSpec(
            "ovi-5s-720", file="Ovi/model.safetensors", sizes=((704, 704), (960, 544), (544, 960), (992, 512)),
            sound=SoundSpec(skip_layer=11, caption="audcap", area=720 * 720), **_OVI,
        ),
        ModelSpec(
            "ovi-10s", file="Ovi/model_960x960_10s.safetensors", sizes=_OVI_SIZES,
            sound=SoundSpec(skip_layer=11, num_latents=314), **_OVI | dict(num_frames=241),
        ),
        ModelSpec(
            "dreamid-omni", file="DreamID-Omni/dreamid_omni.safetensors", repository="XuGuo699/DreamID-Omni",
            dit=_FUSION, **_DREAMID,
        ),
        ModelSpec(
            "wan2.6-r2av-11b", file="Wan2.6-R2AV-11B/model.safetensors", clip=CLIPConfig(),
            dit=replace(_FUSION, **_ADAPTERS), **_DREAMID,
        ),
    )
}  # fmt: skip


# The small model that ships with the package, trained by `wan_jax.train` on talking puppets. Same parts as wan2.6.
NANO = ModelSpec(
    "wan2.6-nano", task="r2av", file="Wan2.6-Nano/model.safetensors",
    dit=FusionConfig(
        dim=128, ffn_dim=256, num_heads=4, num_layers=4, in_dim=64, out_dim=64, patch_size=(1, 1, 1), text_dim=128,
        text_len=112, freq_dim=128, audio_kernel=3, audio_rope_scale=0.064, coupling=CouplingConfig(fps=8.0),
        identity=IdentityConfig(feature_dim=96, dim=128, num_tokens=16, num_layers=1, num_heads=4, max_references=2),
        voice=VoiceConfig(dim=128, num_tokens=16, num_layers=1, num_heads=4, max_references=2, seconds=1.0),
    ),
    vae=VAEConfig(
        version="2.2", patch=16, dim=72, dec_dim=72, z_dim=64, dim_mult=(1, 1, 1), num_res_blocks=0,
        temporal_downsample=(True, True), spatial_downsample=(False, False), latents_mean=(0.0,) * 64,
        latents_std=(1.0,) * 64,
    ),
    text=UMT5Config(vocab_size=256, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=2),
    clip=CLIPConfig(image_size=96, patch_size=12, dim=96, mlp_dim=384, num_heads=3, num_layers=3, out_dim=0),
    sound=SoundSpec(
        vae=AudioVAEConfig(dim=48, dim_mult=(1, 2), num_res_blocks=1), vocoder=None, num_latents=66,
        guidance_scale=1.5, sync_guidance=1.0, negative_prompt="", caption="structured",
    ),
    sizes=((96, 96),), num_steps=20, shift=1.0, guidance_scale=1.5, num_frames=17, fps=8, negative_prompt="",
)  # fmt: skip
MODELS[NANO.name] = NANO
# For recipes that train a vocoder as well; on two CPU cores Griffin and Lim's iterations sound better.
NANO_VOCODER = VocoderConfig(
    dim=128, rates=(8, 8, 4), kernels=(16, 16, 8), res_kernels=(5,), res_dilations=((1, 3, 9),)
)  # fmt: skip


def from_json(kind: type, data: Mapping[str, Any]) -> Any:
    """A configuration out of what `dataclasses.asdict` and JSON made of it; lists become tuples."""

    def tuples(value: Any) -> Any:
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    hints, values = get_type_hints(kind), {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            options = get_args(hints[name]) or (hints[name],)
            value = from_json(FusionConfig if "audio_dim" in value else options[0], value)
        values[name] = tuples(value)
    return kind(**values)


def find_model(name: str) -> ModelSpec:
    """Return the published model called ``name`` (or by its hub repository id); raise with the nearest names."""
    key = name.lower()
    if key:
        for spec in MODELS.values():
            if key in (spec.name, spec.repository.lower(), spec.diffusers_repository.lower()):
                return spec
    raise InputError(f"unknown model {name!r}{nearest(name, MODELS) or '; known: ' + ', '.join(MODELS)}")
