"""The weight engine: every layout gives the same parameters, tables invert, faults come in one report."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import wan_jax
from wan_jax.checkpoint import flatten_params
from wan_jax.conversion import check_folder, export_folder, import_folder, random_folder, tiny_spec
from wan_jax.errors import CheckpointError
from wan_jax.model import build
from wan_jax.parallel import make_mesh
from wan_jax.weights import layouts
from wan_jax.weights.engine import check, export, fill
from wan_jax.weights.maps import dit as dit_map

KINDS = ("t2v", "i2v", "flf2v", "ti2v", "t2v-moe", "i2v-moe")


def quiet(text: str) -> None:
    pass


def parameters(model: wan_jax.Model) -> dict[str, np.ndarray]:
    return {
        f"{part}.{path}": np.asarray(leaf)
        for part in model.parts
        for path, leaf in flatten_params(model.network(part)).items()
    }


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], but: tuple[str, ...] = ()) -> None:
    assert ours.keys() - set(but) == theirs.keys() - set(but)
    for name in ours.keys() - set(but):
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


@pytest.fixture
def tiny_dit():
    """Spec, table and official tensors of a small DiT with every kind of row."""
    spec = tiny_spec("flf2v")
    rows = dit_map.rows(spec.dit)
    rng = np.random.default_rng(0)
    shapes = {name: shape for name, shape, _, _ in export(build("dit", spec, jnp.float32), rows, layout="official")}
    tensors = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return spec, rows, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_all_layouts_hold_the_same_parameters(kind, tmp_path, tiny_folder):
    official = wan_jax.load(tiny_folder(kind), dtype="float32")
    expected = parameters(official)
    import_folder(wan_jax.load(tiny_folder(kind), dtype="float32"), tmp_path / "orbax", quiet)
    orbax = wan_jax.load(tmp_path / "orbax", dtype="float32")
    assert orbax.spec == official.spec
    assert_same(parameters(orbax), expected)
    export_folder(orbax, tmp_path / "diffusers", "diffusers", say=quiet)
    assert not any(coverage.faults for coverage in check_folder(tmp_path / "diffusers").values())
    # The diffusers layout has no place for CLIP's projection, which nothing uses.
    assert_same(parameters(wan_jax.load(tmp_path / "diffusers", dtype="float32")), expected, ("image_encoder.head",))


def test_export_inverts_fill(tiny_dit):
    spec, rows, tensors = tiny_dit
    model = fill(build("dit", spec, jnp.float32), rows, tensors, network="dit")
    for layout in ("official", "diffusers"):
        exported = {name: produce() for name, _, _, produce in export(model, rows, layout=layout)}
        again = fill(build("dit", spec, jnp.float32), rows, exported, network="dit", layout=layout)
        assert_same(*({k: np.asarray(v) for k, v in flatten_params(m).items()} for m in (again, model)))
        if layout == "official":
            assert_same(exported, tensors)


def test_shards_hold_what_one_device_holds(tiny_dit):
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    spec, rows, tensors = tiny_dit
    shape = build("dit", spec, jnp.bfloat16)
    whole = flatten_params(fill(shape, rows, tensors, network="dit"))
    cut = flatten_params(fill(shape, rows, tensors, network="dit", mesh=make_mesh({"fsdp": 4, "tensor": 2})))
    for path, leaf in cut.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(whole[path]), err_msg=path)
    kernel = cut["blocks.ffn.fc1.kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8


def test_every_fault_in_one_report(tiny_dit):
    spec, rows, tensors = tiny_dit
    tensors = dict(tensors)
    del tensors["head.head.bias"]
    tensors["stray.weight"] = np.zeros(3, np.float32)
    tensors["blocks.0.ffn.0.weight"] = tensors["blocks.0.ffn.0.weight"].T
    tensors["blocks.1.norm3.weight"] = tensors["blocks.1.norm3.weight"].astype(np.int32)
    with pytest.raises(CheckpointError) as error:
        fill(build("dit", spec, jnp.float32), rows, tensors, network="dit", what="broken.safetensors")
    text = str(error.value)
    assert "broken.safetensors" in text and "4 faults" in text
    for words in (
        "head.head.bias: missing", "stray.weight: in the checkpoint, unknown", "blocks.0.ffn.0.weight: shape",
        "blocks.1.norm3.weight: dtype int32",
    ):  # fmt: skip
        assert words in text, words


def test_a_table_with_a_repeated_row_is_refused(tiny_dit):
    spec, rows, tensors = tiny_dit
    faults = check(build("dit", spec, jnp.float32), [*rows, rows[0]], tensors).faults
    assert any("filled by two rows" in fault for fault in faults)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64, ml_dtypes.float8_e4m3fn])
def test_source_dtypes(dtype, tiny_dit):
    spec, rows, tensors = tiny_dit
    cast = {name: value.astype(dtype) for name, value in tensors.items()}
    model = fill(build("dit", spec, jnp.float32), rows, cast, network="dit")
    expected = cast["blocks.1.self_attn.q.weight"].astype(np.float32).T
    np.testing.assert_array_equal(np.asarray(model.blocks.self_attn.q.kernel[...])[1], expected)


def test_truncated_shard_names_the_file(tmp_path):
    random_folder(tiny_spec("t2v"), tmp_path / "tiny", say=quiet)
    path = tmp_path / "tiny" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"diffusion_pytorch_model\.safetensors.*truncated"):
        _ = wan_jax.load(tmp_path / "tiny").dit


def test_missing_parts_load_as_far_as_they_are_there(tmp_path):
    random_folder(tiny_spec("t2v"), tmp_path / "tiny", say=quiet)
    (tmp_path / "tiny" / layouts.T5_FILE).unlink()
    model = wan_jax.load(tmp_path / "tiny")
    assert model.parts == ("dit", "vae")
    with pytest.raises(CheckpointError, match=f"lacks\n  text_encoder: .*{layouts.T5_FILE}"):
        _ = model.text_encoder
    with pytest.raises(CheckpointError, match="text_encoder"):
        wan_jax.generate(model, "a cat", size="32x32", num_frames=1, num_steps=1, progress=False)


def test_an_import_that_fails_leaves_no_model(tmp_path, tiny_folder, monkeypatch):
    import wan_jax.conversion as conversion

    written = []

    def save(path, tree):
        if written:
            raise OSError("disk full")
        written.append(path)

    monkeypatch.setattr(conversion, "save_params", save)
    with pytest.raises(OSError, match="disk full"):
        import_folder(wan_jax.load(tiny_folder("t2v")), tmp_path / "orbax", quiet)
    with pytest.raises(CheckpointError, match="not a model folder"):
        wan_jax.load(tmp_path / "orbax")
