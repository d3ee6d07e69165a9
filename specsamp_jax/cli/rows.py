"""The texts of a batch while they are generated: their pieces in order, their stop strings, their speed."""

import time
from collections.abc import Iterable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from specsamp_jax._types import Generation, Stats
from specsamp_jax.cli.shared import acceptance_line, check_target, warn_about_draft
from specsamp_jax.text import StopStream, TextStream


class Row:
    """The text of one row, up to its first stop string and its most tokens.

    Args:
      tokenizer: The tokenizer.
      max_tokens: The most tokens.
      context: Tokens before the text, as in `TextStream`.
      stops: The stop strings.

    Attributes:
      num_tokens: Tokens of the text, up to the one that completed a stop string.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, max_tokens: int, context: Sequence[int] = (), stops: Sequence[str] = ()
    ):
        self.num_tokens = 0
        self._max_tokens = max_tokens
        self._text, self._stop = TextStream(tokenizer, context), StopStream(stops)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text; None before that."""
        return self._stop.stopped

    @property
    def is_finished(self) -> bool:
        """Whether a stop string or the most tokens have been reached."""
        return self.stopped is not None or self.num_tokens >= self._max_tokens

    def push(self, tokens: Iterable[int]) -> str:
        """Returns the text that these tokens complete, possibly empty; nothing after the end."""
        pieces = []
        for token in tokens:
            if self.is_finished:
                break
            pieces.append(self._stop.push(self._text.push([token])))
            self.num_tokens += 1
        return "".join(pieces)

    def flush(self) -> str:
        """Returns the text held back so far; call it after the last token."""
        return self._stop.push(self._text.flush()) + self._stop.flush()


def in_order(
    generations: Iterable[Generation], rows: Sequence[Row], lengths: Sequence[int]
) -> Iterator[tuple[int, str]]:
    """Yields the index of a row with the next piece of its text, all pieces of a row before the next row.

    The first unfinished row is yielded as it grows, and the pieces of later rows wait. Once all rows are finished or
    stopped, no further item is taken.

    Args:
      generations: The items of `stream`.
      rows: One per row.
      lengths: Tokens of each prompt.
    """
    waiting, lengths, current = [""] * len(rows), list(lengths), 0
    for result in generations:
        tokens, grown = np.asarray(result.tokens), np.asarray(result.lengths).tolist()
        for i, row in enumerate(rows):
            waiting[i] += row.push(tokens[i, lengths[i] : grown[i]].tolist())
        # A row that gains nothing in a step is finished.
        finished = [row.is_finished or grown[i] == lengths[i] for i, row in enumerate(rows)]
        while current < len(rows) - 1 and finished[current]:
            yield current, waiting[current] + rows[current].flush()
            current += 1
        yield current, waiting[current]
        waiting[current] = ""
        lengths = grown
        if all(finished):
            break
    for i in range(current, len(rows)):
        yield i, waiting[i] + rows[i].flush()


class Meter:
    """Times and counts the decoding loops of batches; the first step of each compiles and is timed separately.

    Args:
      max_new_tokens: The most tokens of a row that count; the last step may give more.
    """

    def __init__(self, max_new_tokens: int):
        self._max_new_tokens = max_new_tokens
        self.num_tokens = self.num_steps = self._num_timed = 0
        self.seconds = self.first_seconds = 0.0
        self.stats: Stats | None = None

    def watch(self, generations: Iterable[Generation], first: int = 0) -> Iterator[Generation]:
        """Yields the items of `stream`; `first` is the index of its first row among all texts.

        Raises:
          ClickException: The target gave a degenerate row.
        """
        before, last, num_before = self.stats, time.perf_counter(), 0
        for result in generations:
            now, stats = time.perf_counter(), result.stats
            check_target(stats, first=first)
            num_now = int(np.minimum(stats.num_emitted, self._max_new_tokens).sum())
            self.num_tokens += num_now - num_before
            self.num_steps += 1
            if int(stats.num_steps) == 1:
                self.first_seconds += now - last
            else:
                self.seconds += now - last
                self._num_timed += num_now - num_before
            # Batches differ in size: counts per row are not summed.
            self.stats = stats if before is None else _sum_of_drafts(before, stats)
            last, num_before = now, num_now
            yield result

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second, without first steps; None if there was no other."""
        return self._num_timed / self.seconds if self.seconds else None

    def summary(self) -> list[str]:
        """Returns the counts so far, in lines."""
        if self.stats is None:
            return ["nothing was emitted"]
        rate = f"{self.tokens_per_second:.0f} tokens per second, " if self.tokens_per_second else ""
        warn_about_draft(self.stats)
        acceptance = acceptance_line(self.stats)
        return [
            f"{self.num_tokens} tokens in {self.num_steps} steps of the target, "
            f"{self.num_tokens / self.num_steps:.2f} per step; "
            f"{rate}after {self.first_seconds:.1f} s for the first step and its compilation",
            *([] if acceptance is None else [acceptance]),
        ]


def _sum_of_drafts(before: Stats, stats: Stats) -> Stats:
    return stats._replace(
        num_drafted=before.num_drafted + stats.num_drafted,
        num_accepted=before.num_accepted + stats.num_accepted,
        status=jnp.concatenate([before.status, stats.status]),
    )
