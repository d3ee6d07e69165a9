"""Arguments of `generate` that may change without a new trace, and processors of logits as data."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

import specsamp_jax as ss

pytestmark = pytest.mark.optimised(False)

PROMPT = np.array([[1, 2, 3], [2, 0, 0]])
B = len(PROMPT)
KEYS = jax.random.split(jax.random.key(0), B)


class Counted:
    """A target that counts how often it is traced."""

    def __init__(self):
        self.apply_fn, self.traces = tables.counted()

    @property
    def num_traces(self):
        return len(self.traces)

    def generate(self, scale=1.0, **options):
        model = ss.Model(jnp.asarray(tables.table(0)) * scale, self.apply_fn, tables.init_cache_fn)
        return ss.generate(KEYS, PROMPT, target=model, draft=None, max_new_tokens=6, **options)


ON = np.array([3, 0]), np.array([0.9, 1.0], "f"), np.array([0.0, 0.1], "f")
CHANGES = {
    "weights": [{}, {"scale": 2.0}],
    "temperature": [
        {"sampling": ss.SamplingParams(value)}
        for value in (1.0, 0.7, 0.0, 1, np.float32(0.5), jnp.array(0.3), np.array([1, 0], "f"), jnp.ones(2, "float16"))
    ],
    "end tokens": [{"eos_token": value} for value in (None, 2, [1, 2], (), jnp.array([1, 2, 3]), [0, 1, 2, 3])],
    "filters": [
        {"sampling": ss.SamplingParams(0.7, top_k, top_p, min_p)}
        for top_k, top_p, min_p in (ON, (2, 0.5, 0.5), (3, np.float32(0.5), jnp.array(0.2)), (*ON[:2], np.zeros(2)))
    ],
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_without_a_new_trace(name):
    model = Counted()
    results = []
    for i, options in enumerate(CHANGES[name]):
        results.append(model.generate(**options))
        if i == 0:
            first = model.num_traces
    assert model.num_traces == first, f"{options} traced again"
    # They are not ignored either.
    assert len({result.log_probs.tobytes() for result in results}) > 1


def test_the_loop_runs_where_arrays_of_two_ranks_may_not_broadcast():
    options = {"target": tables.model(tables.table(0)), "draft": None, "max_new_tokens": 2}
    with jax.numpy_rank_promotion("raise"):
        steps = ss.stream(KEYS, PROMPT, **options)
        next(steps)
        with pytest.raises(ValueError, match="rank_promotion"):  # still the caller's setting between two items
            jnp.ones(2) + jnp.ones((2, 2))
        tokens = list(steps)[-1].tokens
        shapes = jax.eval_shape(lambda: ss.generate(KEYS, PROMPT, **options | {"draft": ss.NGramDrafter()}))
    assert np.array_equal(tokens, ss.generate(KEYS, PROMPT, **options).tokens)
    assert shapes.tokens.shape == tokens.shape


def test_traced_parameters_give_the_values_of_constant_parameters():
    sampling = ss.SamplingParams(0.5, 2, 0.9, 0.1)
    step = jax.jit(functools.partial(ss.step, target=tables.model(tables.table(0)), draft=None, sampling=sampling))
    state = ss.init(PROMPT, target=tables.model(tables.table(0)), draft=None, max_new_tokens=6)
    while not state.finished.all():
        state, _ = step(KEYS, state)
    result = Counted().generate(sampling=sampling)
    np.testing.assert_array_equal(result.tokens, state.tokens)
    np.testing.assert_allclose(result.log_probs, state.log_probs, rtol=1e-6)


# Processors


def add(bias, tokens, lengths, logits):
    return logits + bias


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Only:
    """Keeps the tokens of a mask [B, V]."""

    mask: jax.Array

    def __call__(self, tokens, lengths, logits):
        return jnp.where(self.mask, logits, -jnp.inf)


def only(*tokens):
    return np.isin(np.arange(tables.VOCAB), tokens) & np.ones((B, 1), bool)


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: Only(jnp.asarray(mask)),
        lambda mask: jax.tree_util.Partial(add, np.where(mask, 0, -np.inf).astype("f")),
    ],
    ids=["dataclass", "partial"],
)
def test_a_pytree_is_data(make):
    model = Counted()
    for i, tokens in enumerate([(1, 2), (0, 3), (0,)]):
        result = model.generate(process_logits_fn=make(only(*tokens)))
        assert set(np.unique(result.tokens[:, 3:])) <= set(tokens)
        if i == 0:
            first = model.num_traces
    assert model.num_traces == first
    if isinstance(make(only(0)), jax.tree_util.Partial):
        return  # Where it goes does not depend on its kind.
    drafted = ss.generate(
        KEYS,
        PROMPT,
        target=tables.model(tables.table(0)),
        draft=tables.model(tables.table(1)),
        max_new_tokens=6,
        process_logits_fn=make(only(1, 2)),
    )
    assert set(np.unique(drafted.tokens[:, 3:])) <= {1, 2}
    *_, last = ss.stream(
        KEYS,
        PROMPT,
        target=tables.model(tables.table(0)),
        draft=None,
        max_new_tokens=6,
        process_logits_fn=make(only(3)),
    )
    assert (last.tokens[:, 3:] == 3).all()


class Mutable:
    def __init__(self, token):
        self.token = token

    def __call__(self, tokens, lengths, logits):
        return jnp.where(jnp.arange(tables.VOCAB) == self.token, 9.0, -9.0)

    def method(self, tokens, lengths, logits):
        return self(tokens, lengths, logits)


@pytest.mark.parametrize("processor", [Mutable(1), Mutable(1).method], ids=["object", "method"])
def test_an_object_whose_changes_would_be_ignored_is_refused(processor):
    with pytest.raises(
        ValueError, match=r"process_logits_fn must be a function.*got Mutable, whose attributes \['token"
    ):
        Counted().generate(process_logits_fn=processor)


class Stateless:
    def __call__(self, tokens, lengths, logits):
        return logits


def test_functions_and_objects_without_attributes_are_taken():
    for processor in (Stateless(), Stateless().__call__, functools.partial(add, 0.0), lambda t, n, logits: logits):
        jax.eval_shape(lambda processor=processor: Counted().generate(process_logits_fn=processor))
