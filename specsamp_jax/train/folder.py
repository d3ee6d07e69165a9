"""The folder of a drafter: weights, config, the files shared with the target, and the report."""

import json
import shutil
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from specsamp_jax.models import load_module, save_checkpoint
from specsamp_jax.sampling.atoms import expected_num_tokens
from specsamp_jax.train import drafters

_COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "normalizer.json",
    "chat_template.jinja",
    "generation_config.json",
    "preprocessor_config.json",
)


class Report(NamedTuple):
    """Measurements on held-out data, after the last step.

    Attributes:
      acceptance_rate: Mean probability that a draft is accepted at temperature 1, along the text.
      greedy_acceptance_rate: Share of positions where target and drafter have the same most probable token.
      tokens_per_step: `expected_num_tokens` of the first rate and `num_draft`.
      greedy_tokens_per_step: `expected_num_tokens` of the second.
      num_positions: Positions measured.
      num_steps: Steps of the training.
      num_parameters: Parameters of the drafter; of a Whisper, those of its decoder.
      seconds: Time of this call.
    """

    acceptance_rate: float
    greedy_acceptance_rate: float
    tokens_per_step: float
    greedy_tokens_per_step: float
    num_positions: int
    num_steps: int
    num_parameters: int
    seconds: float


def check_out(target: Path, out: Path) -> None:
    """Raises ValueError if a drafter cannot be written into the folder `out`."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out must be a folder, got the file {out}.")
    if out.exists() and out.resolve() == target.resolve():
        raise ValueError(f"out must be another folder than the target's, got {out} for both.")


def save_speech_drafter(target: Path, num_layers: int, params: Any, out: Path) -> None:
    """Writes a drafter with trained blocks; every other tensor is the target's, bit by bit.

    Args:
      target: The folder of the target.
      num_layers: Layers of the drafter's decoder.
      params: The blocks, as `distill_windows` returns them.
      out: The folder.
    """
    # Loaded anew, since the dtype of the computation may be narrower than that of the file.
    draft = drafters.layers_of(load_module(target), [0] * num_layers)
    nnx.update(draft.decoder, params)
    save_drafter(out, draft, target)


def save_drafter(out: Path, draft: Any, target: Path) -> None:
    """Writes a drafter in the dtype of the target's file, with copies of the files that both share."""
    save_checkpoint(out, draft, dtype=_dtype_of(target))
    for name in _COPIED:
        if (target / name).is_file():
            shutil.copyfile(target / name, out / name)


def write_report(out: Path, sums: np.ndarray, num_steps: int, module: Any, num_draft: int, began: float) -> Report:
    """Writes report.json and returns its content; `sums` are those of `agreement_of`."""
    rates = sums[:2] / max(sums[2], 1)
    report = Report(
        *rates.tolist(),
        *(float(expected_num_tokens(rate, num_draft)) for rate in rates.astype(np.float32)),
        num_positions=int(sums[2]),
        num_steps=num_steps,
        num_parameters=sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module))),
        seconds=round(time.perf_counter() - began, 1),
    )
    (out / "report.json").write_text(json.dumps(report._asdict(), indent=2) + "\n")
    return report


def _dtype_of(target: Path) -> DTypeLike:
    """Returns the dtype of all parameters in a folder; float32 if they differ."""
    shapes = jax.tree.leaves(nnx.state(load_module(target)))
    dtypes = {leaf.dtype for leaf in shapes}
    return dtypes.pop() if len(dtypes) == 1 else jnp.float32
