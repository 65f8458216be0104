"""The Python API, from a folder to a clip, for every kind of model: tiny random weights, float32, 32x32 pixels.

Compiling dominates: every test uses the same shapes, so that a program is compiled once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wan_jax
from wan_jax import pipeline
from wan_jax.conditions import Condition
from wan_jax.conversion import export_folder, import_folder
from wan_jax.errors import CheckpointError, InputError, NonFiniteError
from wan_jax.media import read_settings
from wan_jax.request import from_settings, resolve
from wan_jax.resume import Resume
from wan_jax.sampling.sampler import start
from wan_jax.weights.writers import write_safetensors

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
LAST = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
OPTIONS = dict(prompt="a cat", size=(32, 32), num_frames=5, num_steps=2, progress=False)
# Name of the case -> kind of model, pictures.
TASKS = {
    "t2v": ("t2v", {}),
    "i2v": ("i2v", {"image": PICTURE}),
    "flf2v": ("flf2v", {"image": PICTURE, "last_image": LAST}),
    "ti2v, text": ("ti2v", {}),
    "ti2v, picture": ("ti2v", {"image": PICTURE}),
    "t2v, two experts": ("t2v-moe", {}),
    "i2v, two experts": ("i2v-moe", {"image": PICTURE}),
}


@pytest.fixture(scope="session")
def model(tiny_folder):
    """kind -> model in float32, its networks held."""
    models = {}

    def get(kind: str) -> wan_jax.Model:
        if kind not in models:
            models[kind] = wan_jax.load(tiny_folder(kind), dtype="float32", offload=False)
        return models[kind]

    return get


@pytest.fixture(scope="session")
def t2v(model):
    return model("t2v")


@pytest.fixture(scope="session")
def clip(t2v):
    return wan_jax.generate(t2v, **OPTIONS)


def latents(model: wan_jax.Model, **options) -> np.ndarray:
    """Final latents of one clip, without decoding them."""
    options = {name: value for name, value in OPTIONS.items() if name != "progress"} | options
    request = resolve(model.spec, **options)
    with wan_jax.parallel.use_mesh(model.mesh):
        noise = pipeline.noise(model, request, 0)
        (result,) = pipeline.denoise(model, request, pipeline.encode(model, request), [noise])
    return np.asarray(result)


@pytest.mark.parametrize("case", TASKS)
def test_every_task_gives_a_clip(case, model):
    kind, pictures = TASKS[case]
    seen = []
    clip = wan_jax.generate(
        model(kind), **OPTIONS, **pictures, callback=lambda p: seen.append((p.step, p.num_steps, p.seconds > 0))
    )
    assert clip.video.shape == (5, 32, 32, 3) and clip.video.dtype == np.uint8
    assert clip.video.std() > 1  # not one colour
    assert clip.fps == model(kind).spec.fps
    assert seen == [(1, 2, True), (2, 2, True)]
    assert {"image_sha256", "last_image_sha256"} & clip.settings.keys() == {f"{name}_sha256" for name in pictures}


def test_pictures_matter(model):
    other = PICTURE[::-1]
    for case in ("i2v", "ti2v, picture", "i2v, two experts"):
        kind, pictures = TASKS[case]
        assert np.abs(latents(model(kind), **pictures) - latents(model(kind), image=other)).max() > 1e-3
    first_last = dict(image=PICTURE, last_image=LAST)
    difference = latents(model("flf2v"), **first_last) - latents(model("flf2v"), image=PICTURE, last_image=other)
    assert np.abs(difference).max() > 1e-3


def test_a_picture_of_ti2v_stays_the_first_frame(model):
    ti2v = model("ti2v")
    clean = pipeline.encode(ti2v, resolve(ti2v.spec, "a cat", size=(32, 32), num_frames=5, image=PICTURE)).pin.value
    np.testing.assert_array_equal(latents(ti2v, image=PICTURE)[:, 0], np.asarray(clean)[:, 0])


def test_a_seed_decides_the_clip(t2v, clip):
    again = wan_jax.generate(t2v, **OPTIONS, seed=0)
    assert np.array_equal(again.video, clip.video)
    several = wan_jax.generate(t2v, **OPTIONS, seed=[1, 0])
    assert isinstance(several, list) and [c.settings["seed"] for c in several] == [1, 0]
    assert np.array_equal(several[1].video, clip.video)
    assert not np.array_equal(several[0].video, clip.video)


def test_noise_in_place_of_a_seed(t2v, clip):
    request = resolve(t2v.spec, "a cat", size=(32, 32), num_frames=5)
    noise = np.asarray(pipeline.noise(t2v, request, 0))
    given = wan_jax.generate(t2v, **OPTIONS, seed=7, noise=noise)
    assert np.array_equal(given.video, clip.video)
    assert "noise_sha256" in given.settings and "noise_sha256" not in clip.settings
    with pytest.raises(InputError, match=r"expected shape \(1, 2, 4, 4, 16\) and one seed, got \(1, 2, 4, 4, 3\)"):
        wan_jax.generate(t2v, **OPTIONS, noise=noise[..., :3])
    with pytest.raises(InputError, match="and 2"):
        wan_jax.generate(t2v, **OPTIONS, noise=noise, seed=[1, 2])


def test_settings_in_a_file_make_the_clip_again(t2v, clip, tmp_path):
    options = from_settings(read_settings(clip.save(tmp_path / "clip.mp4")))
    again = wan_jax.generate(t2v, **options, progress=False)
    assert np.array_equal(again.video, clip.video) and again.settings == clip.settings


def test_settings_of_a_picture_task_keep_the_size(model):
    """The size of the clip follows from the area asked for: taken for the area it would shrink from run to run."""
    spec = model("i2v").spec
    wide = np.zeros((90, 160, 3), np.uint8)
    request = resolve(spec, "a cat", image=wide, size=(832, 480))
    again = resolve(spec, image=wide, **from_settings(request.settings(0)))
    assert (again.width, again.height) == (request.width, request.height) == (832, 464)


def test_text_to_image(t2v):
    clip = wan_jax.generate(t2v, **OPTIONS | {"num_frames": 1})
    assert clip.video.shape == (1, 32, 32, 3)


def test_guidance_in_turn_equals_at_once(t2v):
    at_once, in_turn = latents(t2v, guidance="batch"), latents(t2v, guidance="sequential")
    assert np.abs(at_once).max() > 0.1
    np.testing.assert_allclose(in_turn, at_once, atol=1e-4)
    assert np.abs(latents(t2v, guidance_scale=2.0) - at_once).max() > 1e-3


@pytest.mark.parametrize(("mode", "passes"), [("batch", [2]), ("sequential", [1]), ("none", [1])])
def test_passes_of_guidance(mode, passes):
    """What the network is called with, traced: ``sequential`` is one body that a loop runs twice."""
    batches = []

    def dit(latents, timesteps, text, **_):
        batches.append(latents.shape[0])
        return latents + text.mean((1, 2))[:, None, None, None, None]

    condition = Condition(jnp.stack([jnp.ones((3, 4)), jnp.zeros((3, 4))]))
    args = (dit, condition), jnp.zeros((1, 1, 2, 2, 16)), jnp.float32(1), jnp.float32(3)
    velocity = pipeline.dit_velocity(mode)(*args)
    assert batches == passes
    assert float(velocity.mean()) == (1 if mode == "none" else 3)


def test_guidance_scale_1_needs_no_negative_prompt(t2v):
    clip = wan_jax.generate(t2v, **OPTIONS, guidance_scale=1, negative_prompt="never encoded")
    assert clip.settings["guidance"] == "none" and "never encoded" not in t2v.prompt_cache


def test_segments_make_no_difference(t2v, clip):
    assert np.array_equal(wan_jax.generate(t2v, **OPTIONS, segment="all").video, clip.video)


@pytest.mark.parametrize("axes", [{"fsdp": 2, "seq": 2, "tensor": 2}, {"data": 2, "fsdp": 4}], ids=str)
def test_a_mesh_gives_the_same_latents(axes, tiny_folder, t2v):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    on_mesh = wan_jax.load(tiny_folder("t2v"), dtype="float32", mesh=wan_jax.make_mesh(axes))
    kernel = on_mesh.dit.blocks.ffn.fc1.kernel[...]
    assert kernel.addressable_shards[0].data.size < kernel.size  # really cut
    np.testing.assert_allclose(latents(on_mesh), latents(t2v), atol=1e-4)


def test_offload_gives_the_same_clip(tiny_folder, model):
    kind, pictures = TASKS["i2v, two experts"]
    held = model(kind)
    freed = wan_jax.load(tiny_folder(kind), dtype="float32", offload=True)
    a, b = wan_jax.generate(held, **OPTIONS, **pictures), wan_jax.generate(freed, **OPTIONS, **pictures)
    assert np.array_equal(a.video, b.video)
    assert "in memory: nothing" in repr(freed) and "dit_low" in repr(held)


def test_every_layout_gives_the_same_clip(t2v, tmp_path):
    clip = wan_jax.generate(t2v, watermark=False, **OPTIONS)  # a mark names the model, which is the folder here
    export_folder(t2v, tmp_path / "diffusers", "diffusers", say=lambda text: None)
    import_folder(t2v, tmp_path / "orbax", say=lambda text: None)
    for layout in ("diffusers", "orbax"):
        model = wan_jax.load(tmp_path / layout, dtype="float32", offload=False)
        assert model.files.layout == layout
        assert np.array_equal(wan_jax.generate(model, watermark=False, **OPTIONS).video, clip.video)


def adapter(path, stem: str, scale: float = 1.0):
    rng = np.random.default_rng(3)
    tensors = {
        f"diffusion_model.{stem}.lora_A.weight": rng.standard_normal((4, 64), np.float32) * scale,
        f"diffusion_model.{stem}.lora_B.weight": rng.standard_normal((64, 4), np.float32),
    }
    write_safetensors(path, tensors)
    return str(path)


def test_adapters(tiny_folder, t2v, tmp_path):
    style = adapter(tmp_path / "style.safetensors", "blocks.1.self_attn.q")
    plain = latents(t2v)

    def adapted(*loras: str) -> np.ndarray:
        return latents(wan_jax.load(tiny_folder("t2v"), dtype="float32", loras=loras))

    assert np.abs(adapted(style) - plain).max() > 1e-3
    np.testing.assert_array_equal(adapted(style + ":0"), plain)

    bad = adapter(tmp_path / "bad.safetensors", "blocks.9.self_attn.q")
    with pytest.raises(CheckpointError, match=r"bad\.safetensors: 1 keys cannot be used:\n  blocks\.9\.self_attn\.q"):
        adapted(bad)
    with pytest.raises(InputError, match="no such file; expected FILE or FILE:strength"):
        wan_jax.load(tiny_folder("t2v"), loras=[str(tmp_path / "absent.safetensors")])
    broken = adapter(tmp_path / "nan.safetensors", "blocks.0.self_attn.q", scale=np.nan)
    with pytest.raises(CheckpointError, match="NaN"):
        wan_jax.load(tiny_folder("t2v"), loras=[broken])


def test_an_interrupted_call_continues(t2v, clip, tmp_path):
    state = tmp_path / "state.safetensors"

    def stop(progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wan_jax.generate(t2v, **OPTIONS, seed=[1, 0], callback=stop, resume_file=state)
    steps = []
    with pytest.raises(CheckpointError, match=r"other settings \(prompt\)"):
        wan_jax.generate(t2v, **OPTIONS | {"prompt": "a dog"}, seed=[1, 0], resume_file=state)
    clips = wan_jax.generate(
        t2v, **OPTIONS, seed=[1, 0], callback=lambda p: steps.append(p.step), resume_file=state
    )
    assert steps == [2, 1, 2]  # the first clip had one step behind it
    assert np.array_equal(clips[1].video, clip.video) and not state.exists()
    assert np.array_equal(clips[0].video, wan_jax.generate(t2v, **OPTIONS, seed=1).video)


def test_a_killed_run_continues(t2v, clip, tmp_path, monkeypatch):
    """What is on disk while a run is under way is enough to finish it: a kill may come at any time."""
    monkeypatch.setattr("wan_jax.resume.SAVE_SECONDS", -1)
    state, copy, steps = tmp_path / "state.safetensors", tmp_path / "copy.safetensors", []

    def keep(progress):
        if progress.step == 1:
            copy.write_bytes(state.read_bytes())

    wan_jax.generate(t2v, **OPTIONS, callback=keep, resume_file=state)
    assert not state.exists()
    again = wan_jax.generate(t2v, **OPTIONS, callback=lambda p: steps.append(p.step), resume_file=copy)
    assert steps == [2]
    np.testing.assert_array_equal(again.video, clip.video)


def test_a_state_in_mid_step_is_not_saved(tmp_path):
    """A second Ctrl-C stops while a program owns the buffers of one clip; the others are kept."""
    path, running, done = tmp_path / "new" / "state.safetensors", start(jnp.zeros(3)), start(jnp.ones(3))
    with pytest.raises(KeyboardInterrupt), Resume(path, [{"seed": 0}, {"seed": 1}]) as resume:
        resume.states = {0: (4, running), 1: (8, done)}
        running.sample.delete()
        raise KeyboardInterrupt
    with pytest.raises(CheckpointError, match="number of clips"), Resume(path, [{"seed": 0}]):
        pass
    with Resume(path, [{"seed": 0}, {"seed": 1}]) as resume:
        assert list(resume.states) == [1] and resume.states[1][0] == 8
        np.testing.assert_array_equal(resume.states[1][1].sample, np.ones(3))
    assert not path.exists()


def test_a_sample_that_is_not_finite_is_named(t2v, tmp_path):
    with pytest.raises(NonFiniteError, match=r"sampling step 1 of 2 \(timestep 999\) gave NaN or infinity"):
        noise = np.full((1, 2, 4, 4, 16), np.inf, np.float32)
        wan_jax.generate(t2v, **OPTIONS, noise=noise, resume_file=tmp_path / "state.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": None}, "the prompt is empty"),
        ({"num_frames": 80}, "num_frames=80: need 4n+1, try 81"),
        ({"num_frames": 5.0}, "num_frames=5.0: need a whole number"),
        ({"num_steps": 0}, "num_steps=0: need at least 1"),
        ({"size": (33, 32)}, "size 33x32: width must be a multiple of 16, try 32"),
        ({"size": "32"}, "expected WIDTHxHEIGHT"),
        ({"size": (32,)}, "expected WIDTHxHEIGHT"),
        ({"aspect": "1:1"}, "give size or aspect, not both"),
        ({"fps": 0}, "fps=0: need 0.1 to 240"),
        ({"shift": float("nan")}, "shift=nan: need a finite number"),
        ({"guidance_scale": (3, 4)}, "takes one number"),
        ({"guidance_scale": "5"}, "guidance_scale='5': need a finite number"),
        ({"guidance": "sequentiel"}, "did you mean sequential"),
        ({"solver": "unpic"}, "did you mean unipc"),
        ({"seed": -1}, "seed=-1: need 0 to"),
        ({"seed": [3, 3]}, "give one or several different ones"),
        ({"seed": "1"}, "seed='1': need a whole number"),
        ({"image": PICTURE}, "makes video from text alone"),
        ({"last_image": PICTURE}, "takes no last picture"),
    ],
)  # fmt: skip
def test_wrong_values_are_named(options, message, t2v):
    with pytest.raises(InputError) as error:
        wan_jax.generate(t2v, **OPTIONS | options)
    assert message in str(error.value)


def test_missing_and_narrow_pictures(model):
    for kind, message in (("i2v", "needs a picture"), ("flf2v", "needs a picture")):
        with pytest.raises(InputError, match=message):
            wan_jax.generate(model(kind), **OPTIONS)
    with pytest.raises(InputError, match="needs a first and a last picture"):
        wan_jax.generate(model("flf2v"), **OPTIONS, image=PICTURE)
    for kind in ("i2v", "ti2v"):
        with pytest.raises(InputError, match="a picture of 4000x2 is too narrow"):
            wan_jax.generate(model(kind), **OPTIONS, image=np.zeros((2, 4000, 3), np.uint8))
