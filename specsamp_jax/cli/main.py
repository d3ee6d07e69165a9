"""The command's entry point, for callers of `specsamp_jax.cli.main:main`; see `specsamp.py`."""

from specsamp import main as main
