"""Prompts: cleaning and tokenising, as the umT5 encoder of the Wan models expects them.

Source: ``wan/modules/tokenizers.py`` HuggingfaceTokenizer with ``clean="whitespace"``.
"""

from __future__ import annotations

import html
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from wan_jax.errors import CheckpointError

PAD_ID = 0
EOS_ID = 1
FOLDERS = ("", "google/umt5-xxl", "tokenizer")  # the folder itself, the official and the diffusers layout

_log = logging.getLogger(__name__)


def clean(text: str) -> str:
    """Repair encoding damage and HTML entities, and turn every run of white space into one blank.

    ftfy also rewrites full-width forms and curly quotes, so Chinese prompts change: so they were in training.
    """
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


class Tokenizer:
    """Prompts to the ids of umT5's vocabulary."""

    def __init__(self, encode: Callable[[str], list[int]], vocab_size: int):
        """``encode`` gives the ids of a cleaned text without any special token."""
        self._encode = encode
        self.vocab_size = vocab_size

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read ``tokenizer.json``, else a SentencePiece ``*.model``.

        Args:
            folder: the tokenizer's own, or the model folder around it (``google/umt5-xxl``, ``tokenizer``).
        Raises:
            CheckpointError: no such file, or the file is not a tokenizer with umT5's special tokens.
        """
        places = [Path(folder, name) for name in FOLDERS]
        for place in places:
            if (place / "tokenizer.json").is_file():
                return cls._from_json(place / "tokenizer.json")
            models = sorted(place.glob("*.model"))
            if models:
                return cls._from_sentencepiece(models[0])
        looked = "\n  ".join(map(str, places))
        raise CheckpointError(
            "no tokenizer: expected tokenizer.json or spiece.model, of google/umt5-xxl or from the folder"
            f" tokenizer of a diffusers repository; looked in\n  {looked}"
        )

    @classmethod
    def _from_json(cls, path: Path) -> Tokenizer:
        import tokenizers

        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path}: not a tokenizer.json ({error})") from error
        _check_ids(path, inner.token_to_id("<pad>"), inner.token_to_id("</s>"))
        inner.no_truncation()
        inner.no_padding()
        return cls(lambda text: inner.encode(text, add_special_tokens=False).ids, inner.get_vocab_size())

    @classmethod
    def _from_sentencepiece(cls, path: Path) -> Tokenizer:
        import sentencepiece

        try:
            inner = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path}: not a SentencePiece model ({error})") from error
        _check_ids(path, inner.pad_id(), inner.eos_id())
        return cls(lambda text: inner.encode(text, out_type=int), inner.get_piece_size())

    def __call__(self, texts: Sequence[str], max_length: int = 512) -> tuple[np.ndarray, np.ndarray]:
        """Clean and tokenise; long prompts are cut, with a warning, such that the end token stays the last.

        Returns:
            ids and mask, [B, max_length] int32 each; mask 1 on tokens including the end token, 0 on padding.
        """
        ids_BS = np.full((len(texts), max_length), PAD_ID, np.int32)
        mask_BS = np.zeros((len(texts), max_length), np.int32)
        for row, text in enumerate(texts):
            ids = self._encode(clean(text))
            dropped = len(ids) + 1 - max_length
            if dropped > 0:
                _log.warning(
                    "prompt %r...: the last %d of its %d tokens are dropped, the model reads %d",
                    text[:40], dropped, len(ids), max_length - 1,
                )  # fmt: skip
            ids = [*ids[: max_length - 1], EOS_ID]
            ids_BS[row, : len(ids)] = ids
            mask_BS[row, : len(ids)] = 1
        return ids_BS, mask_BS


def _check_ids(path: Path, pad: int | None, eos: int | None) -> None:
    if (pad, eos) != (PAD_ID, EOS_ID):
        raise CheckpointError(
            f"{path}: <pad> and </s> have ids {pad} and {eos}, umT5 has {PAD_ID} and {EOS_ID}: use the"
            " tokenizer of google/umt5-xxl"
        )
