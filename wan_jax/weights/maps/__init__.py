"""Tables of names, one module for each network."""

from __future__ import annotations

from collections.abc import Mapping


def numbered(shapes: Mapping[str, tuple[int, ...]], name: str) -> list[tuple[int, ...]]:
    """Shapes of the names with 0, 1, 2, ... in the place of ``{}``, up to the first that is not there."""
    found: list[tuple[int, ...]] = []
    while (key := name.format(len(found))) in shapes:
        found.append(shapes[key])
    return found
