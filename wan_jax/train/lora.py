"""Low-rank adaptation: the matrices of the blocks stay, and a product of two thin ones is learnt beside each.

Kernel [layer, in, out] becomes ``kernel + down @ up``, with ``down`` [layer, in, rank] and ``up`` [layer, rank, out],
which is zero at the start. There is no further factor (alpha is the rank), so that every reader of such files agrees.
Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.checkpoint import abstract, flatten_params, unflatten_like
from wan_jax.errors import InputError
from wan_jax.train.step import Task
from wan_jax.weights.engine import Row, plan
from wan_jax.weights.lora import MAX_RANK
from wan_jax.weights.writers import write_safetensors

Array = jax.Array
Factors = dict[str, dict[str, Array]]  # path of a matrix, without ".kernel" -> {"down", "up"}

_BLOCKS = re.compile(r"((video|audio)\.)?blocks\.(?P<module>.+)\.kernel")
PREFIXES = {"diffusers": "transformer.", "official": "diffusion_model."}  # of names in files, as their readers expect


def new_factors(dit: Any, rank: int, *, seed: int = 0, targets: Iterable[str] = ()) -> Factors:
    """Factors, float32, that change nothing yet, for the matrices in the blocks of a `DiT` or of a `Fusion`'s streams.

    Args:
        targets: such as "self_attn.q"; empty for all.
    Raises:
        InputError: a target that the blocks do not have, or a rank that readers refuse.
    """
    if not 1 <= rank <= MAX_RANK:
        raise InputError(f"rank={rank}: need 1 to {MAX_RANK}")
    matrices = {path: x.shape for path, x in flatten_params(dit).items() if _BLOCKS.fullmatch(path)}
    modules = {path: _BLOCKS.fullmatch(path)["module"] for path in matrices}
    targets = set(targets) or set(modules.values())
    if unknown := sorted(targets - set(modules.values())):
        raise InputError(f"targets {', '.join(unknown)}: the blocks have {', '.join(sorted(set(modules.values())))}")
    chosen = {path: shape for path, shape in matrices.items() if modules[path] in targets}
    keys = jax.random.split(jax.random.key(seed), len(chosen))
    return {
        path.removesuffix(".kernel"): {
            "down": jax.random.normal(key, (layers, width, rank)) * width**-0.5,
            "up": jnp.zeros((layers, rank, out)),
        }
        for key, (path, (layers, width, out)) in zip(keys, chosen.items(), strict=True)
    }


def add_factors(dit: Any, factors: Factors) -> Any:
    """The network with its factors merged (pure): summed in float32, then in the dtype of the matrix, as in `generate`.

    In training the sums and their gradients take memory beside the matrices, as much as these.
    """
    flat = flatten_params(dit)
    for path, factor in factors.items():
        kernel = flat[f"{path}.kernel"]
        change = jnp.matmul(factor["down"], factor["up"], precision=jax.lax.Precision.HIGHEST)
        flat[f"{path}.kernel"] = (kernel.astype(jnp.float32) + change).astype(kernel.dtype)
    return unflatten_like(dit, flat)


def lora_task(task: Task, factors: Factors) -> Task:
    """A task on "dit" as one on "dit", which then is the frozen base, and "lora", its factors."""

    def loss(networks: dict[str, Any], examples: Any) -> tuple[Array, dict[str, Array]]:
        networks = dict(networks)
        return task.loss(networks | {"dit": add_factors(networks["dit"], networks.pop("lora"))}, examples)

    return task._replace(networks=task.networks | {"lora": abstract(lambda: factors)}, loss=loss)


def write_lora(path: str | Path, factors: Factors, dit: Any, rows: Iterable[Row]) -> None:
    """One safetensors file in PEFT's form, ``NAME.lora_A.weight`` [rank, in] and ``NAME.lora_B.weight`` [out, rank].

    Names are those of diffusers, or the official ones for networks that diffusers does not have.

    Args:
        dit: the network, concrete or abstract. rows: its table of names.
    """
    rows = list(rows)
    layout = "diffusers" if all(row.names("diffusers") for row in rows) else "official"
    leaves, _ = plan(dit, rows, layout)
    tensors = {}
    for module, factor in factors.items():
        down, up = np.asarray(factor["down"]), np.asarray(factor["up"])
        for piece in leaves[f"{module}.kernel"].pieces:
            name = PREFIXES[layout] + piece.source.removesuffix(".weight")
            tensors[f"{name}.lora_A.weight"] = np.ascontiguousarray(down[piece.layer].T)
            tensors[f"{name}.lora_B.weight"] = np.ascontiguousarray(up[piece.layer].T)
    write_safetensors(path, tensors, metadata={"format": "pt"})
