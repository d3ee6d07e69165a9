"""The decoding loop: draft, verify, append; one compiled step inside one loop on the device."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from specsamp_jax import _checks, _filters, _streams
from specsamp_jax._drafters import Drafter, ModelDrafter, ProcessLogitsFn, append, prefill
from specsamp_jax._types import PAD_TOKEN, Draft, Generation, Model, SamplingParams, Stats, Verification
from specsamp_jax._verify import verify

VerifyFn = Callable[..., Verification]


@dataclasses.dataclass(frozen=True)
class HeuristicNumDraft:
    """The draft length of each row by the paper's heuristic: longer after full acceptance, else shorter.

    Each row starts at `initial`, adds `increase` after a step that accepted all its drafts and takes off
    `decrease` otherwise, between 1 and the largest of `lengths`. A step is compiled for each of `lengths`;
    the shortest that holds all rows' drafts is run, and a row that wants fewer drafts no further.

    Source: Wagner et al. (2024, arXiv 2406.11016, section 4), after Hugging Face's assisted generation.
    """

    initial: int = 5
    increase: int = 2
    decrease: int = 1
    lengths: tuple[int, ...] = (1, 3, 5, 8)

    def __post_init__(self):
        ascending = all(a < b for a, b in zip(self.lengths, self.lengths[1:], strict=False))
        if not self.lengths or self.lengths[0] < 1 or not ascending:
            raise ValueError(f"HeuristicNumDraft.lengths must be ascending and at least 1; got {self.lengths}.")
        if not 1 <= self.initial <= self.lengths[-1]:
            raise ValueError(
                f"HeuristicNumDraft.initial must be from 1 to the largest of lengths, {self.lengths[-1]}; "
                f"got {self.initial}."
            )

    def update(self, num_draft: Int[Array, "B"], num_accepted: Int[Array, "B"]) -> Int[Array, "B"]:
        """The next draft length of each row."""
        longer = jnp.minimum(num_draft + self.increase, self.lengths[-1])
        return jnp.where(num_accepted >= num_draft, longer, jnp.maximum(num_draft - self.decrease, 1))


NumDraft = int | HeuristicNumDraft


class DecodeState(NamedTuple):
    """What the next step needs. W = L + the longest draft: room for drafts that will be cut.

    Attributes:
      tokens: The text of each row, `PAD_TOKEN` behind it.
      lengths: Tokens of each row so far.
      limits: The length at which a row ends.
      finished: Rows that met an end token or their limit.
      log_probs: log p of generated tokens, 0 elsewhere.
      num_draft: How many tokens each row drafts next.
      target_cache: The target's cache.
      draft_state: The drafter's state.
    """

    tokens: Int[Array, "B W"]
    lengths: Int[Array, "B"]
    limits: Int[Array, "B"]
    finished: Bool[Array, "B"]
    log_probs: Float[Array, "B W"]
    num_draft: Int[Array, "B"]
    target_cache: Any
    draft_state: Any


class StepInfo(NamedTuple):
    """What one step did, for an observer.

    Attributes:
      tokens: The tokens that each row gained, then `PAD_TOKEN`; none in rows that were finished before.
      num_tokens: How many those are.
      num_drafted: Drafts that were verified, 0 in rows that were finished before.
      num_accepted: Drafts that were accepted, 0 in rows that were finished before.
      status: As in `Verification`.
    """

    tokens: Int[Array, "B K1"]
    num_tokens: Int[Array, "B"]
    num_drafted: Int[Array, "B"]
    num_accepted: Int[Array, "B"]
    status: Int[Array, "B"]


def init(
    prompt: Int[Array, "B P"],
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    max_new_tokens: int,
    prompt_lengths: Int[Array, "B"] | None = None,
) -> DecodeState:
    """The state before the first step: both models have seen the prompts. Arguments are those of `generate`."""
    _checks.generate(prompt, target, draft, num_draft, max_new_tokens, prompt_lengths)
    batch_size, width = prompt.shape
    drafter, lengths = _drafter(draft), _compiled_lengths(num_draft, draft)
    if prompt_lengths is None:
        prompt_lengths = jnp.full((batch_size,), width, jnp.int32)
    prompt_lengths = jnp.asarray(prompt_lengths, jnp.int32)
    inside = jnp.arange(width) < prompt_lengths[:, None]
    # Columns past a prompt's length are fed as token 0: their cache entries are replaced before they are seen.
    fed = jnp.where(inside, prompt, 0).astype(jnp.int32)
    room = width + max_new_tokens + lengths[-1]
    tokens = jnp.pad(jnp.where(inside, fed, PAD_TOKEN), ((0, 0), (0, room - width)), constant_values=PAD_TOKEN)
    return DecodeState(
        tokens=tokens,
        lengths=prompt_lengths,
        limits=prompt_lengths + max_new_tokens,
        finished=jnp.zeros((batch_size,), bool),
        log_probs=jnp.zeros(tokens.shape, jnp.float32),
        num_draft=jnp.full((batch_size,), getattr(num_draft, "initial", lengths[-1]), jnp.int32),
        target_cache=prefill(target, fed, room),
        draft_state=() if drafter is None else drafter.init(fed, room),
    )


def step(
    key: Key[Array, "*keys"],
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
    """One step: K drafts, one pass of the target over them, and the tokens that the rule lets through.

    What a row draws depends on its key and its length, so the same `key` serves every step. Arguments are
    those of `generate`; `num_draft` and `draft` must be those of `init`.
    """
    batch_size = state.tokens.shape[0]
    keys = _streams.fold_in(_streams.row_keys(key, batch_size), state.lengths)
    drafter, compiled = _drafter(draft), _compiled_lengths(num_draft, draft)
    room = state.tokens.shape[1] - compiled[-1]

    def process(tokens, lengths, logits):
        if process_logits_fn is None:
            return logits
        length = jnp.minimum(lengths, room)
        text = jnp.where(jnp.arange(room) < length[:, None], tokens[:, :room], PAD_TOKEN)
        return process_logits_fn(text, length, logits)

    def verify_drafts(length, state):
        """Draft, score and verify with `length` drafts at most; padded to the longest."""
        proposal, draft_state = Draft(jnp.zeros((batch_size, 0), jnp.int32)), state.draft_state
        if drafter is not None and length > 0:
            proposal, draft_state = drafter.propose(
                keys,
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
        logits, target_cache = target.apply_fn(target.params, fed, positions, state.target_cache)
        if process_logits_fn is not None:
            text = append(state.tokens, state.lengths, proposal.tokens)
            drafts = jnp.arange(length + 1)
            logits = jax.vmap(lambda i, row: process(text, state.lengths + i, row), (0, 1), 1)(drafts, logits)
        result = verify_fn(keys, logits, proposal, sampling)
        num_drafted = jnp.cumprod(proposal.tokens >= 0, axis=1, dtype=jnp.int32).sum(1, dtype=jnp.int32)
        missing = ((0, 0), (0, compiled[-1] - length))
        tokens = jnp.pad(result.tokens, missing, constant_values=PAD_TOKEN)
        log_probs = jnp.pad(result.log_probs, missing)
        return (tokens, log_probs, result.num_accepted, result.status, num_drafted), target_cache, draft_state

    branches = [functools.partial(verify_drafts, length) for length in compiled]
    if len(branches) == 1:
        results, target_cache, draft_state = branches[0](state)
    else:
        longest = jnp.where(state.finished, 0, state.num_draft).max()
        chosen = jnp.searchsorted(jnp.array(compiled), longest)
        results, target_cache, draft_state = lax.switch(chosen, branches, state)
    tokens, log_probs, num_accepted, status, num_drafted = results

    num_new, ended = _cut(tokens, num_accepted + 1, state, eos_token)
    active = ~state.finished
    update = num_draft.update if isinstance(num_draft, HeuristicNumDraft) else lambda num, _: num
    new_state = DecodeState(
        tokens=append(state.tokens, state.lengths, tokens, num_new),
        lengths=state.lengths + num_new,
        limits=state.limits,
        finished=state.finished | ended,
        log_probs=append(state.log_probs, state.lengths, log_probs, num_new),
        num_draft=jnp.where(active, update(state.num_draft, num_accepted), state.num_draft),
        target_cache=target_cache,
        draft_state=draft_state,
    )
    gained = jnp.where(jnp.arange(tokens.shape[1]) < num_new[:, None], tokens, PAD_TOKEN)
    counted = (jnp.where(active, count, 0) for count in (num_drafted, num_accepted, status))
    return new_state, StepInfo(gained, num_new, *counted)


def generate(
    key: Key[Array, "*keys"],
    prompt: Int[Array, "B P"],
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    max_new_tokens: int,
    prompt_lengths: Int[Array, "B"] | None = None,
    sampling: SamplingParams = SamplingParams(),
    eos_token: int | Sequence[int] | Int[Array, "E"] | None = None,
    verify_fn: VerifyFn = verify,
    process_logits_fn: ProcessLogitsFn | None = None,
) -> Generation:
    """Text after each prompt, distributed as the target's own sampling, in fewer passes of the target.

    Each row goes on at its own length until it has met an end token or made `max_new_tokens` tokens. It is
    compiled once for a shape; sampling parameters, end tokens and weights may change without a new trace.

    Args:
      key: One typed threefry key, or one a row. With one a row, a row's draws depend on its key alone.
      prompt: Left-aligned token ids, one or more a row.
      target: The model whose distribution is sampled.
      draft: Who proposes: a smaller `Model`, or any drafter with `propose` such as `NGramDrafter`. None: the
        target decodes alone, one token a step.
      num_draft: Tokens drafted a step: a number, or `HeuristicNumDraft`.
      max_new_tokens: The most tokens that a row may gain.
      prompt_lengths: Tokens of each prompt, 1 to P; columns past them are not read. None: P.
      sampling: Applied to target and draft alike.
      eos_token: The end token, or several; the row ends with it. None: there is none.
      verify_fn: The rule, with the signature of `verify`.
      process_logits_fn: `(tokens [B, L], lengths [B], logits [B, V]) -> logits`, applied to target and draft
        alike before `sampling`; the tokens are the text so far, drafted tokens included.

    Returns:
      A `Generation`.

    Raises:
      ValueError: An argument has a wrong shape, type or value.

    Source: Leviathan et al. (2023, arXiv 2211.17192); the loop of Chen et al. (2023, arXiv 2302.01318).
    """
    _checks.generate(prompt, target, draft, num_draft, max_new_tokens, prompt_lengths)
    _checks.sampling("sampling", sampling, prompt.shape[0])
    keys = _streams.row_keys(key, prompt.shape[0])
    fixed, traced = _filters.split(sampling)
    return _generate(
        keys,
        prompt,
        prompt_lengths,
        target,
        _drafter(draft),
        traced,
        _eos_tokens(eos_token),
        fixed=fixed,
        num_draft=num_draft,
        max_new_tokens=max_new_tokens,
        verify_fn=verify_fn,
        process_logits_fn=process_logits_fn,
    )


def stream(
    key: Key[Array, "*keys"],
    prompt: Int[Array, "B P"],
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    max_new_tokens: int,
    prompt_lengths: Int[Array, "B"] | None = None,
    sampling: SamplingParams = SamplingParams(),
    eos_token: int | Sequence[int] | Int[Array, "E"] | None = None,
    verify_fn: VerifyFn = verify,
    process_logits_fn: ProcessLogitsFn | None = None,
) -> Iterator[Generation]:
    """What `generate` would return, after each step of it: the last item is `generate`'s own result.

    Between two items each row gained the tokens between its old and its new length. Arguments, tokens and
    errors are those of `generate`.
    """
    _checks.generate(prompt, target, draft, num_draft, max_new_tokens, prompt_lengths)
    _checks.sampling("sampling", sampling, prompt.shape[0])
    keys = _streams.row_keys(key, prompt.shape[0])
    fixed, traced = _filters.split(sampling)
    drafter, eos_tokens = _drafter(draft), _eos_tokens(eos_token)
    shared = {"num_draft": num_draft}
    state = _init(prompt, prompt_lengths, target, drafter, max_new_tokens=max_new_tokens, **shared)
    stats = _no_stats(prompt.shape[0], num_draft, drafter)
    length = prompt.shape[1] + max_new_tokens
    functions = {"verify_fn": verify_fn, "process_logits_fn": process_logits_fn}
    while not bool(state.finished.all()):
        state, stats = _advance(
            keys, state, stats, target, drafter, traced, eos_tokens, fixed=fixed, **shared, **functions
        )
        yield _generation(state, stats, length)


def _drafter(draft: Model | Drafter | None) -> Drafter | None:
    return ModelDrafter(draft) if isinstance(draft, Model) else draft


def _compiled_lengths(num_draft: NumDraft, draft: Any) -> tuple[int, ...]:
    """The draft lengths that a step is compiled for, ascending."""
    if draft is None:
        return (0,)
    return num_draft.lengths if isinstance(num_draft, HeuristicNumDraft) else (num_draft,)


def _eos_tokens(eos_token: int | Sequence[int] | Int[Array, "E"] | None) -> Int[Array, "E"]:
    """All end tokens, possibly none."""
    return jnp.ravel(jnp.asarray(() if eos_token is None else eos_token, jnp.int32))


def _cut(
    tokens: Int[Array, "B K1"],
    num_emitted: Int[Array, "B"],
    state: DecodeState,
    eos_token: int | Sequence[int] | Int[Array, "E"] | None,
) -> tuple[Int[Array, "B"], Bool[Array, "B"]]:
    """How many of the emitted tokens each row keeps, and which rows end with them.

    A row ends with its first end token, or at its limit; a finished row keeps none.
    """
    position = jnp.arange(tokens.shape[1])
    num_new = jnp.minimum(num_emitted, state.limits - state.lengths)
    is_eos = (tokens[..., None] == _eos_tokens(eos_token)).any(-1) & (position < num_new[:, None])
    num_new = jnp.where(is_eos.any(1), jnp.argmax(is_eos, axis=1).astype(num_new.dtype) + 1, num_new)
    ended = is_eos.any(1) | (state.lengths + num_new >= state.limits)
    return jnp.where(state.finished, 0, num_new), ended


def _no_stats(batch_size: int, num_draft: NumDraft, draft: Any) -> Stats:
    longest = _compiled_lengths(num_draft, draft)[-1]
    return Stats(*(jnp.zeros(shape, jnp.int32) for shape in ((), (batch_size,), (longest,), (longest,))))


def _count(stats: Stats, info: StepInfo) -> Stats:
    position = jnp.arange(stats.num_drafted.shape[0])

    def by_position(counts):
        return (position < counts[:, None]).sum(0, dtype=jnp.int32)

    return Stats(
        stats.num_steps + 1,
        stats.num_emitted + info.num_tokens,
        stats.num_drafted + by_position(info.num_drafted),
        stats.num_accepted + by_position(info.num_accepted),
    )


def _generation(state: DecodeState, stats: Stats, length: int) -> Generation:
    return Generation(state.tokens[:, :length], state.lengths, state.log_probs[:, :length], stats)


_STEP_STATICS = ("fixed", "num_draft", "verify_fn", "process_logits_fn")


@functools.partial(jax.jit, static_argnames=("num_draft", "max_new_tokens"))
def _init(prompt, prompt_lengths, target, drafter, *, num_draft, max_new_tokens):
    return init(
        prompt,
        target=target,
        draft=drafter,
        num_draft=num_draft,
        max_new_tokens=max_new_tokens,
        prompt_lengths=prompt_lengths,
    )


@functools.partial(jax.jit, static_argnames=_STEP_STATICS, donate_argnames=("state", "stats"))
def _advance(keys, state, stats, target, drafter, traced, eos_tokens, *, fixed, **options):
    sampling = _filters.join(fixed, traced)
    state, info = step(keys, state, target=target, draft=drafter, sampling=sampling, eos_token=eos_tokens, **options)
    return state, _count(stats, info)


@functools.partial(jax.jit, static_argnames=(*_STEP_STATICS, "max_new_tokens"))
def _generate(keys, prompt, prompt_lengths, target, drafter, traced, eos_tokens, *, fixed, max_new_tokens, **options):
    num_draft = options["num_draft"]
    state = _init(prompt, prompt_lengths, target, drafter, num_draft=num_draft, max_new_tokens=max_new_tokens)
    stats = _no_stats(prompt.shape[0], num_draft, drafter)

    def body(carry):
        return _advance(keys, *carry, target, drafter, traced, eos_tokens, fixed=fixed, **options)

    state, stats = lax.while_loop(lambda carry: ~carry[0].finished.all(), body, (state, stats))
    return _generation(state, stats, prompt.shape[1] + max_new_tokens)
