"""Prompt cleaning and the tokenizer, on vocabularies trained here in milliseconds."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest

from wan_jax.errors import CheckpointError
from wan_jax.text import Tokenizer, clean

CORPUS = [
    "a white cat on a surfboard, sunny beach",
    "two boxers in a ring under bright lights",
    "一只戴着墨镜的白猫坐在冲浪板上",
    "rain on a window at night; slow camera",
    "Tom & Jerry run (fast) 3 < 5",
] * 4
PROMPTS = ["a white  cat", "", "一只白猫，坐在冲浪板上", "Tom &amp; Jerry in the rain on a surfboard"]


def train_json(folder: Path, special_tokens: tuple[str, ...] = ("<pad>", "</s>", "<unk>")) -> Path:
    """A tiny ``tokenizer.json``: appends its own end token, and carries settings that we must not inherit."""
    from tokenizers import Tokenizer as Inner
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    inner = Inner(models.Unigram())
    inner.normalizer = normalizers.NFKC()
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=list(special_tokens), unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(CORPUS, trainer)
    eos = [("</s>", special_tokens.index("</s>"))]
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=eos)
    inner.enable_truncation(3)
    inner.enable_padding(length=4)
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / "tokenizer.json"))
    return folder


def train_sentencepiece(folder: Path) -> Path:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=90, hard_vocab_limit=False,
        minloglevel=2, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    return folder


@pytest.fixture(params=[train_json, train_sentencepiece])
def tokenizer(request, tmp_path) -> Tokenizer:
    return Tokenizer.from_folder(request.param(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ""),
        (" \n\t\u3000 ", ""),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("&amp;nbsp;cat&amp;nbsp;", "cat"),  # white space that only the second unescape reveals
        ("schÃ¶n", "schön"),
        ("白猫，坐着", "白猫,坐着"),
    ],
)
def test_clean(text, expected):
    assert clean(text) == expected
    assert clean(expected) == expected


def test_ids_and_mask(tokenizer):
    ids, mask = tokenizer(PROMPTS, 64)
    assert ids.shape == mask.shape == (len(PROMPTS), 64) and ids.dtype == mask.dtype == np.int32
    assert ids[1].tolist() == [1] + [0] * 63 and mask[1].sum() == 1
    for row_ids, row_mask in zip(ids, mask, strict=True):
        n = row_mask.sum()
        assert (row_mask[:n] == 1).all() and (row_ids[n:] == 0).all()
        assert row_ids[n - 1] == 1 and (row_ids[: n - 1] > 1).all(), "one end token, at the end"
    assert 2 < ids.max() < tokenizer.vocab_size
    assert tokenizer([" a white cat\n"], 64)[0].tolist() == ids[:1].tolist(), "prompts are cleaned"


def test_default_length(tokenizer):
    assert tokenizer(["a cat"])[0].shape == (1, 512)


def test_truncation_keeps_the_end_token_and_warns(tokenizer, caplog):
    full, mask = tokenizer(PROMPTS[-1:], 64)
    n = int(mask.sum())
    with caplog.at_level(logging.WARNING):
        exact, _ = tokenizer(PROMPTS[-1:], n)
        assert not caplog.records
        short, mask = tokenizer(PROMPTS[-1:], n - 5)
    assert exact[0].tolist() == full[0, :n].tolist()
    assert short[0].tolist() == full[0, : n - 6].tolist() + [1] and mask.all()
    assert f"the last 5 of its {n - 1} tokens" in caplog.text


@pytest.mark.parametrize("inside", ["google/umt5-xxl", "tokenizer"])
def test_published_folders(tmp_path, inside):
    train_json(tmp_path / inside)
    assert Tokenizer.from_folder(tmp_path).vocab_size == Tokenizer.from_folder(tmp_path / inside).vocab_size


def test_json_is_preferred(tmp_path):
    train_sentencepiece(tmp_path)
    from_model = Tokenizer.from_folder(tmp_path)(PROMPTS, 64)[0]
    from_json = Tokenizer.from_folder(train_json(tmp_path))(PROMPTS, 64)[0]
    assert (from_model != from_json).any()
    (tmp_path / "spiece.model").write_bytes(b"not read")
    np.testing.assert_array_equal(Tokenizer.from_folder(tmp_path)(PROMPTS, 64)[0], from_json)


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer.json or spiece.model") as error:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_damaged_files(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x00damaged")
    with pytest.raises(CheckpointError, match=name):
        Tokenizer.from_folder(tmp_path)


def test_other_special_tokens(tmp_path):
    train_json(tmp_path, ("<unk>", "<pad>", "</s>"))
    with pytest.raises(CheckpointError, match="ids 1 and 2, umT5 has 0 and 1"):
        Tokenizer.from_folder(tmp_path)
