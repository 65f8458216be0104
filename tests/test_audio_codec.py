"""The audio codec: mel spectrogram, autoencoder, vocoder, and their checkpoints in every spelling."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from wan_jax.checkpoint import abstract, flatten_params, unflatten_like
from wan_jax.config import AudioVAEConfig, MelConfig, VocoderConfig
from wan_jax.errors import CheckpointError
from wan_jax.models.audio_vae import AudioVAE, Downsample, UnitConv
from wan_jax.models.vocoder import LOWPASS, Activation, BigVGAN
from wan_jax.nn.conv import conv_transpose1d
from wan_jax.nn.mel import mel_filters, mel_spectrogram
from wan_jax.parallel import make_mesh, param_sharding
from wan_jax.weights.engine import check, export, fill
from wan_jax.weights.fused import FusedWeights
from wan_jax.weights.maps import audio_vae as audio_vae_map
from wan_jax.weights.maps import vocoder as vocoder_map
from wan_jax.weights.readers import open_checkpoint

MEL = MelConfig()
VAE_CFG = AudioVAEConfig(dim=4, z_dim=3, num_res_blocks=1)
VOCODER_CFG = VocoderConfig(
    dim=16, rates=(8, 8, 4), kernels=(16, 16, 8), res_kernels=(3, 5), res_dilations=((1, 3), (1,))
)
SPELLINGS = {
    "plain": None,
    "old": ("weight_g", "weight_v"),
    "new": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}
MAGNITUDES = tuple(names[0] for names in SPELLINGS.values() if names)
IGNORE = vocoder_map.IGNORE["official"]
# The programs are tiny and many: compiled without LLVM's optimisation they are ready sooner.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape: int, std: float = 1.0) -> np.ndarray:
    return np.random.default_rng(shape).normal(0, std, shape).astype(np.float32)


def random_model(cls: type, cfg):
    """A network with filters of unit norm, which the autoencoder's have, and small numbers elsewhere."""
    shape = abstract(lambda: cls(cfg, rngs=nnx.Rngs(0)))
    values = {}
    for path, leaf in flatten_params(shape).items():
        x = normal(*leaf.shape)
        value = x / np.linalg.norm(x, axis=(0, 1)) if x.ndim == 3 else 0.1 * x + (path == "data_std")
        values[path] = jnp.asarray(value, jnp.float32)
    return unflatten_like(shape, values)


@functools.cache
def build(network: str) -> tuple:
    """A network and its table."""
    if network == "audio_vae":
        return random_model(AudioVAE, VAE_CFG), audio_vae_map.rows(VAE_CFG)
    return random_model(BigVGAN, VOCODER_CFG), vocoder_map.rows(VOCODER_CFG)


def official(network: str) -> dict[str, np.ndarray]:
    return {name: produce() for name, _, _, produce in export(*build(network), layout="official")}


def spell(tensors: dict, spelling: str) -> dict:
    """Tensors as the vocoder's file has them: weights in pairs, the direction of any length; and the filters."""
    out = {}
    for name, value in tensors.items():
        if names := SPELLINGS[spelling] if name.endswith(".weight") else None:
            axes = tuple(range(1, value.ndim))
            magnitude = np.sqrt(np.square(value).sum(axes, keepdims=True))
            parts = magnitude, value * (1 + np.arange(len(value), dtype=np.float32).reshape(magnitude.shape))
            out |= {name.removesuffix("weight") + leaf: part for leaf, part in zip(names, parts, strict=True)}
        else:
            out[name] = value
        if name.endswith(".act.alpha"):
            for filter_name in ("upsample.filter", "downsample.lowpass.filter"):
                out[name.replace("act.alpha", filter_name)] = np.float32(LOWPASS)[None, None]
    return out


def vocoder_from(tensors: dict) -> BigVGAN:
    model, rows = build("vocoder")
    return fill(abstract(lambda: model), rows, FusedWeights(tensors), network="vocoder", ignore=IGNORE)


# --- mel spectrogram ---


@pytest.mark.parametrize(
    "cfg", (MEL, MelConfig(22050, 512, 128, 40, 60.0, 7600.0), MelConfig(44100, 2048, 512, 128, 2000.0, 22050.0))
)
def test_filters_are_those_of_librosa(cfg):
    librosa = pytest.importorskip("librosa")
    expected = librosa.filters.mel(
        sr=cfg.sample_rate, n_fft=cfg.n_fft, n_mels=cfg.num_bins, fmin=cfg.fmin, fmax=cfg.fmax
    )
    np.testing.assert_allclose(mel_filters(cfg), expected, atol=1e-8, rtol=1e-5)


def test_mel_of_simple_sounds():
    seconds = np.arange(6500) / MEL.sample_rate
    tone = np.float32(0.4 * np.sin(2 * np.pi * 1000 * seconds))[None]
    mel = jit(mel_spectrogram, static_argnums=1)(tone, MEL)
    assert mel.shape == (1, 25, 80) and mel.dtype == jnp.float32  # 6500 = 25 * 256 + 100
    nearest = np.argmax(mel_filters(MEL) @ (np.arange(513) == 64))  # 64 * 16000 / 1024 = 1000 Hz
    assert (mel[0].argmax(-1) == nearest).all()
    np.testing.assert_allclose(mel, mel_spectrogram(jnp.asarray(tone), MEL), atol=1e-5)

    loud = 5 * tone
    np.testing.assert_array_equal(mel_spectrogram(loud, MEL), mel_spectrogram(np.clip(loud, -1, 1), MEL))
    assert (mel_spectrogram(0 * tone, MEL) == -5).all()  # the floor

    click = np.zeros((1, 6400), np.float32)
    click[0, 10 * 256 + 128] = 1
    assert mel_spectrogram(click, MEL).mean(-1).argmax() == 10


# --- networks ---


def test_one_latent_is_512_samples():
    vae, vocoder = build("audio_vae")[0], build("vocoder")[0]
    wave = normal(2, 7 * 512 + 300, std=0.1)
    mel = mel_spectrogram(wave, MEL)
    mean, logvar = jit(AudioVAE.encode_stats)(vae, mel)  # 15 frames: the last one is dropped
    assert mel.shape == (2, 15, 80) and mean.shape == logvar.shape == (2, 7, 3)
    np.testing.assert_array_equal(jit(AudioVAE.encode)(vae, mel), mean)
    back = jit(AudioVAE.decode)(vae, mean)
    sound = jit(BigVGAN.__call__)(vocoder, back)
    assert back.shape == (2, 14, 80) and sound.shape == (2, 7 * 512) and jnp.abs(sound).max() <= 1
    assert back.dtype == sound.dtype == jnp.float32


def test_audio_vae_keeps_magnitudes_and_clips():
    """White noise comes out with a deviation near one; gains and activations beyond the limits are held there."""
    stats, mel = jit(AudioVAE.encode_stats), normal(1, 32, 80)
    vae = random_model(AudioVAE, AudioVAEConfig(dim=64, z_dim=8, num_res_blocks=1))
    for part in stats(vae, mel):
        assert 0.7 < jnp.std(part) < 1.4
    mean, logvar = stats(jax.tree.map(lambda x: jnp.full_like(x, 1e3) if x.ndim == 0 else x, vae), mel)
    assert jnp.abs(mean).max() > 100 and logvar.min() == -30 and logvar.max() == 20
    still = random_model(AudioVAE, AudioVAEConfig(dim=64, z_dim=8, num_res_blocks=1, clip=1e-3))
    assert jnp.abs(stats(still, mel)[0]).max() < 1e-2


def test_downsampling_is_a_mean_of_two():
    down = Downsample(3, rngs=nnx.Rngs(0))
    x, kernels = normal(1, 5, 3), (down.conv1.kernel[0], down.conv2.kernel[0])
    y = x @ kernels[0]
    np.testing.assert_allclose(down(x), (y[:, :4:2] + y[:, 1:4:2]) / 2 @ kernels[1], atol=1e-5)


@pytest.mark.parametrize("size, stride", ((8, 4), (4, 2), (7, 3), (11, 5)))
def test_transposed_convolution(size, stride):
    x, kernel = normal(2, 6, 3), normal(size, 3, 2)
    full = np.zeros((2, 5 * stride + size, 2), np.float32)
    for t in range(6):
        full[:, t * stride : t * stride + size] += np.einsum("bi,kio->bko", x[:, t], kernel)
    cut = (size - stride) // 2
    np.testing.assert_allclose(conv_transpose1d(x, kernel, stride), full[:, cut:-cut], atol=1e-5)


def test_activation_lets_overtones_fold_back_less():
    """The second harmonic of 0.4 of the sampling rate folds back to 0.2: measured, to a third of the plain formula."""
    act = Activation(1, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(LOWPASS.sum(), 1)
    np.testing.assert_allclose(act(jnp.full((1, 9, 1), 0.3)), 0.3 + np.sin(0.3) ** 2, rtol=1e-5)
    x = 0.5 * np.sin(2 * np.pi * 0.4 * np.arange(200))[None, :, None]
    folded = np.exp(-2j * np.pi * 0.2 * np.arange(100))
    ours, plain = (abs(np.asarray(y)[0, 50:150, 0] @ folded) for y in (act(x), x + np.sin(x) ** 2))
    assert plain > 4 and ours < plain / 2


def test_gradients_are_finite_and_reach_every_parameter():
    def loss(models, mel):
        vae, vocoder = models
        return jnp.square(vocoder(vae.decode(vae.encode(mel)))).mean()

    vae = AudioVAEConfig(dim=4, dim_mult=(1, 2), z_dim=3, num_res_blocks=1)
    vocoder = VocoderConfig(dim=4, rates=(2,), kernels=(4,), res_kernels=(3,), res_dilations=((1,),))
    models = random_model(AudioVAE, vae), random_model(BigVGAN, vocoder)
    grads = flatten_params(jit(jax.grad(loss))(models, normal(1, 4, 80)))
    unused = {path for path, g in grads.items() if not np.abs(g).max() > 0}
    assert not unused and all(np.isfinite(g).all() for g in grads.values())


# --- checkpoints ---


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_vocoder_round_trip(spelling):
    tensors = official("vocoder")
    spelled = spell(tensors, spelling)
    assert any(name.endswith(MAGNITUDES) for name in spelled) == (spelling != "plain")
    loaded = vocoder_from(spelled)
    for path, value in flatten_params(build("vocoder")[0]).items():
        np.testing.assert_allclose(flatten_params(loaded)[path], value, rtol=1e-6, atol=1e-7, err_msg=path)
    back = {name: produce() for name, _, _, produce in export(loaded, build("vocoder")[1], layout="official")}
    assert {name: value.shape for name, value in back.items()} == {name: value.shape for name, value in tensors.items()}
    for name, value in flatten_params(vocoder_from(back)).items():
        np.testing.assert_array_equal(value, flatten_params(loaded)[name], err_msg=name)
    inferred = vocoder_map.infer_config({name: value.shape for name, value in FusedWeights(spelled).items()})
    assert inferred == VOCODER_CFG


def test_audio_vae_round_trip():
    """Filters of any length come back: what the network makes of them to rounding, their length to a percent."""
    model, rows = build("audio_vae")
    tensors = official("audio_vae")
    for name, value in tensors.items():
        if name.endswith(".weight"):
            tensors[name] = normal(*value.shape) * np.exp(normal(len(value), 1, 1))
    tensors["encoder.conv_in.weight"] *= 1e-4  # as small as the constant of the rule
    loaded = fill(abstract(lambda: model), rows, tensors, network="audio_vae")
    w = tensors["encoder.conv_in.weight"].astype(np.float64)
    folded = w / (1e-4 + np.linalg.norm(w, axis=(1, 2), keepdims=True) / 240**0.5) / 240**0.5
    np.testing.assert_allclose(loaded.encoder.conv_in.kernel[...], folded.transpose(2, 1, 0), rtol=1e-6)
    back = {name: produce() for name, _, _, produce in export(loaded, rows, layout="official")}
    assert back.keys() == tensors.keys() and back["data_mean"].shape == (1, 80, 1)
    for name, value in tensors.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-2, err_msg=name)
    again = flatten_params(fill(abstract(lambda: model), rows, back, network="audio_vae"))
    for path, value in flatten_params(loaded).items():
        np.testing.assert_allclose(again[path], value, rtol=1e-6, err_msg=path)
    assert audio_vae_map.infer_config({name: value.shape for name, value in tensors.items()}) == VAE_CFG


def test_filters_that_are_too_long_are_shortened():
    vae, rows = build("audio_vae")
    longer = jax.tree.map(lambda x: 3 * x if x.ndim == 3 else x, vae)
    tensors = {name: produce() for name, _, _, produce in export(longer, rows, layout="official")}
    kernel = fill(abstract(lambda: vae), rows, tensors, network="audio_vae").decoder.mid.attn_1.qkv.kernel[...]
    np.testing.assert_allclose(kernel, vae.decoder.mid.attn_1.qkv.kernel[...], rtol=1e-5)
    norms = jnp.linalg.norm(UnitConv(5, 4, rngs=nnx.Rngs(0)).kernel[...], axis=(0, 1))
    np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_faults_are_named():
    vae, rows = build("audio_vae")
    tensors = official("audio_vae")
    gain = tensors.pop("decoder.learnable_gain")
    with pytest.raises(CheckpointError, match=r"decoder\.learnable_gain: missing"):
        fill(abstract(lambda: vae), rows, tensors, network="audio_vae")
    with pytest.raises(CheckpointError, match=r"decoder\.extra: in the checkpoint, unknown"):
        fill(
            abstract(lambda: vae), rows, tensors | {"decoder.extra": gain, "decoder.learnable_gain": gain},
            network="audio_vae",
        )  # fmt: skip
    with pytest.raises(CheckpointError, match="not an MMAudio autoencoder"):
        audio_vae_map.infer_config({"conv_pre.weight": (3, 3, 3)})
    with pytest.raises(CheckpointError, match="not a BigVGAN"):
        vocoder_map.infer_config({name: value.shape for name, value in tensors.items()})


@pytest.mark.parametrize("spelling", ("old", "new"))
def test_faults_of_weight_norm_are_named(spelling):
    magnitude, direction = (f"conv_pre.{leaf}" for leaf in SPELLINGS[spelling])
    tensors = spell(official("vocoder"), spelling)
    alone = {name: value for name, value in tensors.items() if name != direction}
    with pytest.raises(CheckpointError, match=f"{magnitude}: in the checkpoint, unknown"):
        vocoder_from(alone)
    both = tensors | {"conv_pre.weight": tensors[direction]}
    with pytest.raises(CheckpointError, match=f"{direction}: in the checkpoint, unknown"):
        vocoder_from(both)
    wrong = tensors | {magnitude: np.ones((1, 1, 1), np.float32)}
    with pytest.raises(CheckpointError, match=rf"{magnitude}: shape \(1, 1, 1\)"):
        vocoder_from(wrong)


@pytest.mark.parametrize(
    "network, cls, cfg, table, tensors, values",
    (
        ("audio_vae", AudioVAE, AudioVAEConfig(), audio_vae_map, 57, 171_657_378),
        ("vocoder", BigVGAN, VocoderConfig(), vocoder_map, 784, 112_233_866),
    ),
)
def test_released_sizes(network, cls, cfg, table, tensors, values):
    """Names, counts and shards of the released files, without their memory."""
    model = abstract(lambda: cls(cfg, rngs=nnx.Rngs(0)))
    shapes = {name: shape for name, shape, _, _ in export(model, table.rows(cfg), layout="official")}
    source = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    if network == "vocoder":
        released = {}
        for name, shape in shapes.items():
            if name.endswith(".weight"):
                stem = name.removesuffix("weight")
                released |= {f"{stem}weight_g": (shape[0], 1, 1), f"{stem}weight_v": shape}
            else:
                released[name] = shape
            if name.endswith(".act.alpha"):
                stem = name.removesuffix("act.alpha")
                released |= {f"{stem}upsample.filter": (1, 1, 12), f"{stem}downsample.lowpass.filter": (1, 1, 12)}
        source = {name: np.broadcast_to(np.float32(0), shape) for name, shape in released.items()}
    assert len(source) == tensors and sum(value.size for value in source.values()) == values
    plain = FusedWeights(source)
    coverage = check(model, table.rows(cfg), plain, ignore=table.IGNORE["official"])
    assert not coverage.faults and coverage.used.keys() == shapes.keys()
    assert table.infer_config({name: tensor.shape for name, tensor in plain.items()}) == cfg
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
    assert all(param_sharding(network, path, leaf.shape, mesh) for path, leaf in flatten_params(model).items())


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weight_norm_of_torch(tmp_path):
    """Both spellings as torch writes them, in one file under ``generator`` as released."""
    torch = pytest.importorskip("torch")
    old = torch.nn.utils.weight_norm(torch.nn.ConvTranspose1d(4, 3, 8, stride=4))
    new = torch.nn.utils.parametrizations.weight_norm(torch.nn.Conv1d(3, 5, 7))
    with torch.no_grad():
        for tensor in (*old.parameters(), *new.parameters()):
            tensor.copy_(torch.randn_like(tensor))
    torch.save({"generator": torch.nn.ModuleDict({"old": old, "new": new}).state_dict()}, tmp_path / "netG.pt")
    old(torch.zeros(1, 4, 2))  # the old one computes its weight in the forward pass
    with FusedWeights(open_checkpoint(tmp_path / "netG.pt")) as weights:
        assert set(weights) == {"old.weight", "old.bias", "new.weight", "new.bias"}
        for name, module in (("old", old), ("new", new)):
            np.testing.assert_allclose(weights[f"{name}.weight"].numpy(), module.weight.detach().numpy(), rtol=1e-5)
