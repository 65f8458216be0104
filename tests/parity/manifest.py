"""Every published checkpoint, by abstract evaluation: each key and each shape of our models, and none beside."""

from __future__ import annotations

import re

import jax.numpy as jnp
import numpy as np

from wan_jax.config import MODELS
from wan_jax.model import build
from wan_jax.weights import layouts
from wan_jax.weights.engine import check, export

# Our model and network behind each entry, by the words of its name.
ENTRIES = (
    (r"dit_wan2\.1_t2v_1\.3B", "wan2.1-t2v-1.3b", "dit"),
    (r"dit_wan2\.1_t2v_14B", "wan2.1-t2v-14b", "dit"),
    (r"dit_wan2\.1_i2v_14B", "wan2.1-i2v-14b-720p", "dit"),
    (r"dit_wan2\.1_flf2v_14B", "wan2.1-flf2v-14b-720p", "dit"),
    (r"dit_wan2\.2_t2v_A14B.*", "wan2.2-t2v-a14b", "dit"),
    (r"dit_wan2\.2_i2v_A14B.*", "wan2.2-i2v-a14b", "dit_low"),
    (r"dit_wan2\.2_ti2v_5B", "wan2.2-ti2v-5b", "dit"),
    (r"Wan2\.1_VAE\.pth", "wan2.1-t2v-14b", "vae"),
    (r"Wan2\.2_VAE\.pth", "wan2.2-ti2v-5b", "vae"),
    (r"models_t5.*", "wan2.1-t2v-14b", "text_encoder"),
    (r"models_clip.*", "wan2.1-i2v-14b-720p", "image_encoder"),
)


class Tensor:
    """Shape and dtype of a tensor that is not there."""

    def __init__(self, shape: list[int]):
        self.shape, self.dtype = tuple(shape), np.dtype(np.float32)


def expand(entry: dict) -> dict[str, Tensor]:
    """Key templates with ``{i}`` to keys: the prefix before ``{i}`` names the repeat count."""
    tensors = {}
    for template, shape in entry["shapes"].items():
        prefix = template.split(".{i}")[0]
        for i in range(entry["repeat"][prefix]) if "{i}" in template else (0,):
            tensors[template.replace("{i}", str(i))] = Tensor(shape)
    return tensors


def check_manifest(config: dict, tensors: dict) -> None:
    for name, entry in config.items():
        model, part = next((m, p) for pattern, m, p in ENTRIES if re.fullmatch(pattern, name))
        spec = MODELS[model]
        keys = expand(entry)
        assert len(keys) == entry["num_tensors"]
        module = build(part, spec, jnp.bfloat16)
        cfg = layouts.network_config(spec, part)
        rows = layouts.table(part, cfg)
        coverage = check(module, rows, keys, ignore=layouts.ignored(part, cfg, "official"))
        assert not coverage.faults, (name, coverage.faults[:5])
        used = {key: keys[key].shape for key in coverage.used}
        exported = {key: shape for key, shape, _, _ in export(module, rows, layout="official")}
        assert exported == used, name
        if part.startswith("dit"):
            assert spec.dit.num_params() == entry["num_params"], name


RUNNERS = {"checkpoint_manifest": check_manifest}
