"""Draft length by goodput: its choice by hand, gaps in a drafter's cache, costs; test_generate_law has its law."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

import specsamp_jax as ss
from specsamp_jax.decoding import costs, expected_tokens, first_choice, goodput, goodput_state, probes

pytestmark = pytest.mark.optimised(False)

TARGET, DRAFT = tables.table(3, 1.0), tables.table(4, 1.0)
LENGTHS = (0, 1, 2)
RULE = ss.GoodputNumDraft((1.0, 1.2, 1.4), LENGTHS)
PROMPT = [1, 2, 1, 2, 1]


# As in `generate`, costs and prior are data: rules that differ in these alone share a program.
settle = jax.jit(goodput.settle, static_argnums=0)


def after(rule, accepted, *, num_steps=60, remaining=1000):
    """Draft lengths and states of a row whose step accepts `accepted(i, num_draft)` drafts."""

    program = first_choice.without_data(rule)
    position = np.arange(rule.lengths[-1])
    row = functools.partial(jnp.full, (1,))
    num_tokens = 5
    num_draft, state = goodput.start(rule, first_choice.measured(rule, 1, remaining), row(num_tokens))
    lengths, states = [], []
    for i in range(num_steps):
        lengths.append(int(num_draft[0]))
        states.append(state)
        num_accepted = min(accepted(i, lengths[-1]), lengths[-1])
        num_tokens += num_accepted + 1
        state = state._replace(
            num_emitted=state.num_emitted + num_accepted + 1,
            num_accepted=state.num_accepted + (position < num_accepted),
        )
        num_draft, state = settle(program, state, goodput.Rows(row(True), row(num_tokens), row(remaining)))
    return lengths, states


# The choice


def test_the_best_length_maximises_tokens_per_cost():
    rule = ss.GoodputNumDraft((1.0, 1.1, 1.3, 2.0), (0, 1, 2, 4))
    for rate in (0.05, 0.3, 0.6, 0.9):
        tokens = [float(ss.expected_num_tokens(rate, k)) if k else 1.0 for k in rule.lengths]
        expected = rule.lengths[np.argmax(np.array(tokens) / rule.costs)]
        assert rule.best((rate,) * 4) == expected
    # Positions differ: the first draft is nearly always accepted, the others never.
    assert rule.best((0.9, 0.0, 0.0, 0.0)) == 1


def test_all_accepted_drafts_most_and_all_rejected_drafts_nothing():
    assert set(after(RULE, lambda i, k: k)[0][5:]) == {2}
    lengths, _ = after(RULE, lambda i, k: 0)
    assert lengths[16:].count(0) > 40


def test_the_acceptance_is_that_of_the_steps_that_reached_a_position():
    # Two drafts: the first accepted in all steps, the second in every other.
    rule = ss.GoodputNumDraft((1.0, 1.0, 1.0), LENGTHS, memory=1e9)
    _, states = after(rule, lambda i, k: 1 + i % 2, num_steps=41)
    observed = goodput._with_observations(rule, states[-1])
    assert observed.tried[0].tolist() == [40, 40]
    assert observed.accepted[0].tolist() == [40, 20]
    # A position after a rejection is not tried.
    _, states = after(rule, lambda i, k: 0, num_steps=8)
    assert goodput._with_observations(rule, states[-1]).tried[0].tolist() == [7, 0]


def test_probes_are_rare_enough_to_be_cheap():
    table = (1.0, 1.5, 2.0)
    lengths, _ = after(ss.GoodputNumDraft(table, LENGTHS, probe_share=0.01), lambda i, k: 0, num_steps=2000)
    assert 2 <= np.count_nonzero(lengths[20:]) <= 0.01 * 1980 / (table[1] - table[0])
    never = after(ss.GoodputNumDraft(table, LENGTHS, probe_share=0.0), lambda i, k: 0, num_steps=300)[0]
    assert not any(never[20:])


def test_probes_that_fail_become_rarer_and_those_that_succeed_do_not():
    rule = ss.GoodputNumDraft((1.0, 1.5, 9.0), LENGTHS, probe_share=0.05, prior=(0.0, 0.0))
    gaps = {}
    for name, accepts in (("rejected", lambda i, k: 0), ("accepted at times", lambda i, k: i % 2)):
        lengths, _ = after(rule, accepts, num_steps=500)
        gaps[name] = np.diff(np.flatnonzero(lengths)).tolist()
    # A probe that fails costs the draft, 0.5, and a step of the drafter's reading, 0.5: 20 steps at a share of 0.05.
    assert gaps["rejected"][:4] == [41, 81, 161, 161][: len(gaps["rejected"])]
    assert len(gaps["accepted at times"]) > len(gaps["rejected"])


def test_the_length_changes_after_some_steps_with_drafts():
    rule = ss.GoodputNumDraft(RULE.costs, LENGTHS, prior=0.9, probe_share=0.0, steps_per_choice=5)
    lengths, _ = after(rule, lambda i, k: 0, num_steps=30)
    changes = np.flatnonzero(np.diff(lengths)) + 1
    assert len(changes) >= 1
    assert (changes % 5 == 0).all()


def test_a_measured_acceptance_decides_from_the_first_step():
    for prior, first in (((0.0, 0.0), 0), ((0.9, 0.0), 1), ((0.9, 0.9), 2)):
        rule = ss.GoodputNumDraft(RULE.costs, LENGTHS, prior=prior)
        assert after(rule, lambda i, k: k, num_steps=1)[0] == [first]


@pytest.mark.parametrize(("batch_size", "prior"), [(1, 0.3), (1, (0.6, 0.2)), (16, (0.6, 0.2)), (3, (1.0, 0.0))])
def test_the_first_choice_computes_what_later_choices_do(batch_size, prior):
    """It is made with NumPy."""
    none, left = np.zeros((batch_size, 2), np.float32), np.full((batch_size,), 50, np.int32)
    arrays = np.array(RULE.costs, np.float32), np.broadcast_to(np.float32(prior), (2,)), none, none, left
    is_measured = isinstance(prior, tuple)
    on_host = expected_tokens.estimates(LENGTHS, *arrays, is_measured=is_measured)
    traced = jax.jit(functools.partial(expected_tokens.estimates, LENGTHS, is_measured=is_measured))(*arrays)
    for own, other in zip(on_host, traced, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-5)


@pytest.mark.parametrize(("gain", "first"), [(0.99, 0), (1.01, 0), (1.03, 1)])
def test_a_text_begins_with_the_shorter_of_two_equally_fast_lengths(gain, first):
    rule = ss.GoodputNumDraft((1.0, 1.5 / gain, 9.0), LENGTHS, prior=(0.5, 0.0))
    assert after(rule, lambda i, k: 0, num_steps=1)[0] == [first]


def test_a_change_of_the_length_has_a_price():
    """A probe waits for one as well; a length that is better for the tokens left must earn one."""
    rule = ss.GoodputNumDraft((1.0, 1.5, 9.0), LENGTHS, probe_share=0.05, prior=(0.0, 0.0))
    for change_cost, num_steps in ((0.0, 20), (0.5, 30)):
        data = first_choice.measured(dataclasses.replace(rule, change_cost=change_cost), 1, 1000)
        assert goodput.start(rule, data, jnp.array([5]))[1].probe_at.tolist() == [5 + num_steps]
    # From one draft, whose acceptance is 0 after 50 steps: a step costs 1 for 1.5, so 40 tokens gain 20.
    rule = ss.GoodputNumDraft((1.0, 1.5, 9.0), LENGTHS, prior=(0.6, 0.0), probe_share=0.0)
    for change_cost, length in ((0.0, 0), (19.0, 0), (21.0, 1)):
        _, state = goodput.start(rule, first_choice.measured(rule, 1, 90), jnp.array([5]))
        state = state._replace(tried=jnp.array([[1e9, 0.0]]), costs=state.costs.at[:, -1].set(change_cost))
        state = state._replace(interval=jnp.array([1]), num_emitted=jnp.array([50]))
        num_draft, _ = goodput.settle(rule, state, goodput.Rows(jnp.array([True]), jnp.array([55]), jnp.array([40])))
        assert num_draft.tolist() == [length]


def test_the_measured_acceptance_is_that_of_the_steps_that_reached_a_position():
    def stats(num_steps, accepted):
        emitted = np.array([num_steps + sum(accepted)])
        return ss.Stats(np.int32(num_steps), emitted, np.array([num_steps, 0]), np.array(accepted), np.zeros(1))

    counts = [(0, stats(50, [0, 0])), (1, stats(100, [40, 0])), (2, stats(100, [60, 15]))]
    assert costs._acceptance(counts, 2) == pytest.approx((100.25 / 200.5, 15.25 / 60.5))


def test_a_step_that_a_limit_cuts_short_is_a_step_of_the_measured_acceptance():
    # Ten of 50 steps were cut short: they emitted no token but their accepted drafts.
    stats = ss.Stats(np.int32(50), np.array([40 + 45 + 38]), np.array([50, 50]), np.array([45, 38]), np.zeros(1))
    assert costs._acceptance([(2, stats)], 2) == pytest.approx((45.25 / 50.5, 38.25 / 45.5))


def test_a_step_that_a_limit_cuts_short_leaves_the_times_finite():
    rule = ss.GoodputNumDraft(RULE.costs, LENGTHS, prior=(1.0, 1.0))
    rows = goodput.Rows(jnp.array([False, True]), jnp.array([12, 12]), jnp.array([0, 50]))
    _, state = goodput.start(rule, first_choice.measured(rule, 2, 50), rows.lengths)
    # The first row accepted all drafts of four steps, the last of which emitted only one token more.
    counts = jnp.array([[4, 3], [3, 3]])
    state = goodput._with_observations(rule, state._replace(num_emitted=jnp.array([10, 9]), num_accepted=counts))
    assert (state.accepted <= state.tried).all()
    counts = state.tried, state.accepted, jnp.array([0, 50])
    _, time = expected_tokens.estimates(LENGTHS, state.costs[0, :-1], state.prior[0], *counts, is_measured=True)
    assert jnp.isfinite(time).all()


def num_steps_of_slowest(rates, accepted, remaining, tried=1e6):
    """The expected number of steps at `LENGTHS` of rows whose own acceptance is `accepted`."""
    own = jnp.array(accepted, jnp.float32)
    counts = jnp.full(own.shape, tried), own * tried
    return expected_tokens.num_steps_of_slowest(*counts, jnp.array(rates, jnp.float32), LENGTHS, jnp.array(remaining))


def test_the_slowest_row_of_a_batch_decides():
    """Against 2,000 batches of 16 rows, of which some accept less or have fewer tokens left, with two drafts each."""
    remaining = np.array([60] * 12 + [40] * 4)
    rates = np.linspace([0.5, 0.4], [0.7, 0.6], 16)
    accepted = (np.random.default_rng(0).random((2_000, 16, 60, 2)) < rates[:, None]).cumprod(-1).sum(-1)
    num_steps = 1 + (np.cumsum(accepted + 1, axis=-1) < remaining[:, None]).sum(-1)
    expected = num_steps_of_slowest(rates.mean(0), rates, remaining)
    assert expected[2] == pytest.approx(num_steps.max(1).mean(), rel=0.02)
    assert expected[0] == 60
    alone = num_steps_of_slowest([0.6, 0.5], [[0.6, 0.5], [0.0, 0.0]], [60, 0])
    np.testing.assert_allclose(alone, [60, 60 / 1.6, 60 / 1.9], rtol=0.01)


def test_a_row_without_observations_has_the_acceptance_of_all():
    rates, rows = [0.6, 0.5], [[0.9, 0.9], [0.1, 0.1]]
    unknown = num_steps_of_slowest(rates, rows, [60, 60], tried=0.0)
    alike = num_steps_of_slowest(rates, [rates, rates], [60, 60], tried=0.0)
    np.testing.assert_allclose(unknown, alike, rtol=1e-5)
    assert num_steps_of_slowest(rates, rows, [60, 60])[1] > 1.2 * unknown[1]


def test_rows_without_observations_differ():
    """Against 2,000 batches of 16 rows whose acceptance deviates by .05 from row to row, with two drafts each."""
    rng, rates = np.random.default_rng(0), np.array([0.6, 0.6])
    own = np.clip(rng.normal(0.6, 0.05, (2_000, 16, 1, 1)), 0, 1)
    accepted = (rng.random((2_000, 16, 120, 2)) < own).cumprod(-1).sum(-1)
    num_steps = 1 + (np.cumsum(accepted + 1, axis=-1) < 200).sum(-1)
    expected = num_steps_of_slowest(rates, [rates] * 16, [200] * 16, tried=0.0)
    assert expected[2] == pytest.approx(num_steps.max(1).mean(), rel=0.02)
    assert num_steps_of_slowest(rates, [rates] * 16, [200] * 16)[2] < 0.96 * expected[2]


@pytest.mark.parametrize("num_rows", [1, 16])
def test_a_measured_prior_counts_as_50_observations_of_each_row(num_rows):
    tried, accepted, prior = jnp.full((num_rows, 1), 50.0), jnp.full((num_rows, 1), 25.0), jnp.array([0.9])
    rates = expected_tokens.acceptance(tried, accepted, prior, is_measured=True)
    np.testing.assert_allclose(rates, 0.7, rtol=1e-6)


def test_the_time_between_choices_doubles_while_they_confirm_the_length():
    rule = ss.GoodputNumDraft(RULE.costs, LENGTHS, prior=0.9, probe_share=0.0, memory=10.0, steps_per_choice=2)
    lengths, states = after(rule, lambda i, k: k if i < 60 else 0, num_steps=120)
    choices = [i for i, state in enumerate(states) if i and state.num_emitted[0] == 0]
    assert choices[:6] == [2, 6, 14, 30, 46, 62]
    assert lengths[59] == 2
    changed = next(i for i in range(60, 120) if lengths[i] != 2)
    assert states[changed].interval.tolist() == [2]


def test_there_is_no_choice_where_no_other_length_could_be_better():
    """As under the costs of a measurement, in whose steps a choice would count."""
    for index, expected in enumerate(LENGTHS):
        lengths, states = after(costs.forced(LENGTHS, index), lambda i, k: k, num_steps=80)
        assert set(lengths) == {expected}
        assert states[-1].tried.sum() == 0
    # Two drafts at three times the cost could be as good, and not better.
    for cost, interval in ((2.99, 16), (3.01, first_choice._NO_CHOICE)):
        rule = ss.GoodputNumDraft((1.0, 9.0, cost), LENGTHS, prior=0.1)
        assert after(rule, lambda i, k: 0, num_steps=1)[1][0].interval.tolist() == [interval]


def test_costs_do_not_follow_a_machine_that_is_slower_in_some_rounds():
    slowness = np.array([1.0, 3.0, 1.0, 1.2, 5.0])[:, None]
    disturbed = slowness * [1.0, 1.5, 1.4]
    disturbed[2, 0] = 9.0
    # The median round is the second, in which all lengths took three times as long.
    assert costs._costs(disturbed.tolist()) == pytest.approx((3.0, 4.5, 4.5))
    assert min(costs._costs([[-1.0, 2.0], [0.0, 2.0], [1.0, 2.0]])) > 0


def test_the_time_of_a_step_is_without_that_of_the_first_steps_of_a_call(monkeypatch):
    """A call takes 7 seconds, 2 more if it makes steps, and 0.5 per step."""
    clock, asked = [0.0], []

    def generate_steps(max_steps, *arguments, num_draft, most, **options):
        asked.append(int(max_steps))
        num_steps = min(int(max_steps), most)
        clock[0] += 7.0 + (2.0 if num_steps else 0.0) + 0.5 * num_steps
        return ss.Generation(0, 0, 0, ss.Stats.zeros(1, 2)._replace(num_steps=np.int32(num_steps)), ())

    monkeypatch.setattr(costs, "generate_steps", generate_steps)
    monkeypatch.setattr(costs.time, "perf_counter", lambda: clock[0])
    for most, seconds, beginning in ((99, 0.5, 2.0), (2, 0.5, 2.0), (1, 2.5, None)):
        found = costs._seconds_of_generate(3, None, None, RULE, {"most": most})
        assert found[:2] == (seconds, beginning)
        assert asked[-1] - asked[-2] == 3


def test_a_drafter_that_becomes_good_is_noticed():
    lengths, _ = after(RULE, lambda i, k: 0 if i < 200 else k, num_steps=1200)
    assert set(lengths[150:200]) <= {0, 1}
    assert lengths[-50:].count(2) == 50


def test_a_slightly_better_length_is_not_taken():
    # The true acceptance makes length 1 better than 2 by less than the hysteresis, then by more.
    for hysteresis, last in ((0.5, 2), (0.0, 1)):
        rule = ss.GoodputNumDraft((9.0, 1.0, 1.2), LENGTHS, hysteresis=hysteresis, prior=0.9, probe_share=0.0)
        assert after(rule, lambda i, k: 1 if i % 8 else 0)[0][-1] == last


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"costs": (1.0,)},
            r"costs must be one positive number for each of lengths, \(0, 1, 2\), in a tuple; got \(1.0,\)",
        ),
        ({"costs": (1.0, 0.0, 1.0)}, "one positive number"),
        ({"costs": (1.0, float("nan"), 1.0)}, "one positive number"),
        ({"lengths": (2, 1, 0)}, r"GoodputNumDraft.lengths must be ascending and at least 0; got \(2, 1, 0\)"),
        (
            {"prior": 1.5},
            "prior must be from 0 to 1, one number or one for each position, 2 in all; got 1.5",
        ),
        ({"prior": (0.5, 0.5, 0.5)}, r"2 in all; got \(0.5, 0.5, 0.5\)"),
        ({"memory": 0.5}, "GoodputNumDraft.memory must be from 1"),
        ({"steps_per_choice": 0}, "GoodputNumDraft.steps_per_choice must be"),
    ],
)
def test_wrong_settings_are_reported(options, message):
    with pytest.raises(ValueError, match=message):
        ss.GoodputNumDraft(**{"costs": (1.0, 1.0, 1.0), "lengths": LENGTHS} | options)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        *(
            ("costs", value, "costs must be one positive number for each")
            for value in (None, 5.0, ["a"] * 3, (1j,) * 3)
        ),
        ("costs", [1.0, 1.0, 1.0], "costs must be one positive number for each of lengths, (0, 1, 2), in a tuple; got"),
        *(("prior", value, "prior must be from 0 to 1, one number") for value in (None, "a", [0.5, 0.5])),
        ("memory", None, "memory must be from 1 to inf; got None."),
        ("hysteresis", [1], "hysteresis must be from 0 to 1; got [1]."),
        ("probe_share", True, "probe_share must be from 0 to 1; got True."),
    ],
)
def test_settings_of_a_wrong_type_are_reported(name, value, message):
    # Without the types that only tests check.
    rule = object.__new__(ss.GoodputNumDraft)
    vars(rule).update(vars(RULE) | {name: value})
    with pytest.raises(ValueError, match=re.escape("GoodputNumDraft." + message)):
        inspect.unwrap(ss.GoodputNumDraft.__post_init__)(rule)


def test_the_data_of_a_rule_are_not_bound_to_a_mesh():
    """Calls share them, so an array that was made with a mesh would move later calls to its devices."""
    rule = ss.GoodputNumDraft(RULE.costs, LENGTHS, prior=0.123)
    with jax.set_mesh(jax.make_mesh((1,), ("batch",))):
        assert all(isinstance(each, np.ndarray) for each in first_choice.measured(rule, 1, 9))
    traced = []
    jax.jit(lambda: traced.append(first_choice.measured(rule, 1, 9)))()
    assert all(isinstance(each, jax.Array) and not isinstance(each, jax.core.Tracer) for each in traced[0])
    assert first_choice.measured(rule, 1, 9) is traced[0]


@pytest.mark.parametrize("prior", [0.7, (0.7, 0.6)])
@pytest.mark.parametrize("lengths", [(0, 1, 2), (0, 2), (1, 2), (2,)])
@pytest.mark.parametrize("batch_size", [0, 1, 3])
def test_the_first_choice_is_finite(prior, lengths, batch_size):
    for options in ({}, {"hysteresis": 1.0, "probe_share": 0.0}, {"change_cost": 1e38, "steps_per_choice": 2**24}):
        rule = ss.GoodputNumDraft((1.0,) * len(lengths), lengths, prior=prior, **options)
        data = first_choice._on_host(rule, batch_size, 9)
        assert all(np.isfinite(each).all() and each.dtype == np.float32 for each in data)


def test_the_data_of_a_rule_move_under_a_guard():
    rule = ss.GoodputNumDraft(RULE.costs, LENGTHS, prior=0.321)
    with jax.transfer_guard("disallow"):
        jax.jit(lambda: first_choice.measured(rule, 1, 9).costs).lower()


def test_the_first_choice_of_a_symbolic_batch_is_that_of_one_row():
    (batch,) = jax.export.symbolic_shape("b")
    assert first_choice.measured(RULE, batch, 4) is first_choice.measured(RULE, 1, 4)


def test_no_type_is_promoted_implicitly():
    counts = jnp.ones(3, jnp.int32)

    def run():
        start = goodput.start(RULE, first_choice.measured(RULE, len(counts), 50), counts)[1]
        return start, goodput.settle(RULE, start, goodput.Rows(counts > 0, counts, counts))[1]

    with jax.numpy_dtype_promotion("strict"):
        before, after_step = jax.eval_shape(run)
    assert before == after_step


# The text


@functools.partial(jax.jit, static_argnums=0)
def step(rule, state, target, draft):
    sampling = ss.SamplingParams(0.0)
    return ss.step(jax.random.key(0), state, target=target, draft=draft, num_draft=rule, sampling=sampling)


def steps(rule, draft, num_steps, prompt=(PROMPT, [3, 0, 2, 1, 1])):
    """States and infos of some steps, the draft length chosen by the rule."""
    target = tables.model(TARGET)
    state = ss.init(np.array(prompt), target=target, draft=draft, num_draft=rule, max_new_tokens=80)
    items = []
    for _ in range(num_steps):
        before = state
        state, info = step(first_choice.without_data(rule), state, target, draft)
        items.append((before, state, info))
    return items


@pytest.mark.parametrize(
    "drafter",
    [
        ss.ModelDrafter,
        pytest.param(functools.partial(ss.ConfidenceDrafter, threshold=0.0), marks=pytest.mark.slow, id="confidence"),
    ],
)
def test_a_drafter_reads_the_tokens_of_steps_without_drafts(drafter):
    """A table model remembers the text: after a gap it drafts from a wrong row, and its draft is rejected."""
    rule = ss.GoodputNumDraft((1.0, 1.9, 99.0), LENGTHS, prior=0.1, probe_share=1.0)
    items = steps(rule, drafter(tables.model(TARGET)), 60)
    chosen = [int(before.num_draft.max()) for before, _, _ in items]
    assert chosen[:4] == [0] * 4, "the drafter was not run at first"
    assert 1 in chosen
    for before, after, info in items:
        assert (info.num_accepted == info.num_drafted).all()
        if before.num_draft.max() > 0:
            # All but the last two tokens are in the cache: here a window of 32 covers every gap.
            for cache, text, length in zip(after.draft_state, after.tokens, after.lengths, strict=True):
                np.testing.assert_array_equal(cache[: length - 2], text[: length - 2])


def test_prompts_that_were_not_read_at_first_are_read_before_drafts():
    """The first step drafts nothing, so the drafter starts without the prompts: 70 tokens, three windows of 32."""
    prompt = np.random.default_rng(0).integers(0, tables.VOCAB, (2, 70))
    rule = ss.GoodputNumDraft((1.0, 1.2), (0, 1), prior=0.1, probe_share=1.0)
    items = steps(rule, tables.model(TARGET), 20, prompt)
    assert (items[0][0].draft_state < 0).all(), "an empty cache"
    choices = [int(after.num_draft_state.choice.max()) for _, after, _ in items]
    last = items[choices.index(1) + 1][1]
    for cache, text, length in zip(last.draft_state, last.tokens, last.lengths, strict=True):
        np.testing.assert_array_equal(cache[: length - 2], text[: length - 2])


def test_a_probe_that_too_few_tokens_follow_is_not_made():
    rule = ss.GoodputNumDraft((1.0, 1.5, 9.0), LENGTHS, probe_share=0.05, prior=(0.0, 0.0))
    # Its loss is a step without drafts, so a probe is due after 20 steps, if 40 tokens follow.
    for max_new_tokens, probe_at in ((59, probes.NEVER), (60, 25)):
        _, state = goodput.start(rule, first_choice.measured(rule, 1, max_new_tokens), jnp.array([5]))
        assert state.probe_at.tolist() == [probe_at]


def test_steps_without_drafts_end_where_the_first_unfinished_row_probes():
    row = functools.partial(jnp.full, (3,))
    rule = ss.GoodputNumDraft((1.0, 9.0, 9.0), LENGTHS)
    _, state = goodput.start(rule, first_choice.measured(rule, 3, 1000), row(5))
    state = state._replace(probe_at=jnp.array([20, 9, 12]))
    lengths = jnp.array([15, 8, 8])

    def num_steps(rule, unfinished, lengths=lengths):
        rows = goodput.Rows(jnp.array(unfinished), lengths, row(900))
        arguments = rule.probe_share, state, rows
        return int(goodput_state.num_steps_to_probe(*arguments)), bool(goodput_state.probe_is_due(*arguments))

    for unfinished, expected in [([True] * 3, 1), ([True, False, True], 4), ([True, False, False], 5)]:
        assert num_steps(rule, unfinished) == (expected, False)
        assert num_steps(rule, unfinished, lengths + expected)[1]
    assert num_steps(rule, [True] * 3, lengths + 100) == (1, True)
    assert num_steps(dataclasses.replace(rule, probe_share=0.0), [True] * 3)[0] == probes.NEVER
    assert num_steps(rule, [False] * 3)[0] == probes.NEVER


def test_finished_rows_take_no_part():
    # With the program of the test of gaps.
    rule = dataclasses.replace(RULE, prior=0.9, probe_share=1.0)
    items = steps(rule, ss.ModelDrafter(tables.model(TARGET)), 45)
    _, last, _ = items[-1]
    assert last.finished.all()
    for before, after, _ in items:
        if before.finished.all():
            observed = (goodput._with_observations(rule, each.num_draft_state) for each in (before, after))
            assert len({tuple(each.tried.ravel().tolist()) for each in observed}) == 1


@pytest.mark.parametrize(
    ("prior", "fewest_changes"),
    [
        # The drafter is probed, and misses tokens in between.
        (0.1, 4),
        # A probe is due long before the next choice, which the text does not reach.
        (0.9, 0),
    ],
)
def test_generate_takes_the_steps_of_step(prior, fewest_changes):
    """`generate` runs stretches of steps."""
    rule = ss.GoodputNumDraft(RULE.costs, LENGTHS, prior=prior, memory=5.0, probe_share=1.0, steps_per_choice=100)
    draft = tables.model(DRAFT)
    items = steps(rule, draft, 90)
    num_steps = sum(not before.finished.all() for before, _, _ in items)
    chosen = [int(before.num_draft.max()) for before, _, _ in items[:num_steps]]
    assert np.count_nonzero(np.diff(chosen)) >= fewest_changes
    text = ss.generate(
        jax.random.key(0),
        np.array([PROMPT, [3, 0, 2, 1, 1]]),
        target=tables.model(TARGET),
        draft=draft,
        num_draft=rule,
        max_new_tokens=80,
        sampling=ss.SamplingParams(0.0),
    )
    assert text.stats.num_steps == num_steps
    for name in ("num_drafted", "num_accepted"):
        counts = np.concatenate([getattr(info, name) for _, _, info in items])
        expected = [np.count_nonzero(counts > position) for position in range(2)]
        assert getattr(text.stats, name).tolist() == expected
    np.testing.assert_array_equal(text.tokens, items[-1][1].tokens[:, : text.tokens.shape[1]])


def while_loops(jaxpr):
    """The loops of a program, in the order of their equations, the outer before the inner."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "while":
            yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from while_loops(inner)


def test_steps_of_a_stretch_compute_what_steps_of_a_fixed_length_do():
    """On a GPU each operation more would be a small kernel per step."""

    def loops(num_draft, draft):
        options = {"target": tables.model(TARGET), "draft": draft, "num_draft": num_draft, "max_new_tokens": 20}
        program = jax.make_jaxpr(lambda key: ss.generate(key, np.array([PROMPT, PROMPT]), **options))
        return list(while_loops(program(jax.random.key(0)).jaxpr))

    def arrays(loop):
        return sorted(each.aval.str_short() for each in loop.outvars)

    rule = ss.GoodputNumDraft((1.0, 1.2, 1.4), LENGTHS)
    for draft in (tables.model(DRAFT), ss.NGramDrafter()):
        changed = [arrays(each) for each in loops(rule, draft)]
        assert changed.count(arrays(loops(2, draft)[0])) >= 2, "loops of one and two drafts change no state of the rule"


def test_costs_are_data_and_are_positive():
    counted, traces = tables.counted()
    models = {
        "target": ss.Model(jnp.asarray(TARGET), counted, tables.init_cache_fn),
        "draft": tables.model(DRAFT),
    }
    prompt = np.array([PROMPT])
    measured = ss.measure_goodput(prompt, **models, lengths=(0, 2), max_new_tokens=6)
    assert len(measured.costs) == 2
    assert min(measured.costs) > 0
    num_traces = len(traces)
    for rule in (measured, ss.GoodputNumDraft((1.0, 2.0), (0, 2), prior=(0.1, 0.2))):
        last = ss.generate(jax.random.key(0), prompt, **models, num_draft=rule, max_new_tokens=6)
        assert (last.lengths == 11).all()
    assert len(traces) == num_traces, "generate runs the program that was measured, whatever the costs"


def test_the_acceptance_is_measured_on_whole_texts_of_so_many_steps():
    models = {"target": tables.model(TARGET), "draft": tables.model(TARGET)}
    options = models | {"max_new_tokens": 9, "prompt_lengths": None, "sampling": ss.SamplingParams(), "eos_token": None}
    options |= {"verify_fn": ss.verify, "process_logits_fn": None}
    for decode_fn in (ss.generate, ss.stream):
        counts = costs._texts(7, np.array([PROMPT]), costs.forced((0, 2), 1), options, decode_fn)
        # Two drafts of the target itself are accepted: nine tokens are three steps, and one step is left of seven.
        assert [(length, int(stats.num_steps)) for length, stats in counts] == [(2, 3), (2, 3), (2, 1)]
        assert costs._acceptance(counts, 2) == pytest.approx((7.25 / 7.5,) * 2)


def test_a_drafter_of_length_zero_costs_nothing():
    """With a choice of 0, neither the drafter nor its cache is touched."""
    calls = []

    def counted(table, tokens, positions, cache):
        jax.debug.callback(lambda: calls.append(0))
        return tables.apply_fn(table, tokens, positions, cache)

    draft = ss.Model(jnp.asarray(DRAFT), counted, tables.init_cache_fn)
    items = steps(ss.GoodputNumDraft((1.0, 9.0), (0, 2), probe_share=0.0), draft, 12)
    jax.effects_barrier()
    assert not calls, "not even the prompts"
    assert all((info.num_tokens == 1).all() for _, _, info in items)
