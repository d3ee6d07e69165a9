"""The decoding loop on models that are tables: bookkeeping, ends, rows, statistics, traces."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import tables

import specsamp_jax as ss

pytestmark = pytest.mark.optimised(False)

TARGET, DRAFT = tables.model(tables.table(0)), tables.model(tables.table(1))
PROMPT = np.array([[1, 2, 3], [2, 0, 0], [3, 1, 0]])
PROMPT_LENGTHS = np.array([3, 1, 2])
DRAFTERS = {"model": DRAFT, "ngram": ss.NGramDrafter(), "none": None}
# Most tests have these options and these shapes, so that they run one program.
OPTIONS = {"target": TARGET, "draft": DRAFT, "num_draft": 3, "max_new_tokens": 12}


def generate(key, prompt, **options):
    """The result as NumPy arrays: each slice of a JAX array would be a program."""
    return jax.device_get(ss.generate(key, prompt, **OPTIONS | {"prompt_lengths": PROMPT_LENGTHS} | options))


advance = jax.jit(functools.partial(ss.step, target=TARGET, draft=DRAFT, num_draft=3))


@jax.jit
def _start(prompt, prompt_lengths):
    options = {"num_draft": 3, "max_new_tokens": 12, "prompt_lengths": prompt_lengths}
    return ss.init(prompt, target=TARGET, draft=DRAFT, **options)


def start():
    return _start(PROMPT, PROMPT_LENGTHS)


def keys(num=3, seed=0):
    return jax.random.split(jax.random.key(seed), num)


def greedy_text(prompt, num_new):
    text = list(prompt)
    for _ in range(num_new):
        text.append(int(np.argmax(tables.logits_after(tables.table(0), text))))
    return text


@pytest.mark.parametrize(
    ("name", "num_draft"),
    [
        ("model", 3),
        ("ngram", 3),
        ("none", 3),
        pytest.param("model", 0, marks=pytest.mark.slow),
        pytest.param("model", ss.HeuristicNumDraft(2, lengths=(1, 3)), marks=pytest.mark.slow),
    ],
)
def test_greedy_text_is_the_targets_own(name, num_draft):
    sampling = ss.SamplingParams(temperature=0.0)
    result = generate(jax.random.key(0), PROMPT, sampling=sampling, draft=DRAFTERS[name], num_draft=num_draft)
    for row, length in enumerate(PROMPT_LENGTHS):
        expected = greedy_text(PROMPT[row, :length], 12)
        assert result.tokens[row, : length + 12].tolist() == expected
        assert (result.tokens[row, length + 12 :] == ss.PAD_TOKEN).all()
    assert (result.lengths == PROMPT_LENGTHS + 12).all()
    assert (result.log_probs == 0).all()


def test_log_probs_are_the_targets_and_one_trace_serves_other_numbers():
    counted, traces = tables.counted()
    for temperature, top_k, scale, eos_token in ((0.7, 3, 1, None), (0.4, 2, 2, 1)):
        target = ss.Model(TARGET.params * scale, counted, tables.init_cache_fn)
        sampling = ss.SamplingParams(temperature, top_k)
        result = generate(jax.random.key(1), PROMPT, target=target, sampling=sampling, eos_token=eos_token)
        for row, (start, end) in enumerate(zip(PROMPT_LENGTHS, result.lengths, strict=True)):
            text = result.tokens[row].tolist()
            for i in range(start, end):
                logits = scale * tables.logits_after(tables.table(0), text[:i]).astype(np.float64) / temperature
                logits[np.argsort(logits)[: tables.VOCAB - top_k]] = -np.inf
                expected = logits[text[i]] - np.log(np.exp(logits).sum())
                np.testing.assert_allclose(result.log_probs[row, i], expected, rtol=1e-5, atol=1e-6)
            outside = np.r_[result.log_probs[row, :start], result.log_probs[row, end:]]
            assert (outside == 0).all()
        if scale == 1:
            num_traces = len(traces)
    assert len(traces) == num_traces


@pytest.mark.parametrize("eos_token", [2, [2, 3]])
def test_a_row_ends_with_its_first_end_token(eos_token):
    ends = np.atleast_1d(eos_token)
    cut_inside = False
    for seed in range(6):
        result = generate(keys(seed=seed), PROMPT, eos_token=eos_token)
        free = generate(keys(seed=seed), PROMPT)
        for row, start in enumerate(PROMPT_LENGTHS):
            new = free.tokens[row, start : start + 12]
            hits = np.flatnonzero(np.isin(new, ends))
            length = start + (hits[0] + 1 if len(hits) else 12)
            assert result.lengths[row] == length
            # Up to its end, a row equals the row of a run without end tokens.
            assert (result.tokens[row, :length] == free.tokens[row, :length]).all()
            assert (result.tokens[row, length:] == ss.PAD_TOKEN).all()
            assert (result.log_probs[row, length:] == 0).all()
            cut_inside |= bool(len(hits))
    assert cut_inside


@pytest.mark.parametrize("max_new_tokens", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_nothing_is_written_past_the_limit(max_new_tokens):
    options = {"draft": TARGET, "num_draft": 8, "max_new_tokens": max_new_tokens, "prompt_lengths": None}
    result = generate(keys(), PROMPT, **options)
    assert result.tokens.shape == result.log_probs.shape == (3, 3 + max_new_tokens)
    assert (result.lengths == 3 + max_new_tokens).all()
    assert (result.tokens >= 0).all()
    # The target drafting for itself is always accepted: one step does it.
    assert result.stats.num_steps == 1


@pytest.mark.parametrize(
    ("draft", "num_draft", "order"),
    [
        # Of equal size, the two batches run one program of two branches; of another size, two short ones.
        (DRAFT, ss.HeuristicNumDraft(2, lengths=(1, 3)), [2, 0, 0]),
        pytest.param(ss.NGramDrafter(), 3, [2, 0], marks=pytest.mark.optimised(True)),
    ],
)
def test_a_row_with_its_own_key_does_not_depend_on_its_neighbours(draft, num_draft, order):
    options = {"draft": draft, "num_draft": num_draft}
    together = generate(keys(), PROMPT, **options)
    order = np.array(order)
    others = generate(keys()[order], PROMPT[order], prompt_lengths=PROMPT_LENGTHS[order], **options)
    assert (together.tokens[order] == others.tokens).all()
    assert (together.log_probs[order] == others.log_probs).all()
    # Nor does it depend on the padding after its prompt.
    noise = np.where(np.arange(3) < PROMPT_LENGTHS[:, None], PROMPT, 3)
    again = generate(keys(), noise, **options)
    assert (together.tokens == again.tokens).all()


def test_statistics_count_what_happened():
    result = generate(jax.random.key(5), PROMPT)
    stats = result.stats
    assert (stats.num_emitted == result.lengths - PROMPT_LENGTHS).all()
    assert (stats.num_accepted <= stats.num_drafted).all()
    assert (np.diff(stats.num_accepted) <= 0).all()
    # A row takes at most 12 steps, and drafts at three positions in each, but not beyond its limit.
    assert 36 >= stats.num_drafted[0] >= stats.num_drafted[1] >= stats.num_drafted[2] > 0
    assert 12 / 4 <= stats.num_steps <= 12
    alone = generate(jax.random.key(5), PROMPT, draft=None)
    assert alone.stats.num_steps == 12
    assert alone.stats.num_drafted.shape == (0,)


def test_acceptance_by_position_is_that_of_the_steps():
    state = start()
    drafted, accepted = np.zeros(3, int), np.zeros(3, int)
    while not state.finished.all():
        state, info = advance(keys(), state)
        for num_drafted, num_accepted in zip(info.num_drafted, info.num_accepted, strict=True):
            drafted[:num_drafted] += 1
            accepted[:num_accepted] += 1
    stats = generate(keys(), PROMPT).stats
    assert stats.num_drafted.tolist() == drafted.tolist()
    assert stats.num_accepted.tolist() == accepted.tolist()


@pytest.mark.parametrize("draft", [DRAFT, pytest.param(None, marks=pytest.mark.slow)], ids=["model", "none"])
def test_stream_ends_with_the_result_of_generate(draft):
    options = {"draft": draft, "prompt_lengths": PROMPT_LENGTHS, "eos_token": 2}
    whole = generate(keys(), PROMPT, **options)
    stream = ss.stream(keys(), PROMPT, target=TARGET, num_draft=3, max_new_tokens=12, **options)
    before = PROMPT_LENGTHS
    for num_steps, item in enumerate(map(jax.device_get, stream), start=1):
        assert item.stats.num_steps == num_steps
        assert (item.lengths >= before).all()
        assert (item.lengths > before).any()
        for row, length in enumerate(item.lengths):
            assert (item.tokens[row, :length] == whole.tokens[row, :length]).all()
            assert (item.tokens[row, length:] == ss.PAD_TOKEN).all()
        before = item.lengths
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), item, whole))


def test_a_step_reports_the_new_tokens_of_each_row():
    state = start()
    gained = [[] for _ in PROMPT]
    for _ in range(12):
        state, info = advance(keys(), state)
        info = jax.device_get(info)
        for row, num in enumerate(info.num_tokens):
            assert (info.tokens[row, num:] == ss.PAD_TOKEN).all()
            gained[row] += info.tokens[row, :num].tolist()
    assert state.finished.all()
    tokens = np.asarray(state.tokens)
    for row, begin in enumerate(PROMPT_LENGTHS):
        assert tokens[row, begin : begin + 12].tolist() == gained[row]
    after, info = advance(keys(), state)
    assert (info.num_tokens == 0).all()
    assert (after.tokens == state.tokens).all()


def test_logits_are_processed_with_the_text_so_far():
    def never_twice(tokens, lengths, logits):
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)
        # Nothing may stand behind the text, or a rule could read what is not written yet.
        behind = jnp.where(jnp.arange(tokens.shape[1]) >= lengths[:, None], tokens, ss.PAD_TOKEN)
        broken = (behind != ss.PAD_TOKEN).any(1)[:, None]
        return jnp.where((jnp.arange(tables.VOCAB) == last) | broken, -jnp.inf, logits)

    # test_processors has n-grams, test_traces no drafter.
    options = {"process_logits_fn": never_twice}
    for draft in (DRAFT, TARGET):
        result = generate(keys(), PROMPT, draft=draft, **options)
        for row, start in enumerate(PROMPT_LENGTHS):
            text = np.asarray(result.tokens[row, : result.lengths[row]])
            assert (text[start:] != text[start - 1 : -1]).all()
            assert np.isfinite(result.log_probs[row]).all()
        if draft is TARGET:
            assert (result.stats.num_accepted == result.stats.num_drafted).all()


def test_a_step_moves_nothing_to_the_host():
    state = start()
    row_keys = keys()
    advance(row_keys, state)
    with jax.transfer_guard("disallow"):
        advance(row_keys, state)


@pytest.mark.kernels
def test_it_runs_inside_another_program():
    options = OPTIONS | {"draft": None, "max_new_tokens": 4}  # test_generate_law maps a step that drafts

    @jax.jit
    def outer(key, prompt):
        return jax.vmap(lambda k: ss.generate(k, prompt, **options).tokens)(jax.random.split(key, 2))

    with programs.without_kernels():
        inner = [ss.generate(k, PROMPT, **options).tokens for k in jax.random.split(jax.random.key(3), 2)]
    assert (outer(jax.random.key(3), PROMPT) == np.stack(inner)).all()


@pytest.mark.parametrize(
    ("draft", "num_draft"),
    [
        (DRAFT, ss.GoodputNumDraft((1.0, 1.1), (0, 1), prior=0.1)),
        pytest.param(ss.NGramDrafter(), ss.HeuristicNumDraft(2, lengths=(1, 3)), marks=pytest.mark.slow),
        pytest.param(ss.ConfidenceDrafter(DRAFT), 3, marks=pytest.mark.slow),
        pytest.param(None, 3, marks=pytest.mark.slow),
    ],
    ids=["goodput", "heuristic", "confidence", "none"],
)
def test_it_runs_under_shard_map_over_the_batch(draft, num_draft):
    """One device has the types of several, and the tokens of the whole batch."""
    mesh, batch = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,)), jax.sharding.PartitionSpec("x")
    options = {"draft": draft, "num_draft": num_draft, "max_new_tokens": 6}

    def on_a_device(keys, prompt, prompt_lengths):
        text = ss.generate(keys, prompt, **OPTIONS | options, prompt_lengths=prompt_lengths)
        return text.tokens, text.log_probs, text.stats.num_emitted

    mapped = jax.jit(jax.shard_map(on_a_device, mesh=mesh, in_specs=batch, out_specs=batch))
    got = mapped(keys(), jnp.asarray(PROMPT), jnp.asarray(PROMPT_LENGTHS))
    expected = generate(keys(), PROMPT, **options)
    for array, other in zip(got, (expected.tokens, expected.log_probs, expected.stats.num_emitted), strict=True):
        np.testing.assert_array_equal(array, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": np.array([1, 2])}, r"prompt must be token ids of shape \[B, P\].*got int32\[2\].*\[1, P\]"),
        ({"prompt": np.ones((2, 3), np.float32)}, r"prompt must be token ids.*got float32\[2, 3\]"),
        ({"prompt": np.zeros((2, 0), int)}, "at least one per row"),
        ({"prompt_lengths": np.array([0, 1, 2])}, r"prompt_lengths must be from 1 to P = 3; got \[0 1 2\]"),
        ({"prompt_lengths": np.array([1, 2])}, r"prompt_lengths must have shape \[B\] = \[3\]"),
        ({"target": tables.apply_fn}, "target must be a Model; got function.*adapters"),
        ({"draft": "small"}, "draft must be a Model, a drafter with `propose`, or None; got str"),
        ({"num_draft": -1}, "num_draft must be at least 0; got -1"),
        ({"num_draft": 2.0}, "num_draft must be a Python int, HeuristicNumDraft or GoodputNumDraft"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1; got 0"),
        ({"sampling": ss.SamplingParams(temperature=-1.0)}, "sampling.temperature must be in"),
        ({"key": 0}, "key must be a JAX key"),
    ],
)
@pytest.mark.parametrize("fn", [ss.generate, ss.stream])
def test_a_wrong_argument_raises_an_error(fn, change, message):
    arguments = {"key": jax.random.key(0), "prompt": PROMPT, "target": TARGET, "draft": DRAFT, "max_new_tokens": 4}
    arguments |= change
    key, prompt = arguments.pop("key"), arguments.pop("prompt")
    with pytest.raises(ValueError, match=message):
        list(inspect.unwrap(fn)(key, prompt, **arguments))
