"""Names of the CLIP visual tower in the official (open-clip XLM-R ViT-H) and the diffusers layout.

The latter is that of transformers' ``CLIPVisionModel``, which has no projection head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from wan_jax.config import CLIPConfig
from wan_jax.errors import CheckpointError
from wan_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from wan_jax.weights.engine import Row

IGNORE: dict[str, list[tuple[str, str]]] = {
    "official": [
        (r"textual\..*", "text tower: prompts are read by umT5"),
        (r"log_scale", "temperature of contrastive training"),
    ],
    "diffusers": [
        (r"vision_model\.embeddings\.position_ids", "0, 1, 2, ...: recomputed"),
        (r"visual_projection\.weight", "projection head: features are taken before it"),
    ],
}

HEAD_DIM = 80  # of ViT-H; an official checkpoint does not state its number of heads

_OFFICIAL = "visual.transformer.{i}"
_DIFFUSERS = "vision_model.encoder.layers.{i}"


def rows(cfg: CLIPConfig) -> list[Row]:
    """The table for one configuration. An empty name says that the layout has no such array."""
    patch = (-1, 3, cfg.patch_size, cfg.patch_size)
    embeddings = "vision_model.embeddings"
    qkv = tuple(f"{_DIFFUSERS}.self_attn.{name}_proj" for name in "qkv")
    table = [
        Row(
            "patch_embedding",
            "patch",
            "visual.patch_embedding",
            f"{embeddings}.patch_embedding",
            (patch, patch),
        ),
        Row(
            "cls_embedding",
            "array",
            "visual.cls_embedding",
            f"{embeddings}.class_embedding",
            ((1, 1, -1), (-1,)),
        ),
        Row(
            "pos_embedding",
            "array",
            "visual.pos_embedding",
            f"{embeddings}.position_embedding.weight",
            ((1, cfg.num_tokens, -1), (cfg.num_tokens, -1)),
        ),
        Row("pre_norm", "norm", "visual.pre_norm", "vision_model.pre_layrnorm"),
        Row("transformer.norm1", "norm", f"{_OFFICIAL}.norm1", f"{_DIFFUSERS}.layer_norm1"),
        Row("transformer.attn.to_qkv", "linear", f"{_OFFICIAL}.attn.to_qkv", qkv),
        Row("transformer.attn.proj", "linear", f"{_OFFICIAL}.attn.proj", f"{_DIFFUSERS}.self_attn.out_proj"),
        Row("transformer.norm2", "norm", f"{_OFFICIAL}.norm2", f"{_DIFFUSERS}.layer_norm2"),
        Row("transformer.mlp.fc1", "linear", f"{_OFFICIAL}.mlp.0", f"{_DIFFUSERS}.mlp.fc1"),
        Row("transformer.mlp.fc2", "linear", f"{_OFFICIAL}.mlp.2", f"{_DIFFUSERS}.mlp.fc2"),
        Row("post_norm", "norm", "visual.post_norm", "vision_model.post_layernorm"),
    ]
    if cfg.out_dim:
        table.append(Row("head", "array", "visual.head", ()))
    return table


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> CLIPConfig:
    """Read the sizes off an official checkpoint, which has no config file."""
    dim, _, patch_size, _ = shapes["visual.patch_embedding.weight"]
    return CLIPConfig(
        image_size=math.isqrt(shapes["visual.pos_embedding"][1] - 1) * patch_size,
        patch_size=patch_size,
        dim=dim,
        mlp_dim=shapes["visual.transformer.0.mlp.0.weight"][0],
        num_heads=max(1, dim // HEAD_DIM),
        num_layers=sum(key.startswith("visual.") and key.endswith(".attn.proj.weight") for key in shapes),
        out_dim=shapes["visual.head"][1],
    )


def config_from_diffusers(config: Mapping) -> CLIPConfig:
    """Read ``image_encoder/config.json``.

    Raises:
        CheckpointError: a tower with another activation than the exact GELU of ViT-H.
    """
    if config["hidden_act"] != "gelu":
        raise CheckpointError(f"image encoder with activation {config['hidden_act']!r}: expected 'gelu' (ViT-H/14)")
    return CLIPConfig(
        image_size=config["image_size"],
        patch_size=config["patch_size"],
        dim=config["hidden_size"],
        mlp_dim=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_layers=config["num_hidden_layers"],
        out_dim=0,
        eps=config["layer_norm_eps"],
    )


def config_to_diffusers(cfg: CLIPConfig) -> dict:
    """The ``image_encoder/config.json`` of a configuration."""
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "gelu",
        "image_size": cfg.image_size, "patch_size": cfg.patch_size, "hidden_size": cfg.dim,
        "intermediate_size": cfg.mlp_dim, "num_attention_heads": cfg.num_heads,
        "num_hidden_layers": cfg.num_layers, "layer_norm_eps": cfg.eps, "num_channels": 3,
    }  # fmt: skip


def processor_config(cfg: CLIPConfig) -> dict:
    """``image_processor/preprocessor_config.json``: the nearest to the official preprocessing."""
    return {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": True,
        "do_center_crop": False, "do_rescale": True, "do_normalize": True, "resample": 3,
        "rescale_factor": 1 / 255, "size": {"height": cfg.image_size, "width": cfg.image_size},
        "image_mean": list(PIXEL_MEAN), "image_std": list(PIXEL_STD),
    }  # fmt: skip
