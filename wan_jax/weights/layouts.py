"""Where the parts of a model lie in a folder: official, diffusers or our Orbax layout, found by looking.

| part | official | diffusers | Orbax |
|---|---|---|---|
| dit (the high-noise expert of two) | root, or high_noise_model/ | transformer/ | dit/ |
| dit_low (the low-noise expert) | low_noise_model/ | transformer_2/ | dit_low/ |
| vae | Wan2.1_VAE.pth, Wan2.2_VAE.pth | vae/ | vae/ |
| text_encoder | models_t5_umt5-xxl-enc-bf16.pth | text_encoder/ | text_encoder/ |
| image_encoder | models_clip_...pth | image_encoder/ | image_encoder/ |
| tokenizer | google/umt5-xxl/ | tokenizer/ | tokenizer/ |
| audio_vae, vocoder | MMAudio/ext_weights/ | - | audio_vae/, vocoder/ |

A model that `wan_jax.train` exported has all networks in ``weights-*.safetensors`` under our own names, beside
``spec.json`` and ``tokenizer.json``: the compact layout.

Models with sound come as a folder of several repositories: the transformer is `ModelSpec.file`; its VAE, text encoder
and tokenizer lie in Wan2.2-TI2V-5B/. There is no diffusers layout of them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wan_jax.config import MODELS, DiTConfig, FusionConfig, ModelSpec, from_json
from wan_jax.errors import CheckpointError
from wan_jax.weights.engine import Row
from wan_jax.weights.fused import FusedWeights
from wan_jax.weights.maps import audio_vae, clip, dit, fusion, umt5, vae, vocoder
from wan_jax.weights.readers import open_checkpoint

log = logging.getLogger(__name__)

MANIFEST = "wan_jax.json"
COMPACT = "spec.json"
VAE_FILES = ("Wan2.1_VAE.pth", "Wan2.2_VAE.pth")
T5_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_OFFICIAL = "google/umt5-xxl"
# In a folder of several repositories.
SOUND_PATHS = {
    "vae": f"Wan2.2-TI2V-5B/{VAE_FILES[1]}",
    "text_encoder": f"Wan2.2-TI2V-5B/{T5_FILE}",
    "tokenizer": f"Wan2.2-TI2V-5B/{TOKENIZER_OFFICIAL}",
    "image_encoder": f"Wan2.1-I2V-14B-480P/{CLIP_FILE}",
    "audio_vae": "MMAudio/ext_weights/v1-16.pth",
    "vocoder": "MMAudio/ext_weights/best_netG.pt",
}
DIT_STEM = "diffusion_pytorch_model"
EXPERT_FOLDERS = {"dit": "high_noise_model", "dit_low": "low_noise_model"}
DIFFUSERS_FOLDERS = {
    "dit": "transformer", "dit_low": "transformer_2", "vae": "vae", "text_encoder": "text_encoder",
    "image_encoder": "image_encoder", "tokenizer": "tokenizer",
}  # fmt: skip
SPEC_FIELDS = {"vae": "vae", "text_encoder": "text", "image_encoder": "clip"}  # part -> field of ModelSpec
SOUND_FIELDS = {"audio_vae": "vae", "vocoder": "vocoder"}  # part -> field of SoundSpec
MAPS = {"vae": vae, "text_encoder": umt5, "image_encoder": clip, "audio_vae": audio_vae, "vocoder": vocoder}
NETWORKS = ("dit", "dit_low", *MAPS)


@dataclass(frozen=True)
class Files:
    """A model folder: its layout, what model it holds, and where every part is, or would be if it were there."""

    folder: Path
    layout: str  # official | diffusers | orbax | compact
    spec: ModelSpec
    parts: Mapping[str, Path]

    @property
    def networks(self) -> tuple[str, ...]:
        """Names of the networks that are there."""
        return tuple(part for part in NETWORKS if part in self.parts and self.parts[part].exists())

    def require(self, *parts: str) -> None:
        """Raise CheckpointError unless these parts are there; it names each that is not, and where it was sought."""
        unknown = [part for part in parts if part not in self.parts]
        if unknown:
            known = ", ".join(self.parts)
            raise CheckpointError(f"{self.spec.name} has no {', '.join(unknown)}; its parts are {known}")
        missing = [f"{part}: {self.parts[part]}" for part in parts if not self.parts[part].exists()]
        if missing:
            raise CheckpointError(f"the checkpoint in {self.folder} lacks\n  " + "\n  ".join(missing))


def spec_parts(spec: ModelSpec) -> tuple[str, ...]:
    """Names of the networks of a model."""
    absent = {"dit_low": spec.num_experts == 1, "image_encoder": spec.clip is None}
    absent |= {part: not getattr(spec.sound, field, None) for part, field in SOUND_FIELDS.items()}
    return tuple(part for part in NETWORKS if not absent.get(part))


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error


def locate(folder: str | Path) -> Files:
    """Find out what a folder holds. Parts may be missing, but for the diffusion transformer; see `Files.require`.

    Args:
        folder: or, of models with sound, the transformer's file in it: a folder may hold several.
    Raises:
        CheckpointError: no known layout; names what was looked for and where.
    """
    folder = Path(folder)
    with_sound = [spec for spec in MODELS.values() if spec.file]
    if folder.is_file():
        for spec in with_sound:
            if folder.match(spec.file):
                return _with_sound(folder.parents[len(Path(spec.file).parts) - 1], spec)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if (folder / MANIFEST).is_file():
        return _orbax(folder)
    if (folder / COMPACT).is_file():
        return _compact(folder)
    if (folder / "model_index.json").is_file():
        return _diffusers(folder)
    if (folder / "config.json").is_file() or (folder / EXPERT_FOLDERS["dit"]).is_dir():
        return _official(folder)
    if found := [spec for spec in with_sound if (folder / spec.file).is_file()]:
        if len(found) > 1:
            others = ", ".join(str(folder / spec.file) for spec in found[1:])
            log.warning("%s: taking %s; name another file to take it: %s", folder, found[0].file, others)
        return _with_sound(folder, found[0])
    files = ", ".join(spec.file for spec in with_sound)
    raise CheckpointError(
        f"{folder}: not a model folder. Looked for {MANIFEST} (Orbax layout), {COMPACT} (compact layout),"
        f" model_index.json (diffusers layout), config.json or {EXPERT_FOLDERS['dit']}/ (official layout), and {files}"
        " (with sound)"
    )


def _official(folder: Path) -> Files:
    two = (folder / EXPERT_FOLDERS["dit"]).is_dir()
    parts = {part: folder / name for part, name in EXPERT_FOLDERS.items()} if two else {"dit": folder}
    config = read_json(parts["dit"] / "config.json")
    dit_cfg = dit.config_from_official(config, part_shapes("dit", parts["dit"]))
    vae_file = VAE_FILES[1] if config.get("model_type") == "ti2v" else VAE_FILES[0]
    parts |= {
        "vae": folder / vae_file,
        "text_encoder": folder / T5_FILE,
        "tokenizer": folder / TOKENIZER_OFFICIAL,
    }
    if dit_cfg.image_tokens:
        parts["image_encoder"] = folder / CLIP_FILE
    found = {
        part: module.infer_config(part_shapes(part, parts[part]))
        for part, module in (("vae", vae), ("text_encoder", umt5), ("image_encoder", clip))
        if part in parts and parts[part].exists()
    }
    return Files(folder, "official", _find_spec(folder, config.get("model_type", "t2v"), two, dit_cfg, found), parts)


def _with_sound(folder: Path, spec: ModelSpec) -> Files:
    parts = {"dit": folder / spec.file} | {part: folder / name for part, name in SOUND_PATHS.items()}
    parts = {part: path for part, path in parts.items() if part in (*spec_parts(spec), "tokenizer")}
    config = parts["dit"].with_name("config.json")
    stated = read_json(config) if config.is_file() else None
    found = {
        part: module.infer_config(part_shapes(part, parts[part]))
        for part, module in MAPS.items()
        if part in parts and parts[part].exists()
    }
    fields = {"dit": fusion.infer_config(part_shapes("dit", parts["dit"]), stated)}
    fields |= {field: found[part] for part, field in SPEC_FIELDS.items() if part in found}
    heard = {field: found[part] for part, field in SOUND_FIELDS.items() if part in found}
    same = dataclasses.replace(spec, **fields, sound=dataclasses.replace(spec.sound, **heard))
    if same != spec:  # other widths: the defaults of this kind
        same = dataclasses.replace(same, name=folder.resolve().name, repository="", companions=(), licence="unknown")
    return Files(folder, "official", same, parts)


def _diffusers(folder: Path) -> Files:
    index = read_json(folder / "model_index.json")
    two = index.get("transformer_2", [None])[0] is not None
    dit_cfg = dit.config_from_diffusers(read_json(folder / DIFFUSERS_FOLDERS["dit"] / "config.json"))
    absent = {"dit_low": not two, "image_encoder": not dit_cfg.image_tokens}
    parts = {part: folder / name for part, name in DIFFUSERS_FOLDERS.items() if not absent.get(part)}
    found = {
        part: module.config_from_diffusers(read_json(parts[part] / "config.json"))
        for part, module in (("vae", vae), ("text_encoder", umt5), ("image_encoder", clip))
        if part in parts and parts[part].exists()
    }
    if index.get("expand_timesteps"):
        task = "ti2v"
    elif dit_cfg.image_positions:
        task = "flf2v"
    else:
        task = "i2v" if dit_cfg.in_dim > dit_cfg.out_dim else "t2v"
    spec = _find_spec(folder, task, two, dit_cfg, found)
    if two and index.get("boundary_ratio"):
        spec = dataclasses.replace(spec, boundary=index["boundary_ratio"])
    return Files(folder, "diffusers", spec, parts)


def _orbax(folder: Path) -> Files:
    manifest = read_json(folder / MANIFEST)
    try:
        spec = from_json(ModelSpec, manifest["spec"])
        return Files(folder, "orbax", spec, {part: folder / part for part in (*spec_parts(spec), "tokenizer")})
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: not written by this program, or damaged: {error}") from error


def _compact(folder: Path) -> Files:
    try:
        spec = from_json(ModelSpec, read_json(folder / COMPACT)["spec"])
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / COMPACT}: not written by this program, or damaged: {error}") from error
    return Files(folder, "compact", spec, dict.fromkeys((*spec_parts(spec), "tokenizer"), folder))


def compact_rows(part: str, paths: Iterable[str]) -> list[Row]:
    """The name table of one network in the compact layout: our paths behind its name, stacks as they are."""
    return [Row(path, "array", f"{part}.{path}", ()) for path in paths]


def part_shapes(part: str, path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the official file of a part."""
    with open_part(part, path) as source:
        return {name: tuple(tensor.shape) for name, tensor in source.items()}


def open_part(part: str, path: Path):
    """Open the tensors of one network (official or diffusers layout)."""
    if part == "vocoder":
        return FusedWeights(open_checkpoint(path))
    return open_checkpoint(path, stem=DIT_STEM) if part.startswith("dit") and path.is_dir() else open_checkpoint(path)


def table(part: str, cfg: Any) -> list:
    """The name table of one network."""
    return _map(part, cfg).rows(cfg)


def ignored(part: str, cfg: Any, layout: str) -> list[tuple[str, str]]:
    """(pattern, reason) of source keys that a network does not use."""
    return getattr(_map(part, cfg), "IGNORE", {}).get(layout, [])


def _map(part: str, cfg: Any) -> Any:
    return MAPS.get(part) or (fusion if isinstance(cfg, FusionConfig) else dit)


def network_config(spec: ModelSpec, part: str) -> Any:
    """Architecture of one network of a model."""
    if part in SOUND_FIELDS:
        cfg = spec.sound and getattr(spec.sound, SOUND_FIELDS[part])
    else:
        cfg = getattr(spec, SPEC_FIELDS.get(part, "dit"))
    if cfg is None:
        raise CheckpointError(f"{spec.name} has no {part}")
    return cfg


def _find_spec(folder: Path, task: str, two: bool, dit_cfg: DiTConfig, found: Mapping[str, Any]) -> ModelSpec:
    """The published model with these networks; for other widths, the defaults of the nearest kind, named by the folder.

    Two published models with equal networks (I2V 480P and 720P) are told apart by the folder's name.

    Args:
        found: architectures of the other networks, as far as their files are there.
    """

    def kind(spec: ModelSpec) -> tuple:
        return spec.task, spec.num_experts == 2, spec.clip is not None

    image = dit_cfg.image_tokens > 0
    alike = [spec for spec in MODELS.values() if kind(spec) == (task, two, image)]
    if not alike:
        raise CheckpointError(
            f"{folder}: model_type {task!r} with {'two experts' if two else 'one network'}"
            f" {'and' if image else 'without'} CLIP features is no published kind of Wan model"
        )
    if tower := found.get("image_encoder"):
        dit_cfg = dataclasses.replace(dit_cfg, image_tokens=tower.num_tokens * (2 if dit_cfg.image_positions else 1))
    networks = {"dit": dit_cfg} | {field: found[part] for part, field in SPEC_FIELDS.items() if part in found}
    key = str(folder.resolve()).lower()
    alike.sort(key=lambda spec: spec.repository.split("/")[-1].lower() not in key)  # the named one first
    for spec in alike:
        same = {name: dataclasses.replace(spec, **{name: cfg}) == spec for name, cfg in networks.items()}
        same["clip"] = True  # diffusers keeps the tower without its head
        if all(same.values()):
            return dataclasses.replace(spec, **networks)
    return dataclasses.replace(
        alike[0], name=folder.resolve().name, repository="", diffusers_repository="", licence="unknown", **networks
    )
