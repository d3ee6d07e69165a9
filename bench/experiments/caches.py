"""Folders of the experiments: data, models and raw results, none of them in the repository."""

import os
from pathlib import Path

CACHE = Path(os.environ.get("SPECSAMP_EXPERIMENTS", Path.home() / ".cache" / "specsamp" / "experiments"))
RESULTS = Path(__file__).parent / "results"
"""The tables that are in the repository."""
