"""The DiT, the solvers, exported checkpoints and whole pipelines against diffusers and transformers."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from tests.parity.common import to_last
from wan_jax.checkpoint import abstract, flatten_params
from wan_jax.conditions import encode_image
from wan_jax.config import MODELS, DiTConfig
from wan_jax.conversion import export_folder
from wan_jax.model import Model, build, load
from wan_jax.models.clip import preprocess
from wan_jax.models.dit import DiT
from wan_jax.parallel import compiler_options
from wan_jax.pipeline import denoise, encode, latent_shape
from wan_jax.request import resolve
from wan_jax.sampling.sampler import make_steps, sample, start
from wan_jax.sampling.schedule import make_schedule
from wan_jax.weights import layouts
from wan_jax.weights.engine import fill
from wan_jax.weights.maps import dit as dit_map

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle

TEXT_LEN = 512  # written into diffusers' attention for models with image tokens
KINDS = ("t2v", "i2v", "flf2v", "i2v-2.2", "ti2v")


@pytest.fixture(autouse=True)
def no_accelerate(monkeypatch):
    """Without the package accelerate, diffusers loads no model that keeps some of its parts in float32."""
    monkeypatch.setattr(diffusers.WanTransformer3DModel, "_keep_in_fp32_modules", None)


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(np.asarray(ours, np.float32) - theirs) / np.linalg.norm(theirs))


def to_torch(x_BTHWC):
    return torch.from_numpy(np.moveaxis(np.asarray(x_BTHWC), -1, 1).copy())


class ExactTimesteps(torch.nn.Module):
    """The sinusoid in float64, as the official code has it; diffusers rounds its angles to float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2))

    def forward(self, timesteps):
        angles = timesteps.double()[:, None] * self.frequencies
        return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


def randomise(model, rng: np.random.Generator) -> None:
    """Every parameter: matrices keep their scale, norms lie around 1, biases and tables around 0."""
    for name, parameter in model.named_parameters():
        values = rng.standard_normal(tuple(parameter.shape), np.float32)
        if name.endswith("weight") and parameter.ndim > 1:
            values /= np.sqrt(values[0].size)
        else:
            values = 0.2 * values + ("norm" in name and name.endswith("weight"))
        parameter.data = torch.from_numpy(values.astype(np.float32))


def diffusers_model(cfg: DiTConfig):
    config = {key: value for key, value in dit_map.config_to_diffusers(cfg).items() if key != "_class_name"}
    return diffusers.WanTransformer3DModel(**config).eval()


def their_dit(cfg: DiTConfig, rng: np.random.Generator):
    model = diffusers_model(cfg)
    assert dit_map.config_from_diffusers(model.config) == cfg
    randomise(model, rng)
    model.condition_embedder.timesteps_proj = ExactTimesteps(cfg.freq_dim)
    return model


def our_dit(model, cfg: DiTConfig, dtype=jnp.float32) -> DiT:
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    shape = abstract(lambda: DiT(cfg, dtype=dtype, rngs=nnx.Rngs(0)))
    return fill(shape, dit_map.rows(cfg), weights, network="dit", layout="diffusers")


def random_config(kind: str, rng: np.random.Generator) -> DiTConfig:
    heads, channels = int(rng.integers(1, 5)), int(rng.integers(2, 9))
    image = {"i2v": 257, "flf2v": 2 * int(rng.integers(3, 20))}.get(kind, 0)
    return DiTConfig(
        dim=heads * 2 * int(rng.integers(4, 20)),
        ffn_dim=int(rng.integers(16, 200)),
        num_heads=heads,
        num_layers=int(rng.integers(1, 4)),
        in_dim=channels + (20 if kind in ("i2v", "flf2v", "i2v-2.2") else 0),
        out_dim=channels,
        text_dim=int(rng.integers(8, 80)),
        text_len=TEXT_LEN,
        freq_dim=2 * int(rng.integers(4, 64)),
        patch_size=[(1, 2, 2), (1, 1, 3), (2, 2, 1)][rng.integers(3)],
        eps=float(10 ** rng.uniform(-6, -3)),
        image_tokens=image,
        image_dim=int(rng.integers(8, 60)) if image else 1280,
        image_positions=kind == "flf2v",
    )


def both_velocities(kind: str, cfg: DiTConfig, rng: np.random.Generator, dtype=jnp.float32):
    """Velocities [2, T, H, W, C] of our network and of theirs for the same random weights and inputs."""
    model = their_dit(cfg, rng)
    grid = rng.integers(1, 5, size=3)
    size = tuple(int(n) for n in grid * cfg.patch_size)
    latents = rng.standard_normal((2, *size, cfg.in_dim), np.float32)
    text = rng.standard_normal((2, TEXT_LEN, cfg.text_dim), np.float32)
    timesteps = rng.integers(0, 1000, size=2).astype(np.float32)
    theirs = dict(hidden_states=to_torch(latents), encoder_hidden_states=torch.from_numpy(text))
    theirs["timestep"] = torch.from_numpy(timesteps)
    ours = {}
    if cfg.in_dim > cfg.out_dim:
        latents, ours["condition_BTHWC"] = latents[..., : cfg.out_dim], latents[..., cfg.out_dim :]
    if cfg.image_tokens:
        tokens = rng.standard_normal((2, cfg.image_tokens, cfg.image_dim), np.float32)
        ours["image_BIC"] = tokens
        pictures = 2 * (1 + cfg.image_positions)  # with positions: first and last picture of each sample
        theirs["encoder_hidden_states_image"] = torch.from_numpy(tokens).reshape(pictures, -1, cfg.image_dim)
    if kind == "ti2v":
        token_time = rng.integers(0, 2, size=(2, int(grid.prod())))
        timesteps = np.stack([timesteps, rng.integers(0, 1000, size=2)], axis=1).astype(np.float32)
        ours["token_time"] = token_time
        theirs["timestep"] = torch.from_numpy(np.take_along_axis(timesteps, token_time, axis=1))
    dit = our_dit(model, cfg, dtype)
    run = jax.jit(lambda dit, *args, **kw: dit(*args, **kw), compiler_options=compiler_options())
    with torch.no_grad():
        expected = model(**theirs).sample.numpy()
    return run(dit, latents, timesteps, text, **ours), to_last(expected)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_dit(kind, seed):
    rng = np.random.default_rng([KINDS.index(kind), seed])
    ours, theirs = both_velocities(kind, random_config(kind, rng), rng)
    assert relative_error(ours, theirs) <= 1e-6


@pytest.mark.parametrize("dim", [128, 512])
def test_dit_bfloat16(dim, record_property):
    cfg = DiTConfig(dim=dim, ffn_dim=2 * dim, num_heads=dim // 64, num_layers=4, text_dim=64, freq_dim=256)
    error = relative_error(*both_velocities("t2v", cfg, np.random.default_rng(dim), jnp.bfloat16))
    record_property("relative_error", error)
    assert error <= 8e-3


def toy_velocity(args, sample, timestep, guidance):
    bias, wave = args
    return 0.7 * sample + 0.5 * jnp.sin(wave * timestep / 1000) + bias


def their_scheduler(solver: str):
    flow = dict(prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2)
    if solver == "unipc":
        return diffusers.UniPCMultistepScheduler(**flow, solver_type="bh2", predict_x0=True)
    if solver == "dpm++":
        return diffusers.DPMSolverMultistepScheduler(**flow, algorithm_type="dpmsolver++")
    return diffusers.FlowMatchEulerDiscreteScheduler()


def give_schedule(scheduler, solver: str, num_steps: int, shift: float) -> None:
    """Put our noise levels and timesteps in the place of theirs."""
    schedule = make_schedule(solver, num_steps, shift)
    scheduler.sigmas = torch.from_numpy(schedule.sigmas.astype(np.float32).astype(np.float64))
    scheduler.timesteps = torch.from_numpy(schedule.timesteps.astype(np.float32))
    scheduler.set_begin_index(0)


@pytest.mark.parametrize(("num_steps", "shift"), [(1, 5.0), (2, 1.0), (3, 5.0), (7, 16.0), (50, 3.0)])
@pytest.mark.parametrize("solver", ["unipc", "dpm++", "euler"])
def test_solver(solver, num_steps, shift):
    rng = np.random.default_rng(num_steps)
    noise, bias = rng.standard_normal((2, 1, 3, 4, 5, 6), np.float32)
    args = jnp.asarray(bias), jnp.float32(3)
    steps = make_steps(solver, make_schedule(solver, num_steps, shift))
    ours = []
    state = start(jnp.asarray(noise))
    sample(toy_velocity, args, state, steps, callback=lambda p: ours.append(np.asarray(p.state.sample)))

    scheduler = their_scheduler(solver)
    scheduler.set_timesteps(num_steps)
    give_schedule(scheduler, solver, num_steps, shift)
    latents = torch.from_numpy(noise)
    for i, t in enumerate(scheduler.timesteps):
        velocity = torch.from_numpy(np.array(toy_velocity(args, latents.numpy(), float(t), None)))
        latents = scheduler.step(velocity, t, latents).prev_sample.float()
        np.testing.assert_allclose(ours[i], latents.numpy(), atol=1e-5, rtol=0, err_msg=f"step {i}")


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """``exported(kind)``: a tiny random model in float32, and the folder of its export for diffusers."""

    @functools.cache
    def export(kind: str) -> tuple[Model, str]:
        model = load(tiny_folder(kind), dtype=jnp.float32, offload=False)
        folder = tmp_path_factory.mktemp(kind) / "diffusers"
        export_folder(model, folder, "diffusers", say=str)
        return model, str(folder)

    return export


def from_pretrained(cls, folder: str, part: str):
    """Load, and insist that every key has its place."""
    model, info = cls.from_pretrained(f"{folder}/{part}", output_loading_info=True)
    assert not {name: keys for name, keys in info.items() if keys}
    return model.eval().float()


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "ti2v", "i2v-moe"])
def test_exported_transformer(kind, exported):
    model, folder = exported(kind)
    assert layouts.locate(folder).spec.dit == model.spec.dit
    for part, name in (("dit", "transformer"), ("dit_low", "transformer_2"))[: model.spec.num_experts]:
        theirs = from_pretrained(diffusers.WanTransformer3DModel, folder, name)
        same = our_dit(theirs, model.spec.dit)
        jax.tree.map(np.testing.assert_array_equal, same, model.network(part))


@pytest.mark.parametrize("kind", ["t2v", "ti2v"])
def test_exported_vae(kind, exported):
    model, folder = exported(kind)
    theirs = from_pretrained(diffusers.AutoencoderKLWan, folder, "vae")
    cfg, rng = model.spec.vae, np.random.default_rng(0)
    latents = rng.standard_normal((1, 2, 2, 3, cfg.z_dim), np.float32)
    stride = cfg.spatial_stride
    video = rng.uniform(-1, 1, (1, 5, 2 * stride, 2 * stride, 3)).astype(np.float32)
    mean, std = np.float32(cfg.latents_mean), np.float32(cfg.latents_std)
    with torch.no_grad():
        frames = theirs.decode(to_torch(latents * std + mean)).sample.numpy()  # clamped, ours is not
        encoded = to_last(theirs.encode(to_torch(video)).latent_dist.mode().numpy())
    decoded = jax.jit(lambda vae, z: vae.decode(z))(model.vae, latents)
    assert relative_error(jnp.clip(decoded, -1, 1), to_last(frames)) <= 1e-5
    ours = jax.jit(lambda vae, x: vae.encode(x))(model.vae, video)
    assert relative_error(ours, (encoded - mean) / std) <= 1e-5


def test_exported_text_encoder(exported):
    model, folder = exported("t2v")
    theirs = from_pretrained(transformers.UMT5EncoderModel, folder, "text_encoder")
    ids, mask = model.tokenizer(["a cat surfs", "two words or three"], 24)
    with torch.no_grad():
        features = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    ours = jax.jit(lambda encoder, ids, mask: encoder(ids, mask))(model.text_encoder, ids, mask)
    assert relative_error(np.asarray(ours)[mask > 0], features[mask > 0]) <= 2e-6


def test_exported_image_encoder(exported):
    model, folder = exported("i2v")
    theirs = from_pretrained(transformers.CLIPVisionModel, folder, "image_encoder")
    picture = np.random.default_rng(0).uniform(-1, 1, (1, 70, 90, 3)).astype(np.float32)
    pixels = preprocess(jnp.asarray(picture), model.spec.clip.image_size)
    with torch.no_grad():
        features = theirs(to_torch(pixels), output_hidden_states=True).hidden_states[-2].numpy()
    ours = jax.jit(lambda encoder, pixels: encoder(pixels))(model.image_encoder, pixels)
    assert relative_error(ours, features) <= 2e-6


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v", "t2v-moe", "ti2v", "ti2v with a picture"])
def test_pipeline(kind, exported):
    """diffusers assembles its pipeline from the exported folder, and samples the latents that we sample.

    Noise levels and CLIP features are ours: diffusers starts elsewhere, and resizes for CLIP in its own way.
    """
    model, folder = exported(kind.split()[0])
    pictures = {"i2v": 1, "flf2v": 2, "ti2v with a picture": 1}.get(kind, 0)
    rng = np.random.default_rng(0)
    width, height = 3 * model.spec.size_multiple, 2 * model.spec.size_multiple
    images = list(rng.integers(0, 256, (pictures, height, width, 3), np.uint8))
    named = dict(zip(("image", "last_image"), images, strict=False))
    request = resolve(
        model.spec, "a white  cat on a surfboard", negative_prompt="rain", size=(width, height), num_frames=5,
        num_steps=3, **named,
    )  # fmt: skip
    assert (request.width, request.height) == (width, height)
    noise = rng.standard_normal(latent_shape(model.spec, request), np.float32)
    (ours,) = denoise(model, request, encode(model, request), [jnp.asarray(noise)])

    cls = diffusers.WanImageToVideoPipeline if pictures else diffusers.WanPipeline
    if kind == "ti2v with a picture":  # the published folder is one for text alone
        pipe = cls(**diffusers.WanPipeline.from_pretrained(folder).components, expand_timesteps=True)
    else:
        pipe = cls.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.transformer, pipe.transformer_2):
        if part is not None:
            part.condition_embedder.timesteps_proj = ExactTimesteps(model.spec.dit.freq_dim)
    scheduler = pipe.scheduler
    set_timesteps = scheduler.set_timesteps

    def set_ours(num_steps, **kw):
        set_timesteps(num_steps, **kw)
        give_schedule(scheduler, request.solver, num_steps, request.shift)

    scheduler.set_timesteps = set_ours
    if model.spec.clip:
        tokens = torch.from_numpy(np.array(encode_image(model.image_encoder, images)))
        pipe.encode_image = lambda *args: tokens.reshape(pictures, -1, model.spec.clip.dim)
    low, high = request.guidance_scale if model.spec.num_experts == 2 else (None, request.guidance_scale)
    theirs = pipe(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        width=width,
        height=height,
        num_frames=5,
        num_inference_steps=3,
        guidance_scale=high,
        guidance_scale_2=low,
        latents=to_torch(noise),
        output_type="latent",
        max_sequence_length=TEXT_LEN,
        **{name: Image.fromarray(image) for name, image in named.items()},
    ).frames
    assert relative_error(ours, to_last(theirs.float().numpy())) <= 2e-5


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_official_files(part, tiny_folder, tmp_path):
    """PyTorch reads an exported ``.pth`` without running code of it, and finds the model's numbers."""
    model = load(tiny_folder("t2v"), dtype=jnp.bfloat16, offload=False)
    export_folder(model, tmp_path / "out", "official", parts=[part], say=str)
    (file,) = (tmp_path / "out").glob("*.pth")
    state = torch.load(file, weights_only=True)
    dtypes = {tensor.dtype for tensor in state.values()}
    assert dtypes == ({torch.float32} if part == "vae" else {torch.bfloat16, torch.float32})
    weights = {name: tensor.float().numpy() for name, tensor in state.items()}
    rows = layouts.table(part, layouts.network_config(model.spec, part))
    back = fill(build(part, model.spec, jnp.bfloat16), rows, weights, network=part)
    expected = flatten_params(model.network(part))
    for path, value in flatten_params(back).items():
        np.testing.assert_array_equal(np.asarray(value), np.asarray(expected[path]), err_msg=path)


def test_configs_of_published_models():
    """The networks of our table, as diffusers would build them, have as many parameters as ours."""
    for cfg in {spec.dit for spec in MODELS.values() if spec.diffusers_repository}:
        with torch.device("meta"):
            theirs = diffusers_model(cfg)
        assert sum(p.numel() for p in theirs.parameters()) == cfg.num_params(), cfg
