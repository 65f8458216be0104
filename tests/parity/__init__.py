"""Checks against the goldens of the official code, one module per part; `RUNNERS` maps a file's first words to its check."""
