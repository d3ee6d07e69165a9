"""The decoding loop: `generate` runs all steps on the device, `stream` yields the text after each step."""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import Generation, KeyLike, Model, SamplingParams
from specsamp_jax.decoding import checks, static
from specsamp_jax.decoding.drafters import Drafter, ProcessLogitsFn
from specsamp_jax.decoding.num_draft import NumDraft, compiled_lengths, split
from specsamp_jax.decoding.one_length import step_of_length
from specsamp_jax.decoding.state import DecodeState
from specsamp_jax.decoding.stateful_rule import VerifyFn
from specsamp_jax.decoding.stats import Counts, after_step, over_rows
from specsamp_jax.decoding.step import check_state, init, resolve, step
from specsamp_jax.decoding.stretch import run_steps
from specsamp_jax.rules.verify import verify
from specsamp_jax.sampling import streams
from specsamp_jax.sampling.mesh_axes import vary_like


def generate(
    key: KeyLike,
    prompt: Int[Array | np.ndarray, "B P"],
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    max_new_tokens: int,
    prompt_lengths: Int[Array | np.ndarray, "B"] | None = None,
    sampling: SamplingParams = SamplingParams(),
    eos_token: int | Sequence[int] | Int[Array, "E"] | None = None,
    verify_fn: VerifyFn = verify,
    process_logits_fn: ProcessLogitsFn | None = None,
) -> Generation:
    """Generates text after each prompt, distributed as samples of the target, in fewer passes of the target.

    Each row advances at its own pace until it has an end token or `max_new_tokens` new tokens. The loop is
    compiled once per shape. Weights, temperatures, the values of filters, up to four end tokens and a
    `process_logits_fn` that is a pytree may change without a new trace. A new program is compiled for another B, P
    or dtype; for another `max_new_tokens`, `num_draft` or function; and if a filter that was switched off by a
    Python number is on. Filters given as arrays `[B]` are compiled in, and may be off in any row.

    Args:
      key: One JAX key, or one per row, as in `verify`. With one per row, a row's draws depend on its key alone.
      prompt: Left-aligned token ids, at least one per row.
      target: The model whose distribution is sampled.
      draft: The drafter: a smaller `Model`, or a `Drafter` such as `NGramDrafter`. None: the target decodes
        alone, one token per step.
      num_draft: Tokens drafted per step: a number, `HeuristicNumDraft`, or `GoodputNumDraft`, which drafts nothing
        where that is faster.
      max_new_tokens: Maximum number of new tokens per row.
      prompt_lengths: Tokens of each prompt, 1 to P; columns past them are not read. None: P.
      sampling: Applied to target and draft alike.
      eos_token: One or several end tokens; a row ends after the first of them. None: no end token.
      verify_fn: The verification rule: a function with the signature of `verify`, or a hashable `StatefulRule`, whose
        state is returned in `Generation.verify_state`. With `verify_coupled` a row's text depends on its key alone, not
        on the drafter or the number of drafts; models then draft with its noise.
      process_logits_fn: `(tokens [B, L], lengths [B], logits [B, V]) -> logits`, applied to target and draft
        alike before `sampling`; the tokens are the text so far, drafted tokens included. A pytree, such as
        `jax.tree_util.Partial(function, arrays)` or a dataclass under `jax.tree_util.register_dataclass`, is data
        that may change with each call: a mask, a bias, penalties. Any other callable is compiled in, must be
        hashable, and equal callables must compute equal results.

    Returns:
      A `Generation`.

    Raises:
      ValueError: An argument has a wrong shape, type or value, or the text and the caches of `max_new_tokens` need
        more memory than is free.

    Source: Leviathan et al. (2023, arXiv 2211.17192); the loop of Chen et al. (2023, arXiv 2302.01318).

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache  # the logits after a token depend on that token alone
      >>> table = jnp.where(jnp.eye(5, k=1), 9.0, -9.0)  # each token is followed by the next number
      >>> target = ss.Model(table, bigrams, lambda batch_size, max_length: ())
      >>> text = ss.generate(jax.random.key(0), jnp.array([[1]]), target=target, draft=target, max_new_tokens=3)
      >>> text.tokens.tolist(), text.stats.num_steps.item()
      ([[1, 2, 3, 4]], 1)
    """
    return generate_steps(
        ALL_STEPS,
        key,
        prompt,
        target=target,
        draft=draft,
        num_draft=num_draft,
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
        sampling=sampling,
        eos_token=eos_token,
        verify_fn=verify_fn,
        process_logits_fn=process_logits_fn,
    )


ALL_STEPS = np.int32(2**31 - 1)


@allow_rank_promotion
def generate_steps(
    max_steps: Int[Array | np.generic, ""], key, prompt, *, max_new_tokens, prompt_lengths, **arguments
) -> Generation:
    """Like `generate`, for at most `max_steps` steps: the same compiled program serves any number of them."""
    sizes = {"max_new_tokens": max_new_tokens}
    keys, measured, data, statics = _prepare(key, prompt, prompt_lengths=prompt_lengths, **sizes, **arguments)
    return _generate(max_steps, keys, prompt, prompt_lengths, measured, *data, **sizes, **statics)


def stream(
    key: KeyLike,
    prompt: Int[Array | np.ndarray, "B P"],
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    max_new_tokens: int,
    prompt_lengths: Int[Array | np.ndarray, "B"] | None = None,
    sampling: SamplingParams = SamplingParams(),
    eos_token: int | Sequence[int] | Int[Array, "E"] | None = None,
    verify_fn: VerifyFn = verify,
    process_logits_fn: ProcessLogitsFn | None = None,
) -> Iterator[Generation]:
    """Returns an iterator with a `Generation` after each step; the last one equals the result of `generate`.

    The new tokens of a row are those between its previous and its present length. Arguments, tokens and errors are
    those of `generate`. Arguments are checked at the call; models run when items are asked for.

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> table = jnp.where(jnp.eye(5, k=1), 9.0, -9.0)
      >>> target = ss.Model(table, bigrams, lambda batch_size, max_length: ())
      >>> steps = ss.stream(jax.random.key(0), jnp.array([[1]]), target=target, draft=None, max_new_tokens=2)
      >>> [step.tokens.tolist() for step in steps]
      [[[1, 2, -1]], [[1, 2, 3]]]
    """
    keys, measured, data, statics = _prepare(
        key,
        prompt,
        target=target,
        draft=draft,
        num_draft=num_draft,
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
        sampling=sampling,
        eos_token=eos_token,
        verify_fn=verify_fn,
        process_logits_fn=process_logits_fn,
    )
    return _stream(prompt, prompt_lengths, max_new_tokens, keys, measured, data, statics)


def _stream(prompt, prompt_lengths, max_new_tokens, keys, measured, data, statics) -> Iterator[Generation]:
    init_fn, advance_fn = allow_rank_promotion(_init), allow_rank_promotion(_advance)
    shared = {name: statics[name] for name in ("num_draft", "verify_fn")}
    state = init_fn(prompt, prompt_lengths, measured, *data[:2], max_new_tokens=max_new_tokens, **shared)
    counts = Counts.zeros(prompt.shape[0], compiled_lengths(statics["num_draft"])[-1])
    length = prompt.shape[1] + max_new_tokens
    text, finished = _text(state, counts, length=length)
    if prompt.shape[0] == 0:
        yield text
    while not bool(finished):
        state, counts = advance_fn(keys, state, counts, *data, **statics)
        text, finished = _text(state, counts, length=length)
        yield text


@allow_rank_promotion
def _prepare(
    key,
    prompt,
    *,
    target,
    draft,
    num_draft,
    max_new_tokens,
    prompt_lengths,
    sampling,
    eos_token,
    verify_fn,
    process_logits_fn,
) -> tuple[Any, Any, tuple[Any, ...], dict[str, Any]]:
    """Checks the arguments of `generate`.

    Returns:
      The key of each row, the data of `GoodputNumDraft` or None, the data of a step (target, drafter, sampling
      parameters, end tokens, data of the processor), and the arguments that are compiled in.
    """
    _checks.prompt(prompt, max_new_tokens, prompt_lengths)
    checks.automatic_axes(prompt=prompt, prompt_lengths=prompt_lengths)
    checks.loop(target, draft, num_draft)
    _checks.sampling("sampling", sampling, prompt.shape[0])
    checks.functions(verify_fn, process_logits_fn)
    _checks.key(key, prompt.shape[0])
    keys = _row_keys(key, prompt.shape[0])
    fixed, traced = static.split(sampling, prompt.shape[0])
    processor, processor_data = static.split_processor(process_logits_fn)
    drafter, num_draft = resolve(draft, num_draft)
    num_draft, measured = split(num_draft, prompt.shape[0], max_new_tokens)
    sizes = {"num_draft": num_draft, "max_new_tokens": max_new_tokens}
    checks.drafter(drafter, prompt.shape[0])
    checks.values(prompt, prompt_lengths, eos_token, target, drafter, **sizes)
    data = target, drafter, traced, static.pad_end_tokens(eos_token), processor_data
    statics = {"fixed": fixed, "num_draft": num_draft, "verify_fn": verify_fn, "processor": processor}
    return keys, measured, data, statics


@functools.partial(jax.jit, static_argnums=1)
def _row_keys(key, batch_size):
    """`streams.row_keys` in one launch: operation by operation it takes 1 ms of Python."""
    return streams.row_keys(key, batch_size)


def _generation(state: DecodeState, counts: Counts, length: int) -> Generation:
    return Generation(state.tokens[:, :length], state.lengths, state.log_probs, over_rows(counts), state.verify_state)


@functools.partial(jax.jit, static_argnames="length")
def _text(state: DecodeState, counts: Counts, *, length: int) -> tuple[Generation, Bool[Array, ""]]:
    """A copy of the text, because the next step donates the buffers of the state, and whether all rows are finished."""
    return jax.tree.map(jnp.copy, _generation(state, counts, length)), state.finished.all()


_STEP_STATICS = ("fixed", "num_draft", "verify_fn", "processor")


@functools.partial(jax.jit, static_argnames=("num_draft", "max_new_tokens", "verify_fn"))
def _init(prompt, prompt_lengths, measured, target, drafter, *, num_draft, max_new_tokens, verify_fn):
    return init(
        prompt,
        target=target,
        draft=drafter,
        num_draft=num_draft,
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
        measured=measured,
        verify_fn=verify_fn,
    )


def _shared(target, traced, ends, processor_data, *, fixed, processor, **options) -> dict[str, Any]:
    """Arguments of a step that `step` and `step_of_length` both take."""
    return options | {
        "target": target,
        "sampling": static.join(fixed, traced),
        "eos_token": ends,
        "process_logits_fn": static.join_processor(processor, processor_data),
    }


@functools.partial(jax.jit, static_argnames=_STEP_STATICS, donate_argnames=("state", "counts"))
def _advance(keys, state, counts, target, drafter, *data, **statics):
    state, info = step(keys, state, draft=drafter, **_shared(target, *data, **statics))
    return state, after_step(counts, info)


@functools.partial(jax.jit, static_argnames=(*_STEP_STATICS, "max_new_tokens"))
def _generate(max_steps, keys, prompt, prompt_lengths, measured, target, drafter, *data, max_new_tokens, **statics):
    num_draft = statics["num_draft"]
    shared = {"num_draft": num_draft, "verify_fn": statics["verify_fn"]}
    state = _init(prompt, prompt_lengths, measured, target, drafter, max_new_tokens=max_new_tokens, **shared)
    check_state(state, drafter, num_draft)
    counts = Counts.zeros(prompt.shape[0], compiled_lengths(num_draft)[-1])
    state, counts = vary_like((state, counts), (keys, state, data))
    options = _shared(target, *data, **statics)

    def advance(length, carry):
        state, counts = carry
        state, info = step_of_length(length, state, key=keys, drafter=drafter, **options)
        return state, after_step(counts, info)

    def unfinished(carry):
        state, counts = carry
        return ~state.finished.all() & (counts.num_steps < max_steps)

    state, counts = run_steps(advance, unfinished, (state, counts), drafter=drafter, num_draft=num_draft)
    return _generation(state, counts, prompt.shape[1] + max_new_tokens)
