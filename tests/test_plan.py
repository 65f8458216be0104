"""The plan: operations beside published figures and beside the programs themselves, memory beside the compilers'."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from wan_jax import aot
from wan_jax.cli import main
from wan_jax.config import MODELS, NANO, DiTConfig, UMT5Config, VAEConfig
from wan_jax.errors import InputError, WanError
from wan_jax.model import build
from wan_jax.models.umt5 import UMT5
from wan_jax.parallel import make_mesh
from wan_jax.plan import MEMORY_VARIABLE, Device, codec_bytes, find_device, make_plan, summary, this_device
from wan_jax.references import ResolvedReference
from wan_jax.request import resolve
from wan_jax.sound import reference_times
from wan_jax.work import dit_work, text_work, vae_decode, vae_encode

SIZE_480P, SIZE_720P = (832, 480), (1280, 720)


@pytest.fixture(autouse=True)
def _default_share(monkeypatch):
    monkeypatch.delenv(MEMORY_VARIABLE, raising=False)


def ask_for(name, size=None, frames=None, references=1, **options):
    spec = NANO if name == NANO.name else MODELS[name]
    picture = np.zeros((*(size or spec.sizes[0])[::-1], 3), np.uint8)
    if spec.task in ("i2v", "flf2v"):
        options["image"] = picture
    if spec.task == "flf2v":
        options["last_image"] = picture
    if spec.takes_references:
        voice = np.zeros(16_000, np.float32)
        options |= {"references": [ResolvedReference(picture, voice, voice)] * references, "consent": "none is shown"}
    return spec, resolve(spec, "a plan", size=size, num_frames=frames, **options)


def plan_for(name, device, size=None, frames=None, axes=None, offload=None, dtype="bfloat16", **options):
    spec, request = ask_for(name, size, frames, **options)
    return make_plan(spec, request, find_device(device), dtype=dtype, axes=axes, offload=offload)


# ---- operations --------------------------------------------------------------------------------------------

# TFLOP of one forward: linear, self-attention, cross-attention, all. From an independent closed formula, which gives
# every token of the 5B model a timestep of its own; here there are one or two timesteps (0.7 % less).
FORWARD = [
    ("wan2.1-t2v-1.3b", SIZE_480P, 81, 32_760, (82.1, 197.8, 3.1, 283.0)),
    ("wan2.1-t2v-14b", SIZE_480P, 81, 32_760, (785, 879, 14, 1678)),
    ("wan2.2-t2v-a14b", SIZE_720P, 81, 75_600, (1810, 4682, 32, 6523)),
    ("wan2.2-ti2v-5b", (1280, 704), 121, 27_280, (241, 274, 5, 521)),
    ("wan2.1-t2v-14b", SIZE_720P, 161, 147_600, (3531, 17_847, 62, 21_440)),
    ("wan2.1-t2v-14b", SIZE_720P, 241, 219_600, (5253, 39_505, 92, 44_850)),
    ("wan2.1-t2v-14b", (1920, 1088), 81, 171_360, (4099, 24_055, 72, 28_226)),
]


@pytest.mark.parametrize(("name", "size", "frames", "tokens", "tera"), FORWARD)
def test_operations_of_a_forward(name, size, frames, tokens, tera):
    plan = plan_for(name, "h200", size, frames)
    assert plan.tokens == {"video": tokens}
    assert plan.forward.total / 1e12 == pytest.approx(tera[3], rel=0.01)
    for ours, theirs in zip(plan.forward, tera[:3], strict=True):
        assert ours / 1e12 == pytest.approx(theirs, rel=0.02, abs=0.5)


@pytest.mark.parametrize(
    ("name", "height", "width", "frames", "encode", "decode"),
    [
        ("wan2.1-t2v-1.3b", 480, 832, 81, 164, 275),
        ("wan2.1-t2v-1.3b", 720, 1280, 81, 382, 639),
        ("wan2.1-t2v-1.3b", 720, 1280, 161, 757, 1268),
        ("wan2.1-t2v-1.3b", 1088, 1920, 81, 884, 1468),
        ("wan2.2-ti2v-5b", 704, 1280, 81, 257, 1348),
        ("wan2.2-ti2v-5b", 704, 1280, 121, 383, 2011),
    ],
)
def test_operations_of_the_video_autoencoder(name, height, width, frames, encode, decode):
    cfg = MODELS[name].vae
    assert vae_encode(cfg, height, width, frames).work / 1e12 == pytest.approx(encode, rel=0.005)
    assert vae_decode(cfg, height, width, frames).work / 1e12 == pytest.approx(decode, rel=0.005)


def counted(function, *args) -> float:
    """Operations of the matrix products and convolutions in a program."""

    def walk(jaxpr) -> float:
        total = 0.0
        for equation in jaxpr.eqns:
            out = math.prod(equation.outvars[0].aval.shape)
            if equation.primitive.name == "dot_general":
                (contracted, _), _ = equation.params["dimension_numbers"]
                total += 2 * out * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            elif equation.primitive.name == "conv_general_dilated":
                kernel = equation.invars[1].aval.shape
                channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
                total += 2 * out * math.prod(kernel) / channels
            inner = [walk(sub) for sub in jaxprs_in_params(equation.params)]
            if equation.primitive.name == "cond":  # one branch runs
                total += max(inner)
            else:
                total += sum(inner) * equation.params.get("length", 1)
        return total

    return walk(jax.make_jaxpr(function)(*args).jaxpr)


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


@pytest.mark.parametrize("image", [0, 7])
def test_operations_of_the_program_of_a_dit(image):
    cfg = DiTConfig(dim=96, ffn_dim=160, num_heads=4, num_layers=3, text_dim=40, text_len=24, image_tokens=image)
    spec = dataclasses.replace(MODELS["wan2.1-t2v-1.3b"], dit=cfg)
    args = build("dit", spec, jnp.float32), shape(1, 3, 8, 6, 16), shape(1), shape(1, 24, 40)
    images = {"image_BIC": shape(1, image, cfg.image_dim)} if image else {}
    program = counted(lambda dit, *x: dit(*x[:3], **dict(zip(images, x[3:], strict=True))), *args, *images.values())
    assert dit_work(cfg, 3 * 4 * 3).total == pytest.approx(program, rel=1e-6)


@pytest.mark.parametrize("name", [NANO.name, "dreamid-omni", "wan2.6-r2av-11b"])
def test_operations_of_the_program_of_twin_streams(name):
    spec, request = ask_for(name, references=2, guidance="sequential")
    plan = make_plan(spec, request, find_device("h200"))
    network, condition, state = aot.step(spec, request)[1][:3]
    one = jax.tree.map(lambda x: shape(1, *x.shape[1:]), condition.passes.text)
    seen = {
        stream: shape(1, x.shape[1] + condition.references[stream].shape[1], *x.shape[2:])
        for stream, x in state.sample.items()
    }
    named = {"identity_BRIC": condition.identity_BRIC, "voice_BRTF": condition.voice_BRTF}
    named = {key: x for key, x in named.items() if x is not None}

    def forward(network, seen, time, text, named):
        times = reference_times(
            state.sample["video"].shape[1], state.sample["audio"].shape[1], request.sound.references, spec.sound
        )
        return network(seen, time, text, times=times, **named)

    program = counted(forward, network, seen, shape(1), one, named)
    # Attention in chunks of queries pads the last chunk; the adapters' resamplers are not counted, and the small
    # model is so small that they show.
    assert plan.forward.total == pytest.approx(program, rel=0.08 if name == NANO.name else 0.005)
    assert plan.tokens["audio"] == seen["audio"].shape[1]


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_operations_of_the_program_of_an_autoencoder(version):
    cfg = VAEConfig(
        version=version, dim=8, dec_dim=16, z_dim=4, dim_mult=(1, 2, 2), num_res_blocks=1,
        temporal_downsample=(False, True), latents_mean=(0.0,) * 4, latents_std=(1.0,) * 4,
    )  # fmt: skip
    vae = build("vae", dataclasses.replace(MODELS["wan2.1-t2v-1.3b"], vae=cfg), None)
    height, width, frames, stride = 32, 48, 5, cfg.spatial_stride
    latents = shape(1, 3, height // stride, width // stride, 4)
    decoded = counted(lambda vae, z: vae.decode(z), vae, latents)
    assert vae_decode(cfg, height, width, frames).work == pytest.approx(decoded, rel=1e-6)
    encoded = counted(lambda vae, x: vae.encode(x), vae, shape(1, frames, height, width, 3))
    assert vae_encode(cfg, height, width, frames).work == pytest.approx(encoded, rel=1e-6)


def test_operations_of_the_program_of_the_text_encoder():
    cfg = UMT5Config(vocab_size=50, dim=64, dim_attn=32, dim_ffn=96, num_heads=4, num_layers=3)
    encoder = build("text_encoder", dataclasses.replace(NANO, text=cfg), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, 20), jnp.int32)
    assert isinstance(encoder, UMT5)
    assert text_work(cfg, 20).total == pytest.approx(counted(lambda e, i, m: e(i, m), encoder, ids, ids), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "passes"),
    [
        ("wan2.1-t2v-1.3b", {}, 2),
        ("wan2.1-t2v-1.3b", {"guidance_scale": 1.0}, 1),
        ("ovi-5s", {}, 2),
        ("ovi-5s", {"video": False}, 2),
        ("dreamid-omni", {}, 4),
        ("dreamid-omni", {"voice_guidance": 0.0, "guidance_scale": 1.0}, 3),
    ],
)
def test_passes_of_a_step(name, options, passes):
    spec, request = ask_for(name, **options)
    assert make_plan(spec, request, find_device("h200")).passes == passes
    if request.sound:
        condition = aot.step(spec, request)[1][1]
        assert len(condition.passes.skip_G) == passes


# ---- memory ------------------------------------------------------------------------------------------------

# Compiler estimates of arguments and temporaries of one step, GB (jax 0.10.2; CUDA 13 plugin, libtpu 0.0.42.1). The
# prompt has been read by then, and the weights that this took are not among the arguments.
STEPS = [
    ("wan2.2-t2v-a14b", SIZE_720P, 81, "sequential", "h200", None, 32.20),
    ("wan2.2-t2v-a14b", SIZE_720P, 81, "batch", "h200", None, 37.72),
    ("wan2.2-t2v-a14b", SIZE_480P, 81, "sequential", "h200", None, 28.72),
    ("wan2.1-t2v-1.3b", SIZE_480P, 81, "batch", "h200", None, 5.04),
    ("wan2.1-t2v-1.3b", SIZE_480P, 81, "sequential", "h200", None, 4.05),
    ("wan2.1-i2v-14b-480p", SIZE_480P, 81, "batch", "h200", None, 31.14),
    ("wan2.2-ti2v-5b", (1280, 704), 121, "sequential", "h200", None, 11.37),
    ("dreamid-omni", (1280, 704), 121, "sequential", "h200", None, 26.70),
    ("dreamid-omni", (1280, 704), 121, "batch", "h200", None, 30.58),
    ("wan2.6-r2av-11b", (1280, 704), 121, "sequential", "h200", None, 29.0),
    ("wan2.1-flf2v-14b-720p", SIZE_720P, 81, "batch", "h200", None, 38.59),
    ("wan2.2-t2v-a14b", SIZE_720P, 81, "batch", "h200x8", {"fsdp": 8}, 7.37),
    ("wan2.2-t2v-a14b", SIZE_720P, 81, "batch", "h200x8", {"data": 2, "seq": 4}, 27.28),
]


def one_step(plan) -> float:
    stage = next(stage for stage in plan.stages if stage.name == "denoise")
    return (stage.weights["dit"] - plan._reader + stage.activations) / 1e9


# The same on chunks of at most 4096 tokens, on an RTX 4090.
CHUNKED = [
    (SIZE_720P, "fp8", 17.79), (SIZE_480P, "fp8", 15.94), (SIZE_720P, "int8", 17.96), (SIZE_480P, "int8", 16.11),
    (SIZE_720P, None, 30.02), (SIZE_480P, None, 28.17),
]  # fmt: skip


@pytest.mark.parametrize(("size", "quantize", "gb"), CHUNKED)
def test_memory_of_a_step_in_chunks(size, quantize, gb):
    plan = plan_for("wan2.1-t2v-14b", "rtx4090", size, 81, guidance="sequential", chunk_tokens=4096)
    assert one_step(dataclasses.replace(plan, quantize=quantize)) == pytest.approx(gb, rel=0.03)


@pytest.mark.parametrize(("name", "size", "frames", "guidance", "device", "axes", "gb"), STEPS)
def test_memory_of_a_step(name, size, frames, guidance, device, axes, gb):
    plan = plan_for(name, device, size, frames, axes, guidance=guidance)
    assert one_step(plan) == pytest.approx(gb, rel=0.15 if axes else 0.03)


@pytest.mark.parametrize(
    ("name", "height", "width", "frames", "half", "gb"),
    [
        ("wan2.1-t2v-1.3b", 480, 832, 81, vae_decode, 7.01),
        ("wan2.1-t2v-1.3b", 720, 1280, 81, vae_decode, 15.97),
        ("wan2.2-ti2v-5b", 704, 1280, 121, vae_decode, 16.36),
        ("wan2.1-t2v-1.3b", 480, 832, 81, vae_encode, 5.62),
    ],
)
def test_memory_of_the_video_autoencoder(name, height, width, frames, half, gb):
    walk = half(MODELS[name].vae, height, width, frames)
    assert codec_bytes(walk, frames) / 1e9 == pytest.approx(gb, rel=0.12)


def test_tiles_save_memory():
    whole = plan_for("wan2.1-t2v-14b", "h200", SIZE_720P).stages[-1]
    tiled = plan_for("wan2.1-t2v-14b", "h200", SIZE_720P, tiled=True).stages[-1]
    assert (whole.name, tiled.name) == ("decode", "decode")
    assert tiled.activations / 1e9 == pytest.approx(2.17 + 0.22, rel=0.15) and whole.activations > 17e9


def test_offloading_holds_one_network():
    plan = plan_for("wan2.2-t2v-a14b", "h200", SIZE_720P)
    together, alone = plan.memory(offload=False), plan.memory(offload=True)
    weights = {part: size for stage in plan.stages for part, size in stage.weights.items()}
    assert set(weights) == {"text_encoder", "dit", "dit_low", "vae"}
    assert weights["dit"] == weights["dit_low"] == pytest.approx(28.95e9, rel=0.001)  # bfloat16 but the time embedding
    assert together["denoise"] - alone["denoise"] == weights["text_encoder"] + weights["dit_low"] + plan._reader
    assert plan._reader == pytest.approx(4.29e9, rel=0.01)  # keys and values of the text: a seventh
    assert together["decode"] - alone["decode"] == sum(weights.values()) - weights["vae"]


def test_the_compiler_of_this_machine_counts_the_same_arguments():
    dit = DiTConfig(dim=192, ffn_dim=384, num_heads=2, num_layers=8, text_dim=64, text_len=32)
    spec = dataclasses.replace(MODELS["wan2.1-t2v-1.3b"], dit=dit)
    request = resolve(spec, "a plan", size=(64, 64), num_frames=5, guidance="sequential")
    memory = aot.memory_here(find_device("cpu"), spec, request, None, "float32")
    plan = make_plan(spec, request, find_device("cpu"), dtype="float32")
    (weights,) = (stage.weights["dit"] - plan._reader for stage in plan.stages if stage.name == "denoise")
    assert 0 < memory.arguments - weights < 0.1 * weights and 0 < memory.temporaries


@pytest.mark.skipif(not importlib.util.find_spec("jax_cuda13_plugin"), reason="needs jax[cuda13], no GPU")
def test_the_cuda_compiler_agrees():
    plan = plan_for("wan2.1-t2v-1.3b", "h200", SIZE_480P, guidance="sequential")
    memory = aot.ask(plan.device, plan.spec, plan.request)
    assert one_step(plan) == pytest.approx(memory.peak / 1e9, rel=0.15)


def test_a_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)
    with pytest.raises(InputError, match=r"pip install libtpu"):
        aot.environment(find_device("v6e-8"))
    with pytest.raises(InputError, match=r"pip install .jax\[cuda13\]"):
        aot.environment(find_device("h200"))
    with pytest.raises(InputError, match="no description"):
        aot.environment(find_device("a100"))


def die(*_):
    os._exit(1)


def test_a_compiler_that_dies_is_an_error(monkeypatch):
    monkeypatch.setattr(aot, "memory_here", die)
    before = dict(os.environ)
    with pytest.raises(WanError, match="the compiler for cpu failed"):
        aot.ask(find_device("cpu"), *ask_for(NANO.name))
    assert dict(os.environ) == before


# ---- devices and what to change ----------------------------------------------------------------------------


def test_devices():
    assert find_device("v6e-8").count == 8 and str(find_device("v6e-8")) == "v6e-8"
    assert find_device("v5p-8").count == 4 and str(find_device("v5p-8")) == "v5p-8"  # cores, two to a device
    assert find_device("tpu7x-8") == find_device("v7x-8") and find_device("v7x-8").count == 8
    assert find_device("H100x8").count == 8 and find_device("rtx4090").count == 1
    assert find_device("rtx4090x2").count == 2 and find_device("cpu").count == 1
    for wrong in ("h1000", "v5p-3", "v6e-0", "", "rtx", "h100x"):
        with pytest.raises(InputError):
            find_device(wrong)
    with pytest.raises(InputError, match="did you mean h100"):
        find_device("h101")


def test_this_device():
    assert this_device(jax.devices()).name == "cpu" and this_device(jax.devices()).count == len(jax.devices())

    class Unknown:
        device_kind, platform = "Some GPU", "gpu"

        def memory_stats(self):
            return {"bytes_limit": 10**10}

    device = this_device([Unknown()])
    assert (device.name, device.memory, device.bf16) == ("Some GPU", 10.0, 0)

    class Card(Unknown):
        device_kind = "NVIDIA H200"

    assert this_device([Card()] * 2) == find_device("h200x2")


def test_least_time_is_operations_over_the_rate():
    plan = plan_for("wan2.2-t2v-a14b", "h200", SIZE_720P)
    denoise = next(stage for stage in plan.stages if stage.name == "denoise")
    assert denoise.seconds == pytest.approx((528, 661), rel=0.002)
    many = plan_for("wan2.2-t2v-a14b", "v6e-8", SIZE_720P)
    assert next(stage for stage in many.stages if stage.name == "denoise").seconds == (
        pytest.approx(71.1, rel=0.002), None
    )  # fmt: skip
    assert plan_for("wan2.2-t2v-a14b", "cpu", SIZE_720P).seconds() is None


def test_what_to_change_comes_in_order_of_cost():
    plan = plan_for("wan2.1-t2v-14b", "rtx4090", SIZE_720P)
    assert plan.fits is False and plan.offloads
    changes = plan.changes()
    assert [option for option, _ in changes] == [
        f"{MEMORY_VARIABLE}=0.95", "--guidance sequential", "--chunk-tokens 4096", "--quantize int8"
    ]  # fmt: skip
    peaks = [then.peak / 1e9 for _, then in changes]
    assert peaks[0] == plan.peak / 1e9 and peaks[1] == pytest.approx(31.8, rel=0.01)
    assert [then.fits for _, then in changes] == [False] * 3 + [True]

    long = plan_for("wan2.1-t2v-14b", "rtx4090", (1920, 1088), 241).changes()
    assert [option for option, _ in long][4:] == [
        "--tiled", "--stream-weights", "or --mesh fsdp=4 on rtx4090x4", "or --size 1280x720", "or --size 832x480"
    ]  # fmt: skip
    assert [then.fits for _, then in long] == [False] * 6 + [True] * 3

    one = plan_for("dreamid-omni", "l40s", offload=False)
    assert not one.fits
    (*_, (option, then)) = one.changes()
    assert option == "--offload" and then.fits
    assert not plan_for("wan2.1-t2v-1.3b", "h200").changes()


def test_replicated_weights_are_cut_first():
    plan = plan_for("wan2.1-t2v-14b", "rtx4090x8", SIZE_720P, axes={"data": 2, "seq": 4}, offload=True)
    options = [option for option, _ in plan.changes()]
    assert options[-1] == "--mesh fsdp=8" and plan.changes()[-1][1].fits


def test_unknown_memory_neither_fits_nor_not():
    spec, request = ask_for("wan2.1-t2v-1.3b")
    plan = make_plan(spec, request, Device("Some GPU", "gpu", 0, 0, 0))
    assert plan.fits is None and not plan.changes() and plan.seconds() is None


def test_a_mesh_must_fit_the_devices():
    with pytest.raises(InputError, match="needs 3 devices, found 8"):
        plan_for("wan2.1-t2v-1.3b", "v6e-8", axes={"fsdp": 3})
    with pytest.raises(InputError, match="bfloat16"):
        plan_for("wan2.1-t2v-1.3b", "h200", dtype="float16")


# ---- the command -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_a_plan(name, capsys):
    assert main(["plan", "--model", name, "--device", "h200", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["fits"] and said["peak_bytes"] > 0
    assert said["clip_flop"] > said["num_steps"] * said["step_flop"]
    stages = [stage["name"] for stage in said["stages"]]
    pictures = MODELS[name].task in ("i2v", "flf2v", "r2av")
    assert stages == ["text encoder", *["conditions"] * pictures, "denoise", "decode"]


def test_the_plan_in_words(capsys):
    command = "plan --model wan2.1-t2v-14b --size 1280x720 --num-frames 81 --num-steps 40 --device rtx4090"
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    for part in ("75,600 video", "1,809.7", "does not fit", "--guidance sequential: 31.8 GB", "--quantize int8: "):
        assert part in said
    assert main([*command.split(), "--num-frames", "80"]) == 2
    assert "need 4n+1, try 81" in capsys.readouterr().err
    assert main([*command.split(), "--num-references", "1"]) == 2
    assert "takes no" in capsys.readouterr().err
    assert main([*command.split(), "--device", "h1000"]) == 2
    assert "did you mean h100" in capsys.readouterr().err


def test_references_count(capsys):
    peaks = []
    for count in ("1", "3"):
        command = f"plan --model dreamid-omni --device h200 --num-references {count} --json"
        assert main(command.split()) == 0
        peaks.append(json.loads(capsys.readouterr().out)["tokens"])
    assert peaks == [{"video": 28_160, "audio": 188}, {"video": 29_920, "audio": 250}]


def test_summary_is_one_cheap_line():
    spec, request = ask_for("wan2.2-t2v-a14b", SIZE_720P)
    begin = time.process_time()
    line = summary(spec, request, make_mesh({"fsdp": 8}))
    assert time.process_time() - begin < 3
    assert "75,600 tokens" in line and "523 PFLOP" in line and "\n" not in line and "per device" in line
    assert "per device" not in summary(*ask_for(NANO.name), None)
