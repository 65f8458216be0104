"""The README: its table of models is the one in the code, its links lead somewhere, its Python runs."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import numpy as np
from PIL import Image

import wan_jax
from wan_jax.cli.models import describe
from wan_jax.config import MODELS
from wan_jax.media import Clip

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_table_of_models():
    lines = [line for line in README.splitlines() if line.startswith(tuple(f"| `{name}`" for name in MODELS))]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in lines]
    expected = []
    for spec in MODELS.values():
        about = describe(spec)
        about |= {"sizes": " ".join(about["sizes"]), "memory_bf16_gb": f"{about['memory_bf16_gb']} GB"}
        about.pop("memory_int8_gb")
        expected.append([str(value) for value in about.values()])
    assert rows == expected


def test_paths_exist():
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    mapped = re.findall(r"^\| ((?:`[\w/.]+` ?)+) \|", README[README.index("## Map") :], re.M)
    paths = {link for link in links if link}
    for names in mapped:
        folder = ""
        for name in re.findall(r"`([^`]+)`", names):  # later names of a row are in the folder of the first
            paths.add(path := name if "/" in name else folder + name)
            folder = path[: path.rindex("/") + 1] if path.startswith("wan_jax/") else ""
    assert len(paths) > 15
    assert not [path for path in paths if not (ROOT / path).exists()]
    titles = re.findall(r"^## (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", README)) <= anchors


def test_python_runs(tiny_folder, tmp_path, monkeypatch):
    """Every block in one session, as a reader would, with a tiny model in place of the published one."""
    monkeypatch.chdir(tmp_path)
    load, generate = wan_jax.load, wan_jax.generate

    def tiny(name: str, **options) -> wan_jax.Model:
        return load(tiny_folder("r2av" if MODELS[name].sound else "t2v"), **options)

    monkeypatch.setattr(wan_jax, "load", tiny, raising=False)
    small = functools.partial(generate, size=(32, 32), num_frames=5, num_steps=2, progress=False)
    monkeypatch.setattr(wan_jax, "generate", small, raising=False)
    session: dict = {}
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)).save("photo.jpg")
    hum = 0.3 * np.sin(np.arange(32_000, dtype=np.float32) / 20)
    Clip(None, fps=24, audio=hum, sample_rate=16_000).save("voice.wav")
    for block in re.findall(r"^```python\n(.*?)^```", README, re.M | re.S):
        if "make_mesh" not in block:  # needs eight devices; its result is tested in test_generate
            exec(compile(block, "README.md", "exec"), session)
    assert Path("clip.mp4").exists() and Path("talking.mp4").exists()
    assert session["velocity"].shape == session["noise"].shape
    assert session["video"].shape == (5, 32, 32, 3) and session["video"].dtype == np.uint8
