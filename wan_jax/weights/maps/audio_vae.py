"""Names of the audio autoencoder in its one published layout (``v1-16.pth`` of MMAudio)."""

from __future__ import annotations

from collections.abc import Mapping

from wan_jax.config import AudioVAEConfig
from wan_jax.errors import CheckpointError
from wan_jax.weights.engine import Row
from wan_jax.weights.maps import numbered

IGNORE: dict[str, list[tuple[str, str]]] = {"official": []}

_PER_BIN = ((1, -1, 1),) * 2


def rows(cfg: AudioVAEConfig) -> list[Row]:
    """The table for one configuration."""
    table = [Row(name, "array", name, (), _PER_BIN) for name in ("data_mean", "data_std")]
    for half, levels, blocks, resamplers in (
        ("encoder", "down", cfg.num_res_blocks, {i: ("downsample", ("conv1", "conv2")) for i in cfg.down_levels}),
        ("decoder", "up", cfg.num_res_blocks + 1, {i + 1: ("upsample", ("conv",)) for i in cfg.down_levels}),
    ):
        table += [
            _conv(f"{half}.conv_in"),
            *(_conv(f"{half}.mid.{name}.{conv}") for name in ("block_1", "block_2") for conv in ("conv1", "conv2")),
            *(_conv(f"{half}.mid.attn_1.{conv}") for conv in ("qkv", "proj_out")),
            _conv(f"{half}.conv_out"),
            Row(f"{half}.learnable_gain", "array", f"{half}.learnable_gain", ()),
        ]
        for i in range(len(cfg.dim_mult)):
            level = f"{half}.{levels}.{i}"
            table += [_conv(f"{level}.block.{j}.{conv}") for j in range(blocks) for conv in ("conv1", "conv2")]
            if _widens(cfg, half, i):
                table.append(_conv(f"{level}.block.0.nin_shortcut"))
            name, convs = resamplers.get(i, ("", ()))
            table += [_conv(f"{level}.{name}.{conv}", f"{level}.resample.{conv}") for conv in convs]
    return table


def _conv(official: str, ours: str | None = None) -> Row:
    return Row(ours or official, "unit_conv", official, ())


def _widens(cfg: AudioVAEConfig, half: str, i: int) -> bool:
    mult = (1, *cfg.dim_mult) if half == "encoder" else (*cfg.dim_mult, cfg.dim_mult[-1])
    return mult[i] != mult[i + 1]


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> AudioVAEConfig:
    """Read the architecture off a checkpoint, which carries no config.

    Args:
        shapes: official name -> shape.
    Raises:
        CheckpointError: these are not the names of the audio autoencoder.
    """
    try:
        dim, num_bins, _ = shapes["encoder.conv_in.weight"]
        levels = numbered(shapes, "encoder.down.{}.block.0.conv1.weight")
        return AudioVAEConfig(
            num_bins=num_bins,
            dim=dim,
            dim_mult=tuple(shape[0] // dim for shape in levels),
            num_res_blocks=len(numbered(shapes, "encoder.down.0.block.{}.conv1.weight")),
            z_dim=shapes["decoder.conv_in.weight"][1],
            down_levels=tuple(i for i in range(len(levels)) if f"encoder.down.{i}.downsample.conv1.weight" in shapes),
        )
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"not an MMAudio autoencoder: {error} among {len(shapes)} names") from error
