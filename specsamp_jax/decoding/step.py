"""One step of decoding (draft, score, verify, append), and the state before the first."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import PAD_TOKEN, KeyLike, Model, SamplingParams
from specsamp_jax.decoding import checks, memory
from specsamp_jax.decoding import num_draft as num_draft_module
from specsamp_jax.decoding.catch_up import catch_up, start_drafter
from specsamp_jax.decoding.drafters import Drafter, ModelDrafter, ProcessLogitsFn
from specsamp_jax.decoding.goodput_state import Measured
from specsamp_jax.decoding.model_call import num_slots, prefill, vocab_size
from specsamp_jax.decoding.num_draft import NumDraft
from specsamp_jax.decoding.one_length import step_of_length
from specsamp_jax.decoding.state import DecodeState, StepInfo, with_own_buffers
from specsamp_jax.decoding.stateful_rule import VerifyFn, start_rule
from specsamp_jax.rules.verify import verify
from specsamp_jax.sampling.mesh_axes import vary_like


@allow_rank_promotion
def init(
    prompt: Int[Array | np.ndarray, "B P"],
    *,
    target: Model,
    draft: Model | Drafter | None,
    num_draft: NumDraft = 4,
    max_new_tokens: int,
    prompt_lengths: Int[Array | np.ndarray, "B"] | None = None,
    measured: Measured | None = None,
    verify_fn: VerifyFn = verify,
) -> DecodeState:
    """Returns the state before the first step, with the prompts in the caches. Arguments are those of `generate`.

    `measured` replaces costs, prior and first choice of a `GoodputNumDraft`, so that one compiled program serves all
    tables of costs; it is made for this B and `max_new_tokens`.

    Example:
      >>> import jax.numpy as jnp, specsamp_jax as ss
      >>> def bigrams(table, tokens, positions, cache):
      ...     return table[tokens], cache
      >>> target = ss.Model(jnp.eye(5), bigrams, lambda batch_size, max_length: ())
      >>> state = ss.init(jnp.array([[1, 2]]), target=target, draft=None, max_new_tokens=2)
      >>> state.tokens.tolist(), state.lengths.tolist(), state.limits.tolist()
      ([[1, 2, -1, -1]], [2], [4])
    """
    _checks.prompt(prompt, max_new_tokens, prompt_lengths)
    checks.automatic_axes(prompt=prompt, prompt_lengths=prompt_lengths)
    checks.loop(target, draft, num_draft)
    batch_size, width = prompt.shape
    drafter, num_draft = resolve(draft, num_draft)
    longest = num_draft_module.compiled_lengths(num_draft)[-1]
    checks.drafter(drafter, batch_size)
    arguments = prompt, prompt_lengths, measured
    if prompt_lengths is None:
        prompt_lengths = jnp.full((batch_size,), width, jnp.int32)
    prompt_lengths = jnp.asarray(prompt_lengths, jnp.int32)
    inside = jnp.arange(width) < prompt_lengths[:, None]
    # Columns past a prompt's length are fed as token 0: their cache entries are replaced before they are attended.
    fed = jnp.where(inside, prompt, 0).astype(jnp.int32)
    buffer_length = width + max_new_tokens + longest
    target_slots = num_slots(target, width + max_new_tokens, longest)
    memory.check(prompt, checks.models(target, drafter), max_new_tokens=max_new_tokens, longest_draft=longest)
    if not isinstance(prompt, Tracer):
        _checks.prompt_ids(prompt, prompt_lengths, vocab_size(target, (batch_size, width), target_slots))
    tokens = jnp.pad(jnp.where(inside, fed, PAD_TOKEN), ((0, 0), (0, buffer_length - width)), constant_values=PAD_TOKEN)
    first_num_draft, num_draft_state = num_draft_module.start(num_draft, measured, prompt_lengths, max_new_tokens)
    draft_state, num_draft_state = start_drafter(
        drafter, fed, buffer_length, num_draft=first_num_draft, num_draft_state=num_draft_state
    )
    state = DecodeState(
        tokens=tokens,
        lengths=prompt_lengths,
        limits=prompt_lengths + max_new_tokens,
        finished=jnp.zeros((batch_size,), bool),
        log_probs=jnp.zeros((batch_size, width + max_new_tokens), jnp.float32),
        num_draft=first_num_draft,
        target_cache=prefill(target, fed, target_slots),
        draft_state=draft_state,
        num_draft_state=num_draft_state,
        verify_state=start_rule(verify_fn, batch_size),
    )
    # Loops need one type before and after a step, which makes all of the state vary over these axes.
    return vary_like(with_own_buffers(state, arguments), (state, target, drafter))


@allow_rank_promotion
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
    checks.loop(target, draft, num_draft)
    checks.functions(verify_fn, process_logits_fn)
    checks.state(state)
    drafter, num_draft = resolve(draft, num_draft)
    check_state(state, drafter, num_draft)
    run = functools.partial(
        step_of_length,
        key=key,
        target=target,
        drafter=drafter,
        num_draft=num_draft,
        sampling=sampling,
        eos_token=eos_token,
        verify_fn=verify_fn,
        process_logits_fn=process_logits_fn,
    )

    branches = [functools.partial(run, length) for length in num_draft_module.compiled_lengths(num_draft)]
    if len(branches) == 1:
        state, info = branches[0](state)
    else:
        state, info = lax.switch(num_draft_module.next_index(num_draft, state), branches, catch_up(state, drafter))
    state = num_draft_module.with_step(num_draft, state, info)
    return num_draft_module.settle(num_draft, state), info


def check_state(state: DecodeState, drafter: Drafter | None, num_draft: NumDraft) -> None:
    """Raises ValueError if the state was made for another drafter or other draft lengths."""
    checks.widths(state.tokens, state.log_probs, num_draft_module.compiled_lengths(num_draft)[-1])
    checks.draft_state(drafter, state.draft_state, state.tokens)
    checks.num_draft_state(num_draft, state.num_draft_state)


def resolve(draft: Model | Drafter | None, num_draft: NumDraft) -> tuple[Drafter | None, NumDraft]:
    """Wraps a model in a `ModelDrafter`; without a drafter the draft length is 0."""
    if draft is None:
        return None, 0
    return ModelDrafter(draft) if isinstance(draft, Model) else draft, num_draft
