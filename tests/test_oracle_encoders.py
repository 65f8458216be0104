"""umT5, CLIP, tokenizer and bicubic resize against transformers and PyTorch, on tiny random models."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.test_text import PROMPTS, train_json, train_sentencepiece
from wan_jax.checkpoint import abstract
from wan_jax.models.clip import CLIPVision
from wan_jax.models.umt5 import UMT5, relative_buckets
from wan_jax.nn.resize import bicubic_resize
from wan_jax.text import Tokenizer, clean
from wan_jax.weights.engine import fill
from wan_jax.weights.maps import clip as clip_map
from wan_jax.weights.maps import umt5 as umt5_map

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.oracle


def shake(model):
    """Every parameter random, those that start at 0 or 1 too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def weights(model, prefix: str = "") -> dict[str, np.ndarray]:
    """State dict under published names: transformers 5 drops the prefix that published CLIP files have."""
    return {prefix + name: value.numpy() for name, value in model.state_dict().items()}


# Relative L2 error allowed; each side is within 8e-7 of the same network in float64.
LIMIT = 2e-6


def relative_error(ours, theirs) -> float:
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


def test_umt5():
    model = shake(
        transformers.UMT5EncoderModel(
            transformers.UMT5Config(vocab_size=70, d_model=48, d_kv=8, d_ff=96, num_layers=3, num_heads=4)
        )
    )
    cfg = umt5_map.config_from_diffusers(model.config.to_dict())
    assert cfg.dim_attn == 32
    source = weights(model)
    assert "encoder.embed_tokens.weight" in source
    ours = fill(
        abstract(lambda: UMT5(cfg, rngs=nnx.Rngs(0))),
        umt5_map.rows(cfg),
        source,
        network="text_encoder",
        layout="diffusers",
        ignore=umt5_map.IGNORE["diffusers"],
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(2, 70, (2, 150)).astype(np.int32)
    mask = (np.arange(150) < np.array([[150], [40]])).astype(np.int32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids).long(), torch.from_numpy(mask)).last_hidden_state.numpy()
    assert relative_error(ours(jnp.asarray(ids), jnp.asarray(mask))[mask == 1], theirs[mask == 1]) < LIMIT


@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 40), (64, 1000), (8, 20)])
def test_relative_buckets(num_buckets, max_distance):
    config = transformers.UMT5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, is_decoder=False,
        relative_attention_num_buckets=num_buckets, relative_attention_max_distance=max_distance,
    )  # fmt: skip
    attention = transformers.UMT5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    rel = np.arange(-600, 601)
    theirs = attention._relative_position_bucket(torch.from_numpy(rel)).numpy()
    np.testing.assert_array_equal(relative_buckets(rel, num_buckets, max_distance), theirs)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection"])
def test_clip(kind):
    config = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=4, num_attention_heads=3, image_size=42,
        patch_size=14, projection_dim=20, hidden_act="gelu",
    )  # fmt: skip
    model = shake(getattr(transformers, kind)(config))
    cfg = clip_map.config_from_diffusers(model.config.to_dict())
    source = weights(model, "" if "Projection" in kind else "vision_model.")
    ours = fill(
        abstract(lambda: CLIPVision(cfg, rngs=nnx.Rngs(0))),
        clip_map.rows(cfg),
        source,
        network="image_encoder",
        layout="diffusers",
        ignore=clip_map.IGNORE["diffusers"],
    )
    pixels = np.random.default_rng(0).normal(size=(2, 42, 42, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states[
            -2
        ]
    assert relative_error(ours(jnp.asarray(pixels)), theirs.numpy()) < LIMIT


@pytest.mark.parametrize("size", [(224, 224), (333, 517), (61, 1201), (1, 3)])
@pytest.mark.parametrize("source", [(719, 1283), (33, 51), (2, 5)])
def test_bicubic(source, size):
    image = np.random.default_rng(0).uniform(-1, 1, (2, *source, 3)).astype(np.float32)
    planar = torch.from_numpy(image).permute(0, 3, 1, 2)
    theirs = torch.nn.functional.interpolate(planar, size=size, mode="bicubic")
    ours = jax.jit(lambda x: bicubic_resize(x, size))(image)
    np.testing.assert_allclose(ours, theirs.permute(0, 2, 3, 1).numpy(), atol=1e-5)


@pytest.mark.parametrize("max_length", [8, 64])
@pytest.mark.parametrize("train", [train_json, train_sentencepiece])
def test_tokenizer(train, max_length, tmp_path):
    folder = train(tmp_path)
    ours = Tokenizer.from_folder(folder)(PROMPTS, max_length)
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    if train is train_json:
        file = str(folder / "tokenizer.json")
        theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=file, **special)
    else:
        theirs = transformers.T5Tokenizer.from_pretrained(folder, extra_ids=0, **special)
    cleaned = [clean(text) for text in PROMPTS]
    out = theirs(cleaned, padding="max_length", truncation=True, max_length=max_length)
    np.testing.assert_array_equal(ours[0], out["input_ids"])
    np.testing.assert_array_equal(ours[1], out["attention_mask"])
