"""A loaded model: its networks, each read from its file when first needed and freed when no longer.

``load("wan2.1-t2v-1.3b")`` resolves a name, a hub repository or a folder of any layout. Networks are plain pytrees:
``model.dit``, ``model.vae``, ``model.text_encoder``, ``model.image_encoder``; two-expert models also have
``model.dit_low``, models with sound ``model.audio_vae`` and ``model.vocoder``.
"""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params, restore_params
from wan_jax.config import FusionConfig, ModelSpec, find_model
from wan_jax.errors import InputError, nearest
from wan_jax.models.audio_vae import AudioVAE
from wan_jax.models.clip import CLIPVision
from wan_jax.models.dit import DiT
from wan_jax.models.fusion import Fusion
from wan_jax.models.umt5 import UMT5
from wan_jax.models.vae import VAE
from wan_jax.models.vocoder import BigVGAN
from wan_jax.nn.layers import quantized
from wan_jax.nn.quant import KINDS
from wan_jax.nn.stack import is_streamed
from wan_jax.parallel import make_mesh, memory_budget
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


@functools.cache  # of a name and a specification: shapes alone, which nobody changes
def build(part: str, spec: ModelSpec, dtype: Any, quantize: str | None = None) -> Any:
    """Abstract evaluation of one network: shapes and dtypes of every parameter, no memory.

    Both VAEs, CLIP and the vocoder are float32 whatever ``dtype`` is: small, and the quality hangs on them.
    """
    cfg = layouts.network_config(spec, part)
    kinds = {"vae": VAE, "text_encoder": UMT5, "image_encoder": CLIPVision, "audio_vae": AudioVAE, "vocoder": BigVGAN}
    kind = kinds.get(part) or (Fusion if isinstance(cfg, FusionConfig) else DiT)
    precision = {} if kind in (VAE, CLIPVision, AudioVAE, BigVGAN) else {"dtype": dtype}
    network = abstract(lambda: kind(cfg, **precision, rngs=nnx.Rngs(0)))
    held = kind_of_weights(part, quantize)
    return quantized(network, held) if held else network


def kind_of_weights(part: str, quantize: str | None) -> str | None:
    """How a network holds its matrices under ``quantize``; None as they are.

    The text encoder takes int8 under fp8 too: it runs once per prompt, and single channels of a T5's hidden layer are
    so large that little would be left of the others beside them.
    """
    if part == "text_encoder":
        return quantize and "int8"
    return quantize if part in ("dit", "dit_low") else None


def num_bytes(module: Any, stream: bool = False) -> int:
    """Bytes of the parameters of a module, concrete or abstract; ``stream``: of those that lie on the devices."""
    leaves = flatten_params(module).items()
    return sum(x.size * x.dtype.itemsize for path, x in leaves if not (stream and is_streamed(path)))


def streams(part: str) -> bool:
    """Whether a network is one whose kernels may stay on the host: those of many equal blocks."""
    return part in ("dit", "dit_low", "text_encoder")


class Model:
    """The networks of one checkpoint, loaded on first use.

    Attributes:
        spec: what model this is, with its defaults.
        dtype: of the matrices of the DiT and the text encoder; what they compute in where ``quantize`` is given.
        quantize: "int8" or "fp8", see `load`; None holds matrices in ``dtype``.
        stream: matrices stay in the memory of the host, see `load`.
        mesh: where parameters and activations lie; None is the default device.
        offload: hold one network at a time; `generate` then frees each when its work is done.
    """

    def __init__(
        self,
        files: layouts.Files,
        *,
        dtype: Any,
        mesh: jax.sharding.Mesh | None,
        offload: bool | None,
        quantize: str | None = None,
        stream: bool = False,
    ):
        self.files = files
        self.spec = files.spec
        self.dtype = dtype
        self.quantize = quantize
        self.stream = stream
        self.mesh = mesh
        self.loras: list[Lora] = []
        self.prompt_cache: dict[str, jax.Array] = {}  # text -> features: repeating a prompt needs no text encoder
        self._networks: dict[str, Any] = {}
        total = sum(num_bytes(build(part, self.spec, dtype, quantize), stream and streams(part)) for part in self.parts)
        self.offload = total > RESIDENT_SHARE * memory_budget(mesh) if offload is None else offload

    def __repr__(self) -> str:
        held = ", ".join(self._networks) or "nothing"
        precision = self.quantize or jnp.dtype(self.dtype).name
        return f"Model({self.spec.name}, {precision}, {self.files.folder}, in memory: {held})"

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

    def need_full_weights(self, what: str) -> None:
        """
        Raises:
            InputError: the matrices are quantised or lie on the host; ``what`` needs them as they are in the files.
        """
        if self.quantize or self.stream:
            given = f"quantize={self.quantize!r}" if self.quantize else "stream=True"
            raise InputError(f"{what} needs the weights as they are: load the model without {given}")

    def _load(self, part: str) -> Any:
        self.files.require(part)
        held = kind_of_weights(part, self.quantize)
        size = num_bytes(build(part, self.spec, self.dtype, self.quantize))
        log.info("loading %s (%.2f GB) from %s", part, size / 1e9, self.files.parts[part])
        loras = [lora for lora in self.loras if lora.part in (None, part)] if part.startswith("dit") else []
        stream = self.stream and streams(part)
        if not (held or stream) or not (loras or self.files.layout == "orbax"):
            return self._read(part, loras, self.mesh, held, stream)
        # What an adapter changes must be whole, and at hand: first on the host's own device, then where it belongs.
        try:
            host = make_mesh(devices=jax.local_devices(backend="cpu")[:1])
        except RuntimeError as error:
            raise InputError(
                "adapters and converted folders are quantised and streamed by way of the host's own device: add cpu to"
                " JAX_PLATFORMS, such as cuda,cpu"
            ) from error
        arrays = flatten_params(self._read(part, loras, host))
        return fill(
            build(part, self.spec, self.dtype),
            layouts.compact_rows(part, arrays),
            {f"{part}.{path}": np.asarray(x) for path, x in arrays.items()},
            network=_rules(part),
            mesh=self.mesh,
            quantize=held,
            stream=stream,
        )

    def _read(
        self, part: str, loras: Sequence[Lora], mesh: jax.sharding.Mesh | None, quantize: str | None = None,
        stream: bool = False,
    ) -> Any:  # fmt: skip
        """One network from its files, adapters merged."""
        path, shape, network = self.files.parts[part], build(part, self.spec, self.dtype), _rules(part)
        cfg = layouts.network_config(self.spec, part)
        if self.files.layout == "orbax":
            module = restore_params(path, shape, network=network, mesh=mesh)
        elif self.files.layout == "compact":
            others = rf"(?!{part}\.).*"
            with open_checkpoint(path, stem="weights") as source:
                module = fill(
                    shape,
                    layouts.compact_rows(part, flatten_params(shape)),
                    source,
                    network=network,
                    mesh=mesh,
                    quantize=quantize,
                    stream=stream,
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
                    mesh=mesh,
                    quantize=quantize,
                    stream=stream,
                    ignore=layouts.ignored(part, cfg, self.files.layout),
                    what=str(path),
                )
        for lora in loras:
            module = merge(module, lora, layouts.table(part, self.spec.dit))
        return module

    def add_loras(self, loras: Sequence[Lora]) -> None:
        """Merge adapters into the diffusion transformer (both experts unless the adapter names one)."""
        self.loras += loras
        self.release("dit", "dit_low")


def _rules(part: str) -> str:
    """Key of `wan_jax.parallel.RULES`."""
    return "dit" if part == "dit_low" else part


def load(
    name: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    quantize: str | None = None,
    stream: bool = False,
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
        quantize: hold the matrices of the DiT's and the text encoder's blocks in one byte each, computing in ``dtype``:
            "int8" on every device, or "fp8", less exact, which NVIDIA GPUs from Ada and Hopper on also multiply (the
            text encoder is int8 then too). Adapters are merged before.
        stream: keep those matrices in pinned memory of the host, from where they come to the device layer by layer, in
            every pass. The device holds those of one layer; the clip is the same.
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
    check_quantize(quantize)
    if stream and not _has_host_memory(mesh):
        log.warning("stream: this device does not address the memory of its host: the weights go to the device")
        stream = False
    needed = _largest_network(str(name), dtype, quantize)
    folder = resolve(name, offline=offline, revision=revision, needed_bytes=needed)
    model = Model(layouts.locate(folder), dtype=dtype, quantize=quantize, stream=stream, mesh=mesh, offload=offload)
    model.add_loras([Lora.open(lora) if isinstance(lora, str) else lora for lora in loras])
    return model


def _has_host_memory(mesh: jax.sharding.Mesh | None) -> bool:
    devices = jax.local_devices() if mesh is None else mesh.local_devices
    return any(memory.kind == "pinned_host" for memory in devices[0].addressable_memories())


def check_quantize(quantize: str | None) -> None:
    """
    Raises:
        InputError: there is no such kind of weights.
    """
    if quantize is not None and quantize not in KINDS:
        known = " or ".join(KINDS)
        raise InputError(f"quantize={quantize!r}: use {known}, or leave it out{nearest(str(quantize), KINDS)}")


def _largest_network(name: str, dtype: Any, quantize: str | None) -> int:
    """Bytes of the largest network of a published model, the least that a run must hold; 0 for a folder."""
    try:
        spec = find_model(name)
    except InputError:
        return 0
    return max(num_bytes(build(part, spec, dtype, quantize)) for part in layouts.spec_parts(spec))
