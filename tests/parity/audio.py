"""Goldens of the audio codec: mel spectrogram, autoencoder, vocoder."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from flax import nnx

from tests.parity.common import params
from wan_jax.checkpoint import abstract
from wan_jax.config import AudioVAEConfig, MelConfig, VocoderConfig
from wan_jax.models import vocoder
from wan_jax.models.audio_vae import AudioVAE
from wan_jax.nn.mel import hann_window, mel_filters, mel_spectrogram
from wan_jax.weights.engine import fill
from wan_jax.weights.fused import FusedWeights
from wan_jax.weights.maps import audio_vae as audio_vae_map
from wan_jax.weights.maps import vocoder as vocoder_map

MEL_TOL, VAE_TOL, VOCODER_TOL = 1e-4, 5e-5, 2e-5  # absolute and relative


def last(x: np.ndarray) -> np.ndarray:
    """[B, C, T] -> [B, T, C]."""
    return np.swapaxes(x, 1, 2)


def check_mel(config: dict, tensors: dict[str, np.ndarray]) -> None:
    assert config["win_size"] == config["n_fft"] and config["log"] == "log10"
    cfg = MelConfig(
        sample_rate=config["sampling_rate"], n_fft=config["n_fft"], hop=config["hop_size"], num_bins=config["num_mels"],
        fmin=config["fmin"], fmax=config["fmax"], floor=config["clamp"],
    )  # fmt: skip
    np.testing.assert_allclose(mel_filters(cfg), tensors["out/mel_basis"], atol=1e-7, rtol=1e-6)
    np.testing.assert_allclose(hann_window(cfg.n_fft), tensors["out/hann_window"], atol=1e-6)
    mel = jax.jit(mel_spectrogram, static_argnums=1)(tensors["in/waveform"], cfg)
    np.testing.assert_allclose(mel, last(tensors["out/mel"]), atol=MEL_TOL, rtol=MEL_TOL)


def check_vae(config: dict, tensors: dict[str, np.ndarray]) -> None:
    cfg = AudioVAEConfig(
        num_bins=config["data_dim"], dim=config["hidden_dim"], dim_mult=tuple(config["ch_mult"]),
        num_res_blocks=config["num_res_blocks"], z_dim=config["embed_dim"], down_levels=tuple(config["down_layers"]),
        clip=config["clip_act"],
    )  # fmt: skip
    weights = params(tensors)
    assert audio_vae_map.infer_config({name: value.shape for name, value in weights.items()}) == cfg
    make = abstract(lambda: AudioVAE(cfg, rngs=nnx.Rngs(0)))
    vae = fill(make, audio_vae_map.rows(cfg), weights, network="audio_vae", what="golden")

    def check(ours: jax.Array, name: str) -> None:
        np.testing.assert_allclose(ours, last(tensors[f"out/{name}"]), atol=VAE_TOL, rtol=VAE_TOL, err_msg=name)

    for name in tensors:
        if name.startswith("out/fused/"):
            half, conv = name.removeprefix("out/fused/").removesuffix(".weight").split(".")
            kernel = getattr(getattr(vae, half), conv).kernel[...]
            np.testing.assert_allclose(kernel, np.transpose(tensors[name], (2, 1, 0)), atol=1e-6, rtol=1e-6)
    mel = last(tensors["in/mel"])
    mean, logvar = jax.jit(AudioVAE.encode_stats)(vae, mel)
    decode = jax.jit(AudioVAE.decode)
    check(vae.normalise(mel), "mel_normalized")
    check(mean, "mean")
    check(logvar, "logvar")
    check(decode(vae, last(tensors["in/z"])), "decoded_mel")
    check(decode(vae, mean), "recon_mel")


def check_vocoder(config: dict, tensors: dict[str, np.ndarray]) -> None:
    h = config["h"]
    assert (h["activation"], h["resblock"], h["snake_logscale"]) == ("snakebeta", "1", True)
    cfg = VocoderConfig(
        num_bins=h["num_mels"], dim=h["upsample_initial_channel"], rates=tuple(h["upsample_rates"]),
        kernels=tuple(h["upsample_kernel_sizes"]), res_kernels=tuple(h["resblock_kernel_sizes"]),
        res_dilations=tuple(map(tuple, h["resblock_dilation_sizes"])),
    )  # fmt: skip
    weights = FusedWeights(params(tensors))
    # Shapes tell neither rates nor dilations: what is inferred is the published ones.
    published = dataclasses.replace(
        cfg,
        rates=tuple(size // 2 for size in cfg.kernels),
        res_dilations=tuple((1, 3, 5, 7, 9)[: len(dilations)] for dilations in cfg.res_dilations),
    )
    assert vocoder_map.infer_config({name: value.shape for name, value in weights.items()}) == published
    make = abstract(lambda: vocoder.BigVGAN(cfg, rngs=nnx.Rngs(0)))
    model = fill(
        make, vocoder_map.rows(cfg), weights, network="vocoder", ignore=vocoder_map.IGNORE["official"], what="golden"
    )

    def check(ours: jax.Array, name: str) -> None:
        np.testing.assert_allclose(ours, tensors[f"out/{name}"], atol=VOCODER_TOL, rtol=VOCODER_TOL, err_msg=name)

    for name, value in weights.items():
        if name.endswith(".filter"):
            np.testing.assert_allclose(value[0, 0], vocoder.LOWPASS, atol=1e-6, err_msg=name)
    mel = last(tensors["in/mel"])
    stem = jax.jit(lambda model, mel: model.conv_pre(mel))(model, mel)
    raised = jax.jit(lambda model, x: model.ups[0](x))(model, stem)
    activated = jax.jit(lambda model, x: model.resblocks[0].activations[0](x))(model, last(tensors["out/act0_in"]))
    wave = jax.jit(vocoder.BigVGAN.__call__)(model, mel)[:, None]
    check(last(stem), "conv_pre")
    check(last(raised), "up0")
    check(last(activated), "act0_out")
    check(wave, "wave")
    check(wave, "wave_with_weight_norm")


RUNNERS = {"mel_16k": check_mel, "mmaudio_vae": check_vae, "bigvgan": check_vocoder}
