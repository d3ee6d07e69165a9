"""One step: finished rows do not change and do not influence the draft length."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from inputs import quick_jit

import specsamp_jax as ss

pytestmark = pytest.mark.optimised(False)

VOCAB = 8
HEURISTIC = ss.HeuristicNumDraft(3, increase=2, decrease=1, lengths=(1, 3))
KEY = jax.random.key(0)


def step(state, **options):
    """One step of the state, compiled quickly."""
    run = jax.jit(functools.partial(ss.step, **options), compiler_options={"xla_backend_optimization_level": 0})
    return run(KEY, state)


def no_cache(batch_size, max_length):
    return ()


def look_up(logits, tokens, positions, cache):
    return logits[tokens], cache


def counting(factor=1.0):
    """A model that counts: each token is followed by the next number."""
    logits = jnp.where(jnp.roll(jnp.eye(VOCAB), 1, axis=1), 99.0, -99.0) * factor
    return ss.Model(logits, look_up, no_cache)


def started(prompt, finished, **options):
    options = {"target": counting(), "max_new_tokens": 9} | options
    state = jax.jit(functools.partial(ss.init, **options))(np.array(prompt))
    return state._replace(finished=jnp.array(finished))


def test_a_finished_row_is_counted_nowhere_and_keeps_its_draft_length():
    state = started([[0], [0]], [True, False], draft=counting(), num_draft=HEURISTIC)

    @quick_jit
    def step(target, draft):
        return ss.step(KEY, state, target=target, draft=draft, num_draft=HEURISTIC)

    _, info = step(counting(np.nan), counting())
    assert info.status.tolist() == [0, ss.DEGENERATE_TARGET]
    _, info = step(counting(), counting())
    assert info.num_drafted.tolist() == info.num_accepted.tolist() == [0, 3]
    assert info.num_tokens.tolist() == [0, 4]
    # Of two rows that reject, one has ended.
    after, _ = step(counting(), counting(-1.0))
    assert after.num_draft.tolist() == [3, 2]


def test_a_finished_row_asks_for_no_long_step():
    @jax.tree_util.register_static
    class TellsTheLength:
        """Drafts the length of the step that it is asked for."""

        def init(self, tokens, max_length):
            return ()

        def propose(self, key, state, tokens, lengths, *, num_draft, sampling, process_logits_fn):
            return ss.Draft(jnp.full((*lengths.shape, num_draft), num_draft, jnp.int32)), state

    drafter = TellsTheLength()
    state = started([[0], [0]], [True, False], draft=drafter, num_draft=HEURISTIC)
    state = state._replace(num_draft=jnp.array([3, 1]))
    _, info = step(state, target=counting(), draft=drafter, num_draft=HEURISTIC)
    # 1 follows 0: the row that goes on drafted it, in a step of one draft.
    assert info.num_accepted.tolist() == [0, 1]


def test_a_drafter_samples_with_its_own_parameters():
    model = tables.model(tables.table(5))
    tokens = jnp.asarray(np.random.default_rng(0).integers(tables.VOCAB, size=(64, 3)), jnp.int32)
    text, greedy = jnp.pad(tokens, ((0, 0), (0, 3)), constant_values=-1), ss.SamplingParams(0.0)
    for drafter in (
        ss.ModelDrafter(model, greedy),
        ss.ConfidenceDrafter(model, 0.0, greedy),
    ):
        options = {"num_draft": 3, "sampling": ss.SamplingParams(), "process_logits_fn": lambda t, n, logits: logits}

        @jax.jit
        def propose(keys, drafter=drafter, options=options):
            draft, _ = drafter.propose(keys, drafter.init(tokens, 6), text, jnp.full(64, 3, jnp.int32), **options)
            assert draft.sampling == greedy
            return draft

        draft = propose(jax.random.split(KEY, 64))
        assert (draft.tokens == draft.logits.argmax(-1)).all()


def test_a_state_shares_no_buffer_so_that_a_step_may_donate_it():
    prompt_lengths, options = jnp.array([1]), {"target": counting(), "draft": None, "verify_fn": ss.CalibratedRule()}
    state = ss.init(np.array([[0]]), **options, max_new_tokens=3, prompt_lengths=prompt_lengths)
    buffers = [leaf.unsafe_buffer_pointer() for leaf in [prompt_lengths, *jax.tree.leaves(state)]]
    assert len(set(buffers)) == len(buffers)
