"""Fine-tuning: a folder of clips, low-rank factors, and the command that joins them."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import wan_jax
from tests.test_train import DIT, NO_DROPOUT, QUICK, QUIET, Fixed, dit, dit_batch, flow_task, recipe, same
from wan_jax.checkpoint import abstract, flatten_params
from wan_jax.cli import main
from wan_jax.config import FusionConfig
from wan_jax.conversion import tiny_spec
from wan_jax.errors import InputError
from wan_jax.media import Clip, read_image, read_video
from wan_jax.models.dit import DiT
from wan_jax.models.fusion import Fusion
from wan_jax.parallel import make_mesh
from wan_jax.train.data import ClipFolder, Format, encode_references, find_clips, read_frames
from wan_jax.train.finetune import finetune
from wan_jax.train.loop import fit
from wan_jax.train.lora import add_factors, lora_task, new_factors, write_lora
from wan_jax.train.step import assemble, place, place_frozen, split, start
from wan_jax.weights import layouts
from wan_jax.weights.lora import Lora, merge

TO = Format(32, 32, 5)
SETTINGS = {
    "size": (32, 32), "num_frames": 5, "rank": 2, "watch": {"log": 1, "save": 1},
    "recipe": {"steps": 2, "batch": 2, "warmup": 1, "learning_rate": 1e-2},
}  # fmt: skip


def write_clip(folder: Path, name: str, caption: str | None = "a cat", frames: int = 5, sound: bool = False) -> None:
    rng = np.random.default_rng(len(name) + ord(name[-1]))
    video = np.kron(rng.integers(0, 256, (frames, 4, 6, 3)), np.ones((1, 10, 10, 1))).astype(np.uint8)
    audio = rng.uniform(-0.5, 0.5, frames * 2000).astype(np.float32) if sound else None
    Clip(video, 16.0, audio, 32_000 if sound else None).save(folder / f"{name}.mp4", preset="ultrafast")
    if caption is not None:
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder, "a")
    write_clip(folder, "b", "a dog in the rain")
    return folder


@pytest.fixture(scope="module")
def t2v(tiny_folder) -> wan_jax.Model:
    return wan_jax.load(tiny_folder("t2v"), dtype="float32", offload=False)


@pytest.fixture
def quick_compiler(monkeypatch):
    """Compile without optimisation, which takes longer than the few steps here; other tests do not get the programs."""
    monkeypatch.setattr("wan_jax.conditions._COMPILED", {})
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ---- the folder --------------------------------------------------------------------------------------------


def test_clips_are_encoded_once_and_come_in_a_fixed_order(clips, t2v, tmp_path, monkeypatch):
    feed = ClipFolder(clips, t2v, tmp_path, TO, batch=2, seed=3)
    shared, own = feed(0, 3)
    assert shared["null_text"].shape == (1, 512, 64) and set(own) == {"video", "text"}
    assert own["video"].shape == (3, 2, 2, 4, 4, 16) and own["text"].shape == (3, 2, 512, 64)
    assert np.abs(own["video"][0, 0] - own["video"][0, 1]).max() > 0.1
    for batch in own["video"]:  # each clip once in every epoch
        assert same(np.sort(batch, axis=0), np.sort(own["video"][0], axis=0))
    assert len({feed.order(2 * epoch) for epoch in range(20)}) == 2  # in an order that changes

    monkeypatch.setattr("wan_jax.train.data.encode_clip", None)  # nothing is left to encode
    again = ClipFolder(clips, t2v, tmp_path, TO, batch=2, seed=3)
    again.seek(json.loads(json.dumps(feed.position())))
    assert same(again(2, 1)[1], {name: x[2:] for name, x in own.items()})
    for step in (3, 4, 0):  # in a row, and back
        assert same(again(step, 1), feed(step, 1))


def test_frames_follow_the_rate_and_the_format_of_the_model(tmp_path):
    spec = tiny_spec("t2v")
    ramp = np.repeat(np.arange(12, dtype=np.uint8) * 20, 40 * 60 * 3).reshape(12, 40, 60, 3)
    Clip(ramp, 2.0 * spec.fps).save(tmp_path / "a.mp4", crf=0, preset="ultrafast")
    (tmp_path / "a.txt").write_text("a ramp")
    ((source,), _) = find_clips(tmp_path)
    frames, sound = read_frames(source, spec, TO)
    assert frames.shape == (5, 32, 32, 3) and sound is None
    np.testing.assert_allclose(frames.mean((1, 2, 3)), np.arange(0, 10, 2) * 20, atol=4)
    with pytest.raises(InputError, match=r"a.mp4 has 12 frames at 32 per second: need 13 at 16"):
        read_frames(source, spec, TO._replace(num_frames=13))
    with pytest.raises(InputError, match="size 40x32: need multiples of 16, try 32x32"):
        Format.of(spec, (40, 32), 5)
    with pytest.raises(InputError, match=r"num_frames=6: need 4n\+1, try 5"):
        Format.of(spec, (32, 32), 6)


def test_bad_files_are_reported_and_left_out(clips, t2v, tmp_path, caplog):
    folder = tmp_path / "data"
    folder.mkdir()
    for path in clips.glob("a.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    write_clip(folder, "mute", caption=None)
    write_clip(folder, "short", frames=3)
    (folder / "torn.mp4").write_bytes((folder / "a.mp4").read_bytes()[:700])
    (folder / "torn.txt").write_text("torn")
    feed = ClipFolder(folder, t2v, tmp_path / "cache", TO, batch=1)
    assert (len(feed), feed.skipped) == (1, 3)
    for name, reason in (("mute.mp4", "mute.txt cannot be read"), ("short.mp4", "has 3 frames"), ("torn.mp4", "")):
        assert any(name in line and "left out" in line and reason in line for line in caplog.messages), name


def test_folders_that_cannot_be_used(t2v, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        find_clips(tmp_path / "none")
    with pytest.raises(InputError, match="holds no clips"):
        find_clips(tmp_path)
    write_clip(tmp_path, "a", caption=None)
    with pytest.raises(InputError, match="1 clips and no caption"):
        find_clips(tmp_path)
    (tmp_path / "a.mp4").write_bytes(b"nothing")
    (tmp_path / "a.txt").write_text("a cat")
    with pytest.raises(InputError, match=r"(?s)no clip can be used:.*a.mp4"):
        ClipFolder(tmp_path, t2v, tmp_path / "cache", TO, batch=1)


def test_a_model_with_sound_wants_it(tmp_path):
    spec = tiny_spec("ovi")
    to = Format(32, 32, 5)
    samples = round(5 / spec.fps * 16_000 / spec.sound.hop) * spec.sound.hop
    write_clip(tmp_path, "a")
    ((source,), _) = find_clips(tmp_path)
    with pytest.raises(InputError, match="has no sound, which tiny-ovi learns too: add a.wav"):
        read_frames(source, spec, to._replace(num_frames=1))
    wave = np.sin(np.arange(8000) / 10).astype(np.float32) / 2
    Clip(None, 16.0, wave, 16_000).save(tmp_path / "a.wav")
    ((source,), _) = find_clips(tmp_path)
    Clip(np.zeros((9, 32, 32, 3), np.uint8), 24.0).save(tmp_path / "a.mp4", preset="ultrafast")
    _, heard = read_frames(source, spec, to)
    assert heard.shape == (samples,)
    np.testing.assert_allclose(heard[: min(samples, 8000)], wave[:samples], atol=1e-3)


def test_references_of_a_clip_and_of_one_that_has_none(clips, t2v, tmp_path, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(clips, folder)
    for name in ("b.ref1.png", "b.ref2.png", "b.ref2.wav"):
        (folder / name).write_bytes(name.encode())
    seen = []

    def encode(model, caption, pairs, to, *, consent):
        assert consent
        seen.append((caption, [[path and path.name for path in pair] for pair in pairs], to))
        return {"video_references": np.ones((len(pairs), 4, 4, 16), np.float32)}

    monkeypatch.setattr("wan_jax.train.data.encode_references", encode)
    monkeypatch.setattr("wan_jax.config.ModelSpec.takes_references", True)  # the t2v model is the quickest to encode
    _, own = ClipFolder(folder, t2v, tmp_path / "cache", TO, batch=2, consent=True)(0, 1)
    assert seen == [("a dog in the rain", [["b.ref1.png", None], ["b.ref2.png", "b.ref2.wav"]], TO)]
    assert own["video_references"].shape == (1, 2, 2, 4, 4, 16)
    assert sorted(own["video_references"].mean((0, 2, 3, 4, 5))) == [0, 1]


def test_references_are_encoded_as_for_generate(tiny_folder):
    model = wan_jax.load(tiny_folder("wan2.6"), dtype="float32", offload=False)
    look, voice = (Path(wan_jax.__file__).parent / "assets" / f"puppet.{end}" for end in ("png", "wav"))
    with pytest.raises(InputError, match="--i-have-consent"):
        encode_references(model, "a person", [(look, voice)], TO, consent=False)
    with pytest.raises(InputError, match="all have a voice, or none"):
        encode_references(model, "a person", [(look, voice), (look, None)], TO, consent=True)
    found = encode_references(model, "a person", [(look, None)], Format(64, 32, 5), consent=True)
    assert {name: x.shape[:2] for name, x in found.items()} == {
        "video_references": (1, 2), "identity": (1, 17), "voice": (1, 250),
    }  # fmt: skip
    assert not found["voice"].any() and found["identity"].any()


# ---- factors -----------------------------------------------------------------------------------------------


def velocity(dit: DiT) -> jax.Array:
    batch = dit_batch(2)
    return jax.jit(DiT.__call__, compiler_options=QUICK)(dit, batch["video"], jnp.full(2, 500.0), batch["text"])


def test_trained_factors_are_read_and_merged_by_generate(tmp_path, quick_compiler):
    base = dit()
    factors = new_factors(base, 2)
    assert len(factors) == 10 and factors["blocks.ffn.fc1"]["down"].shape == (2, 16, 2)
    assert same(add_factors(base, factors), base)
    task = lora_task(flow_task(base, NO_DROPOUT), factors)
    state, frozen = fit(
        task, recipe(steps=3, learning_rate=3e-2), {"dit": base, "lora": factors}, Fixed(dit_batch()), tmp_path,
        trains=lambda path: path.startswith("lora."), watch=QUIET,
    )  # fmt: skip
    assert same(flatten_params({"dit": base}), frozen)
    trained = assemble(task, state.params, frozen)["lora"]
    rows = layouts.table("dit", DIT)
    write_lora(tmp_path / "mine.safetensors", trained, base, rows)
    lora = Lora.open(str(tmp_path / "mine.safetensors"))
    assert "blocks.1.attn1.to_out.0" in lora.modules and len(lora.modules) == 20
    expected = velocity(add_factors(base, trained))
    assert np.abs(expected - velocity(base)).max() > 1e-3
    merged = merge(dit.__wrapped__(), lora, rows)  # which donates what it is given
    np.testing.assert_allclose(velocity(merged), expected, atol=1e-5)


def test_factors_of_both_streams_have_official_names(tmp_path):
    cfg = FusionConfig(
        dim=16, ffn_dim=16, num_heads=2, num_layers=1, in_dim=4, out_dim=4, text_dim=8, text_len=3, freq_dim=8,
        audio_dim=3, audio_kernel=3,
    )  # fmt: skip
    fusion = jax.tree.map(lambda x: jnp.zeros(x.shape), abstract(lambda: Fusion(cfg, rngs=nnx.Rngs(0))))
    factors = new_factors(fusion, 1, targets=("self_attn.q", "cross_attn.k_fusion"))
    factors = jax.tree.map(lambda x: x + 1, factors)
    write_lora(tmp_path / "mine.safetensors", factors, fusion, layouts.table("dit", cfg))
    lora = Lora.open(str(tmp_path / "mine.safetensors"))
    assert set(lora.modules) == {
        f"{s}_model.blocks.0.{name}" for s in ("video", "audio") for name in ("self_attn.q", "cross_attn.k_fusion")
    }
    expected = flatten_params(add_factors(fusion, factors))
    for path, x in flatten_params(merge(fusion, lora, layouts.table("dit", cfg))).items():
        np.testing.assert_allclose(x, expected[path], atol=1e-6, err_msg=path)


def test_factors_lie_on_every_device_of_a_mesh():
    params, _ = split({"lora": new_factors(dit(), 2, targets=("ffn.fc1",))})
    mesh, state = make_mesh({"data": 2, "fsdp": 4}), start(recipe(), params)
    for x in jax.tree.leaves(place(state, mesh)) + list(place_frozen(params, mesh).values()):
        assert x.is_fully_replicated and len(x.sharding.device_set) == 8


def test_factors_that_cannot_be():
    with pytest.raises(InputError, match="rank=0: need 1 to 512"):
        new_factors(dit(), 0)
    with pytest.raises(InputError, match=r"targets self_attn.x: the blocks have cross_attn.k,"):
        new_factors(dit(), 2, targets=("self_attn.x",))


# ---- the command -------------------------------------------------------------------------------------------


def write_recipe(path: Path, **settings) -> str:
    given = SETTINGS | {"kind": "finetune", "dtype": "float32"} | settings
    path.write_text(f"from ml_collections import ConfigDict\n\ndef get_config():\n    return ConfigDict({given!r})\n")
    return str(path)


def train(config: str, model: Path, data: Path, out: Path, *more: str) -> int:
    return main(["train", "--config", config, "--model", str(model), "--data", str(data), "--out", str(out), *more])


def test_clips_of_the_model_on_its_way(clips, tiny_folder, tmp_path, caplog, quick_compiler):
    """What training changes is seen in them, the model itself stays; one that cannot be made stops nothing."""
    model = wan_jax.load(tiny_folder("t2v"), dtype="float32", offload=False)
    settings = SETTINGS | {"recipe": SETTINGS["recipe"] | {"ema": 0.0, "learning_rate": 0.1}}
    settings |= {"watch": {"sample": 1}, "samples": [{"prompt": "a cat", "num_steps": 1}, {"prompt": "", "seed": 2}]}
    before = model.dit
    finetune(model, settings, clips, tmp_path)
    assert model.dit is before and "000001-2: no sample: the prompt is empty" in caplog.text
    first, second = (read_video(tmp_path / "samples" / f"00000{step}-1.mp4").video for step in (1, 2))
    assert first.shape == (5, 32, 32, 3) and np.abs(first.astype(float) - second).max() > 3
    assert read_image(tmp_path / "samples" / "000002-1.png").shape[0] > 32


def test_a_lora_from_the_command_line(clips, tiny_folder, tmp_path, caplog, quick_compiler):
    config, out = write_recipe(tmp_path / "recipe.py", dtype="bfloat16"), tmp_path / "out"
    assert train(config, tiny_folder("t2v"), clips, out) == 0
    first = (out / "lora.safetensors").read_bytes()
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert not (out / "export").exists()
    assert train(config, tiny_folder("t2v"), clips, out) != 0  # there is a run
    (out / "lora.safetensors").unlink()
    caplog.set_level(logging.WARNING)
    assert train(config, tiny_folder("t2v"), clips, out, "--resume") == 0
    assert (out / "lora.safetensors").read_bytes() == first and "order is a new one" not in caplog.text
    base, tuned = (
        flatten_params(wan_jax.load(tiny_folder("t2v"), dtype="float32", loras=loras).dit)["blocks.cross_attn.v.kernel"]
        for loras in ((), [f"{out}/lora.safetensors"])
    )
    assert np.abs(tuned - base).max() > 1e-4


def test_all_parameters_from_the_command_line(clips, tiny_folder, tmp_path, quick_compiler):
    out = tmp_path / "out"
    assert train(write_recipe(tmp_path / "r.py", trains="all"), tiny_folder("t2v"), clips, out) == 0
    trained, base = (wan_jax.load(folder, dtype="float32") for folder in (out / "export", tiny_folder("t2v")))
    ours, theirs = flatten_params(trained.dit), flatten_params(base.dit)
    assert all(np.abs(ours[path] - theirs[path]).max() > 0 for path in theirs if path.endswith(".kernel"))
    assert same(trained.vae, base.vae)
    trained.files.require(*layouts.spec_parts(trained.spec), "tokenizer")
    assert np.array_equal(trained.tokenizer(["a cat"], 9), base.tokenizer(["a cat"], 9))


def test_wishes_that_cannot_be(clips, t2v, tmp_path, capsys):
    for wrong, message in (
        ({"trains": "lorra"}, "trains='lorra': use lora, adapters, all, did you mean lora?"),
        ({"trains": "adapters"}, "has no adapters"),
        ({"sizes": 3}, "sizes: unknown settings"),
        ({"levels": {"men": 1}}, "levels.men: unknown setting, did you mean mean?"),
        ({"first_frame": 0.2}, "only models with sound"),
    ):
        with pytest.raises(InputError, match=message.replace("?", r"\?")):
            finetune(t2v, SETTINGS | wrong, clips, tmp_path)
    assert main(["train", "--config", write_recipe(tmp_path / "r.py")]) != 0
    assert "name it by --model, and a folder of clips by --data" in capsys.readouterr().err
