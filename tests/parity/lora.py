"""Adapter goldens: six file formats merged into one base model."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from safetensors import safe_open

from tests.parity.common import build_dit, pad_rows, params, to_last
from wan_jax.checkpoint import flatten_params
from wan_jax.weights.engine import export
from wan_jax.weights.lora import Lora, merge
from wan_jax.weights.maps import dit as dit_map


def check_base(config: dict, tensors: dict[str, np.ndarray]) -> None:
    dit = build_dit(config["model"], tensors)
    np.testing.assert_allclose(_forward(dit, tensors), to_last(tensors["out/x"]), atol=5e-5, rtol=0)


def _forward(dit, tensors: dict[str, np.ndarray]) -> np.ndarray:
    text = pad_rows(tensors["in/context"], dit.cfg.text_len)[None]
    run = jax.jit(lambda dit, x, t, text: dit(x, t, text))
    return np.asarray(run(dit, to_last(tensors["in/x"])[None], tensors["in/t"], text)[0])


def check_lora(config: dict, tensors: dict[str, np.ndarray]) -> None:
    base = Path(config["path"]).parent / config["base_params_file"]
    with safe_open(base, "numpy") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        model = json.loads(file.metadata()["config"])["model"]
    dit = build_dit(model, weights)
    rows = dit_map.rows(dit.cfg)
    np.testing.assert_allclose(_forward(dit, tensors), to_last(tensors["out/x_base"]), atol=5e-5, rtol=0)
    strengths = config["lora"]["strength"]
    strengths = strengths if isinstance(strengths, list) else [strengths]
    for folder, strength in zip(("in/lora/", "in/lora2/"), strengths, strict=False):
        adapter = {name[len(folder) :]: value for name, value in tensors.items() if name.startswith(folder)}
        dit = merge(dit, Lora.from_tensors(adapter, strength=strength), rows)
    np.testing.assert_allclose(_forward(dit, tensors), to_last(tensors["out/x_merged"]), atol=5e-5, rtol=0)

    merged = {name: produce() for name, _, _, produce in export(dit, rows, layout="official")}
    for name, expected in params({n.replace("out/merged/", "params/"): v for n, v in tensors.items()}).items():
        np.testing.assert_allclose(merged[name], expected, atol=2e-6, rtol=0, err_msg=name)
    original = params(weights)
    delta = sum(np.abs(merged[name].astype(np.float64) - original[name]).sum() for name in original)
    np.testing.assert_allclose(delta, tensors["out/merged_sum_abs_delta"][0], rtol=1e-4)
    assert set(merged) == set(original) and len(flatten_params(dit)) > 0


RUNNERS = {"lora_base_": check_base, "lora_": check_lora}
