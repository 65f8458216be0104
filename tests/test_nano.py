"""What the small model is trained on: its words, its clips as the networks take them, and what each stage trains."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wan_jax.checkpoint import flatten_params
from wan_jax.config import NANO
from wan_jax.errors import InputError
from wan_jax.model import build
from wan_jax.text import Tokenizer
from wan_jax.train.flow import Dropout, Levels
from wan_jax.train.nano import is_speech, train_nano
from wan_jax.train.puppet_feed import CHUNK, encode_clips, twin_examples, twin_loss
from wan_jax.train.puppets import faces, scripts, world
from wan_jax.train.words import Words, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer.from_folder(folder)


@pytest.mark.parametrize("people", [1, 2])
@pytest.mark.parametrize("described", [False, True])
def test_words_on_the_device_are_those_of_the_tokenizer(tokenizer, people, described):
    words = Words(tokenizer, NANO.dit.text_len)
    plans = jax.jit(jax.vmap(lambda key: world.draw(key, "test", people)))(jax.random.split(jax.random.key(1), 8))
    got = jax.jit(jax.vmap(lambda plan: words.caption(plan, described=described)))(plans)
    plans = jax.tree.map(np.asarray, plans)
    texts = [world.caption(jax.tree.map(lambda x, k=k: x[k], plans), described=described) for k in range(8)]
    if not described:
        texts = [text.replace("a puppet", "the subject of reference 1", 1) for text in texts]
        texts = [text.replace("a puppet", "the subject of reference 2", 1) for text in texts]
    ids, mask = tokenizer(texts, NANO.dit.text_len)
    np.testing.assert_array_equal(got[0], ids)
    np.testing.assert_array_equal(got[1], mask)


def test_a_syllable_is_one_token(tokenizer):
    _, mask = tokenizer(list(scripts.SYLLABLES), 8)
    assert (mask.sum(1) == 2).all()  # and the end
    _, mask = tokenizer(["banana"], 16)
    assert mask.sum() > 3  # other words are spelled
    assert len(set(map(tuple, tokenizer(list(scripts.SYLLABLES), 8)[0]))) == len(scripts.SYLLABLES)
    assert tokenizer(["ba"], 8)[0].max() < NANO.text.vocab_size


def test_the_sound_alone(tokenizer):
    """Without a video codec clips are sound alone, and so are the examples, the loss, and what trains."""
    words = Words(tokenizer, NANO.dit.text_len)
    codec = {"audio_vae": build("audio_vae", NANO, jnp.float32)}
    encode = functools.partial(encode_clips, spec=NANO, words=words, people=2, split="train")
    rows = jax.eval_shape(encode, codec, jax.random.key(0))
    assert rows["audio"].shape == (CHUNK, NANO.sound.num_latents, 20) and rows["voice"].shape[:2] == (CHUNK, 2)
    assert not {"video", "video_references", "pictures", "video_weight"} & rows.keys()
    rows = {name: x for name, x in rows.items() if not name.endswith("_alone")}
    draw = functools.partial(twin_examples, batch=3, words=words, levels=Levels(), dropout=Dropout(), first_frame=0.0)
    example = jax.eval_shape(lambda rows: draw(rows, None, jax.random.key(0)), rows)
    networks = {part: build(part, NANO, jnp.float32) for part in ("dit", "text_encoder")}
    losses, parts = jax.eval_shape(functools.partial(twin_loss, frames=5), networks, example)
    assert losses.shape == (3,) and parts.keys() == {"audio"}

    trained = [path for path in flatten_params(networks) if is_speech(path)]
    assert {path.split(".")[0] for path in trained} == {"dit", "text_encoder"}
    assert not [path for path in trained if "video" in path or "fusion" in path or "identity" in path]


def test_what_is_seen_of_a_face():
    face = faces.Face(*jnp.full(len(faces.Face._fields), 0.25))
    seen = faces.features(face)
    np.testing.assert_allclose(faces.features(face._replace(hair_hue=jnp.float32(1.25))), seen, atol=1e-6)
    # What is not worn has no colour.
    np.testing.assert_array_equal(faces.features(face._replace(hat=jnp.float32(0.5))), seen)
    hats = [faces.features(face._replace(hat=jnp.float32(x))) for x in (0.75, 0.9)]
    assert (hats[0] != hats[1]).any() and (hats[0] != seen).any()


def test_an_image_encoder_learns_to_be_read(tmp_path):
    settings = {"image_encoder": dict(steps=12, batch=4, learning_rate=3e-3, warmup=1), "watch": {"log": 4}}
    assert train_nano(NANO, settings, tmp_path, only="image_encoder")
    lines = (tmp_path / "image_encoder" / "metrics.jsonl").read_text().splitlines()
    losses = [float(line.split('"seen": ')[1].split(",")[0].rstrip("}")) for line in lines]
    assert losses[-1] < 0.7 * losses[0]
    assert (tmp_path / "image_encoder" / "weights.safetensors").exists()
    with pytest.raises(InputError, match="no settings for the stage vae"):
        train_nano(NANO, settings, tmp_path, only="vae")
