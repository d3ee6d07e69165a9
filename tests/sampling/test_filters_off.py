"""Filters that are off but given as arrays: the program without filters runs, and gives the same bits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import specsamp_jax as ss
from specsamp_jax.sampling import kernels
from specsamp_jax.sampling.filters import call_unfiltered_if_off

V = 20
OFF = {"temperature": [1.0, 1.0], "top_k": [0, 0], "top_p": [1.0, 1.0], "min_p": [0.0, 0.0]}


def arrays(**changes):
    return ss.SamplingParams(**{name: jnp.array(value) for name, value in {**OFF, **changes}.items()})


def is_filtered(*samplings):
    """Whether the program with filters ran."""

    def fn(*samplings):
        return jnp.array(any(sampling is not None for sampling in samplings))

    return bool(call_unfiltered_if_off(fn, *samplings, vocab_size=V))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"top_k": [V, V + 1]},
        {"top_k": [-1, 0]},
        {"top_p": [1.5, np.nan]},
        {"min_p": [-0.5, np.nan]},
        {name: np.zeros((0,)) for name in OFF},
    ],
)
def test_parameters_that_change_nothing_run_the_program_without_filters(change):
    assert not is_filtered(arrays(**change))
    assert not is_filtered(None, arrays(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"temperature": [1.0, 0.7]},
        {"temperature": [0.0, 1.0]},
        {"temperature": [1.0, np.nan]},
        {"temperature": 1.5},
        {"top_k": [0, V - 1]},
        {"top_p": [0.999, 1.0]},
        {"min_p": [0.0, 1e-6]},
        {"min_p": 0.1},
    ],
)
def test_one_row_that_is_filtered_runs_the_program_with_filters(change):
    assert is_filtered(arrays(**change))
    assert is_filtered(arrays(), arrays(**change))


@pytest.mark.parametrize(("sampling", "filtered"), [(ss.SamplingParams(0.7), True), (ss.SamplingParams(), False)])
def test_python_numbers_choose_while_the_program_is_traced(sampling, filtered):
    program = jax.make_jaxpr(lambda: call_unfiltered_if_off(lambda s: s is not None, sampling, vocab_size=V))()
    assert not program.eqns
    assert program.consts == [] or filtered == bool(program.consts[0])
    assert is_filtered(sampling) == filtered


def decide(rule, keys, target, logits, sampling):
    if rule == "sample":
        return ss.sample(keys, target[:, 0], sampling)
    fn = functools.partial(ss.verify_sigmoid, alpha=-5.0, beta=5.0) if rule == "sigmoid" else ss.verify
    return fn(keys, target, ss.Draft(jnp.argmax(logits, -1).astype("i4"), logits, sampling), sampling)


@pytest.mark.parametrize(
    ("rule", "vocab_size"),
    [
        ("verify", 8_193),
        pytest.param("sigmoid", 2, marks=pytest.mark.optimised(False)),
        pytest.param("sample", 1000, marks=pytest.mark.optimised(False)),
        pytest.param("verify", 29, marks=pytest.mark.slow),
        pytest.param("sigmoid", 1, marks=pytest.mark.slow),
    ],
)
def test_a_row_has_the_same_bits_in_both_programs(rule, vocab_size):
    rng = np.random.default_rng(vocab_size)
    target = rng.normal(size=(3, 3, vocab_size)).astype("f") * 3
    logits = target[:, :2] + rng.normal(size=(3, 2, vocab_size)).astype("f") / 2
    rows = jax.random.split(jax.random.key(0), 3), target, logits
    run = jax.jit(functools.partial(decide, rule))
    off = ss.SamplingParams(np.ones(3, "f"), np.zeros(3, "i"), np.ones(3, "f"), np.zeros(3, "f"))
    on = ss.SamplingParams(
        *(np.array(a, t) for a, t in zip(([1, 0.7, 0], [0, 5, 0], [1, 0.9, 1], [0, 0.01, 0]), "fiff", strict=True))
    )
    expected = jax.jit(functools.partial(decide, rule, sampling=None))(*rows)
    for sampling in (off, on):
        for ours, theirs in zip(run(*rows, sampling), expected, strict=True):
            num_rows = 3 if sampling is off else 1
            assert np.asarray(ours[:num_rows]).tobytes() == np.asarray(theirs[:num_rows]).tobytes()


def test_a_narrow_top_k_is_wide_before_it_is_compared_with_the_vocabulary():
    for top_k in (np.array([3, 100], "i1"), jnp.array([3, 100], "uint8")):
        assert kernels.split(ss.SamplingParams(top_k=top_k))[1][0].top_k.dtype == jnp.int32
