"""The table of an evaluation: every score with its interval, and beside it what bounds it.

*Truth* are the rendered clips that were asked for, *codec* is what the model's own video VAE and audio codec leave of
them, *shuffled* are the model's clips with the pictures and the sounds of other clips.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from wan_jax.evaluate import puppets
from wan_jax.evaluate.puppets import CHOICES, Observed, Row
from wan_jax.evaluate.variants import VARIANTS
from wan_jax.train.puppets import world


@dataclass(frozen=True)
class Score:
    """One number beside its bounds; NaN where there is none."""

    value: float
    interval: tuple[float, float]  # 95 %
    truth: float
    codec: float
    shuffled: float


class Seen(NamedTuple):
    """What the detectors saw of one clip."""

    clip: int  # its number
    observed: Observed
    extra: dict[str, bool | float] = {}  # rows beyond `puppets.measure`


@dataclass
class Report:
    """Clips that were made so far. ``seen`` is by (variant, people); "truth" and "codec" are there like variants."""

    model: str
    seed: int
    plans: dict[int, list[world.Plan]] = field(default_factory=dict)  # by people, one per clip
    known: dict[int, list[list[np.ndarray]]] = field(default_factory=dict)  # looks of their references
    seen: dict[tuple[str, int], list[Seen]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)  # of each full clip; the first holds loading and compilation
    interrupted: bool = False

    def plan(self, people: int, plan: world.Plan, known: list[np.ndarray]) -> None:
        """What the next clips are asked to be, and the looks of its references."""
        self.plans.setdefault(people, []).append(plan)
        self.known.setdefault(people, []).append(known)

    def add(self, name: str, people: int, seen: Seen, seconds: float | None = None) -> None:
        """One clip that was made."""
        self.seen.setdefault((name, people), []).append(seen)
        if name == "full" and seconds is not None:
            self.seconds.append(seconds)

    def rows(self, name: str, people: int) -> dict[str, Row]:
        """Of a variant, "truth" or "codec"; nothing where there are too few clips."""
        seen = self.seen.get((name, people), [])
        if len(seen) < CHOICES:
            return {}
        extra = {key: Row(np.array([s.extra[key] for s in seen])) for key in seen[0].extra}
        return self._measure(people, seen, [s.observed for s in seen]) | extra

    def shuffled(self, name: str, people: int) -> dict[str, Row]:
        """With the picture of the clip before and the sound of the clip after each."""
        seen = self.seen.get((name, people), [])
        if len(seen) < CHOICES:
            return {}
        mixed = [
            replace(seen[k - 1].observed, loudness=after.loudness, syllables=after.syllables, timbre=after.timbre)
            for k in range(len(seen))
            for after in [seen[(k + 1) % len(seen)].observed]
        ]
        return self._measure(people, seen, mixed)

    def _measure(self, people: int, seen: Sequence[Seen], observed: Sequence[Observed]) -> dict[str, Row]:
        plans, known = self.plans[people], self.known[people]
        return puppets.measure([plans[s.clip] for s in seen], [known[s.clip] for s in seen], observed)

    def table(self, name: str, people: int) -> dict[str, Score]:
        """Every row of a variant or of "codec", beside its bounds."""
        truth, codec = self.rows("truth", people), self.rows("codec", people)
        shuffled, none = self.shuffled(name, people), float("nan")

        def bound(rows: dict[str, Row], row: str) -> float:
            return rows[row].value if row in rows else none

        return {
            row: Score(each.value, each.interval(), bound(truth, row), bound(codec, row), bound(shuffled, row))
            for row, each in self.rows(name, people).items()
        }

    def tables(self) -> Iterator[tuple[str, int, dict[str, Score]]]:
        """Name, number of clips and table; the codec first, then the variants."""
        for (name, people), seen in sorted(self.seen.items(), key=lambda item: (item[0][0] != "codec", item[0][1])):
            shown = name in VARIANTS or (name == "codec" and people == 1)
            if shown and (table := self.table(name, people)):
                yield name, len(seen), table

    def to_json(self) -> str:
        """NaN becomes null."""

        def number(x: float) -> float | None:
            return None if math.isnan(x) else round(x, 4)

        tables = {
            name: {"clips": count} | {
                row: {
                    "value": number(score.value), "interval": [number(x) for x in score.interval],
                    "truth": number(score.truth), "codec": number(score.codec), "shuffled": number(score.shuffled),
                }
                for row, score in table.items()
            }
            for name, count, table in self.tables()
        }  # fmt: skip
        about = {"model": self.model, "seed": self.seed, "seconds": self.timing(), "interrupted": self.interrupted}
        return json.dumps(about | {"tables": tables}, indent=1)

    def timing(self) -> dict[str, float]:
        """Seconds of the first full clip, which loads and compiles, and the median of the later ones."""
        if not self.seconds:
            return {}
        later = {"later": round(float(np.median(self.seconds[1:])), 2)} if self.seconds[1:] else {}
        return {"first": round(self.seconds[0], 2)} | later

    def __str__(self) -> str:
        lines = []
        for name, count, table in self.tables():
            about = VARIANTS[name].about if name in VARIANTS else "rendered clips through the VAE and the audio codec"
            lines.append(f"{name}: {about}; {count} clips of held-out people, seed {self.seed}")
            lines.append(f"  {'':30}{'score':>9}{'95 % interval':>19}{'truth':>9}{'codec':>9}{'shuffled':>10}")
            for row, score in table.items():
                low, high = score.interval
                span = "-" if math.isnan(low) else f"{_short(low)} .. {_short(high)}"
                bounds = f"{_short(score.truth):>9}{_short(score.codec):>9}{_short(score.shuffled):>10}"
                lines.append(f"  {row:30}{_short(score.value):>9}{span:>19}{bounds}")
            lines.append("")
        lines += [f"seconds of the {which} clip: {value:g}" for which, value in self.timing().items()]
        return "\n".join(lines)


def _short(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:.1f}" if abs(x) >= 10 else f"{x:.3f}"
