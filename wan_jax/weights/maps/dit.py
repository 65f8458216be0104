"""Names of the DiT in the official (``WanModel``) and the diffusers (``WanTransformer3DModel``) layout."""

from __future__ import annotations

from collections.abc import Mapping

from wan_jax.config import DiTConfig
from wan_jax.weights.engine import Row

_ATTENTION = (
    ("q", "linear", "to_q"), ("k", "linear", "to_k"), ("v", "linear", "to_v"), ("o", "linear", "to_out.0"),
    ("norm_q", "norm", "norm_q"), ("norm_k", "norm", "norm_k"),
)  # fmt: skip
_IMAGE_ATTENTION = (
    ("k_img", "linear", "add_k_proj"), ("v_img", "linear", "add_v_proj"), ("norm_k_img", "norm", "norm_added_k"),
)  # fmt: skip

IGNORE = {
    "official": [(r"freqs", "rotary table, recomputed")],
    "diffusers": [(r"rope\..*", "rotary table, recomputed")],
}


def rows(cfg: DiTConfig) -> list[Row]:
    """The table for one configuration. Mind the renumbering: official ``norm3`` is diffusers ``norm2``."""
    condition = "condition_embedder"
    patch = (-1, cfg.in_dim, *cfg.patch_size)
    table = [
        Row("patch_embedding", "patch", "patch_embedding", "patch_embedding", (patch, patch)),
        Row("text_embedding.fc1", "linear", "text_embedding.0", f"{condition}.text_embedder.linear_1"),
        Row("text_embedding.fc2", "linear", "text_embedding.2", f"{condition}.text_embedder.linear_2"),
        Row("time_embedding.fc1", "linear", "time_embedding.0", f"{condition}.time_embedder.linear_1"),
        Row("time_embedding.fc2", "linear", "time_embedding.2", f"{condition}.time_embedder.linear_2"),
        Row("time_projection", "linear", "time_projection.1", f"{condition}.time_proj"),
        Row("head.head", "linear", "head.head", "proj_out"),
        Row("head.modulation", "array", "head.modulation", "scale_shift_table", ((1, 2, -1),) * 2),
        Row("blocks.modulation", "array", "blocks.{i}.modulation", "blocks.{i}.scale_shift_table", ((1, 6, -1),) * 2),
        Row("blocks.norm3", "norm", "blocks.{i}.norm3", "blocks.{i}.norm2"),
        Row("blocks.ffn.fc1", "linear", "blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
        Row("blocks.ffn.fc2", "linear", "blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    ]
    for ours, theirs, names in (
        ("self_attn", "attn1", _ATTENTION),
        ("cross_attn", "attn2", _ATTENTION + (_IMAGE_ATTENTION if cfg.image_tokens else ())),
    ):
        table += [
            Row(f"blocks.{ours}.{name}", kind, f"blocks.{{i}}.{ours}.{name}", f"blocks.{{i}}.{theirs}.{other}")
            for name, kind, other in names
        ]
    if cfg.image_tokens:
        embedder = f"{condition}.image_embedder"
        table += [
            Row("img_emb.norm1", "norm", "img_emb.proj.0", f"{embedder}.norm1"),
            Row("img_emb.fc1", "linear", "img_emb.proj.1", f"{embedder}.ff.net.0.proj"),
            Row("img_emb.fc2", "linear", "img_emb.proj.3", f"{embedder}.ff.net.2"),
            Row("img_emb.norm2", "norm", "img_emb.proj.4", f"{embedder}.norm2"),
        ]
    if cfg.image_positions:
        shape = (1, cfg.image_tokens, -1)
        table.append(Row("img_emb.emb_pos", "array", "img_emb.emb_pos", f"{embedder}.pos_embed", (shape, shape)))
    return table


def config_from_official(config: Mapping, shapes: Mapping[str, tuple[int, ...]] | None = None) -> DiTConfig:
    """Read an official ``config.json``; widths that it does not state come from the tensors' shapes."""
    model_type = config.get("model_type", "t2v")
    image = config.get("clip_tokens", 257) if any("k_img" in key for key in shapes or ()) else 0
    return DiTConfig(
        dim=config["dim"],
        ffn_dim=config["ffn_dim"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        in_dim=config.get("in_dim", 16),
        out_dim=config.get("out_dim", 16),
        text_dim=config.get("text_dim", 4096),
        text_len=config.get("text_len", 512),
        freq_dim=config.get("freq_dim", 256),
        patch_size=tuple(config.get("patch_size", (1, 2, 2))),
        eps=config.get("eps", 1e-6),
        image_tokens=image * (2 if model_type == "flf2v" else 1),
        image_dim=(shapes or {}).get("img_emb.proj.0.weight", (1280,))[0],
        image_positions=model_type == "flf2v",
    )


def config_from_diffusers(config: Mapping) -> DiTConfig:
    """Read the ``config.json`` of a diffusers ``WanTransformer3DModel``."""
    positions = config.get("pos_embed_seq_len")
    return DiTConfig(
        dim=config["num_attention_heads"] * config["attention_head_dim"],
        ffn_dim=config["ffn_dim"],
        num_heads=config["num_attention_heads"],
        num_layers=config["num_layers"],
        in_dim=config["in_channels"],
        out_dim=config["out_channels"],
        text_dim=config["text_dim"],
        freq_dim=config["freq_dim"],
        patch_size=tuple(config["patch_size"]),
        eps=config["eps"],
        image_tokens=(positions or 257) if config.get("image_dim") else 0,
        image_dim=config.get("image_dim") or 1280,
        image_positions=positions is not None,
    )


def config_to_official(cfg: DiTConfig, task: str) -> dict:
    """The official ``config.json`` of a configuration."""
    return {
        "_class_name": "WanModel", "model_type": task, "dim": cfg.dim, "ffn_dim": cfg.ffn_dim, "freq_dim": cfg.freq_dim,
        "num_heads": cfg.num_heads, "num_layers": cfg.num_layers, "in_dim": cfg.in_dim, "out_dim": cfg.out_dim,
        "text_len": cfg.text_len, "text_dim": cfg.text_dim, "patch_size": list(cfg.patch_size), "eps": cfg.eps,
    }  # fmt: skip


def config_to_diffusers(cfg: DiTConfig) -> dict:
    """The diffusers ``transformer/config.json`` of a configuration."""
    return {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": cfg.num_heads, "attention_head_dim": cfg.head_dim,
        "ffn_dim": cfg.ffn_dim, "num_layers": cfg.num_layers, "in_channels": cfg.in_dim, "out_channels": cfg.out_dim,
        "text_dim": cfg.text_dim, "freq_dim": cfg.freq_dim, "patch_size": list(cfg.patch_size), "eps": cfg.eps,
        "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
        "image_dim": cfg.image_dim if cfg.image_tokens else None,
        "added_kv_proj_dim": cfg.dim if cfg.image_tokens else None,
        "pos_embed_seq_len": cfg.image_tokens if cfg.image_positions else None,
    }  # fmt: skip
