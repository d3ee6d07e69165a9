"""The certificate: one row per check, as a table and as a plot; the statistics of counts."""

import importlib
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

FALSE_ALARM = 1e-5
"""Probability with which a statistical check fails a rule that is exact, for a key chosen at random."""

_FEWEST_EXPECTED = 5.0  # cells with a smaller expected count are merged, or chi-square is no approximation


class Check(NamedTuple):
    """The result of a check.

    Attributes:
      name: The subject of the check.
      passed: Whether the rule passed; None if the check says nothing about exactness or could not run.
      detail: The finding, in a sentence.
      num_samples: Number of draws, 0 if nothing was drawn.
      total_variation: Distance of the drawn distribution from the exact one; NaN in checks without one.
      interval: The true distance lies in this interval with probability 1 - `FALSE_ALARM` at least.
      p_value: Of the chi-square test, or of another test if there is no distribution; NaN in checks without a test.
    """

    name: str
    passed: bool | None
    detail: str
    num_samples: int = 0
    total_variation: float = float("nan")
    interval: tuple[float, float] = (float("nan"), float("nan"))
    p_value: float = float("nan")


class Certificate(NamedTuple):
    """The checks of a rule.

    Attributes:
      checks: One per row of the table.
    """

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether no check failed, and at least one passed."""
        return all(check.passed is not False for check in self.checks) and any(check.passed for check in self.checks)

    def rows(self) -> list[tuple[str, ...]]:
        """Returns the table as texts, the first row with the names of the columns."""
        table: list[tuple[str, ...]] = [("check", "result", "samples", "total variation", "interval", "p", "finding")]
        for check in self.checks:
            result = {True: "passed", False: "FAILED", None: "-"}[check.passed]
            distance = ("", "")
            if not np.isnan(check.total_variation):
                low, high = check.interval
                distance = f"{check.total_variation:.4f}", f"{low:.4f} to {high:.4f}"
            p_value = "" if np.isnan(check.p_value) else f"{check.p_value:.2g}"
            samples = f"{check.num_samples:,}" if check.num_samples else ""
            table.append((check.name, result, samples, *distance, p_value, check.detail))
        return table

    def __str__(self) -> str:
        """The table."""
        rows = self.rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        )

    def plot(self, file: str | Path) -> None:
        """Draws the distances with their intervals into a file, whose suffix chooses the format.

        Raises:
          ValueError: matplotlib is not installed.
        """
        try:
            figure_module = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ValueError(
                "The plot of a certificate needs matplotlib, which is not installed; the extra 'plot' installs it."
            ) from error
        drawn = [check for check in self.checks if not np.isnan(check.total_variation)]
        figure = figure_module.Figure(figsize=(7, 1 + 0.4 * len(drawn)), layout="constrained")
        axes = figure.subplots()
        for height, check in enumerate(reversed(drawn)):
            color = "tab:green" if check.passed else "tab:red"
            axes.plot(check.interval, (height, height), color=color, linewidth=2)
            axes.plot(check.total_variation, height, "o", color=color)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(drawn)), [check.name for check in reversed(drawn)])
        axes.set_xlabel("total variation to the exact distribution")
        figure.savefig(file)


def check_law(
    name: str,
    counts: Int[np.ndarray, "N"],
    probs: Float[np.ndarray, "N"],
    *,
    false_alarm: float = FALSE_ALARM,
) -> Check:
    """Holds counts against probabilities: chi-square decides, the total variation is reported with its interval.

    The interval follows from two inequalities: the expected distance of the counts is at least the true one, and
    exceeds it by at most half the sum of sqrt(p (1 - p)/n); the distance deviates from its expectation by more than
    sqrt(ln(1/d)/(2 n)) with probability d at most (McDiarmid). A token of probability zero fails at once.
    """
    num_samples = int(counts.sum())
    share = counts / num_samples
    distance = 0.5 * float(np.abs(share - probs).sum())
    noise = 0.5 * float(np.sqrt(share * (1 - share) / num_samples).sum())
    deviation = float(np.sqrt(np.log(2 / false_alarm) / (2 * num_samples)))
    interval = max(0.0, distance - noise - deviation), min(1.0, distance + deviation)
    impossible = int(counts[probs == 0].sum())
    p_value = 0.0 if impossible else chi_square(counts, probs)
    if impossible:
        detail = f"{impossible:,} texts of probability zero"
    else:
        worst = int(np.argmax(np.abs(share - probs)))
        detail = f"most off: {share[worst]:.4f} drawn where {probs[worst]:.4f} is exact"
    return Check(name, p_value > false_alarm, detail, num_samples, distance, interval, p_value)


def chi_square(counts: Int[np.ndarray, "N"], probs: Float[np.ndarray, "N"]) -> float:
    """Returns the p-value of Pearson's test; cells expected fewer than five times are merged."""
    expected = probs * counts.sum()
    rare = expected < _FEWEST_EXPECTED
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) < 2:
        return 1.0
    statistic = float(((observed - expected) ** 2 / expected).sum())
    return float(jax.scipy.special.gammaincc((len(expected) - 1) / 2, statistic / 2))


def normal_p_value(deviation: float) -> float:
    """Returns the probability that a normal number exceeds `deviation` standard deviations."""
    return float(jax.scipy.special.erfc(deviation / np.sqrt(2)) / 2)
