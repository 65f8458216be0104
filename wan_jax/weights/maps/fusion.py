"""Names of the twin-stream transformer in the files of Ovi and DreamID-Omni; there is no diffusers layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from wan_jax.config import CouplingConfig, FusionConfig, IdentityConfig, VoiceConfig, from_json
from wan_jax.errors import CheckpointError
from wan_jax.models.fusion import STREAMS
from wan_jax.weights.engine import Row
from wan_jax.weights.maps import dit, identity

_CROSS = (
    ("k_fusion", "linear"), ("v_fusion", "linear"), ("pre_attn_norm_fusion", "norm"), ("norm_k_fusion", "norm"),
)  # fmt: skip
_COUPLING = (
    ("q_fusion", "linear"), ("norm_q_fusion", "norm"), ("o_fusion", "linear"), ("gate_fusion", "linear"),
    ("reach_fusion", "array"),
)  # fmt: skip
_STEM = (
    ("conv", "patch_embedding.0"), ("mlp.w1", "patch_embedding.2.w1"), ("mlp.w2", "patch_embedding.2.w2"),
    ("mlp.w3", "patch_embedding.2.w3"),
)  # fmt: skip
IGNORE = dit.IGNORE


def rows(cfg: FusionConfig) -> list[Row]:
    """The DiT's table for each stream, with its prefix; Ovi keeps the blocks' modulation one level deeper."""
    table = []
    for stream in STREAMS:
        prefix = f"{stream}_model."
        for row in dit.rows(cfg):
            if stream == "audio" and row.path == "patch_embedding":
                continue
            official = row.official.replace("{i}.modulation", "{i}.modulation.modulation")
            table.append(Row(f"{stream}.{row.path}", row.kind, prefix + official, (), row.shape))
        table += [
            Row(f"{stream}.blocks.cross_attn.{name}", kind, f"{prefix}blocks.{{i}}.cross_attn.{name}", ())
            for name, kind in _CROSS + (_COUPLING if cfg.coupling else ())
        ]
    table += [Row(f"audio.patch_embedding.{ours}", "conv", f"audio_model.{theirs}", ()) for ours, theirs in _STEM]
    return table + identity.rows(cfg)


def infer_config(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any] | None = None) -> FusionConfig:
    """Read the architecture off the shapes of an Ovi or DreamID-Omni file.

    Args:
        config: what shapes do not tell, as `config_to_official` writes it; the published files come without, and have
            heads of 128.
    """
    config = dict(config or {})
    video, audio = "video_model.", "audio_model."
    dim, in_dim, *patch = shapes[f"{video}patch_embedding.weight"]
    layers = {name.split(".")[2] for name in shapes if name.startswith(f"{video}blocks.")}
    return FusionConfig(
        dim=dim,
        ffn_dim=shapes[f"{video}blocks.0.ffn.0.weight"][0],
        num_heads=config.get("num_heads", max(1, dim // 128)),
        num_layers=len(layers),
        in_dim=in_dim,
        out_dim=shapes[f"{video}head.head.weight"][0] // (patch[0] * patch[1] * patch[2]),
        text_dim=shapes[f"{video}text_embedding.0.weight"][1],
        text_len=config.get("text_len", 512),
        freq_dim=shapes[f"{video}time_embedding.0.weight"][1],
        patch_size=tuple(patch),
        audio_dim=shapes[f"{audio}patch_embedding.0.weight"][1],
        audio_kernel=shapes[f"{audio}patch_embedding.0.weight"][2],
        audio_rope_scale=config.get("audio_rope_scale", 0.19676),
        coupling=_part(CouplingConfig, "coupling", rf"{video}blocks\..*\.q_fusion\..*", shapes, config),
        identity=_part(IdentityConfig, "identity", r"identity_adapter\..*", shapes, config),
        voice=_part(VoiceConfig, "voice", r"voice_adapter\..*", shapes, config),
    )


def _part(
    kind: type, name: str, keys: str, shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]
) -> Any:
    """Configuration of a part whose weights are in the file."""
    found = next((key for key in shapes if re.fullmatch(keys, key)), None)
    if found is None:
        return None
    if not config.get(name):
        raise CheckpointError(f"the file holds {found}, its config.json does not describe the {name}")
    return from_json(kind, config[name])


def config_to_official(cfg: FusionConfig) -> dict[str, Any]:
    """What the shapes in a file do not tell."""
    told = ("num_heads", "text_len", "audio_rope_scale", "coupling", "identity", "voice")
    about = dataclasses.asdict(cfg)
    return {name: about[name] for name in told}
