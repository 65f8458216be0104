"""What a small model was not trained on: it says so, in place of the user's surprise."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.conditions import compiled
from wan_jax.media import to_unit
from wan_jax.text import Tokenizer

log = logging.getLogger(__name__)

# Peak signal-to-noise ratio under which the video VAE has not seen the like of a picture. Puppets: 31 dB and more.
FAMILIAR = 27.0


def warn_of_other_worlds(vae: Any, tokenizer: Tokenizer, prompt: str, pictures: Sequence[np.ndarray]) -> None:
    """Log what is foreign in a prompt and in pictures, uint8 [H, W, 3], as the model gets them."""
    if words := unknown_words(tokenizer, prompt):
        log.warning(
            "this small model knows the words of its puppets alone, not %s: what they ask for will not be seen",
            ", ".join(words),
        )
    for number, picture in enumerate(pictures, 1):
        if (found := familiarity(vae, picture)) < FAMILIAR:
            log.warning(
                "reference %d is far from the drawn puppets that this small model was trained on (its VAE keeps %.0f dB"
                " of it, of puppets more than %.0f): expect little likeness",
                number, found, FAMILIAR,
            )  # fmt: skip


def unknown_words(tokenizer: Tokenizer, prompt: str) -> list[str]:
    """Words outside of quotes that the tokenizer has to spell letter by letter."""
    told = re.sub(r'"[^"]*"', " ", prompt)
    words = dict.fromkeys(re.findall(r"\b[^\W\d_]{3,}\b", told.lower()))
    _, mask = tokenizer(list(words) or ["a"], 64)
    return [word for word, length in zip(words, mask.sum(1) - 1, strict=False) if length >= len(word)]


def familiarity(vae: Any, picture: np.ndarray) -> float:
    """dB of a picture, uint8 [H, W, 3], after the VAE and back."""
    run = compiled("familiarity", _kept)
    return float(run(vae, jnp.asarray(to_unit(picture))[None, None]))


def _kept(vae: Any, video: jax.Array) -> jax.Array:
    error = jnp.square(jnp.clip(vae.decode(vae.encode(video)), -1, 1) - video).mean() / 4
    return -10 * jnp.log10(error)
