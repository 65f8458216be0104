"""``python -m convert`` from a clone: the same as ``wan-jax convert``."""
