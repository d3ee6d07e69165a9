"""Rows are independent of each other; results are equal under all transformations and dtypes.

Kernels are traced where they depend on what is tested: kinds of keys, maps and loops, types.
"""

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from inputs import quick_jit

import specsamp_jax as ss

# Where filters are data, some row has one: only the program with filters runs.
pytestmark = pytest.mark.both_programs(False)

B, K = 8, 3

step = jax.jit(ss.verify)
sample = jax.jit(ss.sample)
quick_step, quick_sample = quick_jit(ss.verify), quick_jit(ss.sample)


def arrays(num_rows=B):
    """Sampling parameters of rows with all, some and no filters, and of a greedy row."""
    rows = [[0.7, 50, 0.9, 0.02], [1, 0, 1, 0], [0, 0, 1, 0], [1.3, 0, 0.8, 0], [1, 3, 1, 0], [0.4, 0, 1, 0.1]] * 2
    columns = zip(*rows[:num_rows], strict=True)
    return ss.SamplingParams(*(np.array(c, t) for c, t in zip(columns, "fiff", strict=True)))


def random_batch(vocab_size, dtype="float32"):
    """Keys, target and draft of B rows; one row has a NaN, one an empty residual, one normalizers too large to use."""
    rng = np.random.default_rng(vocab_size)
    target = rng.normal(size=(B, K + 1, vocab_size)) * 2
    logits = target[:, :K] + rng.normal(size=(B, K, vocab_size)) * 0.5
    tokens = np.where(rng.random((B, K)) < 0.7, target[:, :K].argmax(-1), rng.integers(vocab_size, size=(B, K)))
    tokens[4, 1:] = -1
    normalizers = np.logaddexp.reduce(logits, axis=-1)
    target[5, 0, 17] = np.nan
    logits[6] = target[6, :K]
    normalizers[6] -= 5
    logits[7] += 200
    normalizers[7] += 200
    draft = ss.Draft(tokens.astype("i4"), logits.astype(dtype), None, normalizers.astype("f"))
    return jax.random.split(jax.random.key(vocab_size), B), target.astype(dtype), draft


def take(rows, tree):
    return jax.tree.map(lambda array: array[np.array(rows)], tree)


def as_numpy(tree):
    return jax.tree.map(np.asarray, tree)


def pad(columns, target, draft):
    """The rows with `columns` more draft positions, all padding, with arbitrary logits."""

    def more(array, value):
        return np.pad(array, ((0, 0), (0, columns)) + ((0, 0),) * (array.ndim - 2), constant_values=value)

    normalizers = None if draft.log_normalizers is None else more(draft.log_normalizers, 3)
    return more(target, 5), draft._replace(
        tokens=more(draft.tokens, -1), logits=more(draft.logits, 7), log_normalizers=normalizers
    )


def assert_same_bits(result, expected, num_columns):
    for name in ("num_accepted", "status"):
        assert np.array_equal(getattr(result, name), getattr(expected, name))
    for name, width in (("tokens", num_columns + 1), ("log_probs", num_columns + 1), ("accept_prob", num_columns)):
        ours, theirs = (np.asarray(getattr(r, name))[:, :width] for r in (result, expected))
        assert ours.tobytes() == theirs.tobytes(), name
    assert np.all(result.tokens[:, num_columns + 1 :] == -1)
    assert not np.any(result.log_probs[:, num_columns + 1 :])
    assert not np.any(result.accept_prob[:, num_columns:])


# XLA sums arrays of few elements in another order; 151,936 is the vocabulary of Qwen.
@pytest.mark.parametrize(
    ("vocab_size", "dtype", "filtered", "rows", "columns"),
    [
        (29, "bfloat16", False, [5, 0, 7], 2),
        (151_936, "float32", True, [0], 0),
        pytest.param(1000, "float32", True, [3], 0, marks=pytest.mark.slow),
        pytest.param(5000, "float32", False, [1], 2, marks=pytest.mark.slow),
        pytest.param(151_936, "bfloat16", False, [0], 0, marks=pytest.mark.slow),
    ],
)
def test_the_same_row_gives_the_same_bits_anywhere(vocab_size, dtype, filtered, rows, columns):
    """At another index, with other neighbours or none, and with more padding columns."""
    keys, target, draft = random_batch(vocab_size, dtype)
    sampling = arrays() if filtered else None
    if filtered:
        draft = draft._replace(sampling=sampling, log_normalizers=None)
    expected = as_numpy(step(keys, target, draft, sampling))
    # A single NaN sets the status in a row of any length, with and without filters.
    assert (expected.status & ss.DEGENERATE_TARGET).tolist() == [0, 0, 0, 0, 0, ss.DEGENERATE_TARGET, 0, 0]
    assert expected.tokens[5, 0] == np.nanargmax(target[5, 0].astype(float))
    backwards = list(range(B))[::-1]
    assert_same_bits(
        step(*take(backwards, (keys, target, draft)), take(backwards, sampling)), take(backwards, expected), K
    )
    padded = pad(columns, *take(rows, (target, draft)))
    assert_same_bits(step(keys[np.array(rows)], *padded, take(rows, sampling)), take(rows, expected), K)


def test_the_same_row_samples_the_same_bits_anywhere():
    keys, target, _ = random_batch(1000)
    logits = target[:, 1]
    expected = as_numpy(sample(keys, logits, arrays()))
    result = sample(keys[np.array([3])], logits[np.array([3])], take([3], arrays()))
    for ours, theirs in zip(result, take([3], expected), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_rows_do_not_influence_each_other():
    keys, target, draft = random_batch(29)
    draft = draft._replace(sampling=arrays(), log_normalizers=None)
    expected = as_numpy(quick_step(keys, target, draft, arrays()))
    mine, others = [1, 3, 5, 7], [0, 2, 4, 6]
    for values in (np.nan, np.inf, -np.inf, 1e30):
        target, logits, tokens = target.copy(), draft.logits.copy(), draft.tokens.copy()
        target[others], logits[others], tokens[others] = values, values, 28
        other_keys = keys.at[np.array(others)].set(jax.random.key(9))
        result = quick_step(other_keys, target, draft._replace(logits=logits, tokens=tokens), arrays())
        assert_same_bits(take(mine, as_numpy(result)), take(mine, expected), K)


def test_a_row_of_padding_equals_a_row_with_k_of_zero():
    keys, target, draft = random_batch(29)
    nothing = draft._replace(tokens=-np.ones_like(draft.tokens), sampling=arrays(), log_normalizers=None)
    without_room = quick_step(keys, target[:, :1], ss.Draft(draft.tokens[:, :0]), arrays())
    assert without_room.tokens.shape == (B, 1)
    assert without_room.accept_prob.shape == (B, 0)
    assert not np.any(without_room.num_accepted)
    assert_same_bits(quick_step(keys, target, nothing, arrays()), without_room, 0)
    # K = 0 with draft logits of shape [B, 0, V].
    empty = ss.Draft(draft.tokens[:, :0], draft.logits[:, :0], arrays(), draft.log_normalizers[:, :0])
    assert_same_bits(quick_step(keys, target[:, :1], empty, arrays()), without_room, 0)


def test_one_key_is_the_same_as_that_key_folded_with_each_row():
    _, target, draft = random_batch(29)
    draft = draft._replace(log_normalizers=None)
    key = jax.random.key(3)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(B))
    assert_same_bits(quick_step(key, target, draft, None), quick_step(keys, target, draft, None), K)


@pytest.mark.both_programs
@pytest.mark.kernels
def test_a_scan_of_vmap_is_a_loop():
    keys, target, draft = random_batch(29)
    draft = draft._replace(sampling=arrays(), log_normalizers=None)
    cases = jax.tree.map(lambda a: a.reshape(2, 2, B // 4, *a.shape[1:]), (keys, target, draft, arrays()))

    @quick_jit
    def scan_of_vmap(cases):
        return jax.lax.scan(lambda carry, case: (carry, jax.vmap(ss.verify)(*case)), 0, cases)[1]

    result = jax.tree.map(lambda a: np.asarray(a).reshape(B, *a.shape[3:]), scan_of_vmap(cases))
    # Rows are independent: a loop over the cases gives what all rows at once do.
    with programs.without_kernels():
        expected = as_numpy(quick_step(keys, target, draft, arrays()))
    assert_same_bits(result, expected, K)


def test_bfloat16_logits_are_what_they_are_in_float32():
    keys, target, draft = random_batch(29, "bfloat16")
    draft = draft._replace(sampling=arrays(), log_normalizers=None)
    narrow = quick_step(keys, target, draft, arrays())
    wide = quick_step(keys, target.astype("float32"), draft._replace(logits=draft.logits.astype("float32")), arrays())
    assert np.array_equal(narrow.tokens, wide.tokens)
    assert narrow.log_probs.dtype == narrow.accept_prob.dtype == jnp.float32
    np.testing.assert_allclose(narrow.log_probs, wide.log_probs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "dtype",
    [
        "float8_e4m3fn",
        *(
            pytest.param(dtype, marks=pytest.mark.slow)
            for dtype in ("float8_e5m2", "float8_e4m3b11fnuz", "float8_e4m3fnuz", "float8_e5m2fnuz")
        ),
    ],
)
def test_float8_logits_are_what_they_are_in_bfloat16(dtype):
    keys, target, draft = random_batch(29)
    narrow = [jnp.asarray(np.nan_to_num(z), dtype) for z in (target, draft.logits / 8)]
    wide = [z.astype("bfloat16") for z in narrow]
    results = [quick_step(keys, z_p, ss.Draft(draft.tokens, z_q, arrays()), arrays()) for z_p, z_q in (narrow, wide)]
    assert_same_bits(*results, K)
    assert results[0].log_probs.dtype == jnp.float32
    assert len(set(results[0].num_accepted.tolist())) > 1
    sampled, expected = (quick_sample(keys, z[:, 0], arrays()) for z in (narrow[0], wide[0]))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), sampled, expected))
    for fn in (ss.residual_logits, ss.acceptance_rate):
        assert jnp.array_equal(fn(narrow[0][:, :K], narrow[1]), fn(wide[0][:, :K], wide[1]))


@pytest.mark.kernels
@pytest.mark.parametrize(
    "impl",
    # tests/sampling/test_streams.py has all kinds on each push.
    ["rbg", *(pytest.param(impl, marks=pytest.mark.slow) for impl in ("raw", "unsafe_rbg", "raw rbg"))],
)
def test_keys_of_every_kind_leave_rows_alone(impl):
    """With one key per row, a row gives the same result at another index and in another batch."""
    _, target, draft = random_batch(29)
    draft = draft._replace(log_normalizers=None)
    keys = jax.random.split(jax.random.key(1, impl={"raw": "threefry2x32", "raw rbg": "rbg"}.get(impl, impl)), B)
    if impl.startswith("raw"):
        keys = jax.random.key_data(keys)
    expected = as_numpy(quick_step(keys, target, draft))
    # In one shape; the tests above have batches of other sizes.
    some = np.array([6, 1, 3, 3, 7, 0, 2, 4])
    result = quick_step(keys[some], *take(some, (target, draft)))
    assert_same_bits(result, take(some, expected), K)
    one = quick_step(keys[0], target, draft)
    others = np.array([0, 1, 5, 5, 5, 5, 5, 5])
    result = quick_step(keys[0], *take(others, (target, draft)))
    assert_same_bits(take([0, 1], as_numpy(result)), take([0, 1], as_numpy(one)), K)
    tokens = quick_sample(keys, target[:, 1])[0]
    assert np.array_equal(quick_sample(keys[some], target[some, 1])[0], tokens[some])


@pytest.mark.parametrize("rule", [ss.verify, ss.verify_sigmoid])
def test_drafted_ids_beyond_int32_are_outside_the_vocabulary(rule):
    keys, target, draft = random_batch(29)
    draft = draft._replace(log_normalizers=None)
    wide = draft.tokens.astype(np.int64)
    wide[0, 0], wide[1, 1], wide[2, 2], wide[3, 0] = 2**32 + 1, 2**33, 2**62, -(2**32) + 1
    narrow = draft.tokens.copy()
    narrow[0, 0], narrow[1, 1], narrow[2, 2], narrow[3, 0] = 29, 29, 29, -1
    # Constants of a program: as arguments of one they would be int32 already.
    results = [
        as_numpy(quick_jit(lambda keys, ids=ids: rule(keys, jnp.asarray(target), draft._replace(tokens=ids)))(keys))
        for ids in (wide, narrow)
    ]
    assert_same_bits(*results, K)
    assert results[0].accept_prob[0, 0] == 0


@pytest.mark.kernels
def test_float64_is_verified_in_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        target = jnp.asarray(rng.normal(size=(B, K + 1, 29)))
        draft = ss.Draft(jnp.asarray(rng.integers(29, size=(B, K))), jnp.asarray(rng.normal(size=(B, K, 29))))
        assert target.dtype == jnp.float64
        result = quick_step(jax.random.key(0), target, draft, None)
        assert result.log_probs.dtype == result.accept_prob.dtype == jnp.float64
        log_p, log_q = (np.asarray(jax.nn.log_softmax(z)) for z in (target, draft.logits))
        b, i = np.ogrid[:B, :K]
        ratio = np.exp(log_p[b, i, draft.tokens] - log_q[b, i, draft.tokens])
        np.testing.assert_allclose(result.accept_prob, np.minimum(ratio, 1), rtol=1e-12)
        first = np.asarray(result.tokens[:, 0])
        np.testing.assert_allclose(result.log_probs[:, 0], log_p[range(B), 0, first], rtol=1e-12)
        token, log_normalizers = quick_sample(jax.random.key(0), target[:, 0], None)
        assert log_normalizers.dtype == jnp.float64
        np.testing.assert_allclose(log_normalizers, jax.nn.logsumexp(target[:, 0], axis=-1), rtol=1e-12)
        assert np.all((token >= 0) & (token < 29))


@pytest.mark.parametrize(
    "mode",
    [
        lambda: jax.enable_x64(True),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.numpy_rank_promotion("raise"),
    ],
)
def test_types_are_the_same_with_64_bits_and_without_implicit_promotions(mode):
    keys, target, draft = random_batch(29)
    params = jax.tree.map(jnp.asarray, arrays())

    def run(keys, target, draft, params):
        one_hot, logits, rule = ss.Draft(draft.tokens), target[:, 0], ss.CalibratedRule()
        greedy = ss.SamplingParams(params.temperature)
        results = [fn(keys, target, draft, greedy) for fn in (ss.verify_block, ss.verify_sigmoid, ss.verify_coupled)]
        results += [rule(keys, target, draft, None, rule.init(B)), ss.verify(keys, target, one_hot, params)]
        return results, ss.sample(keys, logits, params), ss.sample_coupled(keys, logits)

    inputs = jax.tree.map(jnp.asarray, (keys, target, draft, params))
    expected = jax.eval_shape(run, *inputs)
    with mode():
        assert jax.eval_shape(run, *inputs) == expected


@pytest.mark.kernels
def test_int8_draft_tokens_do_not_limit_the_emitted_tokens():
    keys, target, draft = random_batch(1000)
    result = quick_step(keys, target, ss.Draft(np.minimum(draft.tokens, 100).astype("int8"), draft.logits), None)
    assert np.all((result.tokens >= -1) & (result.tokens < 1000))
    assert result.tokens.max() > 127


def with_numbers(params):
    """The step with these sampling parameters for target and draft, as constants of the compiled program."""
    return quick_jit(lambda keys, target, draft: ss.verify(keys, target, draft._replace(sampling=params), params))


@pytest.mark.parametrize("setting", [(0.7, 5, 0.9, 0.02), (0.0, 0, 1.0, 0.0)])
def test_parameters_as_numbers_and_as_rows_are_the_same(setting):
    keys, target, draft = random_batch(29)
    draft = draft._replace(log_normalizers=None)

    def with_sampling(params):
        return quick_step(keys, target, draft._replace(sampling=params), params)

    rows = with_sampling(ss.SamplingParams(*(np.full(B, x, t) for x, t in zip(setting, "fiff", strict=True))))
    numbers = with_numbers(ss.SamplingParams(*setting))(keys, target, draft)
    assert np.array_equal(numbers.tokens, rows.tokens)
    assert np.array_equal(numbers.status, rows.status)
    np.testing.assert_allclose(numbers.log_probs, rows.log_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.both_programs
def test_parameters_of_none_equal_parameters_that_are_off():
    keys, target, draft = random_batch(29)
    draft = draft._replace(log_normalizers=None)
    off = ss.SamplingParams(*(np.full(B, x, t) for x, t in zip((1, 0, 1, 0), "fiff", strict=True)))
    plain = quick_step(keys, target, draft, None)
    numbers = with_numbers(ss.SamplingParams())(keys, target, draft)
    rows = quick_step(keys, target, draft._replace(sampling=off), off)
    assert_same_bits(numbers, plain, K)
    assert np.array_equal(rows.tokens, plain.tokens)
    np.testing.assert_allclose(rows.log_probs, plain.log_probs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", [ss.verify, ss.verify_block, ss.verify_coupled, ss.verify_sigmoid])
def test_rows_with_masked_logits_and_padding_make_no_nan(rule):
    """`jax_debug_nans` looks at each operation of a call without `jit`."""
    target = np.random.default_rng(0).normal(size=(2, 3, 8)).astype("f")
    target[..., 0] = -np.inf
    draft = ss.Draft(jnp.array([[1, 2], [0, -1]]), jnp.asarray(target[:, :2] * 2))
    filters = ss.SamplingParams(top_k=np.array([0, 3]), min_p=0.1)
    with jax.debug_nans(True):
        for sampling in (None, filters, ss.SamplingParams(temperature=0.0)):
            result = rule(jax.random.key(0), jnp.asarray(target), draft, sampling)
            assert (result.tokens != 0).all()
