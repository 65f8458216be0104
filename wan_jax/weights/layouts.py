"""Where the parts of a model lie in a folder: official, diffusers or our Orbax layout, found by looking.

| part | official | diffusers | Orbax |
|---|---|---|---|
| dit (the high-noise expert of two) | root, or high_noise_model/ | transformer/ | dit/ |
| dit_low (the low-noise expert) | low_noise_model/ | transformer_2/ | dit_low/ |
| vae | Wan2.1_VAE.pth, Wan2.2_VAE.pth | vae/ | vae/ |
| text_encoder | models_t5_umt5-xxl-enc-bf16.pth | text_encoder/ | text_encoder/ |
| image_encoder | models_clip_...pth | image_encoder/ | image_encoder/ |
| tokenizer | google/umt5-xxl/ | tokenizer/ | tokenizer/ |
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_jax.config import MODELS, CLIPConfig, DiTConfig, ModelSpec, UMT5Config, VAEConfig
from wan_jax.errors import CheckpointError
from wan_jax.weights.maps import clip, dit, umt5, vae
from wan_jax.weights.readers import open_checkpoint

MANIFEST = "wan_jax.json"
VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_OFFICIAL = "google/umt5-xxl"
DIT_STEM = "diffusion_pytorch_model"
EXPERT_FOLDERS = {"dit": "high_noise_model", "dit_low": "low_noise_model"}
DIFFUSERS_FOLDERS = {
    "dit": "transformer", "dit_low": "transformer_2", "vae": "vae", "text_encoder": "text_encoder",
    "image_encoder": "image_encoder", "tokenizer": "tokenizer",
}  # fmt: skip
NETWORKS = ("dit", "dit_low", "vae", "text_encoder", "image_encoder")


@dataclass(frozen=True)
class Files:
    """A model folder: its layout, what model it holds, and the path of every part."""

    folder: Path
    layout: str  # official | diffusers | orbax
    spec: ModelSpec
    parts: Mapping[str, Path]


def spec_parts(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the networks of a model."""
    absent = {"dit_low": spec.num_experts == 1, "image_encoder": spec.clip is None}
    return tuple(part for part in NETWORKS if not absent.get(part))


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def locate(folder: str | Path) -> Files:
    """Find out what a folder holds.

    Raises:
        CheckpointError: no known layout, or parts are missing; names what was looked for and where.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / MANIFEST).is_file():
        return _orbax(folder)
    if (folder / "model_index.json").is_file():
        return _diffusers(folder)
    if (folder / "config.json").is_file() or (folder / EXPERT_FOLDERS["dit"]).is_dir():
        return _official(folder)
    raise CheckpointError(
        f"{folder}: not a model folder. Looked for {MANIFEST} (Orbax layout), model_index.json (diffusers layout), and"
        f" config.json or {EXPERT_FOLDERS['dit']}/ (official layout)"
    )


def _require(parts: Mapping[str, Path]) -> None:
    missing = [f"{part}: {path}" for part, path in parts.items() if not path.exists()]
    if missing:
        raise CheckpointError("the checkpoint lacks\n  " + "\n  ".join(missing))


def _official(folder: Path) -> Files:
    two = (folder / EXPERT_FOLDERS["dit"]).is_dir()
    parts = {part: folder / name for part, name in EXPERT_FOLDERS.items()} if two else {"dit": folder}
    parts["vae"] = next((folder / name for name in VAE_FILES if (folder / name).exists()), folder / VAE_FILES[0])
    parts["text_encoder"] = folder / T5_FILE
    parts["tokenizer"] = folder / TOKENIZER_OFFICIAL
    _require(parts)
    config = read_json(parts["dit"] / "config.json")
    shapes = part_shapes("dit", parts["dit"])
    dit_cfg = dit.config_from_official(config, shapes)
    image_cfg = None
    if dit_cfg.image_tokens:
        parts["image_encoder"] = folder / CLIP_FILE
        _require(parts)
        image_cfg = clip.infer_config(part_shapes("image_encoder", parts["image_encoder"]))
        dit_cfg = dataclasses.replace(dit_cfg, image_tokens=image_cfg.num_tokens * (2 if dit_cfg.image_positions else 1))
    text_cfg = umt5.infer_config(part_shapes("text_encoder", parts["text_encoder"]))
    vae_cfg = vae.infer_config(part_shapes("vae", parts["vae"]))
    task = config.get("model_type", "t2v")
    return Files(folder, "official", _find_spec(folder, task, two, dit_cfg, vae_cfg, text_cfg, image_cfg), parts)


def _diffusers(folder: Path) -> Files:
    index = read_json(folder / "model_index.json")
    two = index.get("transformer_2", [None])[0] is not None
    names = {"dit", "vae", "text_encoder", "tokenizer"} | ({"dit_low"} if two else set())
    parts = {part: folder / name for part, name in DIFFUSERS_FOLDERS.items() if part in names}
    _require(parts)
    dit_cfg = dit.config_from_diffusers(read_json(parts["dit"] / "config.json"))
    image_cfg = None
    if dit_cfg.image_tokens:
        parts["image_encoder"] = folder / DIFFUSERS_FOLDERS["image_encoder"]
        _require(parts)
        image_cfg = clip.config_from_diffusers(read_json(parts["image_encoder"] / "config.json"))
        pictures = 2 if dit_cfg.image_positions else 1
        dit_cfg = dataclasses.replace(dit_cfg, image_tokens=pictures * image_cfg.num_tokens)
    if index.get("expand_timesteps"):
        task = "ti2v"
    elif dit_cfg.image_positions:
        task = "flf2v"
    else:
        task = "i2v" if dit_cfg.in_dim > dit_cfg.out_dim else "t2v"
    text_cfg = umt5.config_from_diffusers(read_json(parts["text_encoder"] / "config.json"))
    vae_cfg = vae.config_from_diffusers(read_json(parts["vae"] / "config.json"))
    spec = _find_spec(folder, task, two, dit_cfg, vae_cfg, text_cfg, image_cfg)
    if two and index.get("boundary_ratio"):
        spec = dataclasses.replace(spec, boundary=index["boundary_ratio"])
    return Files(folder, "diffusers", spec, parts)


def _orbax(folder: Path) -> Files:
    manifest = read_json(folder / MANIFEST)
    try:
        spec = spec_from_json(manifest["spec"])
        parts = {part: folder / part for part in manifest["parts"]}
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not written by this program, or damaged: {error}") from error
    _require(parts)
    return Files(folder, "orbax", spec, parts)


def part_shapes(part: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the official file of a part."""
    with open_part(part, path) as source:
        return {name: tuple(tensor.shape) for name, tensor in source.items()}


def open_part(part: str, path: Path):
    """Open the tensors of one network (official or diffusers layout)."""
    return open_checkpoint(path, stem=DIT_STEM) if part.startswith("dit") and path.is_dir() else open_checkpoint(path)


def table(part: str, cfg: Any) -> list:
    """The name table of one network."""
    if part.startswith("dit"):
        return dit.rows(cfg)
    if part == "vae":
        return vae.rows(cfg)
    return {"text_encoder": umt5, "image_encoder": clip}[part].rows(cfg)


def ignored(part: str, layout: str) -> list[tuple[str, str]]:
    """(pattern, reason) of source keys that a network does not use."""
    module = {"dit": dit, "dit_low": dit, "vae": vae, "text_encoder": umt5, "image_encoder": clip}[part]
    return getattr(module, "IGNORE", {}).get(layout, [])


def network_config(spec: ModelSpec, part: str) -> Any:
    """Architecture of one network of a model."""
    cfg = {"vae": spec.vae, "text_encoder": spec.text, "image_encoder": spec.clip}.get(part, spec.dit)
    if cfg is None:
        raise CheckpointError(f"{spec.name} has no {part}")
    return cfg


def _find_spec(
    folder: Path, task: str, two: bool, dit_cfg: DiTConfig, vae_cfg: VAEConfig, text: UMT5Config, image: CLIPConfig | None
) -> ModelSpec:
    """The published model with these networks; for other widths, the defaults of the nearest kind with the folder's name.

    Two published models with equal networks (I2V 480P and 720P; T2V-14B) are told apart by the folder's name.
    """

    def kind(spec: ModelSpec) -> tuple:
        return spec.task, spec.num_experts == 2, spec.clip is not None

    alike = [spec for spec in MODELS.values() if kind(spec) == (task, two, image is not None)]
    if not alike:
        raise CheckpointError(
            f"{folder}: model_type {task!r} with {'two experts' if two else 'one network'}"
            f" {'and' if image else 'without'} CLIP features is no published kind of Wan model"
        )
    exact = [spec for spec in alike if (spec.dit, spec.vae, spec.text) == (dit_cfg, vae_cfg, text)]
    if exact:
        key = str(folder.resolve()).lower()
        named = [spec for spec in exact if spec.repository.split("/")[-1].lower() in key]
        return dataclasses.replace((named or exact)[0], clip=image)
    return dataclasses.replace(
        alike[0], name=folder.resolve().name, dit=dit_cfg, vae=vae_cfg, text=text, clip=image, repository="",
        diffusers_repository="", licence="unknown",
    )  # fmt: skip


def spec_to_json(spec: ModelSpec) -> dict[str, Any]:
    return dataclasses.asdict(spec)


def spec_from_json(data: Mapping[str, Any]) -> ModelSpec:
    def tuples(value: Any) -> Any:
        return tuple(tuples(v) for v in value) if isinstance(value, list) else value

    fields = {name: tuples(value) for name, value in data.items()}
    for name, kind in (("dit", DiTConfig), ("vae", VAEConfig), ("text", UMT5Config), ("clip", CLIPConfig)):
        if fields[name] is not None:
            fields[name] = kind(**{key: tuples(value) for key, value in fields[name].items()})
    return ModelSpec(**fields)
