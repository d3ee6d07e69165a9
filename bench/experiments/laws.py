"""Total variation between the law that each rule emits and those of target and drafter, on real contexts."""

from typing import Any

import jax.numpy as jnp
import law
import numpy as np
from settings import Setting

CHUNK = 20


def measure(setting: Setting, target: np.ndarray, draft: np.ndarray) -> dict[str, Any]:
    """Means over contexts, computed from logits `[N, V]` in float64; nothing is sampled.

    Returns:
      `to_target`, `to_draft`: total variation of the first emitted token's law to p and to q; `bonus_to_target`: that
      of the token after full acceptance to p; `acceptance`: of the first draft; `between`: of p to q.
    """
    sums: dict[str, list[float]] = {}
    for start in range(0, len(target), CHUNK):
        z_p, z_q = (_cast(rows[start : start + CHUNK], setting) for rows in (target, draft))
        p, q = law.softmax(z_p), law.softmax(z_q)
        emitted = law.first_token(setting.method, z_p, z_q)
        found = {
            "to_target": law.total_variation(emitted, p),
            "to_draft": law.total_variation(emitted, q),
            "bonus_to_target": law.total_variation(law.bonus(setting.method, z_p), p),
            "acceptance": law.acceptance(setting.method, z_p, z_q),
            "between": law.total_variation(p, q),
        }
        for name, values in found.items():
            sums.setdefault(name, []).extend(values)
    return {name: float(np.mean(values)) for name, values in sums.items()} | {"contexts": len(target)}


def contexts(rows: np.ndarray, most: int) -> np.ndarray:
    """One row of each text, at positions that take turns: `[N, V]` from `[N, R, V]`."""
    rows = rows[:most]
    return rows[np.arange(len(rows)), np.arange(len(rows)) % rows.shape[1]]


def _cast(rows: np.ndarray, setting: Setting) -> np.ndarray:
    """Logits rounded to the setting's dtype, then float64, then filtered."""
    rounded = np.asarray(rows).astype(jnp.dtype(setting.dtype)).astype(np.float64)
    return law.keep_top_k(rounded, setting.top_k)
