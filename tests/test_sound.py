"""Picture and sound together: the twin-stream network, its guidance, and clips from references. Tiny random weights."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import wan_jax
from wan_jax import Reference, pipeline
from wan_jax.checkpoint import flatten_params, unflatten_like
from wan_jax.cli import main
from wan_jax.config import MODELS, NANO_VOCODER, FusionConfig, IdentityConfig, VoiceConfig
from wan_jax.conversion import import_folder, write_compact
from wan_jax.errors import CheckpointError, InputError, NonFiniteError
from wan_jax.evaluate import puppets
from wan_jax.media import Clip, read_image, read_settings, read_video
from wan_jax.model import build
from wan_jax.models.fusion import Fusion
from wan_jax.models.identity import voice_features
from wan_jax.parallel import compiler_options, make_mesh, param_sharding, use_mesh
from wan_jax.request import resolve
from wan_jax.sampling.sampler import make_steps, run_segment
from wan_jax.sampling.schedule import make_schedule
from wan_jax.sampling.solvers import State
from wan_jax.sound import SoundCondition, fusion_velocity, guidance_passes, num_voice_latents, reference_times
from wan_jax.train.puppets import world
from wan_jax.train.words import write_tokenizer
from wan_jax.weights.engine import check
from wan_jax.weights.layouts import locate, spec_parts, table

RNG = np.random.default_rng(0)
FACE = RNG.integers(0, 256, (40, 30, 3), np.uint8)
TIME = np.arange(40_000) / 16_000
VOICE = (0.3 * np.sign(np.sin(2 * np.pi * 140 * TIME)) * np.sin(2 * np.pi * 3 * TIME)).astype(np.float32)
OTHER = (0.3 * np.sign(np.sin(2 * np.pi * 230 * TIME))).astype(np.float32)
PERSON, FRIEND = Reference(image=FACE, voice=(VOICE, 16_000)), Reference(image=FACE[::-1], voice=(OTHER, 16_000))
OPTIONS = dict(size=(32, 32), num_frames=5, num_steps=2, progress=False)
R2AV = dict(prompt='Character1 says "We did it!"', references=[PERSON], i_have_consent=True, **OPTIONS)

QUICK = {"xla_backend_optimization_level": "0"}  # for programs that take longer to compile than to run
TINY = FusionConfig(dim=48, ffn_dim=64, num_heads=4, num_layers=3, in_dim=6, out_dim=6, text_dim=20, text_len=8,
                    freq_dim=16, audio_dim=5)  # fmt: skip


@pytest.fixture(scope="session")
def model(tiny_folder):
    """kind -> model in float32, its networks held."""
    return functools.cache(lambda kind: wan_jax.load(tiny_folder(kind), dtype="float32", offload=False))


@pytest.fixture(scope="session")
def clip(model):
    return wan_jax.generate(model("r2av"), **R2AV)


# ---- the network -------------------------------------------------------------------------------------------


@functools.cache
def make_fusion(cfg: FusionConfig = TINY) -> Fusion:
    return jax.jit(lambda: Fusion(cfg, rngs=nnx.Rngs(0)), compiler_options=QUICK)()


def make_inputs(batch: int = 1) -> tuple:
    def normal(i: int, *shape: int) -> jax.Array:
        return jax.random.normal(jax.random.key(i), shape)

    latents = {"video": normal(0, batch, 3, 4, 4, 6), "audio": normal(1, batch, 7, 5)}
    text = {"video": normal(2, batch, 8, 20), "audio": normal(3, batch, 8, 20)}
    return latents, jnp.full(batch, 500.0), text


@functools.partial(jax.jit, compiler_options=QUICK)
def forward(fusion: Fusion, *inputs, **options):
    return fusion(*inputs, **options)


def test_streams_hear_and_see_each_other():
    fusion, (latents, t, text) = make_fusion(), make_inputs()
    both = forward(fusion, latents, t, text)
    for stream, other in (("video", "audio"), ("audio", "video")):
        changed = forward(fusion, latents | {other: latents[other] + 1}, t, text)
        assert float(jnp.abs(changed[stream] - both[stream]).max()) > 1e-3
        alone = forward(fusion, {stream: latents[stream]}, t, {stream: text[stream]})
        assert alone.keys() == {stream} and alone[stream].shape == latents[stream].shape
        assert float(jnp.abs(alone[stream] - both[stream]).max()) > 1e-3


def test_new_adapters_change_nothing():
    sizes = dict(dim=16, num_layers=1, num_heads=2)
    cfg = dataclasses.replace(TINY, identity=IdentityConfig(feature_dim=12, **sizes), voice=VoiceConfig(**sizes))
    fusion, inputs = make_fusion(cfg), make_inputs()
    identity = jax.random.normal(jax.random.key(4), (1, 2, 9, 12))
    voice = jax.jit(lambda wave: voice_features(wave, cfg.voice.mel))(VOICE[None, None, :16_000])
    base, adapted = forward(fusion, *inputs), forward(fusion, *inputs, identity_BRIC=identity, voice_BRTF=voice)
    for stream in base:
        np.testing.assert_array_equal(base[stream], adapted[stream])
    with pytest.raises(ValueError, match="identity_adapter is not part of this model"):
        make_fusion()(*inputs, identity_BRIC=identity)

    # With weights of another kind than zero each adapter moves its own stream first of all.
    flat = flatten_params(fusion)
    path = "identity_adapter.blocks.o.kernel"
    trained = unflatten_like(fusion, flat | {path: jax.random.normal(jax.random.key(5), flat[path].shape)})
    moved = forward(trained, *inputs, identity_BRIC=identity)
    assert float(jnp.abs(moved["video"] - base["video"]).max()) > 1e-3
    none = forward(trained, *inputs, identity_BRIC=identity, there={"video": jnp.zeros((1, 2), bool)})
    np.testing.assert_allclose(none["video"], base["video"], atol=1e-6)


def test_a_skipped_block_is_skipped_for_its_sample_alone():
    fusion, inputs = make_fusion(), make_inputs(batch=2)
    every = forward(fusion, *inputs)
    some = forward(fusion, *inputs, skip_B=jnp.asarray([-1, 1]))
    for stream in every:
        np.testing.assert_allclose(some[stream][0], every[stream][0], atol=1e-6)
        assert float(jnp.abs(some[stream][1] - every[stream][1]).max()) > 1e-3


def test_gradient_and_remat():
    fusion, inputs = make_fusion(), make_inputs()

    def loss(fusion: Fusion, remat: bool) -> jax.Array:
        return sum(jnp.square(v).mean() for v in fusion(*inputs, remat=remat).values())

    run = jax.jit(jax.grad(loss), static_argnums=1, compiler_options=QUICK)
    plain, again = (run(fusion, remat) for remat in (False, True))
    for (path, a), b in zip(jax.tree.leaves_with_path(plain), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=str(path))
        assert float(jnp.abs(a).max()) > 0, path  # every parameter is used


def lowered_step(num_layers: int, mode: str):
    """One step of DreamID-Omni with one reference at 704x1280, four passes, by shapes alone."""
    spec = MODELS["dreamid-omni"]
    cfg = dataclasses.replace(spec.dit, num_layers=num_layers)
    fusion = build("dit", dataclasses.replace(spec, dit=cfg), jnp.bfloat16)

    def zeros(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    latents = {"video": zeros(1, 31, 44, 80, 48), "audio": zeros(1, 157, 20)}
    prompts = {stream: zeros(2, 512, 4096) for stream in latents}
    scale = {"video": 3.0, "audio": 4.0}
    passes = jax.eval_shape(lambda text: guidance_passes(text, scale, image=1, voice=1)[0], prompts)
    references = {"video": zeros(1, 1, 44, 80, 48), "audio": zeros(1, 31, 20)}
    condition = SoundCondition(passes, {stream: zeros(4) for stream in latents}, references)
    guidance = {stream: np.ones((50, 4)) for stream in latents}
    steps = make_steps("unipc", make_schedule("unipc", 50, 5.0), guidance).part(0, 1)
    times = reference_times(31, 157, [_Voiced()], spec.sound)

    velocity = fusion_velocity(mode, times["video"], times["audio"])

    def step(fusion, condition, state, steps):
        return run_segment(velocity, (fusion, condition), state, steps, None)

    return jax.jit(step, compiler_options=compiler_options()).lower(fusion, condition, State(*[latents] * 4), steps)


class _Voiced:
    voice, voice_second = VOICE, VOICE[:16_000]


def test_depth_costs_no_compilation(record_property):
    """30 blocks of both streams at full width give the program of two."""
    programs = []
    for num_layers in (2, 30):
        compiled = lowered_step(num_layers, "sequential").compile()
        instructions = compiled.as_text().count(" = ")
        memory = compiled.memory_analysis().temp_size_in_bytes
        record_property(f"{num_layers} layers", f"{instructions} instructions, {memory} bytes")
        programs.append((instructions, memory // 1024))  # the numbers of the layers take some bytes
    assert programs[0] == programs[1] and instructions > 500


def test_mesh_gives_the_same_velocity():
    """Eight devices, both streams and the adapters cut over them."""
    cfg = dataclasses.replace(TINY, identity=IdentityConfig(feature_dim=12, dim=16, num_layers=1, num_heads=2))
    fusion, (latents, t, text) = make_fusion(cfg), make_inputs(batch=2)
    identity = jax.random.normal(jax.random.key(4), (2, 1, 9, 12))
    expected = forward(fusion, latents, t, text, identity_BRIC=identity)
    for axes in ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "seq": 4}):
        mesh = make_mesh(axes)
        placed = {
            path: jax.device_put(x, param_sharding("dit", path, x.shape, mesh))
            for path, x in flatten_params(fusion).items()
        }
        with use_mesh(mesh):
            ours = forward(unflatten_like(fusion, placed), latents, t, text, identity_BRIC=identity)
        for stream in expected:
            np.testing.assert_allclose(ours[stream], expected[stream], atol=1e-5, err_msg=str(axes))


# ---- names of the official files ---------------------------------------------------------------------------


def official_shapes() -> dict[str, tuple[int, ...]]:
    """Section 1.12 of the specification, written out: Ovi's names and shapes."""
    D, F, names = 3072, 14336, {}
    pair = lambda name, rows, columns: {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}  # noqa: E731
    for s in ("video_model", "audio_model"):
        names |= pair(f"{s}.text_embedding.0", D, 4096) | pair(f"{s}.text_embedding.2", D, D)
        names |= pair(f"{s}.time_embedding.0", D, 256) | pair(f"{s}.time_embedding.2", D, D)
        names |= pair(f"{s}.time_projection.1", 6 * D, D) | pair(f"{s}.head.head", 192 if s[0] == "v" else 20, D)
        names[f"{s}.head.modulation"] = (1, 2, D)
        for i in range(30):
            b = f"{s}.blocks.{i}"
            names[f"{b}.modulation.modulation"] = (1, 6, D)
            for a, more in (("self_attn", ()), ("cross_attn", ("k_fusion", "v_fusion"))):
                for linear in ("q", "k", "v", "o", *more):
                    names |= pair(f"{b}.{a}.{linear}", D, D)
                norms = ("norm_q", "norm_k", *(("norm_k_fusion",) if more else ()))
                names |= {f"{b}.{a}.{norm}.weight": (D,) for norm in norms}
            for norm in ("norm3", "cross_attn.pre_attn_norm_fusion"):
                names |= {f"{b}.{norm}.weight": (D,), f"{b}.{norm}.bias": (D,)}
            names |= pair(f"{b}.ffn.0", F, D) | pair(f"{b}.ffn.2", D, F)
    names |= {"video_model.patch_embedding.weight": (D, 48, 1, 2, 2), "video_model.patch_embedding.bias": (D,)}
    names |= {"audio_model.patch_embedding.0.weight": (D, 20, 7), "audio_model.patch_embedding.0.bias": (D,)}
    stem = "audio_model.patch_embedding.2"
    names |= {f"{stem}.{w}.weight": (8192, D, 7) for w in ("w1", "w3")}
    return names | {f"{stem}.w2.weight": (D, 8192, 7)}


def test_official_names_and_shapes():
    shapes, spec = official_shapes(), MODELS["dreamid-omni"]
    assert len(shapes) == 2073 and sum(map(np.prod, shapes.values())) == spec.num_params == 11_660_753_108
    source = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    coverage = check(build("dit", spec, jnp.bfloat16), table("dit", spec.dit), source)
    assert not coverage.faults and len(coverage.used) == 2073
    missing = check(build("dit", spec, jnp.bfloat16), table("dit", spec.dit), dict(list(source.items())[1:]))
    assert any("missing in the checkpoint" in fault for fault in missing.faults)


def test_folder_with_several_checkpoints(tiny_folder, tmp_path, caplog):
    folder = tmp_path / "ckpts"
    folder.symlink_to(tiny_folder("ovi"))
    assert locate(folder).spec.sound.skip_layer == 11
    file = tiny_folder("ovi") / "Ovi" / "model_960x960.safetensors"
    assert locate(file).spec == locate(tiny_folder("ovi")).spec
    (tmp_path / "Ovi").mkdir()
    for name in ("model.safetensors", "model_960x960_10s.safetensors"):
        (tmp_path / "Ovi" / name).symlink_to(file)
    (tmp_path / "Ovi" / "config.json").symlink_to(file.with_name("config.json"))
    assert locate(tmp_path).spec.sound.caption == "audcap" and "name another file" in caplog.text
    assert locate(tmp_path / "Ovi" / "model_960x960_10s.safetensors").spec.num_frames == 241
    with pytest.raises(CheckpointError, match="MMAudio/ext_weights/v1-16.pth"):
        locate(tmp_path).require("audio_vae")


# ---- guidance and layout -----------------------------------------------------------------------------------


def test_guidance_runs_no_pass_in_vain():
    text = {"video": jnp.arange(2.0).reshape(2, 1, 1), "audio": jnp.arange(2.0).reshape(2, 1, 1)}
    scale = {"video": 3.0, "audio": 4.0}
    passes, weights = guidance_passes(text, scale, image=1.5, voice=2.0, skip=11)
    np.testing.assert_allclose(weights["video"], [3 + 1.5, 1 - 3, -1.5, 0])
    np.testing.assert_allclose(weights["audio"], [4 + 2, 1 - 4, 0, -2])
    assert passes.keep["video"].tolist() == [1, 1, 0, 1] and passes.keep["audio"].tolist() == [1, 1, 1, 0]
    assert passes.skip_G.tolist() == [-1, 11, -1, -1] and passes.text["video"].ravel().tolist() == [0, 1, 0, 0]
    assert passes.coupled_G.all()
    passes, weights = guidance_passes(text, scale, sync=2.0)
    np.testing.assert_allclose(weights["video"], [3 + 2, 1 - 3, -2])
    np.testing.assert_allclose(weights["audio"], [4 + 2, 1 - 4, -2])
    assert passes.coupled_G.tolist() == [True, True, False] and passes.text["audio"].ravel().tolist() == [0, 1, 0]
    assert [len(w["video"]) for _, w in (
        guidance_passes(text, scale), guidance_passes(text, scale, voice=2.0), guidance_passes(text, {}),
    )] == [2, 3, 1]  # fmt: skip


def test_face_and_voice_of_one_person_share_a_place():
    sound = MODELS["dreamid-omni"].sound

    class Silent:
        voice = None

    times = reference_times(31, 157, [Silent(), _Voiced()], sound)
    assert times["video"][-2:] == (150, 300) and len(times["audio"]) == 157 + 31
    assert abs(times["audio"][157] - 300) < 0.2  # the voice of the second person, though the first has none
    assert num_voice_latents(16_000, sound) == 31 and num_voice_latents(32_000, sound) == 62


# ---- clips -------------------------------------------------------------------------------------------------


def test_references_become_a_clip(clip, tmp_path):
    assert clip.video.shape == (5, 32, 32, 3) and clip.video.std() > 1
    assert clip.sample_rate == 16_000 and clip.audio.shape == (round(5 / 24 * 16_000),) and clip.audio.std() > 0
    caption = "<img1>: the subject of reference 1, <sub1>\n<sub1> says <S>We did it!<E>"
    assert clip.settings["caption"] == caption
    assert "agreed" in clip.settings["consent"] and len(clip.settings["references"]) == 1
    again = read_video(clip.save(tmp_path / "clip.mp4"))
    assert again.audio is not None and abs(len(again.audio) / 16_000 - clip.duration) <= 1 / clip.fps
    assert read_settings(tmp_path / "clip.mp4") == clip.settings


def final(model, **options) -> dict[str, np.ndarray]:
    """Final latents of both streams, nothing decoded."""
    options = {name: value for name, value in (R2AV | options).items() if name not in ("progress", "i_have_consent")}
    references = options.pop("references", ())
    if references:
        options |= dict(references=wan_jax.references.resolve_references(references), consent="yes")
    request = resolve(model.spec, **options)
    (result,) = pipeline.denoise(model, request, pipeline.encode(model, request), [pipeline.noise(model, request, 0)])
    return jax.tree.map(np.asarray, result)


def test_clips_are_marked(clip, model, tmp_path, capsys):
    """Picture and sound say that they were generated, unless the user asks for none, which is recorded."""
    record = clip.settings["provenance"]
    assert record["picture"]["payload"] and record["key"] == "public"
    assert record["picture"]["note"] and record["sound"]["note"]  # too small and too short to be read back
    assert main(["verify", str(clip.save(tmp_path / "clip.mp4"))]) == 0
    said = capsys.readouterr().out
    assert "picture" in said and "every person shown or heard" in said
    plain = wan_jax.generate(model("r2av"), watermark=False, **R2AV)
    assert plain.settings["provenance"] == {"watermark": False} and (plain.video != clip.video).any()
    other = wan_jax.generate(model("r2av"), watermark_key="secret", badge=True, **R2AV)
    assert other.settings["provenance"]["key"] == "private" and "secret" not in json.dumps(other.settings)


def test_everything_given_matters(model):
    """Face, voice, their pairing, the prompt and each guidance change the clip; the mode of guidance does not."""
    dreamid = model("r2av")
    base = final(dreamid)
    for name, change in {
        "face": dict(references=[Reference(image=FACE[:, ::-1], voice=(VOICE, 16_000))]),
        "voice": dict(references=[Reference(image=FACE, voice=(OTHER, 16_000))]),
        "prompt": dict(prompt='Character1 says "Well."'),
        "image guidance": dict(image_guidance=0.0),
        "voice guidance": dict(voice_guidance=0.0),
    }.items():
        changed = final(dreamid, **change)
        assert max(np.abs(changed[s] - base[s]).max() for s in base) > 1e-4, name
    sequential = final(dreamid, guidance="sequential")
    for stream in base:
        np.testing.assert_allclose(sequential[stream], base[stream], atol=2e-4)

    pair = final(dreamid, references=[PERSON, FRIEND])
    swapped = [dataclasses.replace(PERSON, voice=FRIEND.voice), dataclasses.replace(FRIEND, voice=PERSON.voice)]
    assert np.abs(final(dreamid, references=swapped)["video"] - pair["video"]).max() > 1e-4


def test_wan26_takes_text_pictures_and_references(model):
    """Adapters at initialisation are silent, random ones are not; without references it makes a clip all the same."""
    wan26 = model("wan2.6")
    with_face = final(wan26)
    other_face = final(wan26, references=[Reference(image=FACE[:, ::-1], voice=(VOICE, 16_000))])
    assert np.abs(with_face["video"] - other_face["video"]).max() > 1e-4
    assert final(wan26, references=[], prompt="a kitchen")["video"].shape == (1, 2, 2, 2, 48)
    first = final(wan26, image=FACE)  # and a first picture beside the references
    assert first["video"].shape == (1, 2, *first["video"].shape[2:]) and first["video"].shape[-1] == 48
    assert np.abs(first["video"][:, 0]).max() > 0


def test_ovi_keeps_the_first_picture(model):
    ovi = model("ovi")
    options = dict(prompt='She says "Hi." Audio: birds', references=[], image=FACE)
    result = final(ovi, **options)
    request = resolve(ovi.spec, options["prompt"], image=FACE, **{k: v for k, v in OPTIONS.items() if k != "progress"})
    pin = pipeline.encode(ovi, request).pin["video"]
    np.testing.assert_array_equal(result["video"][:, 0], np.asarray(pin.value)[:, 0])
    assert request.sound.caption == "She says <S>Hi.<E> Audio: birds"


def test_one_stream_alone(model, tmp_path):
    ovi, options = model("ovi"), dict(prompt="rain on a roof", **OPTIONS)
    silent = wan_jax.generate(ovi, audio=False, **options)
    assert silent.audio is None and silent.video.shape == (5, 32, 32, 3)
    heard = wan_jax.generate(ovi, video=False, **options)
    assert heard.video is None and heard.num_frames == 0 and abs(heard.duration - 5 / 24) < 1e-3
    path = heard.save(tmp_path / "rain.wav")
    np.testing.assert_allclose(wan_jax.media.read_audio(path, sample_rate=16_000), heard.audio, atol=1e-4)
    assert read_settings(path) == heard.settings
    with pytest.raises(InputError, match="no picture"):
        heard.save(tmp_path / "rain.mp4")
    with pytest.raises(InputError, match="holds no picture"):
        silent.save(tmp_path / "rain.wav")


def test_orbax_copy_gives_the_same_clip(model, clip, tmp_path):
    import_folder(model("r2av"), tmp_path / "orbax", say=lambda text: None)
    copy = wan_jax.load(tmp_path / "orbax", dtype="float32")
    assert copy.spec == model("r2av").spec
    again = wan_jax.generate(copy, **R2AV)
    np.testing.assert_array_equal(again.video, clip.video)
    np.testing.assert_array_equal(again.audio, clip.audio)


def test_an_interrupted_run_continues(model, clip, tmp_path):
    def stop(progress) -> None:
        raise KeyboardInterrupt

    options = R2AV | dict(resume_file=tmp_path / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        wan_jax.generate(model("r2av"), callback=stop, **options)
    assert (tmp_path / "state.safetensors").exists()
    seen = []
    again = wan_jax.generate(model("r2av"), callback=lambda p: seen.append(p.step), **options)
    assert seen == [2]
    np.testing.assert_array_equal(again.video, clip.video)
    np.testing.assert_array_equal(again.audio, clip.audio)


def test_sound_that_is_not_finite_is_named(model, monkeypatch):
    monkeypatch.setattr(model("r2av").vocoder.conv_post.bias, "value", jnp.full(1, jnp.nan), raising=False)
    with pytest.raises(NonFiniteError, match="decoded sound"):
        wan_jax.generate(model("r2av"), **R2AV)


BAD = {
    "no reference": (dict(references=[]), "needs 1 to 5 references"),
    "six references": (dict(references=[PERSON] * 6), "6 references: need 1 to 5"),
    "no consent": (dict(i_have_consent=False), "--i-have-consent"),
    "a third character": (dict(prompt="character3 sings"), "character3 in the prompt: 1 reference is given"),
    "an open quotation": (dict(prompt='Character1 says "We did it'), "quotation mark"),
    "a voice without a look": (dict(references=[Reference(voice=(VOICE, 16_000))]), "a voice but no image"),
    "a short voice": (dict(references=[Reference(image=FACE, voice=(VOICE[:4000], 16_000))]), "0.25 s"),
    "no sound": (dict(audio=False), "picture and sound together"),
    "another frame rate": (dict(fps=16), "at 24"),
    "a first picture": (dict(image=FACE), "makes video from references"),
    "a wrong number": (dict(voice_guidance="loud"), "voice_guidance='loud'"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_loaded(case, tiny_folder):
    options, message = BAD[case]
    fresh = wan_jax.load(tiny_folder("r2av"), dtype="float32")
    with pytest.raises(InputError, match=message):
        wan_jax.generate(fresh, **(R2AV | options))
    assert "in memory: nothing" in repr(fresh)


def test_models_without_sound_refuse_it():
    with pytest.raises(InputError, match="has no sound and takes no audio; models with sound are ovi-5s"):
        resolve(MODELS["wan2.1-t2v-1.3b"], "a cat", audio=False)
    with pytest.raises(InputError, match="takes no references; use dreamid-omni"):
        resolve(MODELS["ovi-5s"], "a cat", references=[object()], consent="yes")
    with pytest.raises(InputError, match="wan2.6-r2av-11b has no published weights"):
        wan_jax.load("wan2.6-r2av-11b")


def test_small_model_from_its_export_to_a_clip(tmp_path):
    """The nano architecture in the layout that the trainer writes, random weights: loads, and draws its own puppet."""
    spec, folder = MODELS["wan2.6-nano"], tmp_path / "nano"
    spec = dataclasses.replace(spec, sound=dataclasses.replace(spec.sound, vocoder=NANO_VOCODER))
    rng, networks = np.random.default_rng(0), {}
    for part in spec_parts(spec):
        shape = build(part, spec, jnp.float32)
        flat = {path: 0.05 * rng.standard_normal(x.shape, np.float32) for path, x in flatten_params(shape).items()}
        networks[part] = unflatten_like(shape, flat)
    write_tokenizer(tmp_path / "tokenizer")
    write_compact(spec, networks, tmp_path / "tokenizer", folder)
    assert max(path.stat().st_size for path in folder.iterdir()) < 16e6
    assert sum(path.stat().st_size for path in folder.iterdir()) < 25e6

    nano = wan_jax.load(folder, dtype="float32")
    assert nano.spec == spec and nano.parts == spec_parts(spec)
    assets = Path(wan_jax.__file__).parent / "assets"
    puppet = Reference(image=assets / "puppet.png", voice=assets / "puppet.wav")
    clip = wan_jax.generate(
        nano, 'character1 nods in front of a striped yellow wall and says "to gu".', references=[puppet],
        i_have_consent=True, num_steps=1, sync_guidance=1.5, progress=False,
    )  # fmt: skip
    assert clip.video.shape == (17, 96, 96, 3) and clip.audio.shape == (34_000,)
    (folder / "spec.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"spec.json: not written by this program"):
        wan_jax.load(folder)


def test_the_small_model_that_ships(caplog):
    """Trained: the prompt rules the wall, the puppet is the reference's and opens its mouth, a voice is heard."""
    nano, assets = wan_jax.load("wan2.6-nano", dtype="float32", offline=True), Path(wan_jax.__file__).parent / "assets"
    ask = dict(references=[Reference(image=assets / "puppet.png", voice=assets / "puppet.wav")], i_have_consent=True)
    prompt = 'character1 nods in front of a plain red wall and says "ba do mi".'
    clip = wan_jax.generate(nano, prompt, num_steps=12, seed=1, watermark=False, progress=False, **ask)
    seen = puppets.observe(clip.video, clip.audio)
    assert world.WALLS[seen.wall[0]] == "red" and np.abs(clip.audio).max() > 0.05
    known = read_image(assets / "puppet.png").astype(float)
    shirt = (..., slice(88, 96), slice(40, 56), slice(None))  # below the head, however it moves
    colours = [np.median(x[shirt].reshape(-1, 3), axis=0) for x in (clip.video, known)]
    assert np.abs(colours[0] - colours[1]).max() < 80 < np.ptp(colours[1])
    assert colours[0].argmin() == colours[1].argmin()
    assert not [record for record in caplog.records if "small model" in record.getMessage()]

    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    ask["references"] = [Reference(image=noise, voice=assets / "puppet.wav")]
    wan_jax.generate(nano, 'character1 rides a dragon and says "mi mi".', num_steps=1, progress=False, **ask)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "not rides, dragon:" in said and "reference 1 is far from the drawn puppets" in said


# ---- on the command line -----------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """photo.png, voice.wav and friend.mp4 in the current folder."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(FACE).save("photo.png")
    Clip(None, fps=24, audio=VOICE, sample_rate=16_000).save("voice.wav")
    frames = RNG.integers(0, 256, (12, 32, 32, 3), np.uint8)
    Clip(frames, fps=12, audio=OTHER[:16_000], sample_rate=16_000).save("friend.mp4")


def test_command_makes_a_talking_clip(tiny_folder, files, capsys):
    model = str(tiny_folder("r2av"))
    words = ["generate", "--model", model, "--reference", "photo.png", "--voice", "voice.wav"]
    words += ["--reference", "friend.mp4", "--describe", "2:a tall man"]
    words += ["--prompt", 'Character1 says "Yes!" to character2']
    size = ["--size", "32x32", "--num-frames", "5", "--num-steps", "2", "--dtype", "float32", "--quiet"]
    assert main([*words, *size]) == 2 and "--i-have-consent" in capsys.readouterr().err
    words.append("--i-have-consent")
    assert main([*words, *size, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["caption"].splitlines()[1] == "<img2>: a tall man, <sub2>"
    assert main([*words, *size, "--clean-voice", "--output", "clip.mp4"]) == 0
    made = read_settings("clip.mp4")
    assert made["clean_voice"] and [r["voice_sha256"] is not None for r in made["references"]] == [True, True]
    assert "photo.png" not in json.dumps(made)  # what was given is named by digests
    capsys.readouterr()

    # From the clip everything but the references comes back; without them it says what is missing.
    assert main(["generate", "--model", model, "--from", "clip.mp4", "--dry-run"]) == 2
    assert "was made with --reference" in (said := capsys.readouterr().err) or "needs 1 to 5 references" in said


@pytest.mark.parametrize("answer, code", [("yes", 0), ("no", 2)])
def test_consent_may_be_given_on_a_terminal(answer, code, files, capsys, monkeypatch):
    for stream in ("stdin", "stderr"):
        monkeypatch.setattr(f"sys.{stream}.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: answer)
    words = ["generate", "--model", "dreamid-omni", "--reference", "photo.png", "--prompt", "x", "--dry-run"]
    assert main(words) == code
    seen = capsys.readouterr()
    assert "every person shown or heard" in seen.err and ("agreed" in seen.out) == (code == 0)


def test_sizes_of_models_with_sound():
    """The first picture decides the aspect, the checkpoint the area; a size that is asked for stands."""
    wide, spec = np.zeros((1080, 1920, 3), np.uint8), MODELS["ovi-5s"]
    made = {
        "picture": resolve(spec, "x", image=wide),
        "picture, 720": resolve(MODELS["ovi-5s-720"], "x", image=wide),
        "aspect": resolve(spec, "x", aspect="3:2"),
        "size": resolve(spec, "x", size=(640, 352)),
    }
    assert {name: (r.width, r.height) for name, r in made.items()} == {
        "picture": (1280, 704), "picture, 720": (960, 544), "aspect": (1184, 768), "size": (640, 352),
    }  # fmt: skip


def test_command_makes_sound_alone(tiny_folder, files, capsys):
    words = ["generate", "--model", str(tiny_folder("ovi")), "--prompt", "rain", "--audio-only", "--num-frames", "5"]
    assert main([*words, "--size", "32x32", "--num-steps", "1", "--quiet"]) == 0
    assert capsys.readouterr().out.strip() == "clip.wav" and read_settings("clip.wav")["video"] is False
    assert main(["verify", "clip.wav"]) == 0 and "picture   none" in capsys.readouterr().out
    assert main([*words, "--c2pa-cert", "x.pem"]) == 2 and "needs both" in capsys.readouterr().err
    assert main([*words, "--output", "rain.mp4", "--dry-run"]) == 2 and "name it .wav" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [
        ("--voice voice.wav", "a voice belongs to the --reference before it; there is none"),
        ("--reference photo.png --voice voice.wav --voice voice.wav", "has a voice already"),
        ("--reference photo.png --describe 2:x", "--describe '2:x': need N:TEXT"),
        ("--reference photo.png --describe x", "--describe 'x': need N:TEXT"),
        ("--reference voice.wav", "is a sound: give it as the voice"),
        ("--reference gone.png", "gone.png is missing"),
        ("--reference photo.png --no-audio", "makes picture and sound together"),
        ("--reference photo.png " * 6, "6 references: need 1 to 5"),
        ("--reference playlist.mp4", "playlist.mp4 is not"),
    ],
)
def test_wrong_use_is_found_before_loading(options, message, files, capsys):
    Path("playlist.mp4").write_text("ffconcat version 1.0\nfile voice.wav\n")
    words = ["generate", "--model", "dreamid-omni", "--prompt", "x", "--i-have-consent", *options.split()]
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    assert code == 2 and message in capsys.readouterr().err


def test_new_adapters_on_a_base(tiny_folder, tmp_path, model):
    words = ["convert", "adapters", str(tiny_folder("r2av")), str(tmp_path / "new"), "--dtype", "float32"]
    assert main([*words, "--image-encoder", str(tiny_folder("i2v"))]) == 0
    untrained = wan_jax.load(tmp_path / "new", dtype="float32")
    assert untrained.spec.dit.identity and untrained.spec.dit.voice and untrained.spec.clip
    ours, base = final(untrained), final(model("r2av"))
    for stream in base:  # the program is another, and rounds differently
        np.testing.assert_allclose(ours[stream], base[stream], atol=1e-4)
    assert main(["convert", "adapters", str(tiny_folder("ovi")), str(tmp_path / "x"), "--image-encoder", "y"]) != 0
