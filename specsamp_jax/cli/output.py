"""Output of `specsamp generate`: texts as they grow, or one line of JSON per text."""

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click
import numpy as np

from specsamp_jax._types import Generation
from specsamp_jax.cli.prompts import Prompt
from specsamp_jax.cli.rows import Meter, Row, in_order


def write_texts(
    generations: Iterable[Generation], rows: Sequence[Row], prompts: Sequence[Prompt], lengths: np.ndarray, first: bool
) -> None:
    """Writes each text to continue, and the pieces that follow it as they come; an empty line is between texts.

    Args:
      generations: The items of `stream`.
      rows: One per prompt.
      prompts: The prompts of the batch.
      lengths: Tokens of each prompt.
      first: Whether no text is before the batch.
    """
    current = -1
    for row, piece in in_order(generations, rows, lengths.tolist()):
        if row > current:
            click.echo(("" if first and row == 0 else "\n\n") + prompts[row].text, nl=False)
            current = row
        click.echo(piece, nl=False)
        sys.stdout.flush()


def write_json(
    generations: Iterable[Generation],
    rows: Sequence[Row],
    prompts: Sequence[Prompt],
    lengths: np.ndarray,
    eos_token: Sequence[int],
) -> None:
    """Writes one line of JSON per prompt, when all of the batch are finished.

    Args:
      generations: The items of `stream`.
      rows: One per prompt.
      prompts: The prompts of the batch.
      lengths: Tokens of each prompt.
      eos_token: The end tokens.
    """
    last: list[Generation] = []

    def kept() -> Iterator[Generation]:
        for result in generations:
            last[:] = [result]
            yield result

    texts = [""] * len(rows)
    for row, piece in in_order(kept(), rows, lengths.tolist()):
        texts[row] += piece
    (result,) = last
    tokens, log_probs = np.asarray(result.tokens), np.asarray(result.log_probs)
    for i, (row, prompt, begin) in enumerate(zip(rows, prompts, lengths, strict=True)):
        generated = tokens[i, begin : begin + row.num_tokens].tolist()
        ended = row.stopped is not None or (generated and generated[-1] in eos_token)
        asked = {"prompt": prompt.text} if prompt.messages is None else {"messages": prompt.messages}
        _write(
            {
                **asked,
                "text": texts[i],
                "tokens": generated,
                "log_probs": list(map(_finite, log_probs[i, begin : begin + row.num_tokens].tolist())),
                "finish_reason": "stop" if ended else "length",
                "stop": row.stopped,
            }
        )


def write_statistics(meter: Meter) -> None:
    """Writes the counts of all batches as one line of JSON, the last."""
    stats = meter.stats
    drafted, accepted = ((), ()) if stats is None else (stats.num_drafted, stats.num_accepted)
    _write(
        {
            "statistics": {
                "num_tokens": meter.num_tokens,
                "num_steps": meter.num_steps,
                "num_drafted": np.asarray(drafted).tolist(),
                "num_accepted": np.asarray(accepted).tolist(),
                "tokens_per_second": meter.tokens_per_second,
                "seconds": meter.seconds,
                "first_step_seconds": meter.first_seconds,
            }
        }
    )


def _write(value: dict[str, Any]) -> None:
    click.echo(json.dumps(value, ensure_ascii=False, allow_nan=False))
    sys.stdout.flush()


def _finite(value: float) -> float | None:
    """A number as JSON has it: null for the log of 0."""
    return value if math.isfinite(value) else None
