"""The words of the puppet world as tokens: a tokenizer for the host, and the same tokens from plans on the device.

The captions follow one grammar (`world.prompt`, `wan_jax.captions.structured_caption`), so their tokens are joined from
tables. Words of the grammar and what puppets can say are whole; everything else is spelled letter by letter. Syllables
of one token each stand as far from the mark before them as they are from being said first, which is all that a text
encoder with relative positions has to tell their order by.

Axes: ``S`` tokens. A plan is of one clip; `jax.vmap` over plans.
"""

from __future__ import annotations

import functools
import string
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from wan_jax.text import EOS_ID, PAD_ID, Tokenizer
from wan_jax.train.puppets import faces, scripts, world
from wan_jax.train.puppets.world import Plan

Array = jax.Array

_GRAMMAR = (
    'a puppet with hair , glasses and hat shirt wall in front of says on the left right then . : " '
    "the subject of reference 1 2 <img1> <img2> <sub1> <sub2> <s> <e>"
).split()
_NONE = -1  # no token, in the tables


def write_tokenizer(folder: str | Path) -> None:
    """Write ``tokenizer.json`` of umT5's kind. Any ASCII text can be spelled; capitals count as small letters."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    words = [*_GRAMMAR, *faces.HUES, *world.WALLS, *world.PATTERNS, *" ".join(world.MOTIONS).split()]
    letters = [c for c in string.printable if c.isprintable() and not c.isspace() and not c.isupper()]
    pieces = dict.fromkeys(["<pad>", "</s>", "<unk>"], 0.0)
    pieces |= {f"\u2581{word}": -1.0 for word in dict.fromkeys([*words, *scripts.SYLLABLES])}
    for piece in ("\u2581", *letters, *(f"\u2581{c}" for c in letters)):
        pieces.setdefault(piece, -10.0)
    tokenizer = Tokenizer(models.Unigram(list(pieces.items()), unk_id=2))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"<[^<> ]+>|[.,:;!?\"]"), "isolated"),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(),
        ]
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))


class Words:
    """Tokens of plans on the device.

    Args:
        tokenizer: of `write_tokenizer`.
        length: tokens of a caption, the end and the padding included.
    """

    def __init__(self, tokenizer: Tokenizer, length: int):
        self.length = length

        def ids(text: str) -> tuple[int, ...]:
            ids, mask = tokenizer([text], length)
            return tuple(ids[0, : mask[0].sum() - 1].tolist())

        self._ids = functools.cache(ids)

    def text(self, text: str) -> np.ndarray:
        return np.asarray(self._ids(text), np.int32)

    def choice(self, index: Array, texts: tuple[str, ...]) -> Array:
        """The tokens of one of some texts, filled up with `_NONE`."""
        ids = [self._ids(text) for text in texts]
        width = max(map(len, ids))
        return jnp.asarray([[*row, *[_NONE] * (width - len(row))] for row in ids], jnp.int32)[index]

    def join(self, parts: list[Array]) -> tuple[Array, Array]:
        """Ids and mask, int32 [S] each, of the parts in turn and the end."""
        ids = _row([*parts, [EOS_ID]])
        ids = ids[jnp.argsort(ids == _NONE, stable=True)]
        ids = jnp.pad(ids, (0, max(0, self.length - len(ids))), constant_values=_NONE)[: self.length]
        mask = ids != _NONE
        return jnp.where(mask, ids, PAD_ID), mask.astype(jnp.int32)

    def empty(self) -> tuple[Array, Array]:
        """Of the empty prompt, [1, S] each."""
        return tuple(x[None] for x in self.join([]))

    def caption(self, plan: Plan, *, described: bool, references: bool = True) -> tuple[Array, Array]:
        """Ids and mask [S] of ``structured_caption(world.prompt(plan, ...), descriptions)``.

        Args:
            described: the lines of the references tell what people look like; else they have no description.
            references: False: no such lines, the prompt itself describes the people.
        """
        people = plan.motion.shape[0]
        looks = [self.looks(jax.tree.map(lambda x, k=k: x[k], plan.people.face)) for k in range(people)]
        names = [[self.text(f"<sub{k + 1}>")] for k in range(people)] if references else looks
        parts = []
        for k in range(people if references else 0):
            about = looks[k] if described else [self.text(f"the subject of reference {k + 1}")]
            parts += [self.text(f"<img{k + 1}>:"), *about, self.text(f", <sub{k + 1}>")]
        scene = [
            self.text("in front of a"), self.choice(plan.pattern, world.PATTERNS),
            self.choice(plan.wall, world.WALLS), self.text("wall"),
        ]  # fmt: skip
        does = [self.choice(plan.motion[k], world.MOTIONS) for k in range(people)]
        script = plan.script
        if people == 1:
            parts += [*names[0], does[0], *scene, self.text("and says"), *self.speech(plan, script.on)]
            return self.join([*parts, self.text(".")])
        for k in range(2):
            side = self.choice((plan.left != k).astype(jnp.int32), ("left", "right"))
            parts += [*names[k], self.text("on the"), side, does[k], self.text("and" if k == 0 else ",")]
        parts += [*scene, self.text(".")]
        for turn, then in enumerate(("", ", then")):
            who = (script.speaker[0] + turn) % 2
            said = script.on & (script.speaker == who)
            name = jnp.where(who == 0, _row(names[0]), _row(names[1]))
            words = _row([self.text(then), name, self.text("says"), *self.speech(plan, said)])
            parts.append(jnp.where(said.any(), words, _NONE))
        return self.join([*parts, self.text(".")])

    def speech(self, plan: Plan, said: Array) -> list[Array]:
        """What some slots say, between its marks."""
        index = plan.script.consonant * len(scripts.VOWELS) + plan.script.vowel
        spoken = jnp.where(said[:, None], self.choice(index, scripts.SYLLABLES), _NONE)
        return [self.text("<S>"), spoken.reshape(-1), self.text("<E>")]

    def looks(self, face: faces.Face) -> list[Array]:
        """`faces.words`."""

        def hue(x: Array, text: str) -> Array:
            return self.choice(_hue(x), tuple(text.format(name) for name in faces.HUES))

        hat = (face.hat - faces.HAT) / (1 - faces.HAT)
        return [
            self.text("a puppet with"),
            hue(face.hair_hue, "{} hair"),
            jnp.where(face.glasses > faces.GLASSES, self.text(", glasses"), _NONE),
            jnp.where(face.hat > faces.HAT, hue(hat, ", a {} hat"), _NONE),
            hue(face.shirt_hue, "and a {} shirt"),
        ]


def _hue(x: Array) -> Array:
    return jnp.round(x * len(faces.HUES)).astype(jnp.int32) % len(faces.HUES)


def _row(parts: list[Array]) -> Array:
    return jnp.concatenate([jnp.asarray(part, jnp.int32) for part in parts])
