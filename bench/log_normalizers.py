"""Measures how the log-normaliser of a real model changes from token to token, for the calibrated rule.

    python bench/log_normalizers.py FOLDER TEXT... [--temperature 1.0] [--tokens 320]

FOLDER holds a checkpoint in Hugging Face's layout, each TEXT is a file. Prints one line per text and estimate: the
error of the estimate, which is renewed at every third position, the mean of the bound of docs/algorithms.md, and the
mean of the factor by which acceptance falls.
"""

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import logsumexp

from specsamp_jax.models import load_checkpoint
from specsamp_jax.rules.calibrated import bound
from specsamp_jax.text import load_tokenizer

SKIPPED, WARM_UP, EVERY, OFFSET = 8, 20, 3, 10.0


def estimates(log_normalizers: np.ndarray, kind: str) -> np.ndarray:
    """The estimate at each position but the first, from the rows 0, 3, 6, ... before it."""
    read = log_normalizers[::EVERY]
    values = np.cumsum(read) / np.arange(1, len(read) + 1) if kind == "mean" else read
    return np.repeat(values, EVERY)[: len(log_normalizers) - 1]


def main() -> None:
    """Prints the measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=320)
    options = parser.parse_args()
    tokenizer, model = load_tokenizer(options.folder).tokenizer, load_checkpoint(options.folder, dtype="float32")
    for text in options.texts:
        tokens = jnp.array([tokenizer.encode(text.read_text()).ids[: options.tokens]])
        positions = jnp.arange(tokens.shape[1])[None]
        logits, _ = jax.jit(model.apply_fn)(model.params, tokens, positions, model.init_cache_fn(*tokens.shape))
        exact = logsumexp(np.asarray(logits[0], np.float64) / options.temperature, axis=1)[SKIPPED:]
        change, correlation = np.abs(np.diff(exact)).mean(), np.corrcoef(exact[1:], exact[:-1])[0, 1]
        print(
            f"{text.name}: {len(exact)} rows, deviation {exact.std():.2f}, change {change:.2f}, lag 1 {correlation:.2f}"
        )
        for kind in ("mean", "last"):
            error = estimates(exact, kind) - exact[1:]
            error = error[WARM_UP:]
            kept = np.exp(-np.maximum(error, 0))
            bounds = np.asarray(bound(jnp.asarray(error), OFFSET))
            print(
                f"  {kind}: error {np.abs(error).mean():.2f}, bound {bounds.mean():.3f}, acceptance {kept.mean():.3f}"
            )


if __name__ == "__main__":
    main()
