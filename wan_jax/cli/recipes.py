"""Recipes: Python files whose ``get_config()`` returns settings, for `generate` and `train`; see configs/."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

from wan_jax.errors import InputError


def read_recipe(path: str) -> dict[str, Any]:
    """What ``get_config()`` of a recipe returns."""
    if not Path(path).is_file():
        raise InputError(f"--config {path}: no such file; recipes are Python files, see configs/")
    try:
        recipe = runpy.run_path(path)
    except ModuleNotFoundError as error:
        raise InputError(f"{path}: {error}: pip install {error.name}") from error
    if "get_config" not in recipe:
        raise InputError(f"{path} is no recipe: it defines no get_config()")
    return recipe["get_config"]().to_dict()
