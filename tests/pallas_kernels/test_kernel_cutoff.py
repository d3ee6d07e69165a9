"""Cutoffs that the kernel finds keep what the float64 oracle keeps, and their sums are those of what is kept."""

import itertools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import oracle
import pytest

from pallas_kernels import config, cutoffs, slices
from pallas_kernels.limits import Limits

pytestmark = [pytest.mark.slow, cases.QUICK]

OFF = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
MARGIN = 2e-6
"""Share of top-p and of min-p by which float32 may decide otherwise."""


@pytest.fixture
def run(request, interpreted, monkeypatch):
    """The kernel, with as many blocks per row as the test says where it is interpreted."""
    blocks = getattr(request, "param", 2)
    if not cases.ON_GPU:
        monkeypatch.setattr(slices, "num_blocks", lambda *shape: blocks)

    def run(logits, limits):
        with interpreted():
            return jax.block_until_ready(cutoffs.cutoffs(cutoffs.Rows(logits, limits))[0])

    return run


def limits_of(settings):
    columns = {name: [{**OFF, **one}[name] for one in settings] for name in OFF}
    return Limits(
        *(jnp.array(values, jnp.int32 if name == "top_k" else jnp.float32) for name, values in columns.items())
    )


def check(found, logits, setting):
    """One row against the oracle."""
    row = np.asarray(logits, np.float64)
    setting = {**OFF, **setting}
    with np.errstate(invalid="ignore"):
        weight = np.exp((row - row.max()) / setting["temperature"])
    kept = (row >= found.cutoff) & (row > -np.inf)
    assert found.largest == row.max()
    np.testing.assert_allclose(found.total, weight[kept].sum(), rtol=3e-6 * max(1, 30 / setting["temperature"]))
    for share in (1, 1 - MARGIN, 1 + MARGIN):
        near = {
            name: v if v in (0, 1) else min(v * share, 1) for name, v in setting.items() if name in ("top_p", "min_p")
        }
        if np.array_equal(kept & (weight > 0), oracle.distribution(row, **{**setting, **near}) > 0):
            return
    pytest.fail(f"{setting}: kept {kept.sum()}, not {(oracle.distribution(row, **setting) > 0).sum()}")


def row_of(found, sequence, row):
    return slices.Kept(*(None if x is None else np.asarray(x)[sequence, row] for x in found))


def check_all(run, logits, settings, limits=None):
    found = run(jnp.asarray(logits)[:, None], limits_of(settings) if limits is None else limits)
    for i, setting in enumerate(settings):
        check(row_of(found, i, 0), np.asarray(logits[i].astype(jnp.float32)), setting)


SETTINGS = [
    {"top_k": 20, "top_p": 0.8, "temperature": 0.7},
    {"top_k": 50, "top_p": 0.95},
    {"top_k": 1},
    {"top_k": 300, "top_p": 0.5},
    {"top_p": 0.9},
    {"min_p": 0.05, "temperature": 1.3},
    {"min_p": 0.9},
    {"top_k": 7, "top_p": 0.99, "min_p": 0.2},
    {"top_k": 2040},
    {"top_k": 5000, "top_p": 1e-6},
    {"top_p": 0.999},
    {},
    {"top_p": 0.99, "min_p": 0.2},
]
NUM_SETTINGS = len(SETTINGS)


def normal(seed, vocab_size, dtype, count=NUM_SETTINGS):
    return (3 * jax.random.normal(jax.random.key(seed), (count, vocab_size))).astype(dtype)


@pytest.mark.parametrize("run", [1, 2, 4], indirect=True)
@pytest.mark.parametrize(("vocab_size", "dtype"), [(2056, jnp.bfloat16), (4097, jnp.float32), (5003, jnp.float16)])
def test_equals_the_oracle(run, vocab_size, dtype):
    check_all(run, normal(0, vocab_size, dtype), SETTINGS)


@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[4], SETTINGS[5], {"temperature": 0.5}])
def test_numbers_mean_what_arrays_do(run, setting):
    logits = normal(1, 3000, jnp.bfloat16, 2)
    check_all(run, logits, [setting] * 2, Limits(**setting))


def rows_of_every_kind(vocab_size):
    x = np.random.default_rng(0).normal(size=vocab_size) * 3
    index = np.arange(vocab_size)
    return {
        "ties": np.round(x),
        "all equal": np.full(vocab_size, -1.5),
        "both zeros": np.where(index % 2, -0.0, 0.0),
        "mostly masked": np.where(index % 300 == 7, x, -np.inf),
        "masked with the lowest number": np.where(index % 300 == 7, x, np.finfo(np.float32).min),
        "one left": np.where(index == 77, x, -np.inf),
        "peaked": np.where(index < 12, 20.0 + index, x),
        "negative and far": x - 1e4,
        "huge": np.where(index == 5, 1e30, np.where(index == 9, -1e30, x)),
        "many near the top": np.where(index % 5 == 0, 9.0 + index * 1e-4, x),
    }


@pytest.mark.parametrize("kind", rows_of_every_kind(2100))
def test_every_kind_of_row(run, kind):
    row = jnp.asarray(rows_of_every_kind(2100)[kind], jnp.float32)
    check_all(run, jnp.tile(row, (len(SETTINGS), 1)), SETTINGS)


def test_degenerate_rows_beside_healthy_ones(run):
    logits = normal(2, 2100, jnp.float32, 6).at[0, 5].set(jnp.nan).at[1, 2000].set(jnp.inf).at[2].set(-jnp.inf)
    settings = [SETTINGS[0], SETTINGS[4], SETTINGS[0]] * 2
    found = run(logits[:, None], limits_of(settings))
    assert not np.isfinite(np.asarray(found.total + found.largest)[:3]).any()
    for i in range(3, 6):
        check(row_of(found, i, 0), np.asarray(logits[i]), settings[i])


def test_two_arrays_in_one_launch(interpreted, monkeypatch):
    if not cases.ON_GPU:
        monkeypatch.setattr(slices, "num_blocks", lambda *shape: 2)
    target = normal(3, 2056, jnp.bfloat16, 6).reshape(2, 3, -1)
    draft = normal(4, 2056, jnp.float32, 4).reshape(2, 2, -1)
    with interpreted():
        found = cutoffs.cutoffs(
            cutoffs.Rows(target, Limits(top_k=20)),
            cutoffs.Rows(draft, limits_of([{"top_p": 0.9}, {"min_p": 0.1}])),
        )
    for logits, kept, settings in zip(
        (target, draft), found, ([{"top_k": 20}] * 2, [{"top_p": 0.9}, {"min_p": 0.1}]), strict=True
    ):
        for b, r in itertools.product(range(2), range(logits.shape[1])):
            check(row_of(kept, b, r), np.asarray(logits[b, r].astype(jnp.float32)), settings[b])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("vocab_size", [151936, 50257, 256000])
def test_lowers_to_one_launch(dtype, vocab_size):
    def of(logits, top_p):
        return cutoffs.cutoffs(cutoffs.Rows(logits, Limits(0.7, 20, top_p, 0.1)))

    args = jax.ShapeDtypeStruct((8, 5, vocab_size), dtype), jax.ShapeDtypeStruct((8,), jnp.float32)
    text = jax.jit(of).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert slices.supports(vocab_size)


@pytest.mark.parametrize("run", [1, 2], indirect=True)
def test_many_rows_take_two_launches(run, monkeypatch):
    """Rows that the GPU does not hold at once: some are decided from their lists, others are searched."""
    settings = [setting for setting in SETTINGS if "top_k" in setting]
    logits = normal(5, 2056, jnp.bfloat16, len(settings)).at[0].set(1.0)
    check_all(run, logits, settings)
    launched = []
    monkeypatch.setattr(config, "num_multiprocessors", lambda: 1)
    monkeypatch.setattr(config, "EMITTING_BLOCKS", 1)
    decide_rows = cutoffs._decide_rows
    monkeypatch.setattr(cutoffs, "_decide_rows", lambda *args: launched.append(args) or decide_rows(*args))
    check_all(run, logits, settings)
    assert launched
