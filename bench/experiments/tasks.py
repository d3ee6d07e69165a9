"""A task of the experiments: texts to generate, and the models that generate them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

import specsamp_jax as ss


class Task(NamedTuple):
    """N prompts with the texts that should follow them.

    Attributes:
      name: "summarization" or "asr".
      models: The models in words, for the tables.
      metric: The measure of quality, "rouge" or "wer".
      ids: A name for each prompt.
      groups: The test set of each prompt.
      references: The text that should follow.
      trivial: The output of a system without a model.
      prompts: Tokens, padded.
      lengths: Tokens of each prompt.
      texts: Each prompt with the tokens of its reference, then -1: where real contexts come from.
      max_new_tokens: The most tokens of an output.
      end_tokens: Tokens that end an output.
      processor: The `process_logits_fn` of both models, or None.
      models_fn: Returns target and drafter for the prompts with these indices.
      prepare_fn: Computes what the models need for the first prompts, before anything is timed.
      decode: Returns the text of an output's tokens.
    """

    name: str
    models: str
    metric: str
    ids: list[str]
    groups: list[str]
    references: list[str]
    trivial: list[str]
    prompts: Int[np.ndarray, "N P"]
    lengths: Int[np.ndarray, "N"]
    texts: Int[np.ndarray, "N L"]
    max_new_tokens: int
    end_tokens: tuple[int, ...]
    processor: Callable[..., Any] | None
    models_fn: Callable[[Int[np.ndarray, "B"]], tuple[ss.Model, ss.Model]]
    prepare_fn: Callable[[int], Any]
    decode: Callable[[list[int]], str]


@dataclasses.dataclass(frozen=True)
class _Cast:
    """`apply_fn` with logits of another dtype."""

    apply_fn: Callable[..., Any]
    dtype: str

    def __call__(self, params, tokens, positions, cache):
        logits, cache = self.apply_fn(params, tokens, positions, cache)
        return logits.astype(self.dtype), cache


def with_dtype(model: ss.Model, dtype: str) -> ss.Model:
    """The model with logits of this dtype; the model itself for float32, which logits are."""
    return model if dtype == "float32" else dataclasses.replace(model, apply_fn=_Cast(model.apply_fn, dtype))


def pad(rows: Sequence[Sequence[int]], filler: int) -> tuple[Int[np.ndarray, "N P"], Int[np.ndarray, "N"]]:
    """Rows of tokens as one array, and their lengths."""
    lengths = np.array([len(row) for row in rows], np.int32)
    padded = np.full((len(rows), lengths.max()), filler, np.int32)
    for row, out in zip(rows, padded, strict=True):
        out[: len(row)] = row
    return padded, lengths


def contexts(task: Task, num_texts: int, num_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits `[N, R, V]` of target and drafter at R = `num_rows` consecutive positions of each text, after its prompt.

    The models read the references. A text with fewer tokens than rows after its prompt is read beyond its end.
    """
    batch_size, found = min(8, num_texts), ([], [])
    for start in range(0, num_texts - num_texts % batch_size, batch_size):
        index = np.arange(start, start + batch_size)
        # One more round of positions than the longest text has.
        tokens = np.pad(task.texts[index], ((0, 0), (0, num_rows)), constant_values=-1)
        for model, rows in zip(task.models_fn(index), found, strict=True):
            rows.append(np.asarray(_rows(model, tokens, task.lengths[index], num_rows, task.processor)))
    return np.concatenate(found[0]), np.concatenate(found[1])


def _rows(model, tokens, lengths, num_rows, processor) -> Array:
    return _compiled(model, tokens, jnp.asarray(lengths), num_rows, processor)


def _consecutive(model, tokens, lengths, num_rows, processor):
    batch_size, width = tokens.shape
    fed = jnp.maximum(tokens, 0)
    positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
    cache = model.init_cache_fn(batch_size, width)
    _, cache = model.apply_fn(model.params, fed, positions, cache)
    position = lengths[:, None] - 1 + jnp.arange(num_rows)
    last = jnp.take_along_axis(fed, position, axis=1)
    logits, _ = model.apply_fn(model.params, last, position, cache)
    if processor is None:
        return logits
    texts = [jnp.where(jnp.arange(width) < (lengths + i)[:, None], tokens, ss.PAD_TOKEN) for i in range(num_rows)]
    return jnp.stack([processor(text, lengths + i, logits[:, i]) for i, text in enumerate(texts)], axis=1)


_compiled = jax.jit(_consecutive, static_argnames=("num_rows", "processor"))
