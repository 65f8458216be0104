"""What the marks in picture and sound share: payloads with their check, keyed carriers, and the evidence for a mark.

A mark is the sum of one keyed pattern (carrier) of ``n`` chips per payload bit, with the bit as its sign. Carriers are
rows of a Hadamard matrix, so they are orthogonal; the key picks the rows and permutes and flips the chips, so that to
others they are noise. There is no pattern for synchronisation: a detector looks where the share of the energy that lies
in the span of the carriers is largest, which needs no knowledge of the payload.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

PUBLIC_KEY = "wan_jax public watermark key 1"  # known to everyone: anyone can verify, and anyone can forge
VERSION = 1
# A mark counts from here on, in decimal exponents of chance per place looked at, and only if its check holds too. The
# longest search looks at some 10 million places, so one in 10 unmarked clips may get this far. Of these, check and
# version let 1 in 4 million pass (full payload, with its guesses) or 1 in 1,024 (small; it has fewer places too).
MIN_EVIDENCE = 8.0


@dataclass(frozen=True)
class Layout:
    """A payload: how many bits are spent on what, the generator polynomial of the check without its first term, and how
    many of the weakest bits a reader may guess: each doubles what passes the check by chance."""

    version: int
    model: int
    settings: int
    check: int
    polynomial: int
    guesses: int

    @property
    def bits(self) -> int:
        return self.version + self.model + self.settings + self.check


FULL = Layout(version=4, model=12, settings=24, check=24, polynomial=0x864CFB, guesses=6)  # CRC-24 of RFC 4880
SMALL = Layout(version=2, model=6, settings=0, check=8, polynomial=0x2F, guesses=0)  # CRC-8 of AUTOSAR


@dataclass(frozen=True)
class Message:
    """Hashes are the first bits of a SHA-256, as many as the layout has."""

    version: int
    model: int
    settings: int

    @classmethod
    def of(cls, layout: Layout, model: str, settings: dict[str, Any]) -> Message:
        text = json.dumps(settings, sort_keys=True)
        return cls(VERSION, _first_bits(model, layout.model), _first_bits(text, layout.settings))


@dataclass(frozen=True)
class Mark:
    """What a detector found at the likeliest place.

    Args:
        layout: of the payload that was looked for.
        signs: float32 [bits]; soft bits, whose signs are the payload.
        evidence: -log10 of the probability of so large a share of energy at one place by chance.
    """

    layout: Layout
    signs: np.ndarray
    evidence: float

    @property
    def message(self) -> Message | None:
        """None unless there is enough evidence, the version is known, and the check holds for the signs as they are or
        with some of the weakest changed, the fewest first."""
        if self.evidence < MIN_EVIDENCE:
            return None
        weakest = np.argsort(np.abs(self.signs))[: self.layout.guesses]
        for count in range(len(weakest) + 1):
            for changed in itertools.combinations(weakest, count):
                signs = self.signs.copy()
                signs[list(changed)] *= -1
                message = decode(signs, self.layout)
                if message and message.version == VERSION:
                    return message
        return None


def encode(message: Message, layout: Layout) -> np.ndarray:
    """The payload, first bit first, float32 [bits] of -1 and 1."""
    value = (message.version << layout.model | message.model) << layout.settings | message.settings
    value = value << layout.check | _check(value, layout)
    return np.array([2 * (value >> place & 1) - 1 for place in reversed(range(layout.bits))], np.float32)


def decode(signs: np.ndarray, layout: Layout) -> Message | None:
    """The message, or None when its check fails."""
    value = int(payload_hex(signs), 16)
    value, check = _split(value, layout.check)
    if check != _check(value, layout):
        return None
    value, settings = _split(value, layout.settings)
    version, model = _split(value, layout.model)
    return Message(version, model, settings)


def payload_hex(signs: np.ndarray) -> str:
    return np.packbits(signs > 0).tobytes().hex()  # both layouts have whole bytes


def carriers(key: str, label: str, bits: int, chips: int) -> np.ndarray:
    """Orthogonal patterns of -1 and 1, float32 [bits, chips], the same on every machine; chips is a power of two."""
    stream = hashlib.shake_256(f"{label}\0{key}".encode()).digest(17 * chips)
    rows, columns = np.frombuffer(stream[: 16 * chips], ">u8").reshape(2, chips)
    rows, columns = np.argsort(rows, kind="stable")[:bits], np.argsort(columns, kind="stable")
    flips = np.frombuffer(stream[16 * chips :], np.uint8) & 1
    return 1 - 2 * ((np.bitwise_count(rows[:, None] & columns) + flips) & 1).astype(np.float32)


def evidence(share: float, bits: int, chips: int) -> float:
    """For a share of the energy in the span of the carriers. Without a mark it has a beta distribution, since the
    keyed flips make noise of any picture or sound."""
    from scipy.special import betainc

    return float(-np.log10(max(betainc((chips - bits) / 2, bits / 2, 1 - share), 1e-300)))


def _first_bits(text: str, count: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest(), "big") >> (256 - count)


def _split(value: int, low: int) -> tuple[int, int]:
    return value >> low, value & (1 << low) - 1


def _check(value: int, layout: Layout) -> int:
    """Cyclic redundancy check, from all ones so that leading zeros count."""
    register = (1 << layout.check) - 1
    for place in reversed(range(layout.bits - layout.check)):
        carry, register = _split(register << 1, layout.check)
        register ^= layout.polynomial * (carry ^ value >> place & 1)
    return register
