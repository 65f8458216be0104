"""umT5, CLIP and prompt cleaning against the official code."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx

from tests.parity.common import params
from wan_jax.checkpoint import abstract
from wan_jax.config import CLIPConfig, UMT5Config
from wan_jax.models.clip import CLIPVision, preprocess
from wan_jax.models.umt5 import UMT5, relative_buckets
from wan_jax.parallel import compiler_options
from wan_jax.text import clean
from wan_jax.weights.engine import fill
from wan_jax.weights.maps import clip as clip_map
from wan_jax.weights.maps import umt5 as umt5_map


def _limit(config: Mapping) -> float:
    return 5e-5 if "_eps_" in config["path"] else 3e-5


def build_umt5(config: Mapping, tensors: Mapping[str, np.ndarray], prefix: str = "") -> UMT5:
    names = "vocab_size dim dim_attn dim_ffn num_heads num_layers num_buckets eps".split()
    cfg = UMT5Config(**{name: config[name] for name in names}, max_distance=config["max_dist"])
    shape = abstract(lambda: UMT5(cfg, rngs=nnx.Rngs(0)))
    return fill(shape, umt5_map.rows(cfg), params(tensors, prefix), network="text_encoder", what="golden")


def build_clip(config: Mapping, tensors: Mapping[str, np.ndarray], prefix: str = "") -> CLIPVision:
    assert config["activation"] == "gelu", "the released tower has the exact GELU"
    names = "image_size patch_size dim num_heads num_layers out_dim".split()
    cfg = CLIPConfig(
        **{name: config[name] for name in names},
        mlp_dim=int(config["dim"] * config["mlp_ratio"]),
        eps=config["norm_eps"],
    )
    shape = abstract(lambda: CLIPVision(cfg, rngs=nnx.Rngs(0)))
    ignore = clip_map.IGNORE["official"]
    source = params(tensors, prefix)
    return fill(shape, clip_map.rows(cfg), source, network="image_encoder", ignore=ignore, what="golden")


def check_t5(config: dict, tensors: dict[str, np.ndarray]) -> None:
    model = build_umt5(config, tensors)
    encode = jax.jit(lambda model, ids, mask: model(ids, mask), compiler_options=compiler_options())
    for name in sorted(name for name in tensors if name.startswith("in/ids_")):
        batch = name.removeprefix("in/ids_")
        mask = tensors[f"in/mask_{batch}"]
        hidden = np.asarray(encode(model, tensors[name], mask))
        valid = mask.astype(bool)
        expected = tensors[f"out/hidden_{batch}"][valid]
        np.testing.assert_allclose(hidden[valid], expected, atol=_limit(config), rtol=0, err_msg=batch)
    if "in/rel_pos" in tensors:
        buckets = relative_buckets(tensors["in/rel_pos"], config["num_buckets"], config["max_dist"])
        np.testing.assert_array_equal(buckets, tensors["out_int/rel_bucket"])


def check_clip(config: dict, tensors: dict[str, np.ndarray]) -> None:
    model = build_clip(config, tensors)
    pixels = preprocess(np.moveaxis(tensors["in/image"], 1, -1), config["image_size"])
    np.testing.assert_allclose(pixels, np.moveaxis(tensors["mid/pixels"], 1, -1), atol=1e-5, rtol=0)
    encode = jax.jit(lambda model, pixels: model(pixels), compiler_options=compiler_options())
    features = encode(model, pixels)
    np.testing.assert_allclose(np.asarray(features), tensors["out/penultimate"], atol=_limit(config), rtol=0)


def check_text_clean(config: dict, tensors: dict[str, np.ndarray]) -> None:
    assert config["cleaner"] == "whitespace" and config["cases"]
    for case in config["cases"]:
        assert clean(case["in"]) == case["whitespace"], case["in"]


RUNNERS = {"t5_": check_t5, "clip_visual_": check_clip, "text_clean_": check_text_clean}
