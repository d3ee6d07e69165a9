"""One step of decoding (draft, score, verify, append) and the state between steps."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from specsamp_jax import _checks
from specsamp_jax._types import PAD_TOKEN, Draft, KeyLike, Model, SamplingParams
from specsamp_jax.decoding import checks, memory
from specsamp_jax.decoding import num_draft as num_draft_module
from specsamp_jax.decoding.catch_up import catch_up
from specsamp_jax.decoding.drafters import Drafter, ModelDrafter, ProcessLogitsFn, append
from specsamp_jax.decoding.keys import step_keys
from specsamp_jax.decoding.model_call import apply, prefill, vocab_size
from specsamp_jax.decoding.num_draft import NumDraft
from specsamp_jax.decoding.stateful_rule import VerifyFn, apply_rule, start_rule
from specsamp_jax.decoding.stats import drafts_in_text
from specsamp_jax.rules.verify import verify


class DecodeState(NamedTuple):
    """State between steps. L is P + `max_new_tokens`.

    W = L + the longest draft length, because a step may draft beyond a row's limit.

    Attributes:
      tokens: The text of each row, then `PAD_TOKEN`.
      lengths: Tokens of each row so far.
      limits: Maximum length of each row.
      finished: True for rows that have an end token or have reached their limit.
      log_probs: log p of generated tokens, 0 elsewhere.
      num_draft: Draft length of each row in the next step.
      target_cache: The target's cache.
      draft_state: The drafter's state.
      num_draft_state: The state of the rule for the draft length; () if it has none.
      verify_state: The state of the verification rule; () if it has none.
    """

    tokens: Int[Array, "B W"]
    lengths: Int[Array, "B"]
    limits: Int[Array, "B"]
    finished: Bool[Array, "B"]
    log_probs: Float[Array, "B L"]
    num_draft: Int[Array, "B"]
    target_cache: Any
    draft_state: Any
    num_draft_state: Any = ()
    verify_state: Any = ()


class StepInfo(NamedTuple):
    """Tokens and counts of one step.

    Attributes:
      tokens: The tokens that each row gained, then `PAD_TOKEN`; none in rows that were finished before.
      num_tokens: Number of tokens that each row gained.
      num_drafted: Drafts that were verified, 0 in rows that were finished before. Drafts after an end token or the
        limit are in neither count.
      num_accepted: Drafts that were accepted, 0 in rows that were finished before.
      status: As in `Verification`.
    """

    tokens: Int[Array, "B K1"]
    num_tokens: Int[Array, "B"]
    num_drafted: Int[Array, "B"]
    num_accepted: Int[Array, "B"]
    status: Int[Array, "B"]


for _type in (DecodeState, StepInfo):
    export.register_namedtuple_serialization(_type, serialized_name=f"specsamp_jax.{_type.__name__}")


def init(
    prompt: Int[Array | np.ndarray, "B P"],
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    max_new_tokens: int,
    prompt_lengths: Int[Array | np.ndarray, "B"] | None = None,
    costs: Float[Array, "N"] | None = None,
    verify_fn: VerifyFn = verify,
) -> DecodeState:
    """Returns the state before the first step, with the prompts in the caches. Arguments are those of `generate`.

    `costs` replaces the costs of a `GoodputNumDraft`, so that a program compiled for one table serves others.

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> target = ss.Model(jnp.eye(5), bigrams, lambda batch_size, max_length: ())
      >>> state = ss.init(jnp.array([[1, 2]]), target=target, draft=None, max_new_tokens=2)
      >>> state.tokens.tolist(), state.lengths.tolist(), state.limits.tolist()
      ([[1, 2, -1, -1]], [2], [4])
    """
    _checks.generate(prompt, target, draft, num_draft, max_new_tokens, prompt_lengths)
    batch_size, width = prompt.shape
    drafter, num_draft = resolve(draft, num_draft)
    longest = num_draft_module.compiled_lengths(num_draft)[-1]
    if prompt_lengths is None:
        prompt_lengths = jnp.full((batch_size,), width, jnp.int32)
    prompt_lengths = jnp.asarray(prompt_lengths, jnp.int32)
    inside = jnp.arange(width) < prompt_lengths[:, None]
    # Columns past a prompt's length are fed as token 0: their cache entries are replaced before they are attended.
    fed = jnp.where(inside, prompt, 0).astype(jnp.int32)
    buffer_length = width + max_new_tokens + longest
    memory.check(prompt, checks.models(target, drafter), max_new_tokens=max_new_tokens, longest_draft=longest)
    if not isinstance(prompt, Tracer):
        _checks.prompt_ids(prompt, prompt_lengths, vocab_size(target, (batch_size, width), buffer_length))
    tokens = jnp.pad(jnp.where(inside, fed, PAD_TOKEN), ((0, 0), (0, buffer_length - width)), constant_values=PAD_TOKEN)
    remaining = jnp.full((batch_size,), max_new_tokens, jnp.int32)
    first_num_draft, num_draft_state = num_draft_module.start(num_draft, costs, prompt_lengths, remaining)
    return DecodeState(
        tokens=tokens,
        lengths=prompt_lengths,
        limits=prompt_lengths + max_new_tokens,
        finished=jnp.zeros((batch_size,), bool),
        log_probs=jnp.zeros((batch_size, width + max_new_tokens), jnp.float32),
        num_draft=first_num_draft,
        target_cache=prefill(target, fed, buffer_length),
        draft_state=() if drafter is None else drafter.init(fed, buffer_length),
        num_draft_state=num_draft_state,
        verify_state=start_rule(verify_fn, batch_size),
    )


def step(
    key: KeyLike,
    state: DecodeState,
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    sampling: SamplingParams = SamplingParams(),
    eos_token: int | Sequence[int] | Int[Array, "E"] | None = None,
    verify_fn: VerifyFn = verify,
    process_logits_fn: ProcessLogitsFn | None = None,
) -> tuple[DecodeState, StepInfo]:
    """Runs one step: drafts K tokens, scores them in one pass of the target, and appends the emitted tokens.

    The draws of a row depend on its key and its length, so one `key` serves all steps. A `verify_fn` with a parameter
    `positions`, such as `verify_coupled`, draws by position: it gets the rows' keys and their lengths. Arguments are
    those of `generate`; `num_draft`, `draft` and a `verify_fn` with a state must be those of `init`.

    Example:
      >>> import jax, jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> table = jnp.where(jnp.eye(5, k=1), 9.0, -9.0)
      >>> models = {"target": ss.Model(table, bigrams, lambda batch_size, max_length: ()), "draft": ss.NGramDrafter()}
      >>> state = ss.init(jnp.array([[1, 2, 1]]), **models, num_draft=2, max_new_tokens=4)
      >>> step = jax.jit(lambda key, state: ss.step(key, state, **models, num_draft=2))
      >>> state, info = step(jax.random.key(0), state)
      >>> info.tokens.tolist(), info.num_drafted.tolist(), info.num_accepted.tolist()
      ([[2, 3, -1]], [2], [1])
    """
    batch_size = state.tokens.shape[0]
    drafter, num_draft = resolve(draft, num_draft)
    keys = step_keys(key, state.lengths, drafter, verify_fn)
    compiled = num_draft_module.compiled_lengths(num_draft)
    buffer_length = state.log_probs.shape[1]
    checks.widths(state.tokens, state.log_probs, compiled[-1])
    checks.draft_state(drafter, state.draft_state, state.tokens)

    def process(tokens, lengths, logits):
        if process_logits_fn is None:
            return logits
        length = jnp.minimum(lengths, buffer_length)
        text = jnp.where(jnp.arange(buffer_length) < length[:, None], tokens[:, :buffer_length], PAD_TOKEN)
        processed = process_logits_fn(text, length, logits)
        checks.processed_logits(processed, logits)
        return processed

    def verify_drafts(length, state):
        """Drafts, scores and verifies at most `length` tokens; the results are padded to the longest draft length."""
        proposal, draft_state = Draft(jnp.zeros((batch_size, 0), jnp.int32)), state.draft_state
        if keys.propose_fn is not None and length > 0:
            proposal, draft_state = keys.propose_fn(
                keys.draft,
                state.draft_state,
                state.tokens,
                state.lengths,
                num_draft=length,
                sampling=sampling,
                process_logits_fn=process,
            )
        wanted = jnp.arange(length) < state.num_draft[:, None]
        proposal = proposal._replace(tokens=jnp.where(wanted, proposal.tokens, PAD_TOKEN))
        last = jnp.take_along_axis(state.tokens, state.lengths[:, None] - 1, axis=1)
        fed = jnp.concatenate([last, jnp.maximum(proposal.tokens, 0)], axis=1)
        positions = state.lengths[:, None] - 1 + jnp.arange(length + 1)
        logits, target_cache = apply(target, fed, positions, state.target_cache)
        _checks.end_tokens(eos_token, logits.shape[-1])
        if process_logits_fn is not None:
            text = append(state.tokens, state.lengths, proposal.tokens)
            drafts = jnp.arange(length + 1)
            logits = jax.vmap(lambda i, row: process(text, state.lengths + i, row), (0, 1), 1)(drafts, logits)
        result, verify_state = apply_rule(
            verify_fn,
            keys.verify,
            logits,
            proposal,
            sampling,
            options=keys.verify_options,
            state=state.verify_state,
            finished=state.finished,
        )
        num_drafted = jnp.cumprod(proposal.tokens >= 0, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)
        missing = ((0, 0), (0, compiled[-1] - length))
        tokens = jnp.pad(result.tokens, missing, constant_values=PAD_TOKEN)
        log_probs = jnp.pad(result.log_probs, missing)
        results = tokens, log_probs, result.num_accepted, result.status, num_drafted
        return results, target_cache, draft_state, verify_state

    branches = [functools.partial(verify_drafts, length) for length in compiled]
    if len(branches) == 1:
        results, target_cache, draft_state, verify_state = branches[0](state)
    else:
        longest = jnp.where(state.finished, 0, state.num_draft).max(initial=0)
        state = catch_up(state, drafter, longest)
        chosen = jnp.searchsorted(jnp.array(compiled), longest)
        results, target_cache, draft_state, verify_state = lax.switch(chosen, branches, state)
    tokens, log_probs, num_accepted, status, num_drafted = results

    num_new, ended = _cut(tokens, num_accepted + 1, state, eos_token)
    active = ~state.finished
    lengths = state.lengths + num_new
    counts = {"active": active, "num_accepted": num_accepted, "lengths": lengths}
    next_num_draft, num_draft_state = num_draft_module.update(
        num_draft, state.num_draft, state.num_draft_state, **counts, remaining=state.limits - lengths
    )
    new_state = DecodeState(
        tokens=append(state.tokens, state.lengths, tokens, num_new),
        lengths=lengths,
        limits=state.limits,
        finished=state.finished | ended,
        log_probs=append(state.log_probs, state.lengths, log_probs, num_new),
        num_draft=next_num_draft,
        target_cache=target_cache,
        draft_state=draft_state,
        num_draft_state=num_draft_state,
        verify_state=verify_state,
    )
    gained = jnp.where(jnp.arange(tokens.shape[1]) < num_new[:, None], tokens, PAD_TOKEN)
    kept = drafts_in_text(num_drafted, num_accepted, num_new)
    counted = (jnp.where(active, count, 0) for count in (*kept, status))
    return new_state, StepInfo(gained, num_new, *counted)


def resolve(draft: Model | Drafter | None, num_draft: NumDraft) -> tuple[Drafter | None, NumDraft]:
    """Wraps a model in a `ModelDrafter`; without a drafter the draft length is 0."""
    if draft is None:
        return None, 0
    return ModelDrafter(draft) if isinstance(draft, Model) else draft, num_draft


def eos_tokens(eos_token: int | Sequence[int] | Int[Array, "E"] | None) -> Int[Array, "E"]:
    """All end tokens as one array, empty for None."""
    return jnp.ravel(jnp.asarray(() if eos_token is None else eos_token, jnp.int32))


def _cut(
    tokens: Int[Array, "B K1"],
    num_emitted: Int[Array, "B"],
    state: DecodeState,
    eos_token: int | Sequence[int] | Int[Array, "E"] | None,
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """Number of emitted tokens that each row keeps, and whether the row ends with them.

    A row ends with its first end token, or at its limit; a finished row keeps none.
    """
    position = jnp.arange(tokens.shape[1])
    num_new = jnp.minimum(num_emitted, state.limits - state.lengths)
    ends = eos_tokens(eos_token)
    # An array without elements is not read: XLA of JAX 0.11.2 ends the process if an input of `shard_map` is one.
    is_eos = (tokens[..., None] == ends).any(-1) if ends.size else jnp.zeros(tokens.shape, bool)
    is_eos &= position < num_new[:, None]
    num_new = jnp.where(is_eos.any(1), jnp.argmax(is_eos, axis=1).astype(num_new.dtype) + 1, num_new)
    ended = is_eos.any(1) | (state.lengths + num_new >= state.limits)
    return jnp.where(state.finished, 0, num_new), ended
