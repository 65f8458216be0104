"""The command line: every option on tiny random models, mistakes named in one line, exit codes, Ctrl-C and resuming.

Most tests call `wan_jax.cli.main` in this process, where a program is compiled once; the last ones start processes.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from safetensors import safe_open

from wan_jax import pipeline
from wan_jax.cli import main, make_parser
from wan_jax.config import MODELS
from wan_jax.errors import WanError
from wan_jax.media import Clip, read_image, read_settings, read_video
from wan_jax.references import ResolvedReference
from wan_jax.request import resolve
from wan_jax.weights.writers import write_safetensors

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "configs").glob("*.py"))
TRAINING = ("train_", "finetune_")  # how recipes of `wan-jax train` begin
SHORT = ("--prompt", "a cat", "--size", "32x32", "--num-frames", "5", "--num-steps", "2", "--dtype", "float32")


pytestmark = pytest.mark.usefixtures("alone")


@pytest.fixture
def generate(tiny_folder, capsys):
    """Run ``wan-jax generate`` on a tiny model: (exit code, paths printed, what was said)."""

    def call(kind: str, *options: object) -> tuple[int, list[Path], str]:
        code = main(["generate", "--model", str(tiny_folder(kind)), *SHORT, "--quiet", *map(str, options)])
        said = capsys.readouterr()
        return code, [Path(line) for line in said.out.splitlines()], said.err

    return call


@pytest.fixture
def picture():
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)).save("a.png")
    return "a.png"


def with_settings(path: str, settings: dict) -> None:
    """A picture with any settings inside."""
    info = PngImagePlugin.PngInfo()
    info.add_text("wan_jax", json.dumps(settings))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def refuse(capsys, *words: object) -> tuple[int, str]:
    """Exit code and message of a command that must fail."""
    try:
        code = main([*map(str, words)])
    except SystemExit as stop:  # the parser's
        code = stop.code
    said = capsys.readouterr()
    assert code and not said.out, f"exit code {code}, printed {said.out!r}"
    assert "Traceback" not in said.err and not list(Path().rglob("*.mp4"))
    return code, said.err


# ---- what works --------------------------------------------------------------------------------------------


def test_a_clip(generate):
    code, paths, _ = generate("t2v")
    assert (code, paths) == (0, [Path("clip.mp4")])
    assert read_video("clip.mp4").video.shape == (5, 32, 32, 3)
    settings = read_settings("clip.mp4")
    assert settings["prompt"] == "a cat" and settings["dtype"] == "float32" and "versions" in settings


@pytest.mark.parametrize(
    ("kind", "options", "hashes"),
    [
        ("t2v", "", 0),
        ("i2v", "--image a.png", 1),
        ("flf2v", "--image a.png --last-image a.png", 2),
        ("ti2v", "", 0),
        ("ti2v", "--image a.png", 1),
        ("t2v-moe", "--guidance-scale 2 3", 0),
        ("i2v-moe", "--image a.png", 1),
    ],
)
def test_every_kind_of_model_is_understood(kind, options, hashes, tiny_folder, capsys, picture):
    """Clips of every kind are made in test_generate."""
    assert main(["generate", "--model", str(tiny_folder(kind)), *SHORT, *options.split(), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert said.count("_sha256") == hashes and picture not in said  # pictures by their hash alone
    assert json.loads(said)["task"] == kind.split("-")[0]


@pytest.mark.parametrize(
    ("output", "options", "written"),
    [
        ("x.gif", "", ["x.gif"]),
        ("new/x.webp", "", ["new/x.webp"]),
        ("shot/", "", [f"shot/shot-0000{i}.png" for i in range(5)]),
        ("s-%03d.jpg", "", [f"s-00{i}.jpg" for i in range(5)]),
        ("x.mp4", "--seed 1 22", ["x-seed1.mp4", "x-seed22.mp4"]),
        ("x.mp4", "--offload --segment all --guidance sequential --solver dpm++ --shift 3 --fps 8 --tiled", ["x.mp4"]),
        ("x.mp4", "--chunk-tokens 256", ["x.mp4"]),
    ],
)
def test_outputs_and_options(output, options, written, generate):
    assert generate("t2v", "--output", output, *options.split())[0] == 0
    assert sorted(str(path) for path in Path().rglob("*") if path.is_file()) == written
    settings = read_settings(written[0])
    assert settings["fps"] == (8 if "fps" in options else 16)
    assert settings["guidance"] == ("sequential" if "sequential" in options else "batch")
    assert settings["tiled"] == ("tiled" in options)
    assert settings["chunk_tokens"] == (256 if "chunk" in options else 0)


def test_one_frame_is_a_picture(generate):
    code, paths, _ = generate("t2v", "--num-frames", 1)
    assert (code, paths) == (0, [Path("clip.png")])
    assert read_image("clip.png").shape == (32, 32, 3) and read_settings("clip.png")["num_frames"] == 1


def test_profile_and_progress_leave_stdout_alone(tiny_folder, capfd):
    assert main(["generate", "--model", str(tiny_folder("t2v")), *SHORT, "--profile"]) == 0
    out, err = capfd.readouterr()
    assert out == "clip.mp4\n"
    for said in ("encoding the conditions", "sampling", "2/2", "decoding", "writing", "peak host memory"):
        assert said in err


def test_from_a_clip_or_a_picture(generate, tiny_folder, capsys):
    assert generate("t2v", "--seed", 5, "--num-steps", 1)[0] == 0
    words = ["generate", "--model", str(tiny_folder("t2v")), "--from", "clip.mp4", "--quiet"]
    assert main([*words, "--output", "again.mp4"]) == 0
    assert Path("again.mp4").read_bytes() == Path("clip.mp4").read_bytes()  # settings are inside both
    assert main([*words, "--seed", "6", "--output", "clip-%05d.png"]) == 0
    again, first = read_settings("clip-00000.png"), read_settings("clip.mp4")
    assert again.pop("provenance") != first.pop("provenance") and again == first | {"seed": 6}
    capsys.readouterr()
    assert main([*words[:3], "--from", "clip-00003.png", "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["seed"] == [6]


def test_from_takes_no_paths(capsys, caplog, picture):
    made_with = {"model": "wan2.1-i2v-14b-480p", "prompt": "a cat", "image_sha256": "0", "loras": [{"name": "style"}]}
    with_settings("old.png", made_with)
    command = ["generate", "--from", "old.png", "--dry-run"]
    assert main(command) == 2 and "needs a picture" in capsys.readouterr().err
    assert "made with --image: give it again" in caplog.text and "made with --lora: give it again" in caplog.text
    assert main([*command, "--image", picture]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "wan2.1-i2v-14b-480p"


def test_dry_run_loads_nothing(capsys, monkeypatch):
    monkeypatch.setattr("wan_jax.model.load", lambda *_, **__: pytest.fail("loaded"))
    assert main(["generate", "--model", "wan2.2-t2v-a14b", "--prompt", "a cat", "--aspect", "9:16", "--dry-run"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert (about["width"], about["height"], about["num_frames"], about["num_steps"]) == (720, 1280, 81, 40)
    assert about["guidance_scale"] == [3.0, 4.0] and about["shift"] == 12.0
    assert about["seed"] == [0] and about["output"] == ["clip.mp4"]


def test_adapter(generate):
    rng = np.random.default_rng(0)
    tensors = {f"blocks.0.self_attn.q.lora_{x}.weight": rng.standard_normal(shape, np.float32) for x, shape in
               (("A", (4, 64)), ("B", (64, 4)))}  # fmt: skip
    write_safetensors("style.safetensors", tensors)
    assert generate("t2v", "--output", "plain.mp4")[0] == 0
    assert generate("t2v", "--lora", "style.safetensors:0.5")[0] == 0
    assert not np.array_equal(read_video("plain.mp4").video, read_video("clip.mp4").video)
    assert read_settings("clip.mp4")["loras"] == [{"name": "style.safetensors", "strength": 0.5}]


def test_models_lists_them_all(capsys):
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert all(f"{name} " in table for name in MODELS)
    assert main(["models", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)] == list(MODELS)


def test_convert_there_and_back(tiny_folder, capsys):
    assert main(["convert", "check", str(tiny_folder("t2v"))]) == 0
    assert capsys.readouterr().out.count("complete") == 3
    assert main(["convert", "import", str(tiny_folder("t2v")), "orbax", "--dtype", "float32"]) == 0
    assert main(["convert", "export", "orbax", "diffusers", "--layout", "diffusers", "--dtype", "float32"]) == 0
    assert main(["convert", "export", "diffusers", "official", "--dtype", "float32"]) == 0
    name = "diffusion_pytorch_model.safetensors"
    before, after = (safe_open(folder / name, "numpy") for folder in (tiny_folder("t2v"), Path("official")))
    assert set(before.keys()) == set(after.keys())
    assert all(np.array_equal(before.get_tensor(key), after.get_tensor(key)) for key in before.keys())
    capsys.readouterr()
    code, said = refuse(capsys, "convert", "random", "orbax", "--tiny", "t2v")
    assert code == 2 and "orbax exists and is not empty: name a new folder" in said


# ---- recipes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in RECIPES if not p.stem.startswith(TRAINING)], ids=lambda path: path.stem)
def test_recipes_hold_official_settings(path):
    """But for the one whose docstring says otherwise, a recipe spells out the defaults of its model."""
    config = runpy.run_path(str(path))["get_config"]().to_dict()
    if path.stem == "tiny":
        return
    spec = MODELS[config.pop("model")]
    config.pop("output", None)
    picture = np.zeros((480, 832, 3), np.uint8) if spec.task in ("i2v", "flf2v") else None
    last = picture if spec.task == "flf2v" else None
    given = dict(image=picture, last_image=last)
    if spec.needs_references:
        given |= dict(references=[ResolvedReference(np.zeros((8, 8, 3), np.uint8))], consent="yes")
    request = resolve(spec, "a cat", **given, **config)
    official = resolve(spec, "a cat", **given)
    advised = {"shift": 8.0, "guidance_scale": 6.0} if path.stem == "t2v_1_3b" else {}
    one_frame = {"num_frames": 1} if path.stem == "t2i_14b" else {}
    assert request.settings(0) == official.settings(0) | advised | one_frame


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_show_commands_that_work(path, picture, capsys):
    docstring = runpy.run_path(str(path))["__doc__"].replace("\\\n", " ")
    commands = [shlex.split(line)[1:] for line in docstring.splitlines() if line.startswith("    wan-jax ")]
    os.symlink(ROOT / "configs", "configs")
    for name in ("photo.jpg", "first.png", "last.png"):
        Image.open(picture).save(name)
    Clip(None, fps=24, audio=np.full(16_000, 0.1, np.float32), sample_rate=16_000).save("voice.wav")
    for words in commands:
        if words[0] == "generate" and not path.stem.startswith(("tiny", *TRAINING)):  # of files that are there
            assert main([*words, "--dry-run"]) == 0
        else:
            make_parser().parse_args(words)
    assert commands


def test_recipe_below_clip_below_options(tiny_folder, capsys):
    def settings(*options: str) -> dict:
        assert main(["generate", "--model", str(tiny_folder("t2v")), "--dry-run", *options]) == 0
        return json.loads(capsys.readouterr().out)

    recipe = ("--config", str(ROOT / "configs" / "tiny.py"))
    with_settings("old.png", {"num_steps": 7, "size": [64, 64]})
    assert settings(*recipe)["num_steps"] == 2 and settings(*recipe)["size"] == [32, 32]
    both = settings(*recipe, "--from", "old.png")
    assert (both["num_steps"], both["size"], both["num_frames"]) == (7, [64, 64], 5)
    assert settings(*recipe, "--from", "old.png", "--num-steps", "9")["num_steps"] == 9
    assert settings(*recipe, "--aspect", "16:9")["size"] == [832, 480]  # an aspect takes the place of a size
    Path("mine.py").write_text("import types\ndef get_config():\n    return types.SimpleNamespace(to_dict=lambda: "
                               "{'prompt': 'x', 'aspect': '9:16', 'lora': None, 'solver': 'euler'})\n")  # fmt: skip
    assert settings("--config", "mine.py")["solver"] == "euler"
    assert settings("--config", "mine.py", "--size", "64x64")["size"] == [64, 64]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "recipe.py: no such file"),
        ("x = 1", "recipe.py is no recipe: it defines no get_config()"),
        ("import no_such_module", "No module named 'no_such_module': pip install no_such_module"),
        ("{'num_step': 3, 'promt': 'x'}", "unknown setting 'num_step', did you mean num_steps"),
        ("{'num_steps': 'many'}", "num_steps='many': need a whole number"),
        ("{'quiet': True}", "unknown setting 'quiet'"),
    ],
)
def test_wrong_recipes(text, message, tiny_folder, capsys):
    if text:
        code = f"import types\ndef get_config(): return types.SimpleNamespace(to_dict=lambda: {text})"
        Path("recipe.py").write_text(code if text.startswith("{") else text)
    code, said = refuse(capsys, "generate", "--model", tiny_folder("t2v"), "--prompt", "x", "--config", "recipe.py")
    assert code == 2 and message in said


# ---- what does not -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("t2v", "--num-frames 80", "num_frames=80: need 4n+1, try 81"),
        ("t2v", "--size 65x48", "size 65x48: width must be a multiple of 16, try 64"),
        ("ti2v", "--size 64x48", "size 64x48: height must be a multiple of 32, try 64"),
        ("t2v", "--size 640", "size '640': expected WIDTHxHEIGHT such as 832x480"),
        ("t2v", "--aspect 1:1", "give size or aspect, not both"),
        ("t2v", "--prompt ''", "the prompt is empty"),
        ("t2v", "--fps 0", "fps=0: need 0.1 to 240"),
        ("t2v", "--shift nan", "shift=nan: need a finite number"),
        ("t2v", "--guidance-scale 3 4", "takes one number"),
        ("t2v-moe", "--guidance-scale 3 4 5", "takes one number, or two: (low, high)"),
        ("t2v", "--seed 1 1", "seeds [1, 1]: give one or several different ones"),
        ("t2v", "--mesh fsd=2", "unknown mesh axis 'fsd': use data, fsdp, seq, tensor, did you mean fsdp?"),
        ("t2v", "--mesh fsdp=7", "needs 7 devices, found"),
        ("t2v", "--mesh fsdp", "mesh 'fsdp': expected name=size pairs such as fsdp=4,seq=2"),
        ("t2v", "--segment none", "argument --segment: 'none': need a positive number of steps, or 'all'"),
        ("t2v", "--segment 0", "argument --segment: '0'"),
        ("t2v", "--num-steps x", "argument --num-steps: invalid int value: 'x'"),
        ("t2v", "--solver unpic", "use unipc, dpm++, euler, distilled, rcm, rcm-ode, did you mean unipc?"),
        ("t2v", "--guidence-scale 3", "unknown option '--guidence-scale', did you mean --guidance-scale"),
        ("t2v", "cat", "unexpected 'cat': text with blanks needs quotes"),
        ("t2v", "--output clip.avi", "its suffix is none of .mp4"),
        ("t2v", "--output a.png/x.mp4", "is not a folder, choose another place"),
        ("t2v", "--output x.png", "cannot write 5 frames to x.png: name it x-%05d.png, or .mp4"),
        ("t2v", "--output folder.gif", "it is a folder, end it with '/'"),
        ("t2v", "--lora no.safetensors", "adapter 'no.safetensors': no such file"),
        ("t2v", "--from no.mp4", "no.mp4 is missing: give the path of a local file"),
        ("t2v", "--from a.png", "a.png holds no settings of wan_jax"),
        ("t2v", "--image a.png", "makes video from text alone; for a first picture use one of wan2.1-i2v-14b-480p"),
        ("i2v", "", "needs a picture: give image= (--image)"),
        ("i2v", "--image no.png", "no.png is missing: give the path of a local file"),
        ("i2v", "--image folder.gif", "folder.gif is not a readable file"),
        ("i2v", "--image big.png", "big.png has 9000x9000 = 81.0 Mpixel, the limit is 64.0 Mpixel"),
        ("i2v", "--image text.png", "is not an intact PNG"),
        ("i2v", "--image thin.png", "a picture of 2000x2 is too narrow"),
        ("flf2v", "--image a.png", "needs a first and a last picture"),
    ],
)  # fmt: skip
def test_wrong_use_is_found_before_loading(kind, options, message, tiny_folder, capsys, monkeypatch, picture):
    monkeypatch.setattr("wan_jax.model.load", lambda *_, **__: pytest.fail("loaded"))
    Path("folder.gif").mkdir()
    Path("text.png").write_text("not a picture")
    Image.new("1", (9000, 9000)).save("big.png")
    Image.new("1", (2000, 2)).save("thin.png")
    words = "generate", "--model", tiny_folder(kind), *SHORT, *shlex.split(options)
    code, said = refuse(capsys, *words)
    assert code == 2 and message in said


def test_unknown_names(capsys):
    code, said = refuse(capsys, "generate", "--model", "wan2.1-t2v-1.4b", "--prompt", "x")
    assert code == 2 and "no folder 'wan2.1-t2v-1.4b' here, and unknown model" in said and "wan2.1-t2v-1.3b" in said
    code, said = refuse(capsys, "generat")
    assert code == 2 and "did you mean generate" in said
    code, said = refuse(capsys, "convert", "random", "x", "--tiny", "t2v", "--sead", 3)
    assert code == 2 and "unknown option '--sead', did you mean --seed" in said
    assert "see wan-jax convert random --help" in said
    code, said = refuse(capsys, "generate", "--prompt", "x")
    assert code == 2 and "give --model" in said


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompt": 5}, "prompt=5: need text"),
        ({"prompt": "x", "num_frames": "81"}, "num_frames='81': need a whole number"),
        ({"prompt": "x", "size": {"a": 1}}, "expected WIDTHxHEIGHT"),
        ({"prompt": "x", "guidance_scale": [None]}, "guidance_scale=None: need a finite number"),
        ({"prompt": "x", "shift": 10**400}, "need a finite number"),
        ({"prompt": "x", "seed": [[1]]}, "seed=[1]: need a whole number"),
        ({"prompt": "x", "model": "/tmp", "image": "/etc/passwd", "lora": "x.safetensors"}, "give --model"),
    ],
)
def test_settings_of_unknown_origin(settings, message, tiny_folder, capsys):
    with_settings("old.png", settings)
    model = () if "model" in settings else ("--model", tiny_folder("t2v"))
    code, said = refuse(capsys, "generate", "--from", "old.png", *model)
    assert code == 2 and message in said


class _Hostile:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def _damage(folder: Path, how: str) -> None:
    if how == "missing":
        (folder / "Wan2.1_VAE.pth").unlink()
    elif how == "truncated":
        os.truncate(folder / "diffusion_pytorch_model.safetensors", 100_000)
    elif how == "hostile":
        with zipfile.ZipFile(folder / "Wan2.1_VAE.pth", "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(_Hostile(), protocol=2))
    else:
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "the checkpoint in copy lacks\n  vae: copy/Wan2.1_VAE.pth"),
        ("truncated", "diffusion_pytorch_model.safetensors: truncated: 100,000 bytes"),
        ("hostile", "Wan2.1_VAE.pth: refused"),
        ("empty", "copy: not a model folder"),
    ],
)
def test_damaged_checkpoints(how, message, tiny_folder, capsys):
    shutil.copytree(tiny_folder("t2v"), "copy")
    _damage(Path("copy"), how)
    code, said = refuse(capsys, "generate", "--model", "copy", *SHORT)
    assert code == 1 and message in said and not Path("owned").exists()


def test_out_of_memory_is_exit_code_3(tiny_folder, capsys):
    code, said = refuse(capsys, "generate", "--model", tiny_folder("t2v"), *SHORT, "--num-frames", 4 * 10**9 + 1)
    assert code == 3 and "out of memory. Use a smaller size or fewer frames" in said and "--offload" in said


def test_a_full_disk_is_exit_code_1(capsys, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "x")

    monkeypatch.setattr("wan_jax.conversion.write_folder", full)
    code, said = refuse(capsys, "convert", "random", "x", "--tiny", "t2v")
    assert code == 1 and "No space left on device" in said


def test_nothing_is_lost_when_writing_fails(generate, monkeypatch, caplog):
    """The old clip stays whole, the sampler's state is kept, and the repeated command only decodes, here in tiles."""
    Path("clip.mp4").write_text("an older file")

    def fail(*_, **__):
        raise WanError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(Clip, "save", fail)
        code, paths, said = generate("t2v")
    assert code == 1 and not paths and "no room" in said
    assert Path("clip.mp4").read_text() == "an older file"
    state = Path(".clip.mp4.resume.safetensors")
    assert state.exists() and str(state) in caplog.text
    monkeypatch.setattr(pipeline, "sample", lambda *_, **__: pytest.fail("sampled again"))
    assert generate("t2v", "--tiled")[0] == 0 and not state.exists()
    assert len(read_video("clip.mp4").video) == 5


def test_a_damaged_state_is_named(generate):
    Path(".clip.mp4.resume.safetensors").write_bytes(b"x" * 100)
    code, _, said = generate("t2v")
    assert code == 1 and ".clip.mp4.resume.safetensors" in said
    write_safetensors(".clip.mp4.resume.safetensors", {"x": np.zeros(3, np.float32)}, metadata={"settings": "[1]"})
    code, _, said = generate("t2v")
    assert code == 1 and "not the saved state of a run" in said and "delete it" in said


# ---- real processes ----------------------------------------------------------------------------------------


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "wan_jax.cli", *map(str, words)]


def test_ctrl_c_and_the_same_command_again(tiny_folder, generate):
    """An interrupted command, repeated, gives the clips of an uninterrupted one, bit for bit."""
    options = ("--num-steps", 600, "--seed", 1, 2, "--output")
    assert generate("t2v-moe", *options, "whole.mp4")[0] == 0

    words = command("generate", "--model", tiny_folder("t2v-moe"), *SHORT, *options, "cut.mp4")
    process = subprocess.Popen(words, stderr=subprocess.PIPE)
    seen = b""
    try:
        while max(map(int, re.findall(rb"(\d+)/1200", seen)), default=0) < 30:  # the progress bar
            piece = process.stderr.read1(4096)
            assert piece, seen.decode()
            seen += piece
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
    assert process.returncode == 130
    state = Path(".cut.mp4.resume.safetensors")
    assert f"state saved in {state}" in said and "wan-jax: interrupted" in said
    done = json.loads(safe_open(state, "numpy").metadata()["done"])
    assert 30 <= sum(done.values()) < 1200, "interrupted before or after sampling"
    assert not list(Path().glob("cut*")) and not list(Path().glob(".*partial*"))

    code, _, said = generate("t2v-moe", *options, "cut.mp4", "--shift", 3)
    assert code == 1 and "a run with other settings (shift)" in said and state.exists()

    code, paths, _ = generate("t2v-moe", *options, "cut.mp4")
    assert (code, paths) == (0, [Path("cut-seed1.mp4"), Path("cut-seed2.mp4")]) and not state.exists()
    for seed in (1, 2):
        assert Path(f"cut-seed{seed}.mp4").read_bytes() == Path(f"whole-seed{seed}.mp4").read_bytes()


def test_a_closed_pipe_is_no_error():
    shell = f"{shlex.join(command('models'))} | head -n 1 ; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and "NAME" in done.stdout


def test_exit_code_of_a_process(tiny_folder):
    done = subprocess.run(command("generate", "--model", tiny_folder("t2v")), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("wan-jax: the prompt is empty") and not done.stdout
