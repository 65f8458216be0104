"""A choice that the program makes, and that a person may make instead: by an environment variable or for a while.

Settings are read while a program is traced: one that is compiled already keeps the choice it was compiled with.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from wan_jax.errors import InputError, nearest

AUTO = "auto"


class Setting:
    """One of ``choices``, or "auto".

    Args:
        what: named in errors.
        variable: of the environment; what `use` sets goes before it.
    """

    def __init__(self, what: str, variable: str, choices: Sequence[str]):
        self.what, self.variable, self.choices = what, variable, (AUTO, *choices)
        self._set: str | None = None

    def get(self) -> str:
        """
        Raises:
            InputError: the variable holds no such choice.
        """
        return self._set or self._checked(os.environ.get(self.variable) or AUTO)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Choose ``name`` for the programs that are traced inside.

        Raises:
            InputError: there is no such choice.
        """
        before, self._set = self._set, self._checked(name)
        try:
            yield
        finally:
            self._set = before

    def _checked(self, name: str) -> str:
        if name not in self.choices:
            raise InputError(
                f"{self.what} {name!r}: use {', '.join(self.choices)} ({self.variable}){nearest(name, self.choices)}"
            )
        return name
