"""Temperature, top-k, top-p and min-p, against the oracle's distributions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from inputs import OFF, as_arrays, quick_jit

import specsamp_jax as ss
from specsamp_jax.sampling import cutoff
from specsamp_jax.sampling import rows as dist
from specsamp_jax.sampling.filters import make_filter

LOWEST = float(np.finfo(np.float32).min)
HIGHEST = float(np.finfo(np.float32).max)
B, V = 160, 23


def probs(logits, sampling):
    """The library's filtered distribution of one row per sequence."""
    logits = logits[:, None]
    return dist.probs(dist.target_rows(logits, make_filter(logits, sampling)), logits.shape[-1])


jit_probs = jax.jit(probs)
# The fully optimised program is tested too.
quick_probs = quick_jit(probs)


def probs_of(rows, settings, dtype=jnp.float32):
    """One row a setting, filled with -inf to one shape for all tests: it is compiled once."""
    rows = np.asarray(rows)
    logits = np.full((B, V), -np.inf)
    logits[: len(rows), : rows.shape[1]] = rows
    result = jit_probs(jnp.asarray(logits, dtype), as_arrays([*settings, *[OFF] * (B - len(rows))]))
    assert not np.any(result[: len(rows), rows.shape[1] :])
    return np.asarray(result[: len(rows), : rows.shape[1]])


def possible(logits, setting):
    """The oracle's distributions for this setting and for settings that float32 cannot distinguish from it."""
    for share in (1, 1 - 2e-6, 1 + 2e-6):
        top_p, min_p = ({**OFF, **setting}[name] for name in ("top_p", "min_p"))
        # 1 and 0 switch a filter off, and off is exact.
        near = {"top_p": top_p if top_p in (0, 1) else min(top_p * share, 1), "min_p": min(min_p * share, 1)}
        yield oracle.distribution(logits, **{**setting, **near})


def assert_probs(result, logits, setting, rtol=2e-5):
    """Asserts the oracle's probabilities, and exactly 0 for tokens that are filtered out."""
    result = np.asarray(result, np.float64)
    for expected in possible(np.asarray(logits, np.float64), setting):
        # Below 1e-35 float32 rounds to zero: that, and nothing else, may be lost.
        if np.all((result > 0) <= (expected > 0)) and np.allclose(result, expected, rtol=rtol, atol=1e-35):
            return
    pytest.fail(f"{setting} of {logits} gave {result}, not {oracle.distribution(logits, **setting)}")


def logits_of_every_kind():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=V) * 3
    some_masked = np.where(rng.random(V) < 0.5, -np.inf, normal)
    one_left = np.where(np.arange(V) == 7, normal, -np.inf)
    huge = normal.copy()
    huge[[3, 9]] = 1e30, -1e30
    return {
        "normal": normal,
        "ties": np.round(normal),
        "all equal": np.full(V, -1.5),
        "all zero": np.zeros(V),
        "both zeros": np.where(np.arange(V) % 2, -0.0, 0.0),
        "masked with -inf": some_masked,
        "masked with the lowest number": np.where(np.isinf(some_masked), LOWEST, normal),
        "masked with -1e9": np.where(np.isinf(some_masked), -1e9, normal),
        "one left": one_left,
        "negative and far": normal - 1e4,
        "positive and far": normal + 1e4,
        "spread": normal * 1e3,
        "huge": huge,
        "from end to end": np.where(np.arange(V) == 5, HIGHEST, np.where(np.arange(V) == 6, LOWEST, normal)),
        "neighbours": np.nextafter(np.float32(1), np.float32(2) * (np.arange(V) % 3 - 1), dtype=np.float32),
        "nearly equal": normal * 1e-5,
    }


KINDS = {name: row.astype(np.float32) for name, row in logits_of_every_kind().items()}
SETTINGS = [
    dict(zip(OFF, values, strict=True))
    for values in itertools.product((1.0, 0.6, 2.0), (0, 1, 4, V, V + 5), (1.0, 0.8, 0.0), (0.0, 0.1, 1.0))
] + [
    {**OFF, "temperature": 0.0},
    {**OFF, "temperature": 0.0, "top_k": 3, "top_p": 0.5, "min_p": 0.5},
    {**OFF, "temperature": 1e-6},
    {**OFF, "temperature": 1e-30},
    {**OFF, "temperature": 1e30},
    {**OFF, "temperature": 1e4, "top_p": 0.9, "min_p": 0.5},
    {**OFF, "top_p": 1e-6},
    {**OFF, "top_p": 0.999999},
    {**OFF, "min_p": 1e-6},
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_combination_agrees_with_the_oracle(kind):
    row = KINDS[kind]
    results = probs_of(np.tile(row, (len(SETTINGS), 1)), SETTINGS)
    for result, setting in zip(results, SETTINGS, strict=True):
        assert_probs(result, row, setting)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_narrow_logits_are_full_of_ties_and_neighbours(dtype):
    # Every start of a run of neighbours, so that the largest of them is now even, now odd.
    rows = []
    for start in (1.0, 1.5, -1.0, -3.0, 2.0, 40.0, -0.001):
        run = [np.asarray(start, dtype)]
        for _ in range(8):
            run.append(np.nextafter(run[-1], np.asarray(np.inf, dtype)))
        rows += [[*run[i : i + 5], run[i + 4], run[i + 4], run[i]] for i in range(4)]
    settings = [{**OFF, "top_k": 1}, {**OFF, "top_k": 4}, {**OFF, "top_p": 0.3}, {**OFF, "temperature": 0.001}]
    rows, settings = np.array(rows * len(settings), np.float64), [s for s in settings for _ in rows]
    for result, row, setting in zip(probs_of(rows, settings, dtype), rows, settings, strict=True):
        assert_probs(result, row, setting)


def test_ties_at_the_cutoff_are_kept_together():
    row = np.log([0.1, 0.2, 0.2, 0.2, 0.3])
    settings = [{**OFF, "top_k": 2}, {**OFF, "top_p": 0.31}, {**OFF, "min_p": 0.5}]
    results = probs_of([row] * 3, settings)
    assert (results > 0).tolist() == [[False, True, True, True, True]] * 3
    np.testing.assert_allclose(results[:, 1:], [[2 / 9, 2 / 9, 2 / 9, 3 / 9]] * 3, rtol=1e-6)


@pytest.mark.parametrize("name", ["top_p", "min_p"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_each_token_is_kept_from_its_own_threshold_on(name, temperature):
    row = KINDS["normal"]
    p = np.sort(oracle.distribution(row.astype(float), temperature))[::-1]
    # Those that float32 can tell from their neighbours.
    n = 1 + np.flatnonzero(p[1:] > 1e-3)
    # With n tokens kept the mass is sum(p[:n]), and the last has the share p[n-1] / p[0] of the largest.
    thresholds, beyond = (np.cumsum(p), n + 1) if name == "top_p" else (p / p[0], n - 1)
    for share, num_kept in ((1 - 1e-5, n), (1 + 1e-5, beyond)):
        settings = [{**OFF, "temperature": temperature, name: float(thresholds[i - 1] * share)} for i in n]
        kept = probs_of([row] * len(n), settings) > 0
        # 1 is the most that the first token's own share can be.
        assert np.array_equal(kept.sum(1), np.maximum(num_kept, 1))


def test_values_out_of_range_that_no_check_could_see_have_a_result_too():
    greedy = [
        {**OFF, "temperature": -1.0},
        {**OFF, "temperature": np.nan},
        {**OFF, "min_p": 1.5},
        {**OFF, "top_p": -0.5},
    ]
    off = [
        {**OFF, "top_k": -3},
        {**OFF, "top_p": 1.5},
        {**OFF, "top_p": np.nan},
        {**OFF, "min_p": -0.5},
        {**OFF, "min_p": np.nan},
    ]
    row = KINDS["normal"]
    assert np.all(probs_of([row] * 4, greedy) == oracle.one_hot(row.argmax(), V))
    expected = [oracle.distribution(row.astype(float))] * len(off)
    np.testing.assert_allclose(probs_of([row] * len(off), off), expected, rtol=1e-5)


@pytest.mark.parametrize("min_p", [np.nan, -1.0])
def test_min_p_that_is_no_share_samples_as_if_it_were_off(min_p):
    keys = jax.random.split(jax.random.key(0), B)
    logits = jnp.tile(KINDS["normal"], (B, 1))
    sample = quick_jit(ss.sample)
    sampled = sample(keys, logits, ss.SamplingParams(min_p=jnp.full(B, min_p)))
    expected = sample(keys, logits, ss.SamplingParams(min_p=jnp.zeros(B)))
    assert len(set(sampled[0].tolist())) > 5
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), sampled, expected))


def test_greedy_takes_the_first_of_equal_largest_logits():
    logits = [[1.0, 3.0, 3.0, 3.0], [2.0, 2.0, 2.0, 2.0], [-np.inf, -5.0, -5.0, -9.0]]
    assert probs_of(logits, [{**OFF, "temperature": t} for t in (0.0, 0.0, 1e-39)]).tolist() == [
        [0, 1, 0, 0],
        [1, 0, 0, 0],
        [0, 1, 0, 0],
    ]


@pytest.mark.parametrize("temperature", [1e38, HIGHEST, np.inf])
def test_the_hottest_temperatures_make_all_finite_logits_equal(temperature):
    result = probs_of([[3.0, -np.inf, -100.0, 0.0, 20.0]], [{**OFF, "temperature": temperature}])
    np.testing.assert_allclose(result, [[0.25, 0, 0.25, 0.25, 0.25]], rtol=1e-6)


def test_a_vocabulary_of_one():
    settings = [OFF, {**OFF, "temperature": 0.0}, {"temperature": 0.5, "top_k": 1, "top_p": 0.5, "min_p": 0.5}]
    for logit in (0.0, -1e30, 5.0):
        assert quick_probs(jnp.full((3, 1), logit), as_arrays(settings)).tolist() == [[1.0]] * 3


@pytest.mark.parametrize(
    "setting",
    [{"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05}, {"temperature": 0.0}, {"temperature": 1e-38}, {}],
    ids=["all", "greedy", "flushed to greedy", "off"],
)
def test_numbers_and_arrays_mean_the_same(setting):
    logits = np.stack(list(KINDS.values()))
    as_numbers = quick_jit(lambda z: probs(z, ss.SamplingParams(**setting)))(logits)
    np.testing.assert_allclose(as_numbers, probs_of(logits, [{**OFF, **setting}] * len(logits)), rtol=1e-6)


def test_a_scalar_array_and_a_numpy_number_stand_for_every_row():
    logits = np.stack([KINDS["normal"], KINDS["ties"]])
    setting = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.05}
    expected = probs_of(logits, [setting] * 2)
    scalars = ss.SamplingParams(*(field[0] for field in as_arrays([setting])))
    np.testing.assert_allclose(quick_probs(jnp.asarray(logits), scalars), expected, rtol=1e-6)
    numbers = ss.SamplingParams(np.float32(0.7), np.int32(5), np.float32(0.9), np.float32(0.05))
    np.testing.assert_allclose(quick_jit(lambda z: probs(z, numbers))(logits), expected, rtol=1e-6)


def test_shifted_logits_keep_the_same_tokens():
    row = np.round(np.random.default_rng(1).normal(size=V) * 24) / 8
    settings = [s for s in SETTINGS if s["temperature"] == 1]
    plain, shifted = (probs_of([row + c] * len(settings), settings) for c in (0, 64))
    np.testing.assert_allclose(plain, shifted, rtol=1e-6)


def test_float64_is_filtered_in_float64():
    with jax.enable_x64(True):
        row = np.random.default_rng(2).normal(size=V)
        setting = {"temperature": 0.7, "top_k": 9, "top_p": 0.875, "min_p": 0.0625}
        params = ss.SamplingParams(*(jnp.array([value]) for value in setting.values()))
        result = quick_probs(jnp.asarray(row)[None], params)
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result[0], oracle.distribution(row, **setting), rtol=1e-12)


def test_filters_of_more_than_one_row_a_sequence():
    logits = jnp.asarray(np.random.default_rng(3).normal(size=(2, 3, V)), jnp.float32)
    settings = [{**OFF, "top_k": 2, "temperature": 0.5}, {**OFF, "top_p": 0.6}]

    @quick_jit
    def log_probs(logits, sampling):
        rows = dist.target_rows(logits, make_filter(logits, sampling))
        tokens = jnp.broadcast_to(jnp.arange(3), logits.shape[:2])
        return dist.log_prob(rows, tokens), rows.log_normalizers

    result, log_normalizers = log_probs(logits, as_arrays(settings))
    for b, setting in enumerate(settings):
        for r in range(3):
            p = oracle.distribution(np.asarray(logits[b, r], np.float64), **setting)
            with np.errstate(divide="ignore"):
                np.testing.assert_allclose(result[b, r], np.log(p[r]), rtol=1e-5, atol=1e-6)
            kept = np.asarray(logits[b, r], np.float64)[p > 0] / setting["temperature"]
            np.testing.assert_allclose(log_normalizers[b, r], np.log(np.exp(kept).sum()), rtol=1e-5)


def long_rows():
    """Rows longer than the list of the largest logits: flat, with ties at each cutoff, masked, and far from zero."""
    rng = np.random.default_rng(4)
    size = 5003
    normal = rng.normal(size=size) * 3
    one_left = np.full(size, -np.inf)
    one_left[4999] = 2
    few_left = np.where(rng.random(size) < 0.99, -np.inf, normal)
    tiny = normal * 1e-30
    rows = [normal, np.round(normal), np.full(size, 1.5), np.zeros(size), one_left, few_left, normal - 1e4, tiny]
    steps = np.where(np.arange(size) < 300, 2.0, np.where(np.arange(size) < 2000, 1.0, normal - 12))
    # Ten above the floor of top-k, and more logits equal to that floor than are sorted.
    ties = np.where(np.arange(size) < 10, 3.0, np.where(np.arange(size) < 310, 2.0, -9.0))
    return np.stack(
        [*rows, rng.permuted(steps), rng.permuted(ties), normal * 1e-5, -1.6 * np.log1p(np.arange(size))]
    ).astype(np.float32)


LONG_SETTINGS = [
    {**OFF, "top_k": 1},
    {**OFF, "top_k": 50, "top_p": 0.95},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.0},
    {**OFF, "top_k": 50, "top_p": 0.1},
    {**OFF, "top_k": 1000},
    {**OFF, "top_k": 4000, "top_p": 0.9, "min_p": 0.001},
    {**OFF, "top_k": 5003},
    {**OFF, "top_p": 0.95},
    {**OFF, "top_p": 0.5, "temperature": 2.0},
    {**OFF, "top_p": 1e-6},
    {**OFF, "top_p": 0.999},
    OFF,
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.slow)])
def test_rows_longer_than_the_list_of_the_largest_agree_with_the_oracle(dtype):
    logits = jnp.asarray(np.append(long_rows(), np.full((1, 5003), np.nan, np.float32), axis=0), dtype)

    # The test below compiles a search of these rows with all optimisations.
    @quick_jit
    def log_normalizers_and_cutoffs(logits, sampling):
        filters = make_filter(logits[:, None], sampling)
        return dist.target_rows(logits[:, None], filters).log_normalizers[:, 0], filters.cutoff[:, 0]

    for setting in LONG_SETTINGS:
        result, cutoffs = log_normalizers_and_cutoffs(logits, as_arrays([setting] * len(logits)))
        assert np.isnan(result[-1])
        for row, log_normalizer, smallest in zip(np.asarray(logits, np.float64)[:-1], result, cutoffs, strict=False):
            kept = (row >= smallest) & (row > -np.inf)
            assert any(np.array_equal(kept, expected > 0) for expected in possible(row, setting)), setting
            scaled = row[kept] / setting["temperature"]
            np.testing.assert_allclose(log_normalizer, np.logaddexp.reduce(scaled), rtol=1e-5, atol=1e-5)


def test_a_long_row_has_the_same_cutoff_among_any_neighbours():
    logits = long_rows()
    settings = [LONG_SETTINGS[i] for i in (7, 5, 4, 1, 8, 7, 10, 7, 9, 3, 11, 7)]
    cutoffs = jax.jit(lambda logits, sampling: make_filter(logits[:, None], sampling).cutoff)
    together = np.asarray(cutoffs(logits, as_arrays(settings)))
    for i in (0, 1, 4, 7):
        alone = np.asarray(cutoffs(logits[i : i + 1], as_arrays(settings[i : i + 1])))
        assert alone.tobytes() == together[i : i + 1].tobytes()


@pytest.mark.parametrize(
    ("sampling", "num_loops"),
    [(ss.SamplingParams(0.7, 20, 0.8), 0), (ss.SamplingParams(1.0, 50, 0.95), 0), (ss.SamplingParams(1.0, 0, 0.9), 1)],
)
def test_loops_of_the_filters_on_a_gpu_without_kernels(sampling, num_loops):
    """A small top_k needs none; a search is one loop of at most `max_steps` steps, which all rows share."""
    logits = jax.ShapeDtypeStruct((8, 5, 151_936), jnp.bfloat16)
    traced = jax.jit(lambda z: dist.target_rows(z, make_filter(z, sampling)).log_sum).trace(logits)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("stablehlo.while") == num_loops
    assert [cutoff.max_steps(t) for t in (jnp.bfloat16, jnp.float32, jnp.float64)] == [16, 24, 40]


@pytest.mark.slow
def test_filters_run_inside_shard_map_and_vmap():
    """Without a rule around them: sharded_cases and test_verify_rows have rules on each push."""
    logits = jnp.asarray(long_rows()[:2])[:, None]
    params = as_arrays([LONG_SETTINGS[5], LONG_SETTINGS[7]])
    expected = quick_jit(make_filter)(logits, params).cutoff
    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = jax.sharding.PartitionSpec("batch")
    sharded = jax.shard_map(lambda z, p: make_filter(z, p).cutoff, mesh=mesh, in_specs=(batch, batch), out_specs=batch)
    assert np.array_equal(quick_jit(sharded)(logits, params), expected)
    mapped = jax.vmap(lambda z, p: make_filter(z[None], jax.tree.map(lambda x: x[None], p)).cutoff[0])
    assert np.array_equal(quick_jit(mapped)(logits, params), expected)


def test_a_narrow_type_of_top_k_does_not_wrap():
    logits, top_k = jnp.arange(600.0).reshape(2, 1, 300), np.array([3, 100], "i1")
    cutoff_of = quick_jit(lambda top_k: make_filter(logits, ss.SamplingParams(top_k=top_k)).cutoff)
    assert cutoff_of(top_k)[:, 0].tolist() == [297, 500]
