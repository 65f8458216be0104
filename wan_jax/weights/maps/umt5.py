"""Names of umT5 in the official and the diffusers layout (transformers' ``UMT5EncoderModel``)."""

from __future__ import annotations

from collections.abc import Mapping

from wan_jax.config import UMT5Config
from wan_jax.weights.engine import Row

IGNORE: dict[str, list[tuple[str, str]]] = {
    "official": [],
    "diffusers": [(r"encoder\.embed_tokens\.weight", "the same table as shared.weight")],
}

_ATTENTION = "encoder.block.{i}.layer.0"
_MLP = "encoder.block.{i}.layer.1"


def rows(cfg: UMT5Config) -> list[Row]:
    """The table, the same for every configuration."""
    return [
        Row("token_embedding", "embed", "token_embedding", "shared"),
        Row("blocks.norm1", "norm", "blocks.{i}.norm1", f"{_ATTENTION}.layer_norm"),
        *(
            Row(
                f"blocks.attn.{name}",
                "linear",
                f"blocks.{{i}}.attn.{name}",
                f"{_ATTENTION}.SelfAttention.{name}",
            )
            for name in "qkvo"
        ),
        Row(
            "blocks.pos_embedding",
            "embed",
            "blocks.{i}.pos_embedding.embedding",
            f"{_ATTENTION}.SelfAttention.relative_attention_bias",
        ),
        Row("blocks.norm2", "norm", "blocks.{i}.norm2", f"{_MLP}.layer_norm"),
        Row("blocks.ffn.gate", "linear", "blocks.{i}.ffn.gate.0", f"{_MLP}.DenseReluDense.wi_0"),
        Row("blocks.ffn.fc1", "linear", "blocks.{i}.ffn.fc1", f"{_MLP}.DenseReluDense.wi_1"),
        Row("blocks.ffn.fc2", "linear", "blocks.{i}.ffn.fc2", f"{_MLP}.DenseReluDense.wo"),
        Row("norm", "norm", "norm", "encoder.final_layer_norm"),
    ]


def infer_config(shapes: Mapping[str, tuple[int, ...]]) -> UMT5Config:
    """Read the sizes off an official checkpoint, which has no config file; it keeps the constants of umT5."""
    vocab_size, dim = shapes["token_embedding.weight"]
    num_buckets, num_heads = shapes["blocks.0.pos_embedding.embedding.weight"]
    return UMT5Config(
        vocab_size=vocab_size,
        dim=dim,
        dim_attn=shapes["blocks.0.attn.q.weight"][0],
        dim_ffn=shapes["blocks.0.ffn.fc1.weight"][0],
        num_heads=num_heads,
        num_layers=sum(key.endswith(".attn.q.weight") for key in shapes),
        num_buckets=num_buckets,
    )


def config_from_diffusers(config: Mapping) -> UMT5Config:
    """Read ``text_encoder/config.json``."""
    return UMT5Config(
        vocab_size=config["vocab_size"],
        dim=config["d_model"],
        dim_attn=config["d_kv"] * config["num_heads"],
        dim_ffn=config["d_ff"],
        num_heads=config["num_heads"],
        num_layers=config["num_layers"],
        num_buckets=config["relative_attention_num_buckets"],
        max_distance=config["relative_attention_max_distance"],
        eps=config["layer_norm_epsilon"],
    )


def config_to_diffusers(cfg: UMT5Config) -> dict:
    """The ``text_encoder/config.json`` of a configuration."""
    return {
        "architectures": ["UMT5EncoderModel"], "model_type": "umt5", "feed_forward_proj": "gated-gelu",
        "vocab_size": cfg.vocab_size, "d_model": cfg.dim, "d_kv": cfg.dim_attn // cfg.num_heads,
        "d_ff": cfg.dim_ffn, "num_heads": cfg.num_heads, "num_layers": cfg.num_layers,
        "relative_attention_num_buckets": cfg.num_buckets,
        "relative_attention_max_distance": cfg.max_distance, "layer_norm_epsilon": cfg.eps,
        "pad_token_id": 0, "eos_token_id": 1, "is_encoder_decoder": True, "use_cache": False,
    }  # fmt: skip
