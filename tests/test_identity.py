"""Identity and voice adapters: nothing at the start, masks, dropped references; what a voice is measured by."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params, unflatten_like
from wan_jax.config import FusionConfig, IdentityConfig, MelConfig, VoiceConfig
from wan_jax.models.identity import (
    PITCH_CENTRE,
    AdapterAttention,
    IdentityAdapter,
    VoiceAdapter,
    is_adapter,
    pitch_embedding,
    voice_features,
)
from wan_jax.nn.mel import mel_spectrogram
from wan_jax.parallel import make_mesh, param_sharding
from wan_jax.weights.engine import export, fill
from wan_jax.weights.maps import identity as identity_map

# For programs that run once.
quick = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
RATE = MelConfig().sample_rate
TINY = FusionConfig(
    dim=24,
    num_heads=3,
    num_layers=2,
    identity=IdentityConfig(feature_dim=12, dim=16, num_tokens=3, num_heads=2, max_references=3),
    voice=VoiceConfig(dim=16, num_tokens=3, num_layers=2, num_heads=2, max_references=3),
)
# On the base of Ovi and DreamID-Omni, as `wan2.6-r2av-11b`.
FULL = FusionConfig(
    dim=3072, ffn_dim=14336, num_heads=24, in_dim=48, out_dim=48, identity=IdentityConfig(), voice=VoiceConfig()
)
COUNTS = {"identity_adapter": 498_762_240, "voice_adapter": 394_574_848}


class Both(nnx.Module):
    """The adapters where the fusion model has them."""

    def __init__(self, cfg: FusionConfig = TINY, dtype=jnp.float32):
        size = (cfg.dim, cfg.num_heads, cfg.num_layers)
        self.identity_adapter = IdentityAdapter(cfg.identity, *size, dtype=dtype, rngs=nnx.Rngs(0))
        self.voice_adapter = VoiceAdapter(cfg.voice, *size, dtype=dtype, rngs=nnx.Rngs(1))


@functools.cache
def initial() -> Both:
    return quick(Both)()


def new(dtype=jnp.float32) -> Both:
    shapes = abstract(lambda: Both(dtype=dtype))
    values = flatten_params(initial())
    return unflatten_like(shapes, {path: values[path].astype(x.dtype) for path, x in flatten_params(shapes).items()})


def randomised(make) -> nnx.Module:
    """Every parameter random: zeros and ones would hide a swap."""
    rng = np.random.default_rng(1)
    model = abstract(make)
    flat = sorted(flatten_params(model).items())
    return unflatten_like(model, {path: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype) for path, x in flat})


@functools.cache
def trained(name: str) -> IdentityAdapter | VoiceAdapter:
    return getattr(randomised(Both), name)


def voice(pitch=150.0, *, seconds=1.0, formants=1.0, roll_off=1.0, vibrato=0.0, noise=0.0, syllables=3.0) -> np.ndarray:
    """Harmonics with a roll-off under three formants, in syllables; ``noise`` is relative to the voice's loudness."""
    rng = np.random.default_rng(round(pitch))
    time = np.arange(int(seconds * RATE)) / RATE
    phase = 2 * np.pi * np.cumsum(pitch * (1 + vibrato * np.sin(2 * np.pi * 5 * time))) / RATE
    k = np.arange(1, int(7500 / pitch))[:, None]
    peaks = sum(
        g * np.exp(-0.5 * ((k * pitch - formants * f) / (80 * formants)) ** 2)
        for f, g in ((700, 1), (1200, 0.6), (2600, 0.3))
    )
    wave = (k**-roll_off * (0.05 + peaks) * np.sin(k * phase + rng.uniform(0, 6.28, k.shape))).sum(0)
    wave *= np.clip(1.5 * np.sin(np.pi * syllables * time) ** 2, 0, 1)
    wave += noise * wave.std() * rng.standard_normal(len(time))
    return (0.5 * wave / np.abs(wave).max()).astype(np.float32)


measure = jax.jit(functools.partial(voice_features, cfg=MelConfig()))
run_tokens = quick(lambda adapter, features: adapter.tokens(features))
VOICES = np.array([[90, 130, 170], [210, 250, 290]])  # Hz


def explicit(*waves: np.ndarray) -> dict[str, np.ndarray]:
    """The five measures of each wave, [waves, T]."""
    features = np.stack([measure(wave[None, None])[0, 0, :, MelConfig().num_bins :] for wave in waves])
    return dict(zip(("pitch", "voiced", "energy", "median", "rate"), np.moveaxis(features, -1, 0), strict=True))


def cents(octaves: np.ndarray, hz) -> np.ndarray:
    return 1200 * np.abs(octaves - np.log2(np.asarray(hz) / PITCH_CENTRE))


def waves() -> np.ndarray:
    return np.stack([voice(hz, seconds=0.5) for hz in VOICES.flat]).reshape(2, 3, -1)


@functools.cache
def features() -> dict[str, jax.Array]:
    """Two samples of three references for each adapter."""
    pictures = np.random.default_rng(0).normal(size=(2, 3, 5, 12)).astype(np.float32)
    return {"identity_adapter": jnp.asarray(pictures), "voice_adapter": measure(waves())}


@jax.jit
def attend(blocks: AdapterAttention, q: jax.Array, tokens: jax.Array, mask=None) -> jax.Array:
    """Outputs of all blocks, as the fusion model scans them."""
    return jax.lax.scan(lambda carry, block: (carry, block(q, tokens, mask)), None, blocks)[1]


def queries(batch: int = 2, length: int = 7) -> jax.Array:
    return jax.random.normal(jax.random.key(3), (batch, length, TINY.num_heads, TINY.head_dim))


def parameters(name: str, adapter: nnx.Module) -> dict[str, np.ndarray]:
    return {f"{name}.{path}": np.asarray(x, np.float32) for path, x in flatten_params(adapter).items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", COUNTS)
def test_new_adapters_add_exactly_nothing(name, dtype):
    adapter = getattr(new(dtype), name)
    tokens = run_tokens(adapter, features()[name])
    assert tokens.shape == (2, 9, 16) and tokens.dtype == jnp.float32 and tokens.std() > 0.5
    out = attend(adapter.blocks, queries(), tokens)
    assert out.shape == (2, 2, 7, 24) and out.dtype == dtype
    assert not out.any()
    for path, x in flatten_params(adapter).items():
        matrix = path.endswith((".kernel", ".bias")) and "norm" not in path
        assert x.dtype == (dtype if matrix else jnp.float32), path


@pytest.mark.parametrize("name", COUNTS)
def test_gradients_reach_every_parameter(name):
    def loss(adapter, q, features):
        return jnp.sum(jnp.sin(jnp.arange(24) + attend(adapter.blocks, q, adapter.tokens(features))))

    grad = quick(jax.grad(loss))
    first = parameters(name, grad(getattr(new(), name), queries(), features()[name]))
    assert {path for path, x in first.items() if x.any()} == {f"{name}.blocks.o.kernel", f"{name}.blocks.o.bias"}
    later = parameters(name, grad(trained(name), queries(), features()[name]))
    for path, x in later.items():
        assert np.isfinite(x).all() and np.abs(x).max() > 1e-6, path
        assert is_adapter(path)
    slots = later[f"{name}.slots"]
    assert slots.any(axis=1).all()
    dropped = parameters(name, grad(trained(name), queries(), 0 * features()[name]))
    assert all(np.isfinite(x).all() for x in dropped.values())


def test_mask_leaves_tokens_out():
    attention = randomised(lambda: AdapterAttention(24, 16, 3, eps=1e-6, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    mask = jnp.asarray([[True] * 6, [True] * 2 + [False] * 4, [False] * 6])

    @quick
    def run(q, tokens):
        masked = attention(q, tokens, mask)
        others = attention(q, jnp.where(mask[..., None], tokens, 1e3), mask)
        gradient = jax.grad(lambda tokens: jnp.square(attention(q, tokens, mask)).sum())(tokens)
        return masked, others, attention(q, tokens), attention(q, tokens[:, :2]), gradient

    masked, others, everything, first, gradient = run(queries(3), jax.random.normal(jax.random.key(4), (3, 6, 16)))
    np.testing.assert_allclose(masked[0], everything[0], atol=1e-5)
    np.testing.assert_allclose(masked[1], first[1], atol=1e-5)
    assert everything[2].any() and not masked[2].any()
    np.testing.assert_array_equal(masked, others)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient.any(-1), mask)


@pytest.mark.parametrize("name", COUNTS)
def test_dropped_reference_is_one_like_any_other(name):
    """It is finite, says nothing about the others, and is the same whoever was dropped."""
    adapter = trained(name)
    full = np.asarray(run_tokens(adapter, features()[name])).reshape(2, 3, 3, 16)
    dropped = np.asarray(run_tokens(adapter, features()[name].at[:, 1:].set(0.0))).reshape(2, 3, 3, 16)
    assert np.isfinite(dropped).all()
    np.testing.assert_allclose(dropped[:, 0], full[:, 0], atol=1e-6)
    assert np.abs(dropped[:, 1:] - full[:, 1:]).max(axis=(1, 2, 3)).min() > 1e-3
    unknown = dropped[:, 1:] - np.asarray(adapter.slots)[1:, None]
    np.testing.assert_allclose(unknown, np.broadcast_to(unknown[:1, :1], unknown.shape), atol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_order_of_references_is_their_number(name):
    adapter = trained(name)
    order = np.array([2, 0, 1])
    here, there = (
        np.asarray(run_tokens(adapter, x)).reshape(2, 3, 3, 16) for x in (features()[name], features()[name][:, order])
    )
    slots = np.asarray(adapter.slots)[:, None]
    np.testing.assert_allclose((here - slots)[:, order], there - slots, atol=1e-5)
    assert np.abs(here[:, order] - there).max() > 0.1
    one = np.asarray(run_tokens(adapter, features()[name][:, :1]))
    np.testing.assert_allclose(one, here[:, 0], atol=1e-5)


@pytest.mark.parametrize("name", COUNTS)
def test_scanned_blocks_equal_single_ones(name):
    adapter = trained(name)
    tokens = run_tokens(adapter, features()[name])
    mask = jnp.asarray([[True] * 9, [True] * 3 + [False] * 6])
    scanned = attend(adapter.blocks, queries(), tokens, mask)
    single = quick(lambda block: block(queries(), tokens, mask))
    for i, out in enumerate(scanned):
        block = jax.tree.map(lambda leaf, i=i: leaf[i], adapter.blocks)
        np.testing.assert_allclose(out, single(block), atol=1e-5)
    assert np.abs(scanned[0] - scanned[1]).max() > 0.1


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"vibrato": 0.03},
        {"noise": 0.3},
        {"noise": 0.6, "vibrato": 0.02},
        {"formants": 0.85, "roll_off": 1.5},
        {"formants": 1.25, "roll_off": 0.5},
    ],
    ids=str,
)
def test_pitch_of_voices(kind):
    pitches = np.geomspace(80, 400, 9)
    found = explicit(*(voice(hz, **kind) for hz in pitches))
    assert cents(found["median"][:, 0], pitches).max() < 8
    np.testing.assert_array_equal(found["median"], np.repeat(found["median"][:, :1], 62, axis=1))
    sure = found["voiced"] > 0.5
    assert sure.mean(axis=1).min() > 0.5
    wrong = (cents(found["pitch"], pitches[:, None]) > 100) & sure
    assert wrong.sum() <= 0.03 * sure.sum()  # a gross error is an octave


def test_pitch_follows_vibrato():
    hz = 200 * (1 + 0.05 * np.sin(2 * np.pi * 5 * (np.arange(62) + 0.5) * 256 / RATE))
    found = explicit(voice(200, vibrato=0.05))
    sure = found["voiced"][0] > 0.9
    assert sure.sum() > 40
    assert np.median(cents(found["pitch"][0], hz)[sure]) < 20 < np.median(cents(found["pitch"][0], 200)[sure])


def test_noise_and_silence_have_no_pitch():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=16000).astype(np.float32)
    hum = 0.001 * np.sin(2 * np.pi * 200 * np.arange(16000) / RATE)  # periodic, but far below the voice
    half = np.where(np.arange(16000) < 8000, voice(120, syllables=0.5), hum).astype(np.float32)
    found = explicit(
        0.1 * noise, 0.9 * noise.clip(-1, 1), np.zeros(16000, np.float32), np.full(16000, 0.2, np.float32), half
    )
    assert found["voiced"][:4].max() < 0.2 and found["voiced"][:4].mean(axis=1).max() < 0.01
    assert not found["pitch"][found["voiced"] == 0].any()
    assert found["voiced"][4, 10:25].min() > 0.9 and not found["voiced"][4, 35:].any()
    assert cents(found["median"][4, 0], 120) < 8
    assert all(np.isfinite(x).all() for x in found.values())
    silent = measure(jnp.zeros((1, 1, 16000)))
    assert np.abs(np.asarray(silent)).max(axis=-1).min() > 1  # silence is heard as such, not as a dropped voice


def test_gain_changes_energy_alone():
    wave = voice(150, noise=0.1)
    loud, soft = (explicit(gain * wave) for gain in (1.0, 0.1))
    difference = (loud["energy"] - soft["energy"])[0]
    assert difference[np.argmax(loud["energy"][0])] == pytest.approx(1.0, abs=0.01)  # 20 dB
    assert difference.min() > 0.5
    assert cents(soft["median"], 150).max() < 8
    np.testing.assert_allclose(soft["voiced"], loud["voiced"], atol=0.02)
    np.testing.assert_allclose(soft["rate"], loud["rate"], atol=0.02)


@pytest.mark.parametrize("seconds", [1.0, 4.0])
def test_rate_follows_syllables(seconds):
    syllables = np.arange(2, 9)
    rates = 4 * 2 ** explicit(*(voice(150, seconds=seconds, syllables=s) for s in syllables))["rate"][:, 0]
    assert (np.diff(rates) > 0.4).all()
    assert np.abs(rates - syllables)[1:-1].max() < 0.3  # the ends of the band pull the outermost inwards
    higher = 4 * 2 ** explicit(voice(300, seconds=seconds, syllables=5))["rate"][0, 0]
    assert higher == pytest.approx(rates[3], abs=0.1)


def test_features_stand_beside_the_mel():
    num_bins = MelConfig().num_bins
    found = np.asarray(features()["voice_adapter"])
    assert found.shape == (2, 3, 31, num_bins + 5) and found.dtype == np.float32
    mel = mel_spectrogram(waves().reshape(6, -1), MelConfig()).reshape(2, 3, 31, num_bins)
    np.testing.assert_allclose(found[..., :num_bins], mel + 2, atol=1e-5)
    assert cents(found[:, :, 0, num_bins + 3], VOICES).max() < 8
    assert np.abs(found).max() < 4 and found[..., :num_bins].std() > 0.5


def test_pitch_embedding_tells_cents_apart_over_the_whole_range():
    octaves = np.arange(-1.53, 1.54, 20 / 1200)[:, None].astype(np.float32)
    embedded = np.asarray(pitch_embedding(octaves))
    distance = np.linalg.norm(embedded[:, None] - embedded[None], axis=-1)
    apart = np.abs(octaves - octaves.T) > 39 / 1200
    assert distance[apart].min() > 1.0  # of at most 4.9; one period of 150 cents alone would repeat


def test_every_measure_reaches_the_tokens():
    adapter, start = trained("voice_adapter"), MelConfig().num_bins
    tokens = run_tokens(adapter, features()["voice_adapter"])
    for column in range(start - 1, start + 5):  # the highest mel bin, pitch, voicedness, energy, median, rate
        changed = run_tokens(adapter, features()["voice_adapter"].at[..., column].add(40 / 1200))
        assert np.abs(changed - tokens).max() > 1e-4, column
    unvoiced = features()["voice_adapter"].at[..., start + 1].set(0.0)
    no_pitch = unvoiced.at[..., start].set(1.0).at[..., start + 3].set(1.0)
    np.testing.assert_array_equal(run_tokens(adapter, no_pitch), run_tokens(adapter, unvoiced))


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_checkpoint_round_trip(layout):
    model = randomised(Both)
    rows = identity_map.rows(TINY)
    source = {name: produce() for name, _, _, produce in export(model, rows, layout=layout)}
    assert source["identity_adapter.blocks.1.k.weight"].shape == (24, 16)
    assert source["voice_adapter.layers.0.mlp.fc1.weight"].shape == (64, 16)
    assert source["voice_adapter.conv1.weight"].shape == (16, 80 + 12 + 2, 3)
    assert all(is_adapter(name) for name in source)
    again = flatten_params(fill(abstract(Both), rows, source, network="dit", layout=layout))
    for path, value in flatten_params(model).items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_only_what_is_configured_has_names():
    assert identity_map.rows(FusionConfig()) == []
    (prefix,) = {row.path.split(".")[0] for row in identity_map.rows(FusionConfig(voice=TINY.voice))}
    assert prefix == "voice_adapter"
    assert not any(map(is_adapter, ("video.blocks.ffn.fc1.kernel", "blocks.identity_adapter.k")))


def test_published_size():
    model = abstract(lambda: Both(FULL, jnp.bfloat16))
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    for name, count in COUNTS.items():
        assert sum(x.size for x in jax.tree.leaves(getattr(model, name))) == count
    for path, leaf in flatten_params(model).items():
        sharding = param_sharding("dit", path, leaf.shape, mesh)
        if leaf.size > 2**20:  # what costs memory is cut by all eight
            assert np.prod(sharding.shard_shape(leaf.shape)) * 8 == leaf.size, path
