import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from small_llama import SIZES, make_llama

from specsamp_jax.models import from_linen, from_nnx

pytestmark = pytest.mark.optimised(False)

V, D, B, T, S = 13, 4, 3, 8, 10


# One causal model, written four times: in Linen and in NNX, each with a cache (one embedding per slot) and without.
# Its logits are a linear map of the sum of the embeddings so far.


def sums_so_far(slots, positions):
    mask = jnp.arange(slots.shape[1]) <= positions[..., None]
    return jnp.einsum("bts,bsd->btd", mask.astype(slots.dtype), slots)


def write(slots, new, positions):
    return slots.at[jnp.arange(len(slots))[:, None], positions].set(new, mode="drop")


def init_slots(batch_size, max_length):
    return jnp.zeros((batch_size, max_length, D))


class LinenCached(linen.Module):
    @linen.compact
    def __call__(self, tokens, positions, cache):
        cache = write(cache, linen.Embed(V, D, name="embed")(tokens), positions)
        return linen.Dense(V, name="head")(sums_so_far(cache, positions)), cache


class LinenUncached(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        return linen.Dense(V, name="head")(jnp.cumsum(linen.Embed(V, D, name="embed")(tokens), axis=1))


class NNXCached(nnx.Module):
    def __init__(self, *, rngs):
        self.embed, self.head = nnx.Embed(V, D, rngs=rngs), nnx.Linear(D, V, rngs=rngs)

    def __call__(self, tokens, positions, cache):
        cache = write(cache, self.embed(tokens), positions)
        return self.head(sums_so_far(cache, positions)), cache


class NNXUncached(NNXCached):
    def __call__(self, tokens):
        return self.head(jnp.cumsum(self.embed(tokens), axis=1))


@pytest.fixture(scope="module")
def variables():
    return LinenUncached().init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def nnx_module(make, variables):
    module, params = make(rngs=nnx.Rngs(0)), variables["params"]
    module.embed.embedding[...] = params["embed"]["embedding"]
    module.head.kernel[...] = params["head"]["kernel"]
    module.head.bias[...] = params["head"]["bias"]
    return module


MAKERS = {
    "linen, cached": lambda variables: from_linen(LinenCached(), variables, init_slots),
    "linen, uncached": lambda variables: from_linen(LinenUncached(), variables),
    "nnx, cached": lambda variables: from_nnx(nnx_module(NNXCached, variables), init_slots),
    "nnx, uncached": lambda variables: from_nnx(nnx_module(NNXUncached, variables)),
}


@pytest.fixture(params=MAKERS)
def make_model(request, variables):
    return lambda: MAKERS[request.param](variables)


def test_all_four_modules_give_the_same_logits(make_model, variables):
    embedding, head = variables["params"]["embed"]["embedding"], variables["params"]["head"]
    tokens = np.asarray(jax.random.randint(jax.random.key(1), (B, T), 0, V))
    lengths = np.array([1, 5, 3])
    model = make_model()
    # Row by row: a prompt, with other tokens behind it; then three tokens at the row's own positions.
    prompt = np.where(np.arange(5) < lengths[:, None], tokens[:, :5], 7)
    positions = np.broadcast_to(np.arange(5), (B, 5))
    _, cache = model.apply_fn(model.params, jnp.asarray(prompt), jnp.asarray(positions), model.init_cache_fn(B, S))
    positions = lengths[:, None] + np.arange(3)
    new = np.take_along_axis(tokens, positions, 1)
    logits, _ = model.apply_fn(model.params, jnp.asarray(new), jnp.asarray(positions), cache)
    for row in range(B):
        sums = np.cumsum(embedding[tokens[row]], axis=0)[positions[row]]
        np.testing.assert_allclose(logits[row], sums @ head["kernel"] + head["bias"], rtol=1e-5, atol=1e-5)


def test_a_module_that_is_adapted_again_is_not_traced_again(make_model):
    count = 0

    @jax.jit
    def step(model, tokens, positions, cache):
        nonlocal count
        count += 1
        return model.apply_fn(model.params, tokens, positions, cache)

    for _ in range(2):
        model = make_model()
        step(model, jnp.zeros((B, 2), jnp.int32), jnp.zeros((B, 2), jnp.int32), model.init_cache_fn(B, S))
    assert count == 1


def test_adapters_of_different_modules_are_not_equal(variables):
    models = [make(variables) for make in MAKERS.values()]
    assert len({model.apply_fn for model in models}) == len(MAKERS)
    assert from_nnx(make_llama()).apply_fn != from_nnx(make_llama(rope_theta=400.0)).apply_fn
    assert from_nnx(make_llama()).apply_fn == from_nnx(make_llama(seed=1)).apply_fn


class WithoutCache(nnx.Module):
    def __init__(self, llama):
        self.llama = llama

    def __call__(self, tokens):
        return self.llama(tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))[0]


def test_llama_gives_the_same_logits_with_its_cache_and_without(llama):
    cached, uncached = from_nnx(llama), from_nnx(WithoutCache(llama))
    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, SIZES["vocab_size"])
    caches = [model.init_cache_fn(B, S) for model in (cached, uncached)]
    assert isinstance(caches[0][0].keys, jax.Array)
    np.testing.assert_array_equal(caches[1], np.zeros((B, S)))
    for columns in (slice(0, 5), slice(3, 6), slice(6, 8)):
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))[:, columns]
        (expected, caches[0]), (logits, caches[1]) = (
            model.apply_fn(model.params, tokens[:, columns], positions, cache)
            for model, cache in zip((cached, uncached), caches, strict=True)
        )
        np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_tokens_at_positions_outside_the_text_are_not_written(variables):
    model = MAKERS["nnx, uncached"](variables)
    tokens, positions = jnp.array([[3, 4, 5]]), jnp.array([[1, -1, S]])
    logits, text = model.apply_fn(model.params, tokens, positions, model.init_cache_fn(1, S))
    np.testing.assert_array_equal(text[0], [0, 3, 0, 0, 0, 0, 0, 0, 0, 0])
    assert np.isfinite(logits[0, 0]).all()


class Noisy(nnx.Module):
    def __init__(self, *, rngs):
        self.dropout, self.count = nnx.Dropout(0.5, rngs=rngs), nnx.Variable(jnp.zeros(()))

    def __call__(self, tokens):
        self.count[...] += 1
        return self.dropout(jax.nn.one_hot(tokens, V)) + self.count[...]


def test_state_that_a_module_changes_is_not_kept():
    model = from_nnx(Noisy(rngs=nnx.Rngs(0)))
    arguments = jnp.array([[3, 4]]), jnp.array([[0, 1]]), model.init_cache_fn(1, S)
    first, _ = jax.jit(model.apply_fn)(model.params, *arguments)
    second, _ = jax.jit(model.apply_fn)(model.params, *arguments)
    np.testing.assert_array_equal(first, second)
    assert first.min() == 1


class WithMethod(NNXCached):
    """A module with a method that makes its cache, in place of a hashable object."""

    def init_cache_fn(self, batch_size, max_length):
        return jnp.zeros((batch_size, max_length, self.embed.embedding.shape[1]), self.embed.embedding.dtype)


@pytest.mark.parametrize("by_hand", [False, True])
def test_adapters_of_equal_modules_with_other_weights_are_equal(by_hand):
    modules = [WithMethod(rngs=nnx.Rngs(seed)) for seed in range(2)]
    models = [from_nnx(module, module.init_cache_fn if by_hand else None) for module in modules]
    assert models[0].init_cache_fn == models[1].init_cache_fn
    assert jax.tree.structure(models[0]) == jax.tree.structure(models[1])
    np.testing.assert_array_equal(models[1].init_cache_fn(B, S), np.zeros((B, S, D)))
    modules[1].more = 3
    assert from_nnx(modules[1]).init_cache_fn != models[0].init_cache_fn
