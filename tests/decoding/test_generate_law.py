"""Tokens of the whole loop follow the target's law: enumeration and chi-square.

Probability of a false alarm: 1e-4 per test. Keys are fixed.
"""

import jax
import numpy as np
import oracle
import pytest
import tables
from jax import lax

import specsamp_jax as ss
from specsamp_jax.models import with_vocab_size

NUM_SAMPLES, NUM_NEW = 40_000, 3
FALSE_ALARM = 1e-4
TARGET, DRAFT = tables.table(3, 1.0), tables.table(4, 1.0)
FILTERS = {"temperature": 0.8, "top_k": 3, "top_p": 0.85}
COLDER = ss.ModelDrafter(tables.model(DRAFT), ss.SamplingParams(temperature=0.5))
WIDER = with_vocab_size(tables.model(np.pad(DRAFT, (0, 2), constant_values=2.0)), tables.VOCAB)


def law(prompt, **sampling):
    def target(prefix):
        return oracle.distribution(tables.logits_after(TARGET, [*prompt, *prefix]).astype(np.float64), **sampling)

    return oracle.target_law(target, NUM_NEW)


@pytest.mark.parametrize(
    ("draft", "num_draft", "sampling"),
    [
        # On each push two programs with all of them: filters, a drafter of another temperature or vocabulary, and
        # draft lengths that change. test_processors has n-grams.
        (WIDER, 2, FILTERS),
        (COLDER, ss.HeuristicNumDraft(2, lengths=(1, 3)), {"min_p": 0.1}),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                (tables.model(DRAFT), 2, {}),
                (tables.model(DRAFT), 2, FILTERS),
                (COLDER, 2, {"min_p": 0.1}),
                (tables.model(DRAFT), ss.HeuristicNumDraft(2, lengths=(1, 3)), {}),
                (ss.NGramDrafter(), 2, {}),
                (with_vocab_size(tables.model(DRAFT[:3, :3, :3]), tables.VOCAB), 2, {}),
                (WIDER, 2, {"top_p": 0.9}),
            )
        ),
    ],
    ids=[
        "more tokens, filtered",
        "colder drafter, heuristic",
        "model",
        "filtered",
        "colder drafter",
        "heuristic",
        "ngram",
        "fewer tokens",
        "more tokens",
    ],
)
def test_the_loop_emits_the_targets_law(draft, num_draft, sampling):
    prompt = [1, 2, 1, 2, 1]
    result = ss.generate(
        jax.random.key(11),
        np.broadcast_to(prompt, (NUM_SAMPLES, len(prompt))),
        target=tables.model(TARGET),
        draft=draft,
        num_draft=num_draft,
        max_new_tokens=NUM_NEW,
        sampling=ss.SamplingParams(**sampling),
    )
    expected = law(prompt, **sampling)
    cells = {text: i for i, text in enumerate(expected)}
    texts, counts = np.unique(np.asarray(result.tokens[:, len(prompt) :]), axis=0, return_counts=True)
    observed = np.zeros(len(cells))
    observed[[cells[tuple(text.tolist())] for text in texts]] = counts
    assert oracle.chi_square(observed, np.array(list(expected.values()))) > FALSE_ALARM
    # Some drafts were accepted and some rejected.
    accepted, drafted = result.stats.num_accepted.sum(), result.stats.num_drafted.sum()
    assert 0.02 * drafted < accepted < 0.98 * drafted


@pytest.mark.both_programs  # without filters; every batch above has one
def test_the_law_while_the_draft_length_follows_the_past():
    """Each sample is a batch of its own, so that its draft lengths follow its own accepted drafts."""
    num_new, prompt = 4, [1, 2, 1, 2, 1]
    rule = ss.GoodputNumDraft((1.0, 1.45), (0, 1), hysteresis=0.0, memory=1.0, prior=0.5, steps_per_choice=1)
    models = {"target": tables.model(TARGET), "draft": tables.model(DRAFT), "num_draft": rule}

    @jax.jit
    @jax.vmap
    def sample(key):
        state = ss.init(np.array([prompt]), **models, max_new_tokens=num_new)

        def advance(state, _):
            return ss.step(key, state, **models)[0], (state.lengths[0], state.num_draft[0])

        state, (lengths, num_draft) = lax.scan(advance, state, length=num_new)
        return state.tokens[0, len(prompt) : -1], lengths, num_draft

    tokens, lengths, num_draft = map(np.asarray, sample(jax.random.split(jax.random.key(5), 20_000)))
    expected = oracle.target_law(
        lambda prefix: oracle.distribution(tables.logits_after(TARGET, [*prompt, *prefix]).astype(np.float64)), num_new
    )
    weights = tables.VOCAB ** np.arange(num_new)
    observed = np.bincount(tokens @ weights, minlength=tables.VOCAB**num_new)
    law = np.zeros(tables.VOCAB**num_new)
    law[[int(np.dot(text, weights)) for text in expected]] = list(expected.values())
    assert oracle.chi_square(observed, law) > FALSE_ALARM
    # After two tokens, one draft follows an accepted draft and none a rejected one.
    assert set(num_draft[lengths == len(prompt) + 2]) == {0, 1}
