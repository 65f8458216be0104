"""Whole folders from one layout to another: import to Orbax, export to the official and the diffusers layout, check."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from wan_jax.checkpoint import flatten_params, save_params
from wan_jax.config import (
    MODELS,
    AudioVAEConfig,
    CLIPConfig,
    FusionConfig,
    IdentityConfig,
    ModelSpec,
    UMT5Config,
    VocoderConfig,
    VoiceConfig,
    find_model,
)
from wan_jax.errors import InputError
from wan_jax.model import Model, build
from wan_jax.models.identity import IdentityAdapter, VoiceAdapter
from wan_jax.weights import layouts
from wan_jax.weights.engine import Coverage, check, export
from wan_jax.weights.maps import clip, dit, fusion, identity, umt5, vae
from wan_jax.weights.writers import write_pth, write_safetensors, write_sharded_safetensors

# Distinct values of a random tensor, which a larger one repeats. A prime: no two rows of a matrix are then equal.
NUM_VALUES = 1_000_003
PIECE_BYTES = 14_500_000  # of a file of the compact layout

Say = Callable[[str], None]
Tensors = Iterable[tuple[str, tuple[int, ...], np.dtype, Callable[[], np.ndarray]]]


def check_folder(folder: str | Path) -> dict[str, Coverage]:
    """Coverage of every network that an official or diffusers folder holds; reads headers only."""
    files = layouts.locate(folder)
    if files.layout == "orbax":
        raise InputError(f"{folder} is already converted; check takes the official or diffusers files")
    report = {}
    for part in files.networks:
        cfg = layouts.network_config(files.spec, part)
        with layouts.open_part(part, files.parts[part]) as source:
            report[part] = check(
                build(part, files.spec, jnp.bfloat16), layouts.table(part, cfg), source,
                layout=files.layout, ignore=layouts.ignored(part, cfg, files.layout),
            )  # fmt: skip
    return report


def import_folder(model: Model, target: str | Path, say: Say = print) -> None:
    """Write a model as Orbax checkpoints, one network at a time; the manifest last: without it nothing is there."""
    model.need_full_weights("a conversion")
    target = new_folder(target)
    for part in model.parts:
        say(f"{part}: reading {model.files.parts[part]}")
        network = model.network(part)
        say(f"{part}: writing {target / part}")
        save_params(target / part, network)
        del network
        model.release(part)
    _copy_tokenizer(model, target / "tokenizer")
    write_json(target / layouts.MANIFEST, {"spec": dataclasses.asdict(model.spec)})


def _copy_tokenizer(model: Model, target: Path) -> None:
    source = model.files.parts["tokenizer"]
    if model.files.layout == "compact":  # where it lies beside the weights
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / "tokenizer.json", target)
    elif source.exists():
        shutil.copytree(source, target)


def new_folder(path: str | Path) -> Path:
    path = Path(path)
    if path.exists() and any(path.iterdir()):
        raise InputError(f"{path} exists and is not empty: name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    return path


def export_folder(
    model: Model,
    target: str | Path,
    layout: str,
    *,
    parts: Iterable[str] | None = None,
    dtype: Any = None,
    say: Say = print,
) -> None:
    """Write a model in the official, the diffusers or the compact layout, adapters merged.

    Args:
        parts: networks to write, default all. ComfyUI and diffusers take the transformer alone too.
        dtype: of the tensors; default that of the loaded model.
    """
    model.need_full_weights("an export")
    chosen = tuple(parts or model.parts)
    for part in set(chosen) - set(model.parts):
        raise InputError(f"{model.spec.name} has no {part}: it has {', '.join(model.parts)}")

    if layout == "compact":
        networks = {part: model.network(part) for part in chosen}
        return write_compact(model.spec, networks, model.files.parts["tokenizer"], target)

    def tensors(part: str) -> Iterator:
        rows = layouts.table(part, layouts.network_config(model.spec, part))
        return export(model.network(part), rows, layout=layout, dtype=dtype)

    write_folder(model.spec, target, layout, chosen, tensors, say, after=model.release)
    _copy_tokenizer(model, part_path(model.spec, Path(target), layout, "tokenizer"))


def add_adapters(base: Model, encoder: Model, target: str | Path, *, seed: int = 0, say: Say = print) -> None:
    """Write ``wan2.6-r2av-11b`` before its training: a base model with new adapters, which change nothing yet.

    Args:
        base: DreamID-Omni, or another model with references and without adapters.
        encoder: a model whose image encoder sees the references (Wan2.1 picture to video).
    """
    base.need_full_weights("a base for adapters")
    if not base.spec.needs_references:
        raise InputError(f"{base.spec.name} is no base for adapters: give dreamid-omni, or a folder of it")
    if encoder.spec.clip is None:
        raise InputError(f"{encoder.spec.name} has no image encoder: give wan2.1-i2v-14b-480p, or a folder of it")
    kind = find_model("wan2.6-r2av-11b")
    vision = dataclasses.replace(kind.dit.identity, feature_dim=encoder.spec.clip.dim)
    cfg = dataclasses.replace(base.spec.dit, identity=vision, voice=kind.dit.voice)
    spec = dataclasses.replace(base.spec, name=kind.name, file=kind.file, clip=encoder.spec.clip, dit=cfg)

    def tensors(part: str) -> Iterator:
        source = encoder if part == "image_encoder" else base
        own = layouts.network_config(source.spec, part)
        yield from export(source.network(part), layouts.table(part, own), layout="official")
        if part == "dit":
            size, rngs = (cfg.dim, cfg.num_heads, cfg.num_layers), nnx.Rngs(seed)
            new = {
                "identity_adapter": IdentityAdapter(cfg.identity, *size, dtype=base.dtype, rngs=rngs),
                "voice_adapter": VoiceAdapter(cfg.voice, *size, dtype=base.dtype, rngs=rngs),
            }
            yield from export(new, identity.rows(cfg), layout="official")

    def free(part: str) -> None:
        (encoder if part == "image_encoder" else base).release(part)

    write_folder(spec, target, "official", layouts.spec_parts(spec), tensors, say, after=free)
    _copy_tokenizer(base, part_path(spec, Path(target), "official", "tokenizer"))


def write_compact(spec: ModelSpec, networks: Mapping[str, Any], tokenizer: Path, target: str | Path) -> None:
    """Write the compact layout: all networks in bfloat16 under our names, in pieces, with the specification.

    Pieces of an earlier export are replaced.
    """
    target = Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for old in target.glob("weights*"):
        old.unlink()
    flat = {name: np.asarray(x).astype(jnp.bfloat16) for name, x in flatten_params(dict(networks)).items()}
    write_sharded_safetensors(target, "weights", flat, max_shard_bytes=PIECE_BYTES)
    write_json(target / layouts.COMPACT, {"spec": dataclasses.asdict(spec)})
    shutil.copy(tokenizer / "tokenizer.json", target)


def write_folder(
    spec: ModelSpec,
    target: str | Path,
    layout: str,
    parts: Iterable[str],
    tensors: Callable[[str], Tensors],
    say: Say = print,
    after: Callable[[str], None] = lambda part: None,
) -> None:
    """Write networks and their configuration files; ``tensors(part)`` gives what to write under the layout's names."""
    if spec.sound and layout == "diffusers":
        raise InputError(f"{spec.name} has no diffusers layout: use the official one")
    target = new_folder(target)
    for part in parts:
        path = part_path(spec, target, layout, part)
        say(f"{part}: writing {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".pth", ".pt"):
            write_pth(path, tensors(part))
        elif path.suffix:
            write_safetensors(path, tensors(part), metadata={"format": "pt"})
            write_json(path.with_name("config.json"), fusion.config_to_official(spec.dit))
        else:
            path.mkdir(parents=True, exist_ok=True)
            stem = "model" if part.endswith("_encoder") else layouts.DIT_STEM
            write_sharded_safetensors(path, stem, tensors(part), metadata={"format": "pt"})
            write_json(path / "config.json", part_config(spec, layout, part))
        after(part)
    if layout == "diffusers":
        _write_index(spec, target, parts)


def part_path(spec: ModelSpec, folder: Path, layout: str, part: str) -> Path:
    """File or folder of one network, or of the tokenizer."""
    if layout == "diffusers":
        return folder / layouts.DIFFUSERS_FOLDERS[part]
    if spec.sound:
        return folder / (spec.file if part == "dit" else layouts.SOUND_PATHS[part])
    if part.startswith("dit"):
        return folder / layouts.EXPERT_FOLDERS[part] if spec.num_experts == 2 else folder
    names = {
        "tokenizer": layouts.TOKENIZER_OFFICIAL,
        "vae": f"Wan{spec.vae.version}_VAE.pth",
        "text_encoder": layouts.T5_FILE,
        "image_encoder": layouts.CLIP_FILE,
    }
    return folder / names[part]


def part_config(spec: ModelSpec, layout: str, part: str) -> dict[str, Any]:
    cfg = layouts.network_config(spec, part)
    if part.startswith("dit"):
        return dit.config_to_official(cfg, spec.task) if layout == "official" else dit.config_to_diffusers(cfg)
    return {
        "vae": vae.config_to_diffusers,
        "text_encoder": umt5.config_to_diffusers,
        "image_encoder": clip.config_to_diffusers,
    }[part](cfg)


def _write_index(spec: ModelSpec, target: Path, parts: Iterable[str]) -> None:
    """model_index.json and the scheduler's configuration, as diffusers pipelines read them."""
    image = spec.task in ("i2v", "flf2v")
    index: dict[str, Any] = {
        "_class_name": "WanImageToVideoPipeline" if image else "WanPipeline",
        "_diffusers_version": "0.35.0",
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"] if spec.num_experts == 2 else [None, None],
        "boundary_ratio": spec.boundary,
        "expand_timesteps": spec.task == "ti2v",
    }
    if image:
        known = spec.clip is not None
        index["image_encoder"] = ["transformers", "CLIPVisionModel"] if known else [None, None]
        index["image_processor"] = ["transformers", "CLIPImageProcessor"] if known else [None, None]
    write_json(target / "model_index.json", index)
    scheduler = {
        "_class_name": "UniPCMultistepScheduler", "num_train_timesteps": 1000, "solver_order": 2, "solver_type": "bh2",
        "prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": spec.shift, "predict_x0": True,
        "lower_order_final": True, "final_sigmas_type": "zero", "timestep_spacing": "linspace",
    }  # fmt: skip
    write_json(target / "scheduler" / "scheduler_config.json", scheduler)
    if "image_encoder" in parts:
        write_json(target / "image_processor" / "preprocessor_config.json", clip.processor_config(spec.clip))


def write_json(path: Path, data: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


# Widths of the small random models; every task's path runs in seconds on a CPU.
_TINY_DIT = dict(dim=64, ffn_dim=128, num_heads=4, num_layers=2, text_dim=64, freq_dim=64)
_TINY_VAE = {
    "2.1": dict(dim=8, dec_dim=8),
    "2.2": dict(dim=8, dec_dim=8, z_dim=48),
}
_TINY_BASE = {
    "t2v": "wan2.1-t2v-1.3b", "i2v": "wan2.1-i2v-14b-480p", "flf2v": "wan2.1-flf2v-14b-720p",
    "ti2v": "wan2.2-ti2v-5b", "t2v-moe": "wan2.2-t2v-a14b", "i2v-moe": "wan2.2-i2v-a14b",
    "ovi": "ovi-5s", "r2av": "dreamid-omni", "wan2.6": "wan2.6-r2av-11b",
}  # fmt: skip


def tiny_spec(kind: str) -> ModelSpec:
    """A small relative of a published model: same parts, same paths, widths that run in seconds on a CPU."""
    base = MODELS[_TINY_BASE[kind]]
    vision = base.clip and CLIPConfig(image_size=56, dim=80, mlp_dim=160, num_heads=1, num_layers=3, out_dim=16)
    dit, sound = dataclasses.replace(base.dit, **_TINY_DIT), base.sound
    if isinstance(dit, FusionConfig):
        sizes = dict(dim=32, num_layers=1, num_heads=2)
        if dit.identity:
            adapters = dict(identity=IdentityConfig(feature_dim=vision.dim, **sizes), voice=VoiceConfig(**sizes))
            dit = dataclasses.replace(dit, **adapters)
        sound = dataclasses.replace(
            sound,
            vae=AudioVAEConfig(dim=16, dim_mult=(1, 2), num_res_blocks=1),
            vocoder=VocoderConfig(
                dim=64, rates=(8, 8, 4), kernels=(16, 16, 8), res_kernels=(3,), res_dilations=((1, 3),)
            ),
        )
    elif vision:
        images = vision.num_tokens * (2 if dit.image_positions else 1)
        dit = dataclasses.replace(dit, image_tokens=images, image_dim=vision.dim)
    return dataclasses.replace(
        base,
        name=f"tiny-{kind}",
        dit=dit,
        vae=dataclasses.replace(base.vae, **_TINY_VAE[base.vae.version]),
        text=UMT5Config(vocab_size=384, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2),
        clip=vision,
        sound=sound,
    )  # fmt: skip


def random_folder(
    spec: ModelSpec, target: str | Path, *, layout: str = "official", dtypes: dict[str, Any] | None = None,
    seed: int = 0, say: Say = print, write_tokenizer: Callable[[Path], None] | None = None,
) -> None:  # fmt: skip
    """Write random weights in a published layout: for demonstrations, benchmarks and tests of the loading code.

    Tensors are made one at a time, so a checkpoint of any size can be written; large ones repeat their values, which
    makes that as fast as the disk. Pictures made with it are noise.

    Args:
        dtypes: per network; default float32, the text encoder bfloat16 as in the official files.
        write_tokenizer: fills the tokenizer's folder; default: a tiny one for the vocabulary's size.
    """
    dtypes = {"text_encoder": jnp.bfloat16} | (dtypes or {})
    rng = np.random.default_rng(seed)

    def tensors(part: str) -> Iterator:
        shape = build(part, spec, jnp.float32)
        rows = layouts.table(part, layouts.network_config(spec, part))
        for name, dims, _, _ in export(shape, rows, layout=layout):
            dtype = np.dtype(dtypes.get(part, jnp.float32))
            yield name, dims, dtype, functools.partial(_random, rng, name, dims, dtype)

    write_folder(spec, target, layout, layouts.spec_parts(spec), tensors, say)
    folder = part_path(spec, Path(target), layout, "tokenizer")
    (write_tokenizer or tiny_tokenizer(spec.text.vocab_size))(folder)


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values of a plausible size: 1 for norms, 0.02 for biases and tables, else 1 / sqrt(fan in)."""
    x = rng.standard_normal(min(math.prod(shape), NUM_VALUES), np.float32)
    if len(shape) < 2 or name.endswith(("gamma", "modulation", "scale_shift_table")):
        centre = 1.0 if ("norm" in name and name.endswith("weight")) or name.endswith("gamma") else 0.0
        x = centre + 0.02 * x
    else:
        x *= np.float32(math.prod(shape[1:]) ** -0.5)
    return np.resize(x.astype(dtype), shape)


def tiny_tokenizer(vocab_size: int) -> Callable[[Path], None]:
    """A tokenizer.json of umT5's kind that spells in ASCII: enough to run a random model with any prompt."""

    def write(folder: Path) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers, processors

        pieces = ["<pad>", "</s>", "<unk>", "\u2581", *map(chr, range(ord("!"), ord("~") + 1))]
        tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces[:vocab_size]], unk_id=2))
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))

    return write
