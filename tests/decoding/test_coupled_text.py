"""The loop with the coupled rule: one text per key, whatever drafts, and how many."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tables

import specsamp_jax as ss
from specsamp_jax.decoding.drafters import DraftsCoupled
from specsamp_jax.decoding.keys import step_keys

pytestmark = pytest.mark.optimised(False)

TARGET, DRAFT = tables.model(tables.table(0)), tables.model(tables.table(1))
PROMPT = np.array([[1, 2, 3], [2, 0, 0], [3, 1, 0]])
PROMPT_LENGTHS = np.array([3, 1, 2])
NUM_NEW = 12
KEYS = jax.random.split(jax.random.key(0), 3)
SAMPLING = ss.SamplingParams(temperature=np.array([0.8, 1.0, 0.0], "f"))
generate = functools.partial(
    ss.generate,
    target=TARGET,
    max_new_tokens=NUM_NEW,
    prompt_lengths=PROMPT_LENGTHS,
    sampling=SAMPLING,
    verify_fn=ss.verify_coupled,
)


sample = jax.jit(ss.sample_coupled)


class OtherDrafter:
    """A drafter that knows neither the noise nor the models."""

    def init(self, tokens, max_length):
        return ()

    def propose(self, key, state, tokens, lengths, *, num_draft, sampling, process_logits_fn):
        drafts = jax.vmap(lambda key: jax.random.randint(key, (num_draft,), 0, tables.VOCAB))(key)
        return ss.Draft(drafts), state


jax.tree_util.register_static(OtherDrafter)


def sampled_text(row):
    """The text that plain sampling gives, one call of `sample_coupled` per token."""
    text = PROMPT[row, : PROMPT_LENGTHS[row]].tolist()
    sampling = ss.SamplingParams(SAMPLING.temperature[row])
    for _ in range(NUM_NEW):
        logits = tables.logits_after(tables.table(0), text)[None]
        text.append(int(sample(KEYS[row : row + 1], logits, sampling, positions=len(text))[0][0]))
    return text


@pytest.fixture(scope="module")
def texts():
    return [sampled_text(row) for row in range(3)]


@pytest.mark.parametrize(
    ("draft", "num_draft"),
    [
        (None, 4),
        (TARGET, 4),
        *(
            pytest.param(*options, marks=pytest.mark.slow)
            for options in (
                (ss.NGramDrafter(), 2),
                (DRAFT, 1),
                (DRAFT, 3),
                (ss.ConfidenceDrafter(DRAFT, 0.5), 3),
                (ss.ModelDrafter(DRAFT, ss.SamplingParams(temperature=0.3)), 2),
                (OtherDrafter(), 2),
                (DRAFT, ss.HeuristicNumDraft(2, lengths=(1, 3))),
                (DRAFT, ss.GoodputNumDraft((1.0, 1.1, 1.2), (0, 1, 2))),
            )
        ),
    ],
    ids=["none", "itself", "n-grams", "1", "3", "confidence", "colder", "other", "heuristic", "goodput"],
)
def test_the_text_is_that_of_plain_sampling(texts, draft, num_draft):
    result = generate(KEYS, PROMPT, draft=draft, num_draft=num_draft)
    for row in range(3):
        assert result.tokens[row, : len(texts[row])].tolist() == texts[row]
    if draft is TARGET:
        # Drawn with the target's noise, all drafts of the target itself are accepted.
        assert result.stats.num_steps == -(-NUM_NEW // 5)


def test_a_row_depends_on_its_key_alone(texts):
    order = np.array([2, 0])
    padded = np.pad(PROMPT[order], ((0, 0), (0, 2)), constant_values=1)
    sampling = SAMPLING._replace(temperature=SAMPLING.temperature[order])
    options = {"prompt_lengths": PROMPT_LENGTHS[order], "sampling": sampling}
    result = generate(KEYS[order], padded, draft=None, **options)
    for row, index in enumerate(order):
        assert result.tokens[row, : len(texts[index])].tolist() == texts[index]


@pytest.mark.slow
def test_models_draft_with_the_noise_of_the_target():
    table, prompt = tables.table(2) * 0.3, np.ones((64, 1), int)
    options = {"target": tables.model(table), "max_new_tokens": 8, "num_draft": 2}

    def share(draft, verify_fn):
        stats = ss.generate(jax.random.key(1), prompt, draft=draft, verify_fn=verify_fn, **options).stats
        return float(stats.num_accepted[0] / stats.num_drafted[0])

    model = tables.model(table + 0.1 * tables.table(3))
    assert share(model, ss.verify_coupled) > 0.8 > 0.5 > share(OtherDrafter(), ss.verify_coupled)
    assert isinstance(ss.ModelDrafter(model), DraftsCoupled)
    assert isinstance(ss.ConfidenceDrafter(model), DraftsCoupled)
    assert not isinstance(ss.NGramDrafter(), DraftsCoupled)


def test_what_draws_by_position():
    """A rule with a parameter `positions`, bound or not, and drafters that have its noise."""
    lengths = jnp.array([3, 1, 2])
    bound = functools.partial(ss.verify_coupled, implementation="xla")
    folded = jax.vmap(jax.random.fold_in)(KEYS, lengths)
    for rule, drafter, for_rule, for_drafter in (
        (ss.verify, ss.ModelDrafter(DRAFT), folded, folded),
        (ss.verify_coupled, ss.ModelDrafter(DRAFT), KEYS, KEYS),
        (bound, ss.ConfidenceDrafter(DRAFT), KEYS, KEYS),
        (bound, ss.NGramDrafter(), KEYS, folded),
        (bound, None, KEYS, folded),
    ):
        keys = step_keys(KEYS, lengths, drafter, rule)
        assert (keys.verify == for_rule).all()
        assert (keys.draft == for_drafter).all()
        assert set(keys.verify_options) == (set() if rule is ss.verify else {"positions"})


@pytest.mark.slow
def test_the_loop_emits_the_targets_law():
    num_samples, prompt, num_new = 20_000, [1, 2, 1], 3
    result = ss.generate(
        jax.random.key(11),
        np.broadcast_to(prompt, (num_samples, len(prompt))),
        target=TARGET,
        draft=DRAFT,
        num_draft=2,
        max_new_tokens=num_new,
        verify_fn=ss.verify_coupled,
    )

    def target(prefix):
        return oracle.distribution(tables.logits_after(tables.table(0), [*prompt, *prefix]).astype(np.float64))

    law = oracle.target_law(target, num_new)
    cells = {text: i for i, text in enumerate(law)}
    texts, counts = np.unique(np.asarray(result.tokens[:, len(prompt) :]), axis=0, return_counts=True)
    observed = np.zeros(len(cells))
    observed[[cells[tuple(text.tolist())] for text in texts]] = counts
    assert oracle.chi_square(observed, np.array(list(law.values()))) > 1e-4
