"""What the compiler of a device that need not be here says of one step of sampling: the memory that it takes.

Compilers come as packages: libtpu for TPUs, the CUDA plugin of JAX for NVIDIA, and XLA:CPU always. None of them needs
its device. The figures are the compiler's own buffer assignment, never a measurement: call them compiler estimates.

    memory = ask(find_device("h200"), spec, request)
"""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.conditions import Condition, pin_first_frame
from wan_jax.config import ModelSpec
from wan_jax.errors import InputError, WanError
from wan_jax.model import DTYPES, build
from wan_jax.models.dit import Context
from wan_jax.models.identity import voice_features
from wan_jax.parallel import activation_spec, compiler_options, make_mesh, param_sharding, replicated, use_mesh
from wan_jax.pipeline import latent_shape, make_velocity, settle
from wan_jax.plan import Device
from wan_jax.request import Request
from wan_jax.sampling.guidance import expert_steps
from wan_jax.sampling.sampler import make_steps, run_segment
from wan_jax.sampling.solvers import State
from wan_jax.sound import SoundCondition, guidance_passes, num_voice_latents

# What the CUDA compiler is told of a card, by its number of cores, and so on (GpuTargetConfigProto).
CARDS = {
    "h200": dict(
        core_count=132, threads_per_core_limit=2048, shared_memory_per_core=233472,
        shared_memory_per_block_optin=232448, memory_bandwidth=4_800_000_000_000, l2_cache_size=52_428_800,
        clock_rate_ghz=1.98, device_memory_size=150_000_000_000, capability=(9, 0), description="NVIDIA H200",
    ),
    "rtx4090": dict(
        core_count=128, threads_per_core_limit=1536, shared_memory_per_core=102400,
        shared_memory_per_block_optin=101376, memory_bandwidth=1_008_000_000_000, l2_cache_size=75_497_472,
        clock_rate_ghz=2.52, device_memory_size=25_282_281_472, capability=(8, 9),
        description="NVIDIA GeForce RTX 4090",
    ),
}  # fmt: skip
# Shapes of the slices that the TPU compiler knows, by number of chips.
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8"}
CUBES = {1: "1x1x1", 4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4"}
SLICES = {"v5e": ("v5e", FLAT, 1), "v6e": ("v6e", FLAT, 1), "v5p": ("v5p", CUBES, 1), "v7x": ("tpu7x", CUBES, 2)}


class Memory(NamedTuple):
    """Compiler estimate of one step on one device, bytes; and the seconds that compiling took."""

    arguments: int
    temporaries: int
    seconds: float

    @property
    def peak(self) -> int:
        """Results take the place of the arguments, which are donated."""
        return self.arguments + self.temporaries


def step(
    spec: ModelSpec,
    request: Request,
    dtype: Any = jnp.bfloat16,
    quantize: str | None = None,
    *,
    settled: bool = True,
) -> tuple[Any, Any]:
    """One step of sampling as `pipeline.denoise` runs it, and its arguments by shape: network, condition, state, steps,
    known latents.

    Args:
        settled: the first two are as `pipeline.settle` leaves them.
    """
    latents = jax.tree.map(_array, latent_shape(spec, request), is_leaf=lambda x: isinstance(x, tuple))
    condition = (_condition if request.sound is None else _sound_condition)(spec, request, latents)
    schedule = request.schedule()
    high = expert_steps(schedule.timesteps, spec.boundary)
    velocity, guidance = make_velocity(spec, request, condition, schedule.timesteps, high)
    steps = make_steps(request.solver, schedule, guidance).part(0, 1)

    def run(network: Any, condition: Any, state: Any, steps: Any, pin: Any) -> Any:
        return run_segment(velocity, (network, condition), state, steps, pin)

    network = build("dit", spec, dtype, quantize)
    if settled and isinstance(condition, Condition):
        network, condition = jax.eval_shape(settle, network, condition)
    return run, (network, condition, State(*[latents] * 4), steps, condition.pin)


def _array(shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _pin(spec: ModelSpec, request: Request, latents: jax.ShapeDtypeStruct) -> tuple[Any, Any]:
    """Known first latents and the tokens that they are, of a model that may begin with a picture."""
    if request.image is None or request.task not in ("ti2v", "ti2av"):
        return None, None
    first = _array((1, 1, *latents.shape[2:]))
    return jax.eval_shape(lambda first: pin_first_frame(first, latents.shape, spec.dit.patch_size), first)


def _condition(spec: ModelSpec, request: Request, latents: jax.ShapeDtypeStruct) -> Condition:
    cfg = spec.dit
    pin, token_time = _pin(spec, request, latents)
    return Condition(
        _array((1 if request.guidance == "none" else 2, cfg.text_len, cfg.text_dim)),
        video_BTHWC=_array((*latents.shape[:4], extra)) if (extra := cfg.in_dim - latents.shape[4]) else None,
        image_BIC=_array((1, cfg.image_tokens, cfg.image_dim)) if cfg.image_tokens else None,
        token_time=token_time,
        pin=pin,
    )


def _sound_condition(spec: ModelSpec, request: Request, latents: dict[str, Any]) -> SoundCondition:
    cfg, sound, references = spec.dit, request.sound, request.sound.references
    scale = {"video": request.guidance_scale, "audio": sound.audio_guidance_scale}
    rows = {stream: np.zeros((2, 0)) for stream in latents}
    passes, weights = guidance_passes(
        rows, scale, image=sound.image_guidance, voice=sound.voice_guidance, sync=sound.sync_guidance,
        skip=spec.sound.skip_layer,
    )  # fmt: skip
    text = _array((len(passes.skip_G), cfg.text_len, cfg.text_dim))
    condition = SoundCondition(passes._replace(text=dict.fromkeys(latents, text)), weights)
    pin, token_time = _pin(spec, request, latents["video"]) if sound.video else (None, None)
    if pin is not None:
        condition = condition._replace(pin={"video": pin}, token_time=token_time)
    if references:
        behind = {"video": _array((1, len(references), *latents["video"].shape[2:]))}
        if lengths := [num_voice_latents(len(r.voice_second), spec.sound) for r in references if r.voice is not None]:
            behind["audio"] = _array((1, sum(lengths), cfg.audio_dim))
        condition = condition._replace(references=behind)
        if cfg.identity:
            shape = 1, len(references), spec.clip.num_tokens, cfg.identity.feature_dim
            condition = condition._replace(identity_BRIC=_array(shape))
        if cfg.voice:
            waves = _array((1, len(references), round(cfg.voice.seconds * cfg.voice.mel.sample_rate)))
            heard = jax.eval_shape(lambda waves: voice_features(waves, cfg.voice.mel), waves)
            condition = condition._replace(voice_BRTF=heard)
    return condition


def compile_here(
    device: Device,
    spec: ModelSpec,
    request: Request,
    axes: Mapping[str, int] | None,
    dtype: str,
    quantize: str | None = None,
) -> jax.stages.Compiled:
    """The program of one step, compiled in this process, whose environment must be that of `environment`."""
    run, arguments = step(spec, request, DTYPES[dtype], quantize)
    options, platforms = compiler_options(device.platform), None
    if device.platform == "cpu":
        devices = jax.devices()
    else:
        devices = _topology(device)
        platforms = (device.platform,) if device.platform == "cuda" else None
    mesh = make_mesh(axes, devices[: device.count])  # of one device too: it says what the program is for
    whole = replicated(mesh)

    def place(x: Any, sharding: Any = whole) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    network, *rest = arguments
    placed = {path: place(x, param_sharding("dit", path, x.shape, mesh)) for path, x in flatten_params(network).items()}
    condition, *rest = jax.tree.map(place, rest)
    with use_mesh(mesh):
        if isinstance(getattr(condition, "text", None), Context):  # it lies as the program leaves it that has read it
            context = jax.tree.map(lambda x: place(x, _shared(x, mesh)), condition.text)
            condition = condition._replace(text=context)
        traced = jax.jit(run, donate_argnums=2).trace(unflatten_like(network, placed), condition, *rest)
        return traced.lower(lowering_platforms=platforms).compile(options)


def _shared(x: Any, mesh: jax.sharding.Mesh) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, activation_spec(x.shape, "B", None, None, "N", None))


def memory_here(*program: Any) -> Memory:
    """Of the program that `compile_here` makes of these arguments."""
    begin = time.perf_counter()
    memory = compile_here(*program).memory_analysis()
    return Memory(memory.argument_size_in_bytes, memory.temp_size_in_bytes, time.perf_counter() - begin)


def _topology(device: Device) -> list[Any]:
    """Devices that the compiler knows by their description."""
    from jax.experimental import topologies

    if device.platform == "tpu":
        name, shapes, per_chip = SLICES[device.name]
        chips = device.count // per_chip
        if chips not in shapes:
            raise InputError(f"{device}: the compiler knows slices of {', '.join(map(str, shapes))} chips")
        alone = {"chips_per_host_bounds": (1, 1, 1)} if chips == 1 else {}
        return topologies.get_topology_desc(f"{name}:{shapes[chips]}", platform="tpu", **alone).devices
    grid = f"1x1x{device.count}"
    return topologies.get_topology_desc(
        platform="cuda", topology_name=grid, topology=grid, target_config=_card(**CARDS[device.name])
    ).devices


def _card(*, capability: tuple[int, int], description: str, **values: Any) -> str:
    """GpuTargetConfigProto as text."""
    limits = " ".join(f"{name}: {value}" for name, value in values.items())
    return f"""
    gpu_device_info {{
      {limits} threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 fpus_per_core: 128
      block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
      registers_per_core_limit: 65536 registers_per_block_limit: 65536
      cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
    }}
    platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 13 }}
    device_description_str: "{description}"
    """


def environment(device: Device) -> dict[str, str]:
    """What the process that compiles must find in its environment when it starts.

    Raises:
        InputError: the compiler is not installed, or does not know the device.
    """
    common = {"JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "3"}
    if device.platform == "cpu":
        return common | {"JAX_NUM_CPU_DEVICES": str(device.count)}
    if device.name not in {**CARDS, **SLICES}:
        raise InputError(f"{device.name}: no description for its compiler; there are {', '.join({**CARDS, **SLICES})}")
    if device.platform == "tpu":
        if not (importlib.util.find_spec("libtpu") or os.environ.get("TPU_LIBRARY_PATH")):
            raise InputError('the TPU compiler is not installed: pip install libtpu (or "wan_jax[tpu]")')
        # Nothing of a cloud machine is asked for, and several processes may compile at once.
        return common | {
            "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"
        }  # fmt: skip
    if not importlib.util.find_spec("jax_cuda13_plugin"):
        raise InputError('the CUDA compiler is not installed: pip install "jax[cuda13]" (or "wan_jax[cuda13]")')
    import jaxlib

    libraries = (Path(jaxlib.__file__).parent.parent / "nvidia").glob("**/lib")
    return common | {
        "CUDA_VISIBLE_DEVICES": "-1",
        "LD_LIBRARY_PATH": ":".join(str(path) for path in sorted(libraries)),
        "XLA_FLAGS": "--xla_gpu_enable_triton_gemm=false",  # else every product is an untuned Triton one
    }


def ask(
    device: Device,
    spec: ModelSpec,
    request: Request,
    axes: Mapping[str, int] | None = None,
    dtype: str = "bfloat16",
    quantize: str | None = None,
) -> Memory:
    """Compiler estimate of one step of sampling, from a process of its own.

    Args:
        axes: of the mesh over ``device.count`` devices; default all on ``fsdp``.
        dtype: of the matrices, "bfloat16" or "float32".
        quantize: see `wan_jax.load`.
    Raises:
        InputError: the compiler is not installed. WanError: it failed.
    """
    return elsewhere(memory_here, device, spec, request, axes, dtype, quantize)


def elsewhere(function: Callable[..., Any], device: Device, *args: Any) -> Any:
    """``function(device, *args)`` in a process of its own, which has the environment of the compiler for ``device``.

    Raises:
        InputError: the compiler is not installed. WanError: it failed.
    """
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    with _variables(environment(device)), ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, device, *args).result()
        except (BrokenProcessPool, jax.errors.JaxRuntimeError) as error:
            raise WanError(f"the compiler for {device} failed: {str(error).splitlines()[0]}") from error


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Environment for the processes started inside."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
