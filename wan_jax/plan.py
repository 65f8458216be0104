"""What a generation takes on a device that need not be here: operations, memory, the least time, and what to change.

Everything follows from the architectures, the request and a table of devices; no weight is read, no program is
compiled, no device is started. Memory is that of the arrays alive at once, as formulas that were set beside the
compilers' own figures (`wan_jax.aot`); docs/performance.md says how far they lie apart.

    plan = make_plan(MODELS["wan2.2-t2v-a14b"], request, find_device("h200"))
    plan.peak, plan.fits, plan.changes()
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax

from wan_jax.checkpoint import flatten_params
from wan_jax.config import DiTConfig, FusionConfig, ModelSpec
from wan_jax.errors import InputError, nearest
from wan_jax.model import DTYPES, RESIDENT_SHARE, build, check_quantize, streams
from wan_jax.models.dit import READER
from wan_jax.models.vae import TILE
from wan_jax.nn.attention import SCORE_BYTES_ACCELERATOR
from wan_jax.nn.stack import is_streamed
from wan_jax.parallel import ACTIVATION_AXES, MESH_AXES, free_host_memory, make_mesh, param_sharding
from wan_jax.request import Request
from wan_jax.sound import num_voice_latents
from wan_jax.weights.layouts import spec_parts
from wan_jax.work import Convolutions, Work, dit_work, fusion_work, text_work, vae_decode, vae_encode

# ---- devices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """One or more equal devices, as JAX counts them.

    Attributes:
        memory: GB of each, as sold; 0 if not known.
        bf16, float32: dense TFLOP/s of each, as published; 0 if not known. Full float32 on a TPU is six bf16 products.
        matmul: TFLOP/s that bf16 products were measured to reach; 0 if not known.
        kinds: beginnings of what JAX calls such a device.
        cores: what the number in the name of a slice counts, per device: v5p-8 has 8 cores, two to a device.
        fp8: it multiplies 8-bit floats, at twice the rate of bfloat16, as published.
    """

    name: str
    platform: str  # tpu | cuda | cpu
    memory: float
    bf16: float
    float32: float
    matmul: float = 0.0
    kinds: tuple[str, ...] = ()
    cores: int = 1
    fp8: bool = False
    count: int = 1

    def __str__(self) -> str:
        if self.platform == "tpu":
            return f"{self.name}-{self.count * self.cores}"
        return self.name if self.count == 1 else f"{self.name}x{self.count}"

    @property
    def usable(self) -> float | None:
        """Bytes of each that a program may take; None if not known.

        JAX takes three quarters of a GPU unless told otherwise, and a TPU's runtime keeps a little for itself.
        """
        share = float(os.environ.get(MEMORY_VARIABLE, 0.75)) if self.platform == "cuda" else 0.97
        return self.memory * share * 1e9 or None


MEMORY_VARIABLE = "XLA_PYTHON_CLIENT_MEM_FRACTION"
MOST_OF_IT = 0.95  # of a GPU; the rest is for the driver and the libraries' own buffers
CHUNK_TOKENS = 4096  # that the plan offers: still wide products
# TPUs: cloud.google.com/tpu/docs, pages v5e, v5p, v6e, tpu7x (a chip of v7x is two devices). GPUs: NVIDIA's data
# sheets, dense rates (A100 80GB SXM, H100 SXM, H200 SXM, HGX B200, L40S) and the architecture white papers of Ada and
# Blackwell (bf16 with float32 sums). 790 TFLOP/s: the best matrix product measured on an H200.
DEVICES = {
    device.name: device
    for device in (
        Device("v5e", "tpu", 16, 197, 197 / 6, kinds=("TPU v5 lite", "TPU v5e")),
        Device("v5p", "tpu", 95, 459, 459 / 6, kinds=("TPU v5p", "TPU v5"), cores=2),
        Device("v6e", "tpu", 32, 918, 918 / 6, kinds=("TPU v6 lite", "TPU v6e")),
        Device("v7x", "tpu", 96, 1153.5, 1153.5 / 6, kinds=("TPU7x", "TPU v7x")),
        Device("a100", "cuda", 80, 312, 19.5, kinds=("NVIDIA A100",)),
        Device("h100", "cuda", 80, 989, 67, kinds=("NVIDIA H100",), fp8=True),
        Device("h200", "cuda", 141, 989, 67, matmul=790, kinds=("NVIDIA H200",), fp8=True),
        Device("b200", "cuda", 180, 2250, 75, kinds=("NVIDIA B200",), fp8=True),
        Device("l40s", "cuda", 48, 362, 91.6, kinds=("NVIDIA L40S",), fp8=True),
        Device("rtx4090", "cuda", 24, 165.2, 82.6, kinds=("NVIDIA GeForce RTX 4090",), fp8=True),
        Device("rtx5090", "cuda", 32, 209.5, 104.8, kinds=("NVIDIA GeForce RTX 5090",), fp8=True),
        Device("cpu", "cpu", 0, 0, 0, kinds=("cpu",)),
    )
}
ALIASES = {"tpu7x": "v7x"}


def find_device(text: str) -> Device:
    """Read ``v6e-8``, ``h200``, ``h100x8`` or ``cpu``; the memory of ``cpu`` is what is free on this machine.

    Raises:
        InputError: unknown, with the nearest names; or a slice that has no whole number of devices.
    """
    names = [*DEVICES, *ALIASES]
    match = re.fullmatch(rf"({'|'.join(names)})(?:[-x](\d+))?", text.strip().lower())
    if not match:
        raise InputError(f"unknown device {text!r}{nearest(text, names)}; such as v6e-8 or h100x8: {', '.join(names)}")
    name, number = match.groups()
    device = DEVICES[ALIASES.get(name, name)]
    units = device.cores if number is None else int(number)
    if units < 1 or units % device.cores:
        raise InputError(f"device {text!r}: {name} is counted in cores, {device.cores} to a device")
    device = replace(device, count=units // device.cores)
    if name == "cpu":  # several of them share the memory
        device = replace(device, memory=(free_host_memory() or 0) / 1e9 / device.count)
    return device


def this_device(devices: list[Any]) -> Device:
    """The row of the table that JAX devices belong to; without one, what they tell of themselves."""
    kind = devices[0].device_kind
    for device in DEVICES.values():
        if kind.startswith(device.kinds):
            return find_device(f"{device.name}-{len(devices) * device.cores}")
    limit = (devices[0].memory_stats() or {}).get("bytes_limit", 0)
    return Device(kind, devices[0].platform, limit / 1e9, 0, 0, count=len(devices))


# ---- memory ------------------------------------------------------------------------------------------------


def weight_bytes(
    spec: ModelSpec,
    part: str,
    dtype: str,
    mesh: jax.sharding.Mesh | None,
    quantize: str | None = None,
    stream: bool = False,
    within: Sequence[str] = ("",),
) -> int:
    """Bytes of one network's parameters on one device; ``stream``: of the kernels that do so one layer; ``within``:
    those under these paths.
    """
    network = "dit" if part == "dit_low" else part

    def size(path: str, leaf: Any) -> int:
        shape = leaf.shape if mesh is None else param_sharding(network, path, leaf.shape, mesh).shard_shape(leaf.shape)
        here = math.prod(shape) * leaf.dtype.itemsize
        return here // leaf.shape[0] if stream and streams(part) and is_streamed(path) else here

    shapes = _shapes(spec, network, dtype, quantize)
    return sum(size(path, leaf) for path, leaf in shapes.items() if path.startswith(tuple(within)))


@functools.cache
def _shapes(spec: ModelSpec, part: str, dtype: str, quantize: str | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Parameters by path; a plan and what it proposes to change ask for the same ones."""
    return flatten_params(build(part, spec, DTYPES[dtype], quantize))


def _share(size: int, axis: str, axes: Mapping[str, int]) -> int:
    """What one device holds of ``size`` rows along a logical axis of activations; what does not divide stays whole."""
    for name in ACTIVATION_AXES[axis]:
        if size % axes.get(name, 1) == 0:
            size //= axes.get(name, 1)
    return size


def step_bytes(
    cfg: DiTConfig,
    tokens: int,
    batch: int,
    itemsize: int,
    axes: Mapping[str, int],
    platform: str,
    quantize: str | None = None,
    chunk_tokens: int = 0,
) -> float:
    """Temporary memory of one forward on one device.

    The larger of two moments: in the MLP the stream before and after the cross-attention (float32) beside the input
    and the hidden layer; in self-attention the stream beside queries, keys and values, what several devices trade of
    them, and the scores of one chunk where no kernel of ``nn/kernels.py`` keeps them to itself. Where products round
    what they multiply (``nn/quant.py``), that stands beside it, in one byte.

    In chunks it is those of one chunk, beside the stream, all keys and values, and the weights of a block.
    """
    d, size = cfg.dim, itemsize
    devices = axes.get("fsdp", 1) * axes.get("seq", 1)
    rows = _share(batch, "B", axes) * -(-tokens // devices)
    if 0 < chunk_tokens < tokens and devices == 1:
        kept = rows * (4 + 2 * size) * d + (1 if quantize else size) * (8 * d**2 + 2 * d * cfg.ffn_dim)
        chunk = -(-tokens // -(-tokens // chunk_tokens))
        return kept + step_bytes(cfg, chunk, batch, itemsize, axes, platform, quantize) + 8 * tokens * cfg.head_dim
    rounded = int(quantize == "fp8" and platform == "cuda")
    mlp = rows * ((2 * 4 + size) * d + (size + rounded) * cfg.ffn_dim)
    traded = rows * 4 * size * d if devices > 1 else 0
    kernel = size == 2 and platform in ("cuda", "tpu")
    scores = 0 if kernel else (1 + size / 4) * SCORE_BYTES_ACCELERATOR
    attention = rows * (4 + 4 * size + rounded) * d + traded + scores
    matrices = size * d * cfg.ffn_dim
    if axes.get("fsdp", 1) > 1:  # the weights of one block, whole
        matrices = size * (8 * d**2 + 2 * d * cfg.ffn_dim)
    return max(mlp, attention) + matrices + 8 * tokens * cfg.head_dim


def stem_bytes(cfg: DiTConfig, itemsize: int) -> int:
    """The kernels of the audio stem in the layout of the convolution, which stay beside passes that run in turn."""
    return 3 * itemsize * cfg.audio_kernel * cfg.dim * cfg.stem_dim if isinstance(cfg, FusionConfig) else 0


def codec_bytes(walk: Convolutions, frames: int) -> float:
    """Temporary memory of coding a clip in a stream: the past beside two of the widest layers. Of one frame none is
    kept.
    """
    return 4 * (walk.past * (frames > 1) + 2 * walk.widest)


# ---- the plan ----------------------------------------------------------------------------------------------


class Stage(NamedTuple):
    """One part of a generation.

    work: operations of one clip. seconds: the least that they take at the published rate of their precision, and at
    the measured one; None where the rate is not known. weights: bytes per device of the networks that it uses.
    activations: bytes per device beside them.
    """

    name: str
    work: float
    seconds: tuple[float | None, float | None]
    weights: dict[str, int]
    activations: float


@dataclass(frozen=True)
class Plan:
    """What one request needs on one device. Built by `make_plan`.

    ``dtype`` is that of the matrices, or with ``quantize`` of the products; ``axes`` the mesh, ``offload`` whether one
    network is held at a time, ``stream`` whether matrices stay on the host.
    """

    spec: ModelSpec
    request: Request
    device: Device
    dtype: str
    axes: dict[str, int]
    offload: bool | None
    quantize: str | None = None
    stream: bool = False

    @property
    def offloads(self) -> bool:
        """Given, or decided as `wan_jax.model.Model` does."""
        if self.offload is not None or not self.device.usable:
            return bool(self.offload)
        return sum(self._weights.values()) > RESIDENT_SHARE * self.device.usable

    @functools.cached_property
    def _weights(self) -> dict[str, int]:
        return {part: weight_bytes(self.spec, part, *self._held) for part in spec_parts(self.spec)}

    @functools.cached_property
    def _held(self) -> tuple[Any, ...]:
        mesh = make_mesh(self.axes, [object()] * self.device.count) if self.device.count > 1 else None
        return self.dtype, mesh, self.quantize, self.stream

    @functools.cached_property
    def _reader(self) -> int:
        """Bytes of the weights that are let go once the prompt is read."""
        if isinstance(self.spec.dit, FusionConfig):
            return 0
        return weight_bytes(self.spec, "dit", *self._held, [f"{name}." for name in READER])

    @functools.cached_property
    def clip_tokens(self) -> dict[str, int]:
        """Tokens of each stream that the clip has."""
        spec, request = self.spec, self.request
        frames = (request.num_frames - 1) // spec.vae.temporal_stride + 1
        video = frames * self._per_frame
        if request.sound is None:
            return {"video": video}
        return {"video": request.sound.video * video, "audio": request.sound.audio * request.sound.num_latents}

    @functools.cached_property
    def tokens(self) -> dict[str, int]:
        """Tokens of each stream, those of the references included."""
        counts = dict(self.clip_tokens)
        for reference in self.request.sound.references if self.request.sound else ():
            counts["video"] += self._per_frame
            if reference.voice is not None:
                counts["audio"] += num_voice_latents(len(reference.voice_second), self.spec.sound)
        return counts

    @property
    def _per_frame(self) -> int:
        multiple = self.spec.size_multiple
        return self.request.height // multiple * (self.request.width // multiple)

    @property
    def passes(self) -> int:
        """Forwards of one step."""
        sound = self.request.sound
        if sound is None:
            return 1 + self._negatives
        extra = (
            self._negatives, sound.image_guidance and sound.video, sound.voice_guidance and sound.audio,
            sound.sync_guidance and sound.video and sound.audio,
        )  # fmt: skip
        return 1 + sum(map(bool, extra))

    @property
    def forwards(self) -> int:
        """Of all steps; those outside the guidance interval run one pass."""
        low, high = self.request.guidance_interval
        guided = sum(low < sigma <= high for sigma in self.request.schedule().sigmas[:-1])
        return self.request.num_steps + guided * (self.passes - 1)

    @property
    def _negatives(self) -> int:
        """Negative prompts: of a model with sound one for each stream."""
        request, sound = self.request, self.request.sound
        if sound is None:
            return int(request.guidance != "none")
        scales = [request.guidance_scale] * sound.video + [sound.audio_guidance_scale] * sound.audio
        return len(scales) if any(scale != 1 for scale in scales) else 0

    @functools.cached_property
    def forward(self) -> Work:
        cfg = self.spec.dit
        if not isinstance(cfg, FusionConfig):
            return dit_work(cfg, self.tokens["video"])
        clip = self.clip_tokens["video"], self.clip_tokens["audio"]
        return fusion_work(cfg, self.tokens["video"], self.tokens["audio"], len(self.request.sound.references), clip)

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        return tuple(stage for stage in (self._text(), self._conditions(), self._denoise(), self._decode()) if stage)

    def _stage(
        self, name: str, work: float, dtype: str, parts: tuple[str, ...], activations: float, eight_bits: float = 0.0
    ) -> Stage:
        """``eight_bits``: the part of the work at twice the published rate."""
        published, measured = self.device.bf16, 0.0 if eight_bits else self.device.matmul
        if dtype == "float32":
            published, measured = self.device.float32, 0.0
        least = (work - eight_bits / 2) / 1e12 / self.device.count
        seconds = [least / rate if rate else None for rate in (published, measured)]
        weights = {part: self._weights[part] for part in parts if part in self._weights}
        return Stage(name, work, tuple(seconds), weights, activations)

    def _text(self) -> Stage:
        """All prompts at their full length; a short one takes a quarter of that."""
        cfg, tokens, size = self.spec.text, self.spec.dit.text_len, self._itemsize
        work = text_work(cfg, tokens).total * (1 + self._negatives)
        scores = (4 + 4 + size) * cfg.num_heads * tokens**2  # and the position bias
        activations = tokens * ((8 + size) * cfg.dim + 3 * size * cfg.dim_ffn) + scores
        return self._stage("text encoder", work, self.dtype, ("text_encoder",), activations)

    def _conditions(self) -> Stage | None:
        """Pictures through the encoder of the VAE: a whole clip of them for I2V, one by one otherwise. The image
        encoder and the audio codec are small beside it: their weights count, their operations do not.
        """
        request, references = self.request, self.request.sound.references if self.request.sound else ()
        pictures = len(references) + (request.image is not None)
        if not pictures:
            return None
        frames = request.num_frames if request.task in ("i2v", "flf2v") else 1
        walk = vae_encode(self.spec.vae, request.height, request.width, frames)
        once = walk.work if frames > 1 else pictures * walk.work
        memory = 12 * frames * request.height * request.width  # the clip in float32
        memory += codec_bytes(walk, frames)
        return self._stage("conditions", once, "float32", ("image_encoder", "vae", "audio_vae"), memory)

    def _denoise(self) -> Stage:
        cfg, batch, size = self.spec.dit, self.passes if self.request.guidance == "batch" else 1, self._itemsize
        where = self.axes, self.device.platform, self.quantize, self.request.chunk_tokens
        activations = step_bytes(cfg, sum(self.tokens.values()), batch, size, *where)
        if batch < self.passes:
            activations += stem_bytes(cfg, size)
        text = (1 + isinstance(cfg, FusionConfig)) * self.passes * 4 * cfg.text_len * cfg.text_dim
        if not isinstance(cfg, FusionConfig):  # keys and values of every block
            kept = cfg.num_layers * (cfg.text_len + cfg.image_tokens) * 2 * cfg.dim * size
            text += kept * _share(self.passes, "B", self.axes)
        state = 4 * self.tokens["video"] * math.prod(cfg.patch_size) * (4 * cfg.out_dim + cfg.in_dim)
        work = self.forward.total * self.forwards  # reading the prompt, a thousandth of a pass, is counted in each
        eight_bits = self.forward.linear * self.forwards if self.quantize == "fp8" and self.device.fp8 else 0.0
        return self._stage("denoise", work, self.dtype, ("dit", "dit_low"), activations + text + state, eight_bits)

    def _decode(self) -> Stage:
        request, cfg = self.request, self.spec.vae
        pixels = request.num_frames * request.height * request.width
        work, activations = 0.0, 0.0
        if self.tokens["video"]:
            work = vae_decode(cfg, request.height, request.width, request.num_frames).work
            tile = [cfg.spatial_stride * side for side in TILE]
            height, width = (min(side, of) for side, of in zip(tile, (request.height, request.width), strict=True))
            area = (height, width) if request.tiled else (request.height, request.width)
            walk = vae_decode(cfg, *area, request.num_frames)
            rows = _share(area[0], "H", self.axes) / area[0]
            activations = rows * codec_bytes(walk, request.num_frames) + 3 * pixels
            if request.tiled:  # the clip and the tile in float32
                activations += 12 * pixels + 12 * request.num_frames * height * width
        return self._stage("decode", work, "float32", ("vae", "audio_vae", "vocoder"), activations)

    @property
    def _itemsize(self) -> int:
        return 4 if self.dtype == "float32" else 2

    def memory(self, offload: bool | None = None) -> dict[str, float]:
        """Peak bytes per device of every stage; ``offload`` in place of the plan's own."""
        offload = self.offloads if offload is None else offload
        held: dict[str, int] = {}
        peaks = {}
        for stage in self.stages:
            held = stage.weights if offload else held | stage.weights
            parts = dict(held)
            if offload and "dit_low" in parts:  # one expert after the other
                del parts["dit_low"]
            read = self._reader if offload and "dit" in parts else 0  # before the step's activations are there
            peaks[stage.name] = sum(parts.values()) + max(stage.activations - read, 0)
        return peaks

    @property
    def peak(self) -> float:
        return max(self.memory().values())

    @property
    def fits(self) -> bool | None:
        return None if self.device.usable is None else self.peak <= self.device.usable

    def seconds(self) -> float | None:
        """The least that a clip takes: measured rates where there are any, published ones else."""
        times = [stage.seconds[1] or stage.seconds[0] for stage in self.stages]
        return None if None in times else sum(times)

    def changes(self) -> list[tuple[str, Plan]]:
        """What to change until it fits, the cheapest first: each option with the plan under it and those before it.

        The last ones are alternatives: more devices, or the next smaller size.
        """
        found: list[tuple[str, Plan]] = []
        now, left = self, dict(self._cheap())
        while now.fits is False:
            plans = ((option, change(now)) for option, change in left.items())
            helps = (x for x in plans if x[1].peak < now.peak or x[1].device.usable > now.device.usable)
            option, plan = next(helps, (None, now))
            if option is None:
                return found + list(now._dear())
            found.append((option, plan))
            now = plan
            del left[option]  # the others may help from here on
        return found

    def _cheap(self) -> Iterator[tuple[str, Any]]:
        """Options that change nothing in the clip, or next to nothing, as functions of a plan."""
        if self.device.platform == "cuda" and self.device.usable < MOST_OF_IT * 1e9 * self.device.memory:
            share = MOST_OF_IT * self.device.memory * 1e9 / self.device.usable
            larger = replace(self.device, memory=self.device.memory * share)
            yield f"{MEMORY_VARIABLE}={MOST_OF_IT}", lambda now: replace(now, device=larger)
        if self.request.guidance == "batch" and self.passes > 1:
            yield "--guidance sequential", lambda now: replace(now, request=replace(now.request, guidance="sequential"))
        if not self.request.chunk_tokens and self.request.sound is None:
            chunked = {"chunk_tokens": CHUNK_TOKENS}
            yield f"--chunk-tokens {CHUNK_TOKENS}", lambda now: replace(now, request=replace(now.request, **chunked))
        if not self.offloads:
            yield "--offload", lambda now: replace(now, offload=True)
        if (count := self.device.count) > 1 and self.axes["fsdp"] < count:
            yield f"--mesh fsdp={count}", lambda now: replace(now, axes=_axes({"fsdp": count}))
        if not self.request.tiled:
            yield "--tiled", lambda now: replace(now, request=replace(now.request, tiled=True))
        if not self.quantize:
            yield "--quantize int8", lambda now: replace(now, quantize="int8")
        if not self.stream and self.device.platform != "cpu":  # there the host's memory is the device's
            yield "--stream-weights", lambda now: replace(now, stream=True)

    def _dear(self) -> Iterator[tuple[str, Plan]]:
        """More devices, or a smaller clip."""
        for power in range(1, 7):
            count = self.device.count * 2**power
            plan = replace(self, device=replace(self.device, count=count), axes=_axes({"fsdp": count}))
            if plan.fits and self.device.platform != "cpu":
                yield f"or --mesh fsdp={count} on {plan.device}", plan
                break
        area = self.request.width * self.request.height
        for width, height in sorted(self.spec.sizes, key=lambda size: -size[0] * size[1]):
            landscape = (width >= height) == (self.request.width >= self.request.height)
            plan = replace(self, request=replace(self.request, width=width, height=height, size=(width, height)))
            if width * height < area and landscape:
                yield f"or --size {width}x{height}", plan


def _axes(axes: Mapping[str, int]) -> dict[str, int]:
    return {name: 1 for name in MESH_AXES} | dict(axes)


def make_plan(
    spec: ModelSpec,
    request: Request,
    device: Device,
    *,
    dtype: str = "bfloat16",
    axes: Mapping[str, int] | None = None,
    offload: bool | None = None,
    quantize: str | None = None,
    stream: bool = False,
) -> Plan:
    """What ``request`` needs on ``device``.

    Args:
        quantize, stream: see `wan_jax.load`.
        axes: sizes of the mesh over all of ``device``; default everything on ``fsdp``.
        offload: hold one network at a time; None decides as `wan_jax.load` does.
    Raises:
        InputError: the mesh does not fit the devices.
    """
    if dtype not in DTYPES:
        raise InputError(f"dtype={dtype}: use {' or '.join(DTYPES)}")
    check_quantize(quantize)
    mesh = make_mesh(axes, [object()] * device.count)
    return Plan(spec, request, device, dtype, dict(mesh.shape), offload, quantize, stream)


def summary(
    spec: ModelSpec,
    request: Request,
    mesh: jax.sharding.Mesh | None,
    dtype: str = "bfloat16",
    offload: bool | None = None,
    quantize: str | None = None,
    stream: bool = False,
) -> str:
    """One line on what this request takes here, before anything is loaded."""
    devices = jax.devices()[:1] if mesh is None else list(mesh.devices.flat)
    axes = mesh and dict(mesh.shape)
    device, how = this_device(devices), {"dtype": dtype, "quantize": quantize, "stream": stream}
    return describe(make_plan(spec, request, device, axes=axes, offload=offload, **how))


def describe(plan: Plan) -> str:
    """A plan in one line."""
    request, device = plan.request, plan.device
    tokens = " + ".join(f"{count:,}" for count in plan.tokens.values() if count)
    work = sum(stage.work for stage in plan.stages)
    parts = [
        f"{plan.spec.name} {request.width}x{request.height}, {request.num_frames} frames: {tokens} tokens",
        f"{request.num_steps} steps, {plan.forwards} passes, {work / 1e15:,.3g} PFLOP",
    ]
    if seconds := plan.seconds():
        parts.append(f"at least {seconds:,.0f} s on {device}")
    peak = f"peak memory about {plan.peak / 1e9:,.1f} GB"
    if device.usable:
        peak += f" of {device.usable / 1e9:,.1f} GB" + " per device" * (device.count > 1)
    parts.append(peak)
    if plan.fits is False:
        cheap = [option for option, _ in plan.changes()]
        parts.append("does not fit" + (f": {', '.join(cheap)}" if cheap else ""))
    return "; ".join(parts)
