"""Readers and writers of checkpoints: round trips, hostile and damaged files, bounded memory."""

from __future__ import annotations

import json
import pickle
import random
import struct
import sys
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from wan_jax.errors import CheckpointError
from wan_jax.weights.lazy import SAFETENSORS_DTYPES
from wan_jax.weights.readers import open_checkpoint, verify_sha256
from wan_jax.weights.writers import write_pth, write_safetensors, write_sharded_safetensors

linux = pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")


def every_dtype() -> dict[str, np.ndarray]:
    """One array per element type, with an odd count, and the shapes that are easy to get wrong."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 100, (3, 5))
    arrays = {f"blocks.0.{name}": values.astype(dtype) for name, dtype in SAFETENSORS_DTYPES.items()}
    empty, scalar = np.zeros((0, 4), np.float32), np.array(7, ml_dtypes.bfloat16)
    return arrays | {"empty": empty, "scalar": scalar, "größe": np.arange(4, dtype=np.int64)}


def assert_equal(checkpoint, arrays: dict[str, np.ndarray]) -> None:
    assert set(checkpoint) == set(arrays)
    for name, array in arrays.items():
        tensor = checkpoint[name]
        got = tensor.numpy()
        assert (tensor.name, tensor.shape, tensor.dtype) == (name, array.shape, array.dtype)
        assert (got.shape, got.dtype, tensor.nbytes) == (array.shape, array.dtype, array.nbytes)
        assert got.tobytes() == array.tobytes()
        assert not got.flags.writeable and not got.flags.owndata


def refused(path: Path, *words: str, **options) -> str:
    """Open and expect a CheckpointError that names the file and all the words."""
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)
    text = str(caught.value)
    for word in (path.name, *words):
        assert word in text, text
    return text


def memory_growth(function) -> int:
    """Bytes by which the peak of resident memory exceeds the start while function runs."""

    def resident(field: str) -> int:
        rows = dict(row.split(":", 1) for row in Path("/proc/self/status").read_text().splitlines())
        return int(rows[field].removesuffix("kB")) * 1024

    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    except OSError as error:
        pytest.skip(f"this kernel does not reset the memory peak: {error}")
    before = resident("VmRSS")
    function()
    return resident("VmHWM") - before


# --- round trips ---


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_round_trip_of_every_dtype(tmp_path, suffix):
    arrays, path = every_dtype(), tmp_path / f"model.{suffix}"
    if suffix == "pth":
        write_pth(path, arrays)
    else:
        write_safetensors(path, arrays, {"format": "pt", "note": "größe"})
    with open_checkpoint(path) as checkpoint:
        assert_equal(checkpoint, arrays)
        assert checkpoint.files == [path] and checkpoint.skipped == ()
        assert checkpoint.metadata == ({"format": "pt", "note": "größe"} if suffix == "safetensors" else {})
        tensor = checkpoint["blocks.0.BF16"]
        held = tensor.numpy()
        checkpoint.release()
        tensor.release()
        assert held.tobytes() == arrays["blocks.0.BF16"].tobytes()
    assert held.tobytes() == arrays["blocks.0.BF16"].tobytes()  # outlives the checkpoint
    with pytest.raises(CheckpointError, match="closed"):
        tensor.numpy()
    assert list(tmp_path.iterdir()) == [path]


def test_safetensors_agrees_with_its_library(tmp_path):
    from safetensors.numpy import load_file, save_file

    arrays = {name: array for name, array in every_dtype().items() if "F8" not in name}  # which it lacks
    save_file(arrays, tmp_path / "theirs.safetensors", {"a": "b"})
    theirs = open_checkpoint(tmp_path / "theirs.safetensors")
    assert_equal(theirs, arrays)
    assert theirs.metadata == {"a": "b"}
    write_safetensors(tmp_path / "ours.safetensors", dict(reversed(arrays.items())))
    for name, array in load_file(tmp_path / "ours.safetensors").items():
        assert array.dtype == arrays[name].dtype and array.tobytes() == arrays[name].tobytes()
    for tensor in open_checkpoint(tmp_path / "ours.safetensors").values():
        assert tensor.numpy().flags.aligned


def test_sharded_round_trip_from_index_folder_and_loose_shards(tmp_path):
    arrays = {f"w{i}": np.full(100, i, np.float32) for i in range(7)}
    paths = write_sharded_safetensors(tmp_path, "model", arrays, max_shard_bytes=1000, metadata={"k": "v"})
    index = tmp_path / "model.safetensors.index.json"
    assert [path.name for path in paths] == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert json.loads(index.read_text())["metadata"]["total_size"] == 2800
    (tmp_path / "README.md").write_text("unrelated")
    (tmp_path / "config.json").write_text("{}")
    for source in (index, tmp_path):
        checkpoint = open_checkpoint(source)
        assert_equal(checkpoint, arrays)
        assert (checkpoint.files, checkpoint.metadata) == (paths, {"k": "v"})
        assert checkpoint["w6"].file == paths[3]
    index.unlink()
    assert_equal(open_checkpoint(tmp_path), arrays)

    with pytest.raises(CheckpointError, match="model-00001-of-00004.safetensors"):  # would be mixed up
        write_sharded_safetensors(tmp_path, "model", arrays)
    (single,) = write_sharded_safetensors(tmp_path / "new", "model", arrays)
    assert single.name == "model.safetensors" and list(single.parent.iterdir()) == [single]
    assert_equal(open_checkpoint(single.parent), arrays)


def test_index_over_torch_files(tmp_path):
    first, second = {"a": np.arange(3)}, {"b": np.ones(2, ml_dtypes.bfloat16)}
    write_pth(tmp_path / "pytorch_model-00001-of-00002.bin", first)
    write_pth(tmp_path / "pytorch_model-00002-of-00002.bin", second)
    places = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    assert_equal(open_checkpoint(tmp_path), first | second)


def test_writers_leave_nothing_behind_on_faults(tmp_path):
    def rows(array):
        good = ("good", (2,), np.float32, lambda: np.ones(2, np.float32))
        return [good, ("w", (2, 3), np.float32, lambda: array)]

    path = tmp_path / "old.safetensors"
    write_safetensors(path, {"w": np.zeros(1)})
    for write in (write_safetensors, write_pth):
        for array in (np.zeros((3, 2), np.float32), np.zeros((2, 3), np.float64)):
            with pytest.raises(CheckpointError, match=r"old.safetensors: tensor 'w' came as .* announced"):
                write(path, rows(array))
        with pytest.raises(CheckpointError, match="'w' twice"):
            write(path, rows(None)[1:] * 2)
        with pytest.raises(CheckpointError, match="complex64"):
            write(path, {"w": np.zeros(1, np.complex64)})
    with pytest.raises(CheckpointError, match="metadata must map text to text"):
        write_safetensors(path, {}, {"step": 3})
    assert list(tmp_path.iterdir()) == [path]
    assert_equal(open_checkpoint(path), {"w": np.zeros(1)})


@linux
def test_resident_memory_stays_near_one_tensor(tmp_path):
    size, count = 10_000_000, 20
    rows = [(f"w{i}", (size,), np.uint8, lambda i=i: np.full(size, i, np.uint8)) for i in range(count)]
    safetensors, pth = tmp_path / "big.safetensors", tmp_path / "big.pth"
    assert memory_growth(lambda: write_safetensors(safetensors, rows)) < 4 * size
    assert memory_growth(lambda: write_pth(pth, rows)) < 4 * size

    def read(path, release):
        with open_checkpoint(path) as checkpoint:
            for i, tensor in enumerate(checkpoint.values()):
                assert np.array(tensor.numpy())[-1] == i
                if release:
                    tensor.release()

    for path in (safetensors, pth):
        assert memory_growth(lambda path=path: read(path, release=True)) < 5 * size
    assert memory_growth(lambda: read(pth, release=False)) > 0.7 * count * size  # the measure does see pages


def test_verify_sha256(tmp_path):
    path = tmp_path / "abc.pth"
    path.write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    verify_sha256(path, digest)
    verify_sha256(path, digest.upper())
    path.write_bytes(b"abd")
    with pytest.raises(CheckpointError, match=rf"abc.pth: SHA-256 is a52d.*expected {digest}"):
        verify_sha256(path, digest)
    with pytest.raises(CheckpointError, match="not found"):
        verify_sha256(tmp_path / "absent.pth", digest)


# --- files, folders, indexes ---


def test_missing_and_unknown_files(tmp_path):
    write_safetensors(tmp_path / "model.safetensors", {"w": np.zeros(1)})
    refused(tmp_path / "modle.safetensors", f"not found in {tmp_path}", "did you mean model.safetensors")
    refused(tmp_path / "absent" / "model.safetensors", "there is no folder")
    (tmp_path / "weights.h5").write_bytes(b"x" * 100)
    refused(tmp_path / "weights.h5", "unknown ending '.h5'", ".safetensors")
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0")
    refused(tmp_path / "pointer.safetensors", "git lfs pull")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no checkpoint", ".safetensors")


def test_a_folder_of_several_families_needs_a_stem(tmp_path):
    arrays = {"w": np.arange(3)}
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        write_safetensors(tmp_path / name, arrays)
    write_pth(tmp_path / "pytorch_model.bin", {"other": np.arange(3)})
    write_pth(tmp_path / "model.pth", {"other": np.arange(3)})
    refused(tmp_path, "'diffusion_pytorch_model' (safetensors)", "'model'", "'pytorch_model' (bin)", "stem=")
    refused(tmp_path, "did you mean pytorch_model", "found", stem="pytorch_modle")
    for stem in ("diffusion_pytorch_model", "model"):  # "model" exists in two formats: safetensors wins
        assert_equal(open_checkpoint(tmp_path, stem=stem), arrays)
    assert list(open_checkpoint(tmp_path, stem="pytorch_model")) == ["other"]


def test_shards_must_be_complete_and_disjoint(tmp_path):
    arrays = {f"w{i}": np.full(100, i, np.float32) for i in range(4)}
    paths = write_sharded_safetensors(tmp_path, "model", arrays, max_shard_bytes=400)
    index = tmp_path / "model.safetensors.index.json"
    contents = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[2].unlink()
    for source in (index, tmp_path):
        text = str(pytest.raises(CheckpointError, open_checkpoint, source).value)
        assert paths[0].name in text and paths[2].name in text and paths[1].name not in text, text
    paths[0].write_bytes(contents[0])
    index.unlink()
    assert paths[2].name in refused(tmp_path)
    paths[2].write_bytes(contents[1])
    with pytest.raises(CheckpointError, match=rf"{paths[2].name}: tensor 'w1': also in {paths[1].name}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "C:x.safetensors"]
    + [".x.safetensors", "x\0.safetensors", "..", ".", "", 3, None, ["x"]],
)
def test_index_names_must_be_plain(tmp_path, name):
    folder = tmp_path / "in"
    folder.mkdir()
    write_safetensors(tmp_path / "x.safetensors", {"w": np.zeros(1)})
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": name}}))
    refused(index, "tensor 'w'", "not a plain name")


def test_index_must_agree_with_its_shards(tmp_path):
    write_safetensors(tmp_path / "a.safetensors", {"w": np.zeros(1), "v": np.zeros(1)})
    write_safetensors(tmp_path / "b.safetensors", {"u": np.zeros(1), "v": np.zeros(1)})
    index = tmp_path / "model.safetensors.index.json"

    def fails(content: str, *words: str) -> None:
        index.write_text(content)
        text = str(pytest.raises(CheckpointError, open_checkpoint, index).value)
        for word in words:
            assert word in text, text

    def places(**files: str) -> str:
        return json.dumps({"weight_map": files})

    a, b = "a.safetensors", "b.safetensors"
    fails(places(w=a, v=a, x=a), a, "tensor 'x'", "absent")
    fails(places(w=a, v=a, u=b), b, "tensor 'v'", f"also in {a}")
    fails(places(w=a), a, "tensor 'v'", "not listed")
    fails(places(w=a, v=index.name), "unknown ending '.json'")
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "[" * 100_000, "\xff"):
        fails(content, index.name)
    fails('{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}', "duplicate key 'w'")


# --- safetensors ---


def entry(kind="F32", shape=(2,), span=(0, 8), **more) -> dict:
    return {"dtype": kind, "shape": list(shape), "data_offsets": list(span), **more}


BAD_HEADERS = {
    "not JSON": (b"{nonsense", 8, "not valid JSON"),
    "not UTF-8": (b'{"\xff": 1}', 8, "not valid JSON"),
    "nested": (b'{"a":' * 100_000, 8, "not valid JSON"),
    "no object": (b"[1, 2]", 8, "expected an object"),
    "duplicate key": (b'{"a": 1, "a": 2}', 8, "duplicate key 'a'"),
    "metadata": ({"__metadata__": {"a": 1}}, 0, "text to text"),
    "overlap": ({"a": entry(), "w": entry(span=(4, 12))}, 12, "overlaps"),
    "same bytes": ({"a": entry(), "w": entry()}, 8, "overlaps"),
    "hole": ({"a": entry(), "w": entry(span=(12, 20))}, 20, "hole"),
    "hole at the start": ({"w": entry(span=(4, 12))}, 12, "hole"),
    "trailing bytes": ({"w": entry()}, 12, "after the last tensor"),
    "out of range": ({"w": entry()}, 4, "truncated"),
    "falling offsets": ({"w": entry(span=(8, 0))}, 8, "tensor 'w'"),
    "negative offset": ({"w": entry(span=(-8, 0))}, 8, "tensor 'w'"),
    "real offset": ({"w": entry(span=(0, 8.0))}, 8, "tensor 'w'"),
    "three offsets": ({"w": entry(span=(0, 8, 8))}, 8, "tensor 'w'"),
    "size mismatch": ({"w": entry(shape=(3,))}, 8, "tensor 'w': F32 (3,) needs 12 bytes"),
    "overflowing shape": ({"w": entry(shape=(2**33, 2**33))}, 8, "needs"),
    "negative shape": ({"w": entry(shape=(-1, -2))}, 8, "tensor 'w'"),
    "boolean shape": ({"w": entry(shape=(True, 2))}, 8, "tensor 'w'"),
    "shape is text": ({"w": entry() | {"shape": "2"}}, 8, "tensor 'w'"),
    "too many axes": ({"w": entry(shape=(1,) * 60 + (2,))}, 8, "tensor 'w'"),
    "unknown dtype": ({"w": entry("F5")}, 8, "unknown dtype 'F5'"),
    "extra field": ({"w": entry(code="x")}, 8, "expected exactly"),
    "missing field": ({"w": {"dtype": "F32", "shape": [2]}}, 8, "expected exactly"),
    "no entry": ({"w": 3}, 8, "expected exactly"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_bad_safetensors_headers(tmp_path, case):
    header, size, word = BAD_HEADERS[case]
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "bad.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(size))
    refused(path, word)


def test_safetensors_header_length_and_truncation(tmp_path):
    path = tmp_path / "bad.safetensors"
    for length in (100_000_001, 2**63, 2**64 - 1):
        path.write_bytes(struct.pack("<Q", length) + b"{}")
        refused(path, "at most 100,000,000")
    write_safetensors(path, {"w": np.arange(6.0).reshape(2, 3), "v": np.arange(3)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(path, "truncated")


# --- torch files, by hand ---


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def group(*parts: bytes) -> bytes:
    return b"(" + b"".join(parts) + b"t"


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def state(*items: bytes) -> bytes:
    """A dict of alternating keys and values."""
    return b"}(" + b"".join(items) + b"u"


ORDERED = name("collections", "OrderedDict") + b")R"


def storage(key="0", count=6, kind="FloatStorage", module="torch") -> bytes:
    return group(text("storage"), name(module, kind), text(key), text("cpu"), number(count)) + b"Q"


STORAGE = storage()


def tensor(offset=0, shape=(2, 3), strides=(3, 1), source=STORAGE, version="v2", tail=b"") -> bytes:
    sizes = (group(*map(number, values)) for values in (shape, strides))
    arguments = group(source, number(offset), *sizes, b"\x89", ORDERED, tail)
    return name("torch._utils", f"_rebuild_tensor_{version}") + arguments + b"R"


GOOD = state(text("w"), tensor())
SHAPE = group(number(2), number(3))
VALUES = np.arange(6, dtype=np.float32)


STORED = ("archive/data/0", VALUES.tobytes())


def write_archive(path: Path, body: bytes, files=(STORED,), protocol=2) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80" + bytes([protocol]) + body + b".")
        for file, content in files:
            archive.writestr(file, content)
    return path


def test_torch_file_by_hand(tmp_path):
    """Transposed, shared and offset views, a parameter, versions by BUILD, other values, wrappers."""
    transposed = tensor(shape=(3, 2), strides=(1, 3))
    parameter = name("torch._utils", "_rebuild_parameter") + group(transposed, b"\x88", ORDERED) + b"R"
    versions = state(text("_metadata"), ORDERED + b"(" + text("") + state(text("version"), number(1)) + b"u")
    inner = state(text("w"), tensor(), text("t"), parameter, text("tail"), tensor(4, (2,), (1,)))
    inner += versions + b"b"
    others = text("epoch") + number(3) + text("note") + text("x" * 70_000)
    others += text("list") + b"](K\x01K\x02e" + b"K\x05N"
    expected = {"w": VALUES.reshape(2, 3), "t": VALUES.reshape(2, 3).T, "tail": VALUES[4:]}
    path = write_archive(tmp_path / "a.pth", inner)
    with open_checkpoint(path) as checkpoint:
        assert_equal(checkpoint, expected)
        assert list(checkpoint) == list(expected) and checkpoint["t"].numpy().strides == (4, 12)
        checkpoint["t"].release()
    mixed = inner + b"(" + others + b"u"
    assert open_checkpoint(write_archive(path, mixed)).skipped == ("epoch", "note", "list", "5")
    wrapped = open_checkpoint(write_archive(path, state(others + text("model") + inner)))
    assert_equal(wrapped, expected)
    assert wrapped.skipped == ("epoch", "note", "list", "5")
    refused(write_archive(path, state(text("net"), GOOD, text("ema"), GOOD)), "several state dicts", "'ema'")
    for nothing in (state(), state(text("epoch"), number(3)), number(3)):
        refused(write_archive(path, nothing), "only a dict of plain tensors")


CANARY = "import pathlib; pathlib.Path('canary').touch()"
SYSTEM = name("posix", "system")
TOUCH = text("touch canary")
LAUGHS = b")q\x00" + b"h\x00\x86q\x00" * 60  # a tuple of 2^60 leaves: (t, t) of (t, t) of ...
IMPORTED = name("builtins", "__import__") + text("os") + b"\x85R"
REBUILD, PARAMETER = name("torch._utils", "_rebuild_tensor_v2"), name("torch._utils", "_rebuild_parameter")

HOSTILE_PICKLES = {
    "os.system": (SYSTEM + TOUCH + b"\x85R", "posix.system"),
    "os.system later": (state(text("w"), tensor(), text("x"), SYSTEM + TOUCH + b"\x85R"), "posix.system"),
    "eval": (name("builtins", "eval") + text(CANARY) + b"\x85R", "builtins.eval"),
    "python 2 eval": (name("__builtin__", "eval") + text(CANARY) + b"\x85R", "__builtin__.eval"),
    "getattr": (name("builtins", "getattr") + IMPORTED + text("system") + b"\x86R", "builtins.getattr"),
    "dotted name": (name("torch", "os.system") + TOUCH + b"\x85R", "torch.os.system"),
    "subprocess": (name("subprocess", "Popen") + TOUCH + b"\x85R", "subprocess.Popen"),
    "torch.load": (name("torch", "load") + TOUCH + b"\x85R", "torch.load"),
    "codecs": (name("_codecs", "encode") + TOUCH + b"\x85R", "_codecs.encode"),
    "nested reduce": (PARAMETER + group(SYSTEM + TOUCH + b"\x85R", b"\x88", ORDERED) + b"R", "posix.system"),
    "global never called": (state(text("w"), tensor(), text("x"), SYSTEM), "posix.system"),
    "INST": (b"(" + TOUCH + b"iposix\nsystem\n", "INST"),
    "OBJ": (b"(" + ORDERED + b"o", "OBJ"),
    "OBJ of os.system": (b"(" + SYSTEM + TOUCH + b"o", "posix.system"),
    "NEWOBJ": (name("collections", "OrderedDict") + b")\x81", "NEWOBJ"),
    "EXT1": (b"\x82\x01", "EXT1"),
    "STACK_GLOBAL": (text("posix") + text("system") + b"\x93" + TOUCH + b"\x85R", "STACK_GLOBAL"),
    "PERSID": (b"Pstorage\n", "PERSID"),
    "BUILD of a function": (REBUILD + state(text("__defaults__"), b")") + b"b", "BUILD"),
    "BUILD of a tensor": (tensor() + state(text("__setstate__"), TOUCH) + b"b", "BUILD"),
    "storage class called": (name("torch", "FloatStorage") + number(2**30) + b"\x85R", "torch.FloatStorage"),
    "OrderedDict with arguments": (name("collections", "OrderedDict") + b"]\x85R", "OrderedDict"),
    "text called": (TOUCH + b")R", "REDUCE"),
    "call with a wrong storage": (tensor(source=text("0")), "_rebuild_tensor_v2"),
    "persistent id": (group(text("module"), text("x")) + b"Q", "persistent id"),
    "append to a dict": (b"}N" + b"a", "APPEND"),
    "items of a list": (b"]NNs", "SETITEM"),
    "tuple as key": (b"})Ns", "key of type tuple"),
    "stack underflow": (b"R", "damaged pickle"),
    "unknown memo": (b"h\x07", "damaged pickle"),
    "mark underflow": (b"t", "damaged pickle"),
    "no end": (text("w")[:-1], "opcode"),
    "endless name": (b"c" + b"a" * 1000, "damaged pickle"),
}


@pytest.mark.parametrize("case", HOSTILE_PICKLES)
def test_hostile_pickles_run_nothing(tmp_path, monkeypatch, case):
    monkeypatch.chdir(tmp_path)
    body, word = HOSTILE_PICKLES[case]
    refused(write_archive(tmp_path / "hostile.pth", body), word)
    assert [path.name for path in tmp_path.iterdir()] == ["hostile.pth"]  # no canary


def test_the_canary_would_sing(tmp_path, monkeypatch):
    """Proof of the proof: what the hostile pickles do when they meet Python's own unpickler."""
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + HOSTILE_PICKLES["os.system"][0] + b".")
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("protocol", [0, 3, 4, 5])
def test_other_pickle_protocols(tmp_path, protocol):
    refused(write_archive(tmp_path / "a.pth", GOOD, protocol=protocol), f"protocol {protocol}, expected 2")


MEGABYTES = 15_900_000
BOMBS = {
    "memo index": b"Nr\xff\xff\xff\x7f",  # LONG_BINPUT 2^31 - 1: an array of that size in Python's unpickler
    "empty lists": b"]" * MEGABYTES,
    "empty dicts": b"}" * MEGABYTES,
    "marks": b"(" * MEGABYTES,
    "nested tuples": b")" + b"\x85" * MEGABYTES,
    "nested tuple as key": b"})" + b"\x85" * 400_000 + b"Ns",
    "wide text": text("\U0001f600" + "x" * (MEGABYTES - 100)),
    "long integer": b"\x8b" + struct.pack("<i", 2**31 - 1),
    "long bytes": b"\x8e" + struct.pack("<Q", 2**40),
    "decimal integer": b"I" + b"9" * MEGABYTES + b"\n",
    "doubling tuple": LAUGHS,
    "doubling tuple as key": b"}" + LAUGHS + b"Ns",
    "doubling tuple as shape": state(text("w"), tensor().replace(SHAPE, LAUGHS)),
    "doubling tuple in a call": PARAMETER + LAUGHS + b"R",
    "unused puts": b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(3_000_000)),
}


@linux
@pytest.mark.parametrize("case", BOMBS)
def test_pickle_bombs_are_bounded(tmp_path, case):
    path = write_archive(tmp_path / "bomb.pth", BOMBS[case])
    seconds = []

    def attempt():
        start = time.process_time()
        refused(path)
        seconds.append(time.process_time() - start)

    assert memory_growth(attempt) < 100e6
    assert seconds[0] < 5  # processor seconds: about half of one on an idle machine, 2.5 on a very busy one


UNTYPED = storage("0", 24, "UntypedStorage", "torch.storage")
BAD_TENSORS = {
    "numel too large": (tensor(source=storage(count=7)), "does not fit its 24 bytes"),
    "numel too small": (tensor(source=storage(count=5)), "does not fit its 24 bytes"),
    "numel negative": (tensor(source=storage(count=-6)), "does not fit its 24 bytes"),
    "wider type": (tensor(source=storage(kind="DoubleStorage")), "does not fit its 24 bytes"),
    "shape beyond": (tensor(shape=(2, 4)), "exceed the 6 elements"),
    "stride overflow": (tensor(strides=(2**31 - 1, 2**31 - 1)), "exceed the 6 elements"),
    "stride beyond": (tensor(strides=(4, 1)), "exceed the 6 elements"),
    "offset beyond": (tensor(offset=1), "exceed the 6 elements"),
    "empty at an offset beyond": (tensor(7, (0,), (1,)), "exceed the 6 elements"),
    "expanded": (tensor(shape=(2**31 - 1, 3), strides=(0, 1)), "exceed the 6 elements"),
    "negative offset": (tensor(offset=-1), "integers >= 0"),
    "negative stride": (tensor(5, (6,), (-1,)), "integers >= 0"),
    "negative shape": (tensor(shape=(-2, -3)), "integers >= 0"),
    "shape and stride differ": (tensor(strides=(1,)), "integers >= 0"),
    "too many axes": (tensor(shape=(1,) * 60, strides=(1,) * 60), "at most 16 axes"),
    "shape is text": (tensor().replace(SHAPE, text("23")), "integers >= 0"),
    "boolean shape": (tensor().replace(SHAPE, group(b"\x88", number(3))), "integers >= 0"),
    "absent storage": (tensor(source=storage(key="1")), "storage '1' is not in the archive"),
    "storage path": (tensor(source=storage(key="../data.pkl")), "is not in the archive"),
    "other entry": (tensor(source=storage(key="archive/data.pkl")), "is not in the archive"),
    "untyped without type": (tensor(source=UNTYPED), "UntypedStorage"),
    "typed with type": (tensor(version="v3", tail=name("torch", "float8_e5m2")), "FloatStorage"),
    "type as storage": (tensor(source=storage(kind="uint16")), "uint16"),
    "storage as type": (tensor(source=UNTYPED, version="v3", tail=name("torch", "IntStorage")), "IntStorage"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_bad_torch_tensors(tmp_path, case):
    body, word = BAD_TENSORS[case]
    refused(write_archive(tmp_path / "bad.pth", state(text("layer.w"), body)), "tensor 'layer.w'", word)


def test_bad_torch_archives(tmp_path):
    path = tmp_path / "bad.pth"
    assert_equal(open_checkpoint(write_archive(path, GOOD)), {"w": VALUES.reshape(2, 3)})
    whole = path.read_bytes()

    refused(write_archive(path, GOOD, [STORED, ("other/data.pkl", b"\x80\x02}.")]), "2 entries data.pkl")
    with pytest.warns(UserWarning, match="Duplicate"):
        write_archive(path, GOOD, [STORED, ("archive/data.pkl", b"\x80\x02}.")])
    refused(path, "same name")
    with pytest.warns(UserWarning, match="Duplicate"):
        write_archive(path, GOOD, [STORED, STORED])
    refused(path, "same name")
    refused(write_archive(path, GOOD, [STORED, ("archive/byteorder", b"big")]), "big-endian")
    assert open_checkpoint(write_archive(path, GOOD, [STORED, ("archive/byteorder", b"little")]))
    refused(write_archive(path, b"}" + bytes(16_000_000)), "at most 16,000,000")

    for compressed in ("archive/data.pkl", "archive/data/0"):
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in (("archive/data.pkl", b"\x80\x02" + GOOD + b"."), STORED):
                kind = zipfile.ZIP_DEFLATED if file == compressed else zipfile.ZIP_STORED
                archive.writestr(file, content, kind)
        refused(path, compressed, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model.txt", "x")
    refused(path, "0 entries data.pkl")

    for legacy in (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19." + bytes(100), b"", b"<html>404</html>"):
        path.write_bytes(legacy)
        refused(path, "legacy format", "safetensors")
    for length in range(4, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path)
    huge = b"\xf0\xff\xff\x7f"
    for directory in (whole.index(b"PK\x01\x02"), whole.rindex(b"PK\x01\x02")):  # data.pkl, data/0
        for field, value in ((8, b"\x01"), (42, huge), (20, huge + huge)):  # encrypted, header offset, sizes
            at = directory + field
            path.write_bytes(whole[:at] + value + whole[at + len(value) :])
            refused(path)


def test_random_damage_gives_checkpoint_errors_only(tmp_path):
    random_ = random.Random(0)
    path = tmp_path / "fuzz.safetensors"
    write_safetensors(path, {"w": np.arange(6.0), "v": np.zeros((2, 2), ml_dtypes.bfloat16)}, {"a": "b"})
    safetensors = path.read_bytes()
    write_archive(path, GOOD)
    archive = path.read_bytes()
    outcomes = {True: 0, False: 0}
    for i in range(1500):
        body = bytearray((GOOD, safetensors, archive)[i % 3])
        for _ in range(random_.choice((1, 1, 3))):
            body[random_.randrange(len(body))] = random_.randrange(256)
        path = tmp_path / ("fuzz.safetensors" if i % 3 == 1 else "fuzz.pth")
        if i % 3:
            path.write_bytes(body)
        else:
            write_archive(path, bytes(body))
        try:
            with open_checkpoint(path) as checkpoint:
                outcomes[True] += all(tensor.numpy().tobytes() is not None for tensor in checkpoint.values())
        except CheckpointError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 100, outcomes


# --- the oracle ---


def torch_state_dict(torch):
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(6, 8, generator=generator)
    real = ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]
    whole = ["int64", "int32", "int16", "int8", "uint8", "uint16", "uint32", "uint64"]
    tensors = {name: (base * 3).to(getattr(torch, name)) for name in real}
    tensors |= {name: torch.arange(5).to(getattr(torch, name)) for name in whole}
    shared = torch.arange(40.0).to(torch.bfloat16)
    return tensors | {
        "bool": base > 0,
        "transposed": base.t(),
        "strided": base[1::2, ::3],
        "permuted": torch.randn(2, 3, 4, generator=generator).permute(2, 0, 1),
        "shared.a": shared[:24].view(4, 6),
        "shared.b": shared[20:],
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(base),
    }


def torch_bytes(torch, tensor) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


@pytest.mark.oracle
def test_torch_written_files_are_read_bit_equal(tmp_path):
    torch = pytest.importorskip("torch")
    tensors = torch_state_dict(torch)
    torch.save(tensors, tmp_path / "a.pth")
    with open_checkpoint(tmp_path / "a.pth") as checkpoint:
        assert list(checkpoint) == list(tensors)
        for key, tensor in tensors.items():
            got = checkpoint[key]
            assert (got.shape, f"torch.{got.dtype.name}") == (tuple(tensor.shape), str(tensor.dtype))
            assert got.numpy().tobytes() == torch_bytes(torch, tensor), key
            if tensor.numel():
                assert got.numpy().strides == tuple(s * tensor.element_size() for s in tensor.stride())

    module = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3), torch.nn.BatchNorm3d(3))
    torch.save({"state_dict": module.state_dict(), "epoch": 3}, tmp_path / "module.pt")
    with open_checkpoint(tmp_path / "module.pt") as checkpoint:
        assert list(checkpoint) == list(module.state_dict()) and checkpoint.skipped == ("epoch",)
        for key, tensor in module.state_dict().items():
            assert checkpoint[key].numpy().tobytes() == torch_bytes(torch, tensor)

    torch.save(module.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pth", "legacy format")
    torch.save(module, tmp_path / "module.pth")
    refused(tmp_path / "module.pth", "torch.nn.modules.container.Sequential is not allowed")


@pytest.mark.oracle
def test_torch_reads_our_files_bit_equal(tmp_path):
    torch = pytest.importorskip("torch")
    arrays = every_dtype()
    write_pth(tmp_path / "a.pth", arrays)
    for mmap in (False, True):
        loaded = torch.load(tmp_path / "a.pth", weights_only=True, mmap=mmap)
        assert list(loaded) == list(arrays)
        for key, tensor in loaded.items():
            assert tuple(tensor.shape) == arrays[key].shape
            assert str(tensor.dtype) == f"torch.{arrays[key].dtype.name}"
            assert torch_bytes(torch, tensor) == arrays[key].tobytes(), key
            assert mmap is False or tensor.data_ptr() % 64 == 0 or not tensor.numel()
    write_safetensors(tmp_path / "a.safetensors", arrays)
    for key, tensor in pytest.importorskip("safetensors.torch").load_file(tmp_path / "a.safetensors").items():
        assert torch_bytes(torch, tensor) == arrays[key].tobytes(), key
