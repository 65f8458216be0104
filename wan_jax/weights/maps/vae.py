"""Names of the VAE in the official (``WanVAE_``) and the diffusers (``AutoencoderKLWan``) layout, 2.1 and 2.2."""

from __future__ import annotations

import re
from collections.abc import Mapping

from wan_jax.config import LATENT_MEAN_21, LATENT_MEAN_22, LATENT_STD_21, LATENT_STD_22, VAEConfig
from wan_jax.errors import CheckpointError
from wan_jax.models.vae import decoder_widths, encoder_widths
from wan_jax.weights.engine import Row

_GAMMA = ((-1, 1, 1, 1),) * 2
_GAMMA_FRAME = ((-1, 1, 1),) * 2  # of the one norm that works on single frames


def rows(cfg: VAEConfig) -> list[Row]:
    """The table for one configuration."""
    table = [Row("conv1", "conv", "conv1", "quant_conv"), Row("conv2", "conv", "conv2", "post_quant_conv")]
    for half, stages, widths, temporal, blocks in (
        ("encoder", "downsamples", encoder_widths(cfg), cfg.temporal_downsample, cfg.num_res_blocks),
        ("decoder", "upsamples", decoder_widths(cfg), cfg.temporal_downsample[::-1], cfg.num_res_blocks + 1),
    ):
        table += [
            Row(f"{half}.conv1", "conv", f"{half}.conv1", f"{half}.conv_in"),
            *_residual(f"{half}.middle.block1", f"{half}.middle.0", f"{half}.mid_block.resnets.0"),
            *_attention(f"{half}.middle.attention", f"{half}.middle.1", f"{half}.mid_block.attentions.0"),
            *_residual(f"{half}.middle.block2", f"{half}.middle.2", f"{half}.mid_block.resnets.1"),
            Row(f"{half}.head.norm", "gamma", f"{half}.head.0", f"{half}.norm_out", _GAMMA),
            Row(f"{half}.head.conv", "conv", f"{half}.head.2", f"{half}.conv_out"),
        ]
        for s, (d_in, d_out) in enumerate(widths):
            *names, (official, diffusers) = _parts(cfg, half, s, blocks)
            for j, (theirs, hf) in enumerate(names):
                table += _residual(f"{half}.{stages}.{s}.blocks.{j}", theirs, hf, widens=j == 0 and d_in != d_out)
            if s < len(temporal):
                ours = f"{half}.{stages}.{s}.resample"
                table.append(Row(f"{ours}.conv", "conv", f"{official}.resample.1", f"{diffusers}.resample.1"))
                if temporal[s]:
                    table.append(Row(f"{ours}.time_conv", "conv", f"{official}.time_conv", f"{diffusers}.time_conv"))
    return table


def _parts(cfg: VAEConfig, half: str, s: int, blocks: int) -> list[tuple[str, str]]:
    """Official and diffusers names of the residual blocks of stage ``s``, and last of its resampler.

    Official 2.1 and diffusers' encoder for it number all parts of a half in one flat list.
    """
    name, up = ("downsamples", "down") if half == "encoder" else ("upsamples", "up")
    flat = [f"{s * (blocks + 1) + j}" for j in range(blocks + 1)]
    nested = [f"{s}.resnets.{j}" for j in range(blocks)]
    if cfg.version == "2.2":
        official = [f"{s}.{name}.{j}" for j in range(blocks + 1)]
        diffusers = [*nested, f"{s}.{up}sampler"]
    else:
        official = flat
        diffusers = flat if half == "encoder" else [*nested, f"{s}.upsamplers.0"]
    return [(f"{half}.{name}.{a}", f"{half}.{up}_blocks.{b}") for a, b in zip(official, diffusers, strict=True)]


def _residual(ours: str, official: str, diffusers: str, *, widens: bool = False) -> list[Row]:
    table = [
        Row(f"{ours}.norm1", "gamma", f"{official}.residual.0", f"{diffusers}.norm1", _GAMMA),
        Row(f"{ours}.conv1", "conv", f"{official}.residual.2", f"{diffusers}.conv1"),
        Row(f"{ours}.norm2", "gamma", f"{official}.residual.3", f"{diffusers}.norm2", _GAMMA),
        Row(f"{ours}.conv2", "conv", f"{official}.residual.6", f"{diffusers}.conv2"),
    ]
    return table + [Row(f"{ours}.shortcut", "conv", f"{official}.shortcut", f"{diffusers}.conv_shortcut")] * widens


def _attention(ours: str, official: str, diffusers: str) -> list[Row]:
    return [
        Row(f"{ours}.norm", "gamma", f"{official}.norm", f"{diffusers}.norm", _GAMMA_FRAME),
        Row(f"{ours}.to_qkv", "conv", f"{official}.to_qkv", f"{diffusers}.to_qkv"),
        Row(f"{ours}.proj", "conv", f"{official}.proj", f"{diffusers}.proj"),
    ]


def _statistics(z_dim: int) -> dict[str, tuple[float, ...]]:
    """The released normalisation of the latents; none for a width that was not released."""
    mean, std = {16: (LATENT_MEAN_21, LATENT_STD_21), 48: (LATENT_MEAN_22, LATENT_STD_22)}.get(
        z_dim, ((0.0,) * z_dim, (1.0,) * z_dim)
    )
    return {"latents_mean": mean, "latents_std": std}


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> VAEConfig:
    """Read the architecture off an official checkpoint, which carries no config.

    Args:
        shapes: official name -> shape.
    Raises:
        CheckpointError: these are not the names of a Wan VAE.
    """
    # Parts of the encoder in order: "3" (2.1) or "1.downsamples.0" (2.2). A stage ends with a resampler.
    names = {m[1] for key in shapes if (m := re.match(r"encoder\.downsamples\.(\d+(\.downsamples\.\d+)?)\.", key))}
    try:
        stages: list[list[int]] = [[]]
        temporal = []
        for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
            part = f"encoder.downsamples.{name}"
            if f"{part}.resample.1.weight" in shapes:
                stages.append([])
                temporal.append(f"{part}.time_conv.weight" in shapes)
            else:
                stages[-1].append(shapes[f"{part}.residual.6.weight"][0])
        dim, z_dim = shapes["encoder.conv1.weight"][0], shapes["conv2.weight"][0]
        dim_mult = tuple(widths[0] // dim for widths in stages)
        return VAEConfig(
            version="2.2" if any("downsamples" in name for name in names) else "2.1",
            dim=dim,
            dec_dim=shapes["decoder.head.0.gamma"][0] // dim_mult[0],
            z_dim=z_dim,
            dim_mult=dim_mult,
            num_res_blocks=len(stages[0]),
            temporal_downsample=tuple(temporal),
            **_statistics(z_dim),
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(f"not an official Wan VAE: {error} is missing among {len(shapes)} names") from error


def config_from_diffusers(config: Mapping) -> VAEConfig:
    """Read the ``config.json`` of a diffusers ``AutoencoderKLWan``."""
    return VAEConfig(
        version="2.2" if config.get("is_residual") else "2.1",
        dim=config["base_dim"],
        dec_dim=config.get("decoder_base_dim") or config["base_dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),  # their spelling
        latents_mean=tuple(config["latents_mean"]),
        latents_std=tuple(config["latents_std"]),
    )


def config_to_diffusers(cfg: VAEConfig) -> dict:
    """The diffusers ``vae/config.json`` of a configuration."""
    channels, residual = 3 * cfg.patch_size**2, cfg.version == "2.2"
    return {
        "_class_name": "AutoencoderKLWan", "base_dim": cfg.dim, "decoder_base_dim": cfg.dec_dim, "z_dim": cfg.z_dim,
        "dim_mult": list(cfg.dim_mult), "num_res_blocks": cfg.num_res_blocks, "attn_scales": [], "dropout": 0.0,
        "temperal_downsample": list(cfg.temporal_downsample), "latents_mean": list(cfg.latents_mean),
        "latents_std": list(cfg.latents_std), "is_residual": residual,
        "patch_size": cfg.patch_size if residual else None, "in_channels": channels, "out_channels": channels,
        "scale_factor_temporal": cfg.temporal_stride, "scale_factor_spatial": cfg.spatial_stride,
    }  # fmt: skip
