"""Training: the step, the loop that stops and continues, its states on disk, and what it is applied to."""

from __future__ import annotations

import functools
import json
import os
import signal
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params, unflatten_like
from wan_jax.config import NANO, CouplingConfig, DiTConfig, FusionConfig, IdentityConfig, VoiceConfig
from wan_jax.errors import CheckpointError, InputError, NonFiniteError, WanError
from wan_jax.models.dit import DiT
from wan_jax.models.fusion import Fusion, FusionAttention, Meeting, moments
from wan_jax.models.identity import is_adapter
from wan_jax.nn.layers import MLP
from wan_jax.nn.rope import rope_table
from wan_jax.parallel import make_mesh, use_mesh
from wan_jax.train import snapshots
from wan_jax.train.flow import Dropout, Levels, draw_examples, draw_levels, flow_loss
from wan_jax.train.loop import Watch, fit
from wan_jax.train.nano import train_nano
from wan_jax.train.puppet_feed import CHUNK, ClipPool
from wan_jax.train.snapshots import Snapshots
from wan_jax.train.step import Recipe, Task, _matrices, assemble, make_step, place, place_frozen, split, start

DIT = DiTConfig(dim=16, ffn_dim=16, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=3, freq_dim=8)
FUSION = FusionConfig(
    dim=24, ffn_dim=32, num_heads=4, num_layers=2, in_dim=4, out_dim=4, text_dim=8, text_len=3, freq_dim=8, audio_dim=3,
    audio_kernel=3, coupling=CouplingConfig(latent_frames=2, fps=8.0, audio_latent=0.0625),
    identity=IdentityConfig(feature_dim=6, dim=8, num_tokens=2, num_layers=1, num_heads=2),
    voice=VoiceConfig(dim=8, num_tokens=2, num_layers=1, num_heads=2),
)  # fmt: skip
QUICK = {"xla_backend_optimization_level": "0"}  # for programs that take longer to compile than to run
QUIET = Watch(log=0, save=0)
NO_DROPOUT = Dropout(text=0, image=0, voice=0)


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


@functools.cache
def dit_batch(count: int = 8) -> dict[str, jax.Array]:
    return {"video": normal(0, count, 3, 4, 4, 4), "text": normal(1, count, 3, 8), "null_text": jnp.zeros((1, 3, 8))}


@functools.cache
def dit() -> DiT:
    return jax.jit(lambda: DiT(DIT, rngs=nnx.Rngs(0)))()


drawn = jax.jit(draw_examples, static_argnames=("levels", "dropout", "first_frame"), compiler_options=QUICK)
losses_of = jax.jit(lambda dit, example: flow_loss({"dit": dit}, example)[0], compiler_options=QUICK)


def flow_task(network: Any, dropout: Dropout = NO_DROPOUT, times: Any = None) -> Task:
    def draw(batch: Any, own: Any, key: jax.Array) -> Any:
        return draw_examples(key, batch, Levels(), dropout)

    return Task({"dit": abstract(lambda: network)}, draw, functools.partial(flow_loss, times=times))


class Fixed:
    """A feed of one batch, and of its own number for every step."""

    def __init__(self, batch: Any = None):
        self.batch, self.at = batch, 0

    def __call__(self, step: int, count: int) -> tuple[Any, Any]:
        self.at = step + count
        return self.batch, jnp.arange(step, step + count)

    def position(self) -> dict[str, Any]:
        return {"at": self.at}

    def seek(self, position: dict[str, Any]) -> None:
        self.at = position["at"]


@functools.cache
def toy() -> dict[str, MLP]:
    """A network that compiles at once, for the tests of everything around it."""
    return {"vae": MLP(3, 5, 2, act=jnp.tanh, rngs=nnx.Rngs(0))}


def toy_task(nan_at: int = -1) -> Task:
    def draw(shared: Any, own: Any, key: jax.Array) -> Any:
        return jax.random.normal(key, (8, 3)) * jnp.where(own == nan_at, jnp.nan, 1.0)

    def loss(networks: Any, x: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        error = jnp.square(networks["vae"](x) - x[:, :2]).mean(-1)
        return error, {"error": error}

    return Task({"vae": abstract(toy.__wrapped__)["vae"]}, draw, loss)


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"steps": 8, "batch": 8, "warmup": 2, "learning_rate": 3e-3} | options)


def run(folder: Path, *, what: Task | None = None, watch: Watch = QUIET, **options: Any):
    kept = {name: options.pop(name) for name in ("resume", "sample") if name in options}
    return fit(what or toy_task(), recipe(**options), toy(), Fixed(), folder, watch=watch, **kept)


def same(a: Any, b: Any) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- the step ----------------------------------------------------------------------------------------------


def test_noise_levels():
    sigma = draw_levels(jax.random.key(0), 4096, Levels(mean=0.4, std=0.9))
    assert abs(float(jnp.median(sigma)) - 0.599) < 2e-3 and 0 < sigma.min() and sigma.max() < 1
    shifted = draw_levels(jax.random.key(0), 4096, Levels(std=0.0, shift=3.0))
    assert abs(float(jnp.median(shifted)) - 0.75) < 2e-3  # 3 / 2 / (1 + 2 / 2)


def test_velocity_that_is_right_has_no_loss():
    """The convention of the sampler: noise - clean, at (1 - sigma) clean + sigma noise, with timestep 1000 sigma."""

    class Oracle:
        cfg = DIT

        def __call__(self, x, t, text, **_):
            sigma = (t / 1000)[:, None, None, None, None]
            return (x - clean) / sigma

    batch = dit_batch()
    clean = batch["video"]
    example = drawn(jax.random.key(1), batch, Levels(), NO_DROPOUT)
    losses, _ = flow_loss({"dit": Oracle()}, example)
    assert losses.shape == (8,) and float(losses.max()) < 1e-6


def test_weighted_loss_counts_tokens():
    batch = dit_batch(2)
    example = drawn(jax.random.key(1), batch, Levels(), NO_DROPOUT)
    weight = np.zeros((2, 3, 4, 4), np.float32)
    weight[:, 1] = 2.0
    plain = losses_of(dit(), example)
    some, twice = (losses_of(dit(), example | {"video_weight": x}) for x in (weight, 2 * weight))
    assert np.abs(plain - some).min() > 1e-4
    np.testing.assert_allclose(some, twice, rtol=1e-5)


def test_dropout_of_conditions():
    batch = dit_batch(512) | {"audio_references": jnp.ones((512, 2, 3)), "voice": jnp.ones((512, 1, 2, 2))}
    chances = Dropout(text=0.2, voice=0.1, image=0, tokens=0.3, everything=0.1)
    example = drawn(jax.random.key(2), batch, Levels(), chances)
    text, tokens, voice = (
        np.all(np.asarray(example[name]) == 0, axis=tuple(range(1, example[name].ndim)))
        for name in ("text", "audio_references", "voice")
    )
    for got, expected in ((text, 0.28), (tokens, 1 - 0.9 * 0.9 * 0.7), (voice, 0.19)):
        assert abs(got.mean() - expected) < 0.06
    assert (tokens >= voice).all() and not (text == voice).all()


def test_one_batch_is_learnt(tmp_path):
    batch = dit_batch() | {"video": jnp.broadcast_to(2 * normal(3, 8, 1, 1, 1, 4), (8, 3, 4, 4, 4))}
    r = recipe(steps=300, learning_rate=2e-2, steps_per_call=25)
    fit(flow_task(dit()), r, {"dit": dit()}, Fixed(batch), tmp_path, watch=Watch(log=25))
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert losses[-1] < 0.5 < 2 < losses[0], losses


def test_micro_batches_give_the_same_step():
    params, frozen = split(toy())
    ends = []
    for accumulate in (1, 4):
        r = recipe(accumulate=accumulate)
        state, means = make_step(toy_task(), r, start(r, params))(start(r, params), frozen, None, jnp.arange(1))
        ends.append((state.params, means))
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5)
    with pytest.raises(InputError, match="multiple of accumulate=3"):
        recipe(accumulate=3)


def test_moving_average_and_steps_in_one_call():
    params, frozen = split(toy())
    one, four = recipe(ema=0.7), recipe(ema=0.7, steps_per_call=4)
    step, state = make_step(toy_task(), one, start(one, params)), start(one, params)
    expected = {path: np.asarray(x, np.float64) for path, x in params.items()}
    for i in range(4):
        state, _ = step(state, frozen, None, jnp.arange(i, i + 1))
        decay = min(0.7, (1 + i) / (10 + i))
        expected = {path: decay * expected[path] + (1 - decay) * np.asarray(x) for path, x in state.params.items()}
    for path, x in state.ema.items():
        np.testing.assert_allclose(x, expected[path], atol=1e-6, err_msg=path)
    together, means = make_step(toy_task(), four, start(four, params))(start(four, params), frozen, None, jnp.arange(4))
    assert means["loss"].shape == (4,) and int(together.step) == 4
    for a, b in zip(jax.tree.leaves(together.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    with pytest.raises(InputError, match="multiple of steps_per_call=3, try 9"):
        recipe(steps_per_call=3)


def test_muon_steps_are_orthogonal():
    params, frozen = split(toy())
    r = recipe(optimizer="muon", weight_decay=0.0, warmup=1, learning_rate=1.0)
    step, state = make_step(toy_task(), r, start(r, params)), start(r, params)
    for i in range(2):  # the first has a rate of zero
        state, _ = step(state, frozen, None, jnp.arange(i, i + 1))
    moved = np.asarray(state.params["vae.fc1.kernel"] - params["vae.fc1.kernel"])  # [3, 5]
    sizes = np.linalg.svd(moved, compute_uv=False)
    assert 0.6 < sizes.min() / sizes.max() and 0.05 < np.square(moved).mean() ** 0.5 < 0.4  # Adam's would be 1
    assert np.abs(state.params["vae.fc1.bias"] - params["vae.fc1.bias"]).max() > 0.1
    with pytest.raises(InputError, match="optimizer='sgd': use adamw or muon"):
        recipe(optimizer="sgd")


def test_muon_takes_layers_apart():
    like = jax.eval_shape(lambda: Fusion(FUSION, rngs=nnx.Rngs(0)))
    rows = {path: m.reduction_axis for path, m in _matrices(flatten_params({"dit": like})).items() if m is not None}
    assert rows["dit.video.blocks.self_attn.q.kernel"] == (1,)  # [layers, in, out]
    assert rows["dit.identity_adapter.resampler.layers.attn.q.kernel"] == (1,)
    assert rows["dit.video.patch_embedding.kernel"] == (0,) and rows["dit.voice_adapter.conv1.kernel"] == (0, 1)


def test_stages_of_the_small_model_one_by_one(tmp_path):
    with pytest.raises(InputError, match="stage 'vocder': use .*vocoder"):
        train_nano(NANO, {}, tmp_path, only="vocder")
    with pytest.raises(InputError, match="vocoder builds on audio_vae, and .*weights.safetensors is not there"):
        train_nano(NANO, {}, tmp_path, only="vocoder")


def test_pool_of_clips_is_made_anew_in_time():
    pool = ClipPool(lambda key: {"x": jax.random.uniform(key, (CHUNK,))}, size=2 * CHUNK, refresh=10, seed=3)
    first, _ = pool(0, 1)
    again, _ = pool(9, 1)
    later, _ = pool(10, 1)
    assert first["x"].shape == (2 * CHUNK,) and len(np.unique(first["x"])) == 2 * CHUNK
    assert first is again and not np.isin(later["x"], first["x"]).any()
    np.testing.assert_array_equal(pool(0, 1)[0]["x"], first["x"])


def test_masters_are_float32_and_products_bfloat16():
    small = abstract(lambda: DiT(DIT, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    params, _ = split({"dit": jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), small)})
    assert {x.dtype for x in params.values()} == {jnp.dtype("float32")}
    seen = flatten_params(assemble(flow_task(dit())._replace(networks={"dit": small}), params))
    assert seen["dit.blocks.ffn.fc1.kernel"].dtype == jnp.bfloat16
    assert seen["dit.blocks.norm3.weight"].dtype == jnp.float32


def test_mesh_equals_one_device():
    params, frozen = split({"dit": dit()})
    r = recipe()
    ends = []
    for mesh in (None, make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        with use_mesh(mesh):
            state = place(start(r, params), mesh)
            step = make_step(flow_task(dit(), Dropout()), r, state, mesh)
            state, means = step(state, place_frozen(frozen, mesh), dit_batch(), jnp.arange(1))
        ends.append((jax.device_get(state.params), jax.device_get(means)))
    kernel = state.params["dit.blocks.ffn.fc1.kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.size == kernel.size // 4
    for a, b in zip(*map(jax.tree.leaves, ends), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-4)


# ---- the twin streams --------------------------------------------------------------------------------------


@functools.cache
def fusion(cfg: FusionConfig = FUSION) -> Fusion:
    return jax.jit(lambda: Fusion(cfg, rngs=nnx.Rngs(0)))()


def fusion_batch(count: int = 4) -> dict[str, jax.Array]:
    return dit_batch(count) | {
        "audio": normal(2, count, 10, 3),
        "video_references": normal(3, count, 1, 4, 4, 4),
        "audio_references": normal(4, count, 2, 3),
        "identity": normal(5, count, 1, 4, 6),
        "voice": normal(6, count, 1, 6, 85),
    }


TIMES = (("video", (0.0, 1.0, 2.0, 150.0)), ("audio", (*np.arange(10) * 0.25, 150.0, 150.25)))


@functools.partial(jax.jit, compiler_options=QUICK)
def fusion_loss(fusion: Fusion, example: dict[str, Any]) -> dict[str, jax.Array]:
    return flow_loss({"dit": fusion}, example, times=dict(TIMES))[1]


@functools.partial(jax.jit, compiler_options=QUICK)
def velocity(fusion: Fusion, latents: dict[str, jax.Array], text: jax.Array, coupled_B: jax.Array):
    t = jnp.full(len(text), 500.0)
    return fusion(latents, t, {"video": text, "audio": text}, times=dict(TIMES), coupled_B=coupled_B)["video"]


def test_streams_that_are_cut_apart():
    batch = fusion_batch(2)
    latents = {s: jnp.concatenate([batch[s], batch[f"{s}_references"]], 1) for s in ("video", "audio")}
    louder = latents | {"audio": latents["audio"] + 1}
    cut, all_ = jnp.asarray([True, False]), jnp.ones(2, bool)
    ours, other, whole = (velocity(fusion(), *x) for x in (
        (latents, batch["text"], cut), (louder, batch["text"], cut), (latents, batch["text"], all_),
    ))  # fmt: skip
    apart = np.abs(np.asarray(other - ours)).max((1, 2, 3, 4))
    assert apart[0] > 1e-4 and apart[1] == 0
    np.testing.assert_allclose(ours[0], whole[0], atol=1e-5)


def test_streams_meet_in_their_own_time():
    """What is far in time counts nothing; the reach is learnt; references neither see nor are seen."""
    attend = FusionAttention(FUSION, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x, other = normal(0, 1, 5, 24), normal(1, 1, 7, 24)
    lags = 0.3 * (jnp.arange(4.0)[:, None] - jnp.arange(6.0))[None].repeat(4, axis=0)
    rope = tuple(rope_table((n, 1, 1), 6) for n in (4, 6))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def meet(attend: FusionAttention, other: jax.Array) -> jax.Array:
        return attend.meet(x, other, Meeting(*rope, lags))

    base = meet(attend, other)
    assert base.shape == (1, 5, 24) and (base[:, 4] == 0).all() and (base[:, :4] != 0).any(-1).all()
    for token, near in ((0, [0]), (5, []), (6, [])):  # 0.3 s are 3.3 times the reach, 1.5 s 17 times
        moved = np.abs(np.asarray(meet(attend, other.at[:, token].add(1.0)) - base)).max((0, 2))
        assert [i for i in range(5) if moved[i] > 0.1] == near, moved
    flat = flatten_params(attend)
    wide = unflatten_like(attend, flat | {"reach_fusion": flat["reach_fusion"] + 3})
    assert float(jnp.abs(meet(wide, other.at[:, 5].add(1.0)) - meet(wide, other))[:, 0].max()) > 1e-2


def test_moments():
    seconds = moments(CouplingConfig(), 8, 3, 2)
    np.testing.assert_allclose(seconds["audio"], [[0.016, 0.048]])
    assert seconds["video"].shape == (8, 3) and (seconds["video"][:, 0] == 0.5 / 16).all()
    np.testing.assert_allclose(seconds["video"][[0, 3, 4], 2], [5.5 / 16, 8.5 / 16, 5.5 / 16])


def test_first_frame_that_is_given_costs_nothing():
    example = drawn(jax.random.key(1), fusion_batch(), Levels(), NO_DROPOUT, first_frame=0.5)
    pinned = np.asarray(example["pinned"])
    assert 0 < pinned.sum() < 4
    changed = {"video": example["noise"]["video"].at[:, 0].add(1.0), "audio": example["noise"]["audio"]}
    a = fusion_loss(fusion(), example)["video"]
    b = fusion_loss(fusion(), example | {"noise": changed})["video"]
    assert ((np.asarray(a) == np.asarray(b)) == pinned).all()


def test_adapters_train_and_the_base_stays(tmp_path):
    networks = {"dit": fusion()}
    adapters = flow_task(fusion(), times=dict(TIMES))
    before = {path: np.array(x) for path, x in flatten_params(networks).items()}
    state, frozen = fit(
        adapters, recipe(steps=2, batch=4), networks, Fixed(fusion_batch()), tmp_path, watch=QUIET,
        trains=lambda path: is_adapter(path.split(".", 1)[1]),
    )  # fmt: skip
    assert all("_adapter." in path for path in state.params) and not any("_adapter." in path for path in frozen)
    assert all(np.array_equal(x, before[path]) for path, x in frozen.items())
    moved = [path for path, x in state.params.items() if not np.array_equal(x, before[path])]
    assert any("identity_adapter.blocks.o" in path for path in moved)
    assert any("voice_adapter.blocks.o" in path for path in moved)
    with pytest.raises(InputError, match="no parameter"):
        split(networks, lambda path: False)


# ---- stopping and continuing -------------------------------------------------------------------------------


class Killed(Exception):
    pass


def kill(step: int, ema: Any, frozen: Any) -> None:
    raise Killed


def test_a_killed_run_continues_bit_by_bit(tmp_path):
    whole, _ = run(tmp_path / "whole", steps=20, watch=Watch(log=4))
    with pytest.raises(Killed):
        run(tmp_path / "cut", steps=20, watch=Watch(log=2, save=10, sample=14), sample=kill)
    with pytest.raises(InputError, match="add --resume"):
        run(tmp_path / "cut", steps=20)
    ours, _ = run(tmp_path / "cut", steps=20, watch=Watch(log=4), resume=True)
    assert same(whole, ours) and int(ours.step) == 20
    assert [line["step"] for line in metrics(tmp_path / "cut")] == [2, 4, 6, 8, 10, 12, 16, 20]
    assert metrics(tmp_path / "cut")[-1]["loss"] == metrics(tmp_path / "whole")[-1]["loss"]


def test_sigterm_saves_and_returns(tmp_path):
    state, _ = run(tmp_path, watch=Watch(log=0, sample=3), sample=lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert int(state.step) == 3 and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    whole, _ = run(tmp_path / "whole")
    ours, _ = run(tmp_path, resume=True)
    assert same(whole, ours)


def test_time_is_limited(tmp_path):
    state, _ = run(tmp_path, steps=10**6, watch=Watch(log=0, minutes=1e-9))
    assert int(state.step) < 10**6


def test_half_written_state_is_ignored(tmp_path, caplog):
    run(tmp_path, steps=4)
    (tmp_path / "states" / "9" / "state").mkdir(parents=True)
    (tmp_path / "states" / "9" / "state" / "data").write_bytes(b"cut")
    (tmp_path / "states" / "12.orbax-checkpoint-tmp-7").mkdir()
    state, _ = run(tmp_path, resume=True)
    assert int(state.step) == 8 and "9: half-written, ignored" in caplog.text


def test_flipped_byte_is_found_and_named(tmp_path):
    marked = {"a": jnp.arange(2000, dtype=jnp.float32), "b": jnp.full(500, 7.0), "step": jnp.asarray(3)}
    with Snapshots(tmp_path) as states:
        for step in (1, 2):
            states.save(step, marked, {"feed": {}})
        states.wait()
        wanted = np.full(500, 7.0, np.float32).tobytes()
        (place,) = [p for p in (tmp_path / "2").rglob("*") if p.is_file() and wanted in p.read_bytes()]
        data = bytearray(place.read_bytes())
        data[data.find(wanted) + 801] ^= 4
        place.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"2 is damaged in b: delete .* continue from step 1"):
            states.restore(marked)
        step, restored, about = states.restore(marked, step=1)
        assert (step, about) == (1, {"feed": {}}) and same(restored, marked)
        with pytest.raises(CheckpointError, match=r"(?s)another run.*c: missing.*b: not in this run"):
            states.restore({"a": marked["a"], "c": marked["b"], "step": marked["step"]}, step=1)


def test_states_of_another_run(tmp_path):
    with Snapshots(tmp_path / "states") as states:
        with pytest.raises(CheckpointError, match="no saved state"):
            states.restore({})
        states.save(1, {"a": jnp.zeros(3)}, {})
        states.wait()
        with pytest.raises(CheckpointError, match="cannot be read"):
            states.restore({"a": jnp.zeros(4)})


def test_full_disk(tmp_path, monkeypatch):
    run(tmp_path, steps=4)
    monkeypatch.setattr(snapshots.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(WanError, match=r"0\.000 GB are free: make room; the state of step 4 is kept"):
        run(tmp_path, resume=True)


def test_nan_stops_with_its_step(tmp_path):
    bad = toy_task(nan_at=6)
    with pytest.raises(NonFiniteError, match="step 7: .* is NaN"):
        run(tmp_path, what=bad, watch=Watch(log=2, save=4), steps_per_call=2)
    with Snapshots(tmp_path / "states") as states:
        assert states.steps() == [4]
