"""Checks against the goldens of the official code, one module per part; `RUNNERS` maps first words to checks."""
