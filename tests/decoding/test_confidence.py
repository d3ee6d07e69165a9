"""Drafts that end after the first token of low probability are exact; drafts that drop it are not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tables

import specsamp_jax as ss

pytestmark = pytest.mark.optimised(False)

NUM_SAMPLES, FALSE_ALARM = 20_000, 1e-4
P, Q = np.array([0.5, 0.5]), np.array([0.9, 0.1])
THRESHOLD = 0.4


def always(probs):
    """A model that gives these probabilities after any text."""
    logits = jnp.log(jnp.asarray(probs, jnp.float32))
    return ss.Model(
        logits, lambda z, tokens, positions, cache: (jnp.broadcast_to(z, (*tokens.shape, 2)), cache), lambda b, n: ()
    )


@jax.tree_util.register_static
class CutBefore:
    """A biased drafter: ends each draft before, not after, the first token of low probability."""

    drafter = ss.ModelDrafter(always(Q))
    init = drafter.init

    def propose(self, *args, **kwargs):
        draft, state = self.drafter.propose(*args, **kwargs)
        probs = jnp.take_along_axis(jax.nn.softmax(draft.logits), draft.tokens[..., None], axis=-1)[..., 0]
        return draft._replace(tokens=jnp.where(probs < THRESHOLD, ss.PAD_TOKEN, draft.tokens)), state


def first_tokens(draft):
    prompt = np.zeros((NUM_SAMPLES, 1), int)
    options = {"target": always(P), "draft": draft, "num_draft": 2, "max_new_tokens": 1}
    return np.bincount(ss.generate(jax.random.key(3), prompt, **options).tokens[:, 1], minlength=2)


@pytest.mark.optimised(True)  # runs for longer than it compiles
def test_a_cut_after_the_unsure_token_is_exact_and_one_before_it_is_not():
    assert oracle.chi_square(first_tokens(ss.ConfidenceDrafter(always(Q), THRESHOLD)), P) > FALSE_ALARM
    biased = first_tokens(CutBefore())
    assert oracle.chi_square(biased, P) < 1e-20
    # q(0) min(1, p/q) + (the residual never gives it) + q(1) p(0): .5 + .1 x .5.
    assert oracle.chi_square(biased, np.array([0.55, 0.45])) > FALSE_ALARM


@pytest.fixture(scope="module")
def proposals():
    """Drafts of 64 rows, every second one greedy: by `ModelDrafter`, and by `ConfidenceDrafter` for two thresholds."""
    model = tables.model(tables.table(5))
    tokens = np.random.default_rng(0).integers(tables.VOCAB, size=(64, 3))
    text = jnp.pad(jnp.asarray(tokens, jnp.int32), ((0, 0), (0, 5)), constant_values=-1)
    sampling = ss.SamplingParams(np.array([1, 0] * 32, "f"))
    options = {"num_draft": 5, "sampling": sampling, "process_logits_fn": lambda tokens, lengths, logits: logits}

    @jax.jit
    def propose(keys, drafter):
        state = drafter.init(jnp.asarray(tokens, jnp.int32), 8)
        return drafter.propose(keys, state, text, jnp.full(64, 3, jnp.int32), **options)[0]

    keys = jax.random.split(jax.random.key(1), 64)
    drafters = ss.ModelDrafter(model), ss.ConfidenceDrafter(model, 0.5), ss.ConfidenceDrafter(model, 0.0)
    return [jax.device_get(propose(keys, drafter)) for drafter in drafters]


def test_drafts_are_those_of_the_model_up_to_the_first_unsure_token(proposals):
    whole, ours, _ = proposals
    probs = np.take_along_axis(jax.nn.softmax(whole.logits), whole.tokens[..., None], axis=-1)[..., 0]
    # The probability is the model's own also where the draft is greedy.
    lengths = [1 + next((i for i, p in enumerate(row) if p < 0.5), 4) for row in probs.tolist()]
    for rows in (lengths[::2], lengths[1::2]):  # sampled, greedy
        assert 1 in rows
        assert 5 in rows
    for row, length in enumerate(lengths):
        assert ours.tokens[row].tolist() == [*whole.tokens[row, :length].tolist(), *[-1] * (5 - length)]
        assert (ours.logits[row, :length] == whole.logits[row, :length]).all()
        assert (ours.log_normalizers[row, :length] == whole.log_normalizers[row, :length]).all()
    assert (whole.tokens == whole.logits.argmax(-1))[1::2].all()
    assert not (whole.tokens == whole.logits.argmax(-1))[::2].all()


def test_a_threshold_of_zero_never_stops(proposals):
    whole, _, ours = proposals
    assert (ours.tokens == whole.tokens).all()


def test_the_model_runs_until_every_row_is_unsure():
    """The cache counts the passes: one for the prompts, and one per draft until all rows have ended."""
    logits = jnp.where(jnp.eye(6, k=1), 9.0, -9.0).at[3:].set(0.0)
    model = ss.Model(logits, lambda z, tokens, positions, cache: (z[tokens], cache + 1), lambda b, n: jnp.zeros(b, int))
    drafter = ss.ConfidenceDrafter(model, 0.5)
    models = {"target": model, "draft": drafter, "num_draft": 5}
    state = jax.jit(functools.partial(ss.init, **models, max_new_tokens=9))(np.array([[2], [1]]))
    state, info = jax.jit(functools.partial(ss.step, **models))(jax.random.key(0), state)
    # After 1 come 2 and 3, and an unsure token.
    assert info.num_drafted.tolist() == [2, 3]
    assert state.draft_state.tolist() == [1 + 3] * 2
