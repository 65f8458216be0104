"""A loaded model: its networks, each read from its file when first needed and freed when no longer.

``load("wan2.1-t2v-1.3b")`` resolves a name, a hub repository or a folder of any layout. Networks are plain pytrees:
``model.dit``, ``model.vae``, ``model.text_encoder``, ``model.image_encoder``; two-expert models also have
``model.dit_low``, models with sound ``model.audio_vae`` and ``model.vocoder``.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params, restore_params
from wan_jax.config import FusionConfig, ModelSpec, find_model
from wan_jax.errors import InputError
from wan_jax.models.audio_vae import AudioVAE
from wan_jax.models.clip import CLIPVision
from wan_jax.models.dit import DiT
from wan_jax.models.fusion import Fusion
from wan_jax.models.umt5 import UMT5
from wan_jax.models.vae import VAE
from wan_jax.models.vocoder import BigVGAN
from wan_jax.parallel import memory_budget
from wan_jax.text import Tokenizer
from wan_jax.weights import layouts
from wan_jax.weights.engine import fill
from wan_jax.weights.hub import resolve
from wan_jax.weights.lora import Lora, merge
from wan_jax.weights.readers import open_checkpoint

log = logging.getLogger(__name__)

# Share of the memory that weights may take before `Model.offload` chooses to hold one network at a time.
RESIDENT_SHARE = 0.7
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def build(part: str, spec: ModelSpec, dtype: Any) -> Any:
    """Abstract evaluation of one network: shapes and dtypes of every parameter, no memory.

    Both VAEs, CLIP and the vocoder are float32 whatever ``dtype`` is: small, and the quality hangs on them.
    """
    cfg = layouts.network_config(spec, part)
    kinds = {"vae": VAE, "text_encoder": UMT5, "image_encoder": CLIPVision, "audio_vae": AudioVAE, "vocoder": BigVGAN}
    kind = kinds.get(part) or (Fusion if isinstance(cfg, FusionConfig) else DiT)
    precision = {} if kind in (VAE, CLIPVision, AudioVAE, BigVGAN) else {"dtype": dtype}
    return abstract(lambda: kind(cfg, **precision, rngs=nnx.Rngs(0)))


def num_bytes(module: Any) -> int:
    """Bytes of the parameters of a module, concrete or abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(module))


class Model:
    """The networks of one checkpoint, loaded on first use.

    Attributes:
        spec: what model this is, with its defaults.
        dtype: of the matrices of the DiT and the text encoder.
        mesh: where parameters and activations lie; None is the default device.
        offload: hold one network at a time; `generate` then frees each when its work is done.
    """

    def __init__(self, files: layouts.Files, *, dtype: Any, mesh: jax.sharding.Mesh | None, offload: bool | None):
        self.files = files
        self.spec = files.spec
        self.dtype = dtype
        self.mesh = mesh
        self.loras: list[Lora] = []
        self.prompt_cache: dict[str, jax.Array] = {}  # text -> features: repeating a prompt needs no text encoder
        self._networks: dict[str, Any] = {}
        total = sum(num_bytes(build(part, self.spec, dtype)) for part in self.parts)
        self.offload = total > RESIDENT_SHARE * memory_budget(mesh) if offload is None else offload

    def __repr__(self) -> str:
        held = ", ".join(self._networks) or "nothing"
        return f"Model({self.spec.name}, {jnp.dtype(self.dtype).name}, {self.files.folder}, in memory: {held})"

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the networks that the checkpoint holds."""
        return self.files.networks

    @property
    def dit(self) -> DiT | Fusion:
        """The diffusion transformer; of two experts the high-noise one."""
        return self.network("dit")

    @property
    def dit_low(self) -> DiT:
        """The low-noise expert of a two-expert model."""
        return self.network("dit_low")

    @property
    def vae(self) -> VAE:
        return self.network("vae")

    @property
    def text_encoder(self) -> UMT5:
        return self.network("text_encoder")

    @property
    def image_encoder(self) -> CLIPVision:
        return self.network("image_encoder")

    @property
    def audio_vae(self) -> AudioVAE:
        return self.network("audio_vae")

    @property
    def vocoder(self) -> BigVGAN | None:
        """None where the model does without, see `wan_jax.nn.mel.griffin_lim`."""
        return self.network("vocoder") if "vocoder" in self.parts else None

    @property
    def tokenizer(self) -> Tokenizer:
        self.files.require("tokenizer")
        return Tokenizer.from_folder(self.files.parts["tokenizer"])

    def network(self, part: str) -> Any:
        """One network, loaded if it is not held."""
        if part not in self._networks:
            self._networks[part] = self._load(part)
        return self._networks[part]

    def replace(self, part: str, network: Any) -> None:
        """Hold another network in the place of one, such as a trained one; `release` brings back the file's."""
        self._networks[part] = network

    def release(self, *parts: str) -> None:
        """Free networks (all without arguments); they are read again when next used."""
        held = self._networks.keys() & (parts or self._networks.keys())
        for part in held:
            del self._networks[part]
        if held:
            gc.collect()  # host memory that JAX took over without a copy is given back only then

    def _load(self, part: str) -> Any:
        self.files.require(part)
        path, shape = self.files.parts[part], build(part, self.spec, self.dtype)
        cfg = layouts.network_config(self.spec, part)
        network = "dit" if part == "dit_low" else part
        log.info("loading %s (%.2f GB) from %s", part, num_bytes(shape) / 1e9, path)
        if self.files.layout == "orbax":
            module = restore_params(path, shape, network=network, mesh=self.mesh)
        elif self.files.layout == "compact":
            others = rf"(?!{part}\.).*"
            with open_checkpoint(path, stem="weights") as source:
                module = fill(
                    shape,
                    layouts.compact_rows(part, flatten_params(shape)),
                    source,
                    network=network,
                    mesh=self.mesh,
                    ignore=[(others, "of another network")],
                    what=str(path),
                )
        else:
            with layouts.open_part(part, path) as source:
                module = fill(
                    shape,
                    layouts.table(part, cfg),
                    source,
                    network=network,
                    layout=self.files.layout,
                    mesh=self.mesh,
                    ignore=layouts.ignored(part, cfg, self.files.layout),
                    what=str(path),
                )
        for lora in self.loras:
            if lora.part in (None, part) and part.startswith("dit"):
                module = merge(module, lora, layouts.table(part, self.spec.dit))
        return module

    def add_loras(self, loras: Sequence[Lora]) -> None:
        """Merge adapters into the diffusion transformer (both experts unless the adapter names one)."""
        self.loras += loras
        self.release("dit", "dit_low")


def load(
    name: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    mesh: jax.sharding.Mesh | None = None,
    loras: Sequence[str | Lora] = (),
    offload: bool | None = None,
    offline: bool | None = None,
    revision: str | None = None,
) -> Model:
    """Open a model; its networks are read when first used.

    Args:
        name: a model of `wan_jax.MODELS` ("wan2.1-t2v-1.3b"), a hub repository ("Wan-AI/Wan2.1-T2V-1.3B" or its
            ``-Diffusers`` twin), or a folder in the official, the diffusers or our Orbax layout.
        dtype: bfloat16, or float32 for parity with the official numerics.
        mesh: from `wan_jax.make_mesh`; None uses the default device.
        loras: "FILE" or "FILE:strength", or parsed `Lora`.
        offload: hold one network at a time; None decides by the memory found.
        offline: never use the network; say what is missing.
        revision: commit or branch of the hub repository.
    Raises:
        InputError: unknown name. CheckpointError: files missing or damaged.
    """
    dtype = DTYPES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype not in (jnp.bfloat16, jnp.float32):
        raise InputError(f"dtype={dtype}: use {' or '.join(DTYPES)}")
    folder = resolve(name, offline=offline, revision=revision, needed_bytes=_largest_network(str(name), dtype))
    model = Model(layouts.locate(folder), dtype=dtype, mesh=mesh, offload=offload)
    model.add_loras([Lora.open(lora) if isinstance(lora, str) else lora for lora in loras])
    return model


def _largest_network(name: str, dtype: Any) -> int:
    """Bytes of the largest network of a published model, the least that a run must hold; 0 for a folder."""
    try:
        spec = find_model(name)
    except InputError:
        return 0
    return max(num_bytes(build(part, spec, dtype)) for part in layouts.spec_parts(spec))
