"""Names of BigVGAN in its one published layout (``best_netG.pt`` of MMAudio).

They are those of plain weights; files with weight normalisation are read through `wan_jax.weights.fused`.
"""

from __future__ import annotations

from collections.abc import Mapping

from wan_jax.config import VocoderConfig
from wan_jax.errors import CheckpointError
from wan_jax.weights.engine import Row
from wan_jax.weights.maps import numbered

_ACTIVATION = r"(resblocks\.\d+\.activations\.\d+|activation_post)"
IGNORE: dict[str, list[tuple[str, str]]] = {
    "official": [(rf"{_ACTIVATION}\.(upsample|downsample\.lowpass)\.filter", "the same low-pass for all: computed")],
}


def rows(cfg: VocoderConfig) -> list[Row]:
    """The table for one configuration."""
    table = [Row(name, "conv", name, ()) for name in ("conv_pre", "conv_post")]
    table.append(_activation("activation_post"))
    for s in range(len(cfg.rates)):
        table.append(Row(f"ups.{s}", "transposed_conv", f"ups.{s}.0", ()))
        for k, dilations in enumerate(cfg.res_dilations):
            block = f"resblocks.{s * len(cfg.res_kernels) + k}"
            table += [_activation(f"{block}.activations.{n}") for n in range(2 * len(dilations))]
            for convs in (f"{block}.convs1", f"{block}.convs2"):
                table += [Row(f"{convs}.{n}", "conv", f"{convs}.{n}", ()) for n in range(len(dilations))]
    return table


def _activation(name: str) -> Row:
    return Row(name, "snake", f"{name}.act", ())


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> VocoderConfig:
    """Read the architecture off a checkpoint, which carries no config.

    What shapes do not tell is as in every published BigVGAN: a rate is half of its kernel, dilations are 1, 3, 5, ...

    Args:
        shapes: official name -> shape, of plain weights.
    Raises:
        CheckpointError: these are not the names of a BigVGAN.
    """
    try:
        dim, num_bins, _ = shapes["conv_pre.weight"]
        kernels = tuple(shape[-1] for shape in numbered(shapes, "ups.{}.0.weight"))
        blocks = numbered(shapes, "resblocks.{}.convs1.0.weight")
        res_kernels = tuple(shape[-1] for shape in blocks[: len(blocks) // len(kernels)])
        pairs = [len(numbered(shapes, f"resblocks.{k}.convs1.{{}}.weight")) for k in range(len(res_kernels))]
        return VocoderConfig(
            num_bins=num_bins,
            dim=dim,
            rates=tuple(size // 2 for size in kernels),
            kernels=kernels,
            res_kernels=res_kernels,
            res_dilations=tuple(tuple(range(1, 2 * n, 2)) for n in pairs),
        )
    except (KeyError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"not a BigVGAN: {error} among {len(shapes)} names") from error
