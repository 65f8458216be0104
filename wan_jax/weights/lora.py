"""Low-rank adapters: read every format that Wan adapters come in, and merge them into a DiT.

An adapter changes a matrix by ``strength * scale * up @ down``; scale is alpha / rank where the file states alpha, else
1. Distilled files also add whole differences to weights (``.diff``), biases (``.diff_b``) and modulations
(``.diff_m``). Names may be official, diffusers or kohya's (dots turned into underscores), under several prefixes.
Merging runs on the device, one layer of one parameter at a time, in float32, and is cast back.
"""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.errors import CheckpointError, InputError
from wan_jax.weights.engine import LAYOUTS, Leaf, Piece, Row, piece_shape, plan
from wan_jax.weights.readers import open_checkpoint

log = logging.getLogger(__name__)

MAX_RANK = 512
PREFIXES = ("diffusion_model.", "base_model.model.", "transformer.", "transformer_2.", "model.", "unet.")
KOHYA = re.compile(r"lora_unet__?")
# suffix of a key -> what the tensor is
SUFFIXES = (
    (
        re.compile(r"(\.lora_A|\.lora_down|_lora\.down|\.lora\.down|\.lora_linear_layer\.down)(\.default)?(\.weight)?"),
        "down",
    ),
    (re.compile(r"(\.lora_B|\.lora_up|_lora\.up|\.lora\.up|\.lora_linear_layer\.up)(\.default)?(\.weight)?"), "up"),
    (re.compile(r"\.alpha"), "alpha"),
    (re.compile(r"\.diff"), "diff"),
    (re.compile(r"\.diff_b"), "diff_b"),
    (re.compile(r"\.diff_m"), "diff_m"),
)
# Keys that some models lack by design: adapters of I2V models carry them, T2V models drop them.
IMAGE_KEYS = re.compile(r".*(k_img|v_img|add_[kv]_proj|img_emb|image_embedder).*")


@dataclass
class Lora:
    """An adapter, parsed but not yet matched with a model.

    Attributes:
        modules: module name as in the file, prefix stripped -> {"down", "up", "alpha", "diff", "diff_b", "diff_m"}.
        part: "dit" or "dit_low" when the adapter is meant for one expert, None for both.
    """

    name: str
    strength: float
    modules: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    metadata_scale: float | None = None
    part: str | None = None

    @classmethod
    def open(cls, text: str) -> Lora:
        """Read ``FILE``, ``FILE:strength`` or, for one expert of two, ``high=FILE:strength``, ``low=FILE:strength``."""
        expert, _, rest = text.partition("=") if text.startswith(("high=", "low=")) else ("", "", text)
        path, colon, strength = rest.rpartition(":")
        try:
            value = float(strength) if colon else 1.0
        except ValueError:
            path, value = rest, 1.0  # the colon belongs to the path
        path = Path(path or rest)
        if not path.is_file():
            raise InputError(f"adapter {str(path)!r}: no such file; expected FILE or FILE:strength, got {text!r}")
        with open_checkpoint(path) as source:
            tensors = {name: np.array(tensor.numpy()) for name, tensor in source.items()}
            metadata = dict(source.metadata)
        lora = cls.from_tensors(tensors, name=path.name, strength=value, metadata=metadata)
        lora.part = {"high": "dit", "low": "dit_low"}.get(expert, lora.part)
        return lora

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, np.ndarray],
        *,
        strength: float = 1.0,
        name: str = "adapter",
        metadata: Mapping[str, str] = {},
    ) -> Lora:
        """Parse tensors under the names found in files.

        Raises:
            CheckpointError: a key of no known form, a missing partner, a rank above `MAX_RANK`, a value not finite.
        """
        lora, faults = cls(name, strength, metadata_scale=_metadata_scale(metadata)), []
        for key, value in tensors.items():
            match = next(
                ((m, kind) for pattern, kind in SUFFIXES if (m := re.search(pattern.pattern + "$", key))), None
            )
            if match is None:
                faults.append(f"{key}: no known adapter suffix")
            elif not np.isfinite(np.asarray(value, np.float32)).all():
                faults.append(f"{key}: NaN or infinity")
            else:
                module = key[: match[0].start()]
                if module.startswith("transformer_2."):
                    lora.part = "dit_low"
                lora.modules.setdefault(_strip(module), {})[match[1]] = value
        for module, found in lora.modules.items():
            if ("up" in found) != ("down" in found):
                faults.append(f"{module}: has {'up' if 'up' in found else 'down'} without its partner")
            elif "up" in found and (
                found["down"].shape[0] != found["up"].shape[1] or found["down"].shape[0] > MAX_RANK
            ):
                shapes = f"down {found['down'].shape}, up {found['up'].shape}"
                faults.append(f"{module}: {shapes}: ranks must agree and be at most {MAX_RANK}")
        _raise(f"adapter {name}", faults)
        return lora

    def scale(self, module: str) -> float:
        """alpha / rank, or the file's metadata, or 1. An alpha of 0 counts as absent, as in LightX2V."""
        found = self.modules[module]
        alpha = float(found.get("alpha", 0.0))
        if alpha:
            return alpha / found["down"].shape[0]
        return self.metadata_scale or 1.0


def _raise(what: str, faults: list[str]) -> None:
    if faults:
        more = f"\n  ... and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise CheckpointError(f"{what}: {len(faults)} keys cannot be used:\n  " + "\n  ".join(faults[:5]) + more)


def _strip(module: str) -> str:
    while prefix := next((p for p in PREFIXES if module.startswith(p)), None):
        module = module[len(prefix) :]
    return module


def _metadata_scale(metadata: Mapping[str, str]) -> float | None:
    """lora_alpha / r from the JSON that diffusers and PEFT write into the header."""
    for value in metadata.values():
        try:
            config = json.loads(value)
        except ValueError:
            continue
        if isinstance(config, dict):
            flat = {key.split(".")[-1]: number for key, number in config.items()}
            if isinstance(flat.get("r"), int) and isinstance(flat.get("lora_alpha"), (int, float)) and flat["r"] > 0:
                return flat["lora_alpha"] / flat["r"]
    return None


class Target(NamedTuple):
    leaf: Leaf
    piece: Piece


def _targets(module: Any, rows: Iterable[Row]) -> dict[str, Target]:
    """Every tensor name of the model, official, diffusers and underscored, -> where it lies in the model."""
    rows, targets = list(rows), {}
    for layout in LAYOUTS:
        leaves, _ = plan(module, rows, layout)
        for leaf in leaves.values():
            for piece in leaf.pieces:
                target = Target(leaf, piece)
                targets[piece.source] = target
                stem, _, end = piece.source.rpartition(".")
                targets[f"{stem.replace('.', '_')}.{end}"] = target
    return targets


@functools.partial(jax.jit, donate_argnums=0)
def _add(leaf: jax.Array, layer: jax.Array | None, delta: jax.Array) -> jax.Array:
    index = ... if layer is None else layer
    return leaf.at[index].set((leaf[index].astype(jnp.float32) + delta).astype(leaf.dtype))


@jax.jit
def _product(up: jax.Array, down: jax.Array, factor: jax.Array) -> jax.Array:
    return factor * jnp.dot(up, down, precision=jax.lax.Precision.HIGHEST)


def merge(module: Any, lora: Lora, rows: Iterable[Row]) -> Any:
    """Add an adapter to a DiT. The module's arrays are donated: use the returned one.

    Logs how many keys matched. Keys of the image branch are dropped for models without one, a patch embedding of
    another number of channels likewise; both with a warning.

    Raises:
        CheckpointError: keys that match nothing, or shapes that do not fit; the module is unchanged then.
    """
    targets, changes, faults, dropped = _targets(module, rows), [], [], []
    for name, found in lora.modules.items():
        kohya = KOHYA.match(name)
        stem = name[kohya.end() :] if kohya else name
        factor = lora.strength * lora.scale(name)
        for kind, leaf_name in (("up", "weight"), ("diff", "weight"), ("diff_b", "bias"), ("diff_m", "modulation")):
            if kind not in found:
                continue
            target = targets.get(f"{stem}.{leaf_name}") or (targets.get(stem) if kind == "diff" else None)
            if target is None:
                (dropped if IMAGE_KEYS.fullmatch(stem) else faults).append(f"{name} ({kind}): no such parameter")
                continue
            shape = piece_shape(target.leaf)
            if kind == "up":
                parts = found["up"].reshape(found["up"].shape[0], -1), found["down"].reshape(found["down"].shape[0], -1)
                size, source = parts[0].shape[0] * parts[1].shape[1], (found["up"].shape[0], *found["down"].shape[1:])
                delta = (*parts, factor, source)
            else:
                size, delta = found[kind].size, (found[kind], None, lora.strength, found[kind].shape)
            if size != int(np.prod(shape)):
                message = f"{name} ({kind}): shape {delta[3]} does not fit {target.leaf.path} {shape}"
                (dropped if stem.startswith("patch_embedding") else faults).append(message)
                continue
            changes.append((target, delta))
    _raise(f"adapter {lora.name}", faults)
    if dropped:
        log.warning(
            "adapter %s: dropped %d keys that this model has no place for, e.g. %s", lora.name, len(dropped), dropped[0]
        )
    log.info("adapter %s: %d changes matched, strength %g", lora.name, len(changes), lora.strength)

    values = dict(flatten_params(module))
    for (leaf, piece), (first, second, factor, source) in changes:
        first = jnp.asarray(first, jnp.float32)
        delta = (
            first * factor if second is None else _product(first, jnp.asarray(second, jnp.float32), jnp.float32(factor))
        )
        delta = delta.reshape(leaf.source_shape or source)
        if delta.ndim > 1:
            delta = leaf.transform.load(delta)
        shape = piece_shape(leaf)
        if piece.parts > 1:  # one third of a fused matrix
            widths = [(0, 0)] * (len(shape) - 1) + [
                (piece.part * shape[-1], (piece.parts - piece.part - 1) * shape[-1])
            ]
            delta = jnp.pad(delta.reshape(shape), widths)
        target_shape = leaf.shape if piece.layer is None else leaf.shape[1:]
        values[leaf.path] = _add(values[leaf.path], piece.layer, delta.reshape(target_shape))
    return unflatten_like(module, values)
