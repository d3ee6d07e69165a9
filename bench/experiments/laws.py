"""Total variation between the law that each rule emits and those of target and drafter, on real contexts."""

from typing import Any

import jax.numpy as jnp
import law
import methods
import numpy as np
from settings import Setting

CHUNK = 20
EXACT = "calibrated exact"
"""The calibrated rule with each row's own log-normaliser."""

OFFSET = methods.CALIBRATED["calibrated"].offset


def measure(setting: Setting, target: np.ndarray, draft: np.ndarray) -> dict[str, Any]:
    """Means over contexts, computed from logits `[N, R, V]` in float64; nothing is sampled.

    The context of a text is one of its rows but the first; they take turns. Both models' logits are filtered as the
    setting says. The estimate of a calibrated rule is the mean log-normaliser of the filtered rows before it in the
    text, or the row's own for "calibrated exact".

    Returns:
      `to_target`, `to_draft`: total variation of the first emitted token's law to p and to q; `bonus_to_target`: that
      of the token after full acceptance to p; `acceptance`: of the first draft; `between`: of p to q.
    """
    sums: dict[str, list[float]] = {}
    num_texts, num_rows, _ = target.shape
    for start in range(0, num_texts, CHUNK):
        text = np.arange(start, min(start + CHUNK, num_texts))
        row = 1 + text % (num_rows - 1)
        z_p, z_q = (_cast(rows[text, row], setting) for rows in (target, draft))
        p, q = law.softmax(z_p), law.softmax(z_q)
        if setting.method.startswith("calibrated"):
            estimates = _estimates(setting, target[text], row, z_p)
            emitted, accept = law.calibrated(z_p, z_q, estimates, OFFSET)
            bonus, accepted = p, (q * accept).sum(-1)
        else:
            emitted, bonus = law.first_token(setting.method, z_p, z_q), law.bonus(setting.method, z_p)
            accepted = law.acceptance(setting.method, z_p, z_q)
        found = {
            "to_target": law.total_variation(emitted, p),
            "to_draft": law.total_variation(emitted, q),
            "bonus_to_target": law.total_variation(bonus, p),
            "acceptance": accepted,
            "between": law.total_variation(p, q),
        }
        for name, values in found.items():
            sums.setdefault(name, []).extend(values)
    return {name: float(np.mean(values)) for name, values in sums.items()} | {"contexts": len(target)}


def _estimates(setting: Setting, rows: np.ndarray, row: np.ndarray, z_p: np.ndarray) -> np.ndarray:
    """The estimate of each context's log-normaliser by the setting's rule."""
    if setting.method == EXACT:
        return law.log_normalizer(z_p)
    before = (_cast(text[:end], setting) for text, end in zip(rows, row, strict=True))
    return np.array([law.log_normalizer(each).mean() for each in before]) + methods.CALIBRATED[setting.method].margin


def _cast(rows: np.ndarray, setting: Setting) -> np.ndarray:
    """Logits rounded to the setting's dtype, then float64, then divided by the temperature and filtered."""
    rounded = np.asarray(rows).astype(jnp.dtype(setting.dtype)).astype(np.float64)
    return law.filtered(rounded, setting.temperature, setting.top_k, setting.top_p)
