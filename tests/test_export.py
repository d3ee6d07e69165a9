"""Programs that are exported, written to bytes, read again and called, with a symbolic batch."""

import functools
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables
from jax import export
from small_llama import make_llama

import specsamp_jax as ss
from specsamp_jax.models import from_nnx
from specsamp_jax.models.cache import LayerCache
from specsamp_jax.models.whisper.layers import KeysValues

V, K = 20, 2
SAMPLING = ss.SamplingParams(0.7, 5, 0.9, 0.05)


def shapes(tree, batch):
    """The inputs with a batch of another size."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype), tree)


def inputs(batch_size):
    rng = np.random.default_rng(batch_size)
    target_logits = rng.normal(size=(batch_size, K + 1, V)).astype("f")
    draft_logits = rng.normal(size=(batch_size, K, V)).astype("f")
    sampling = ss.SamplingParams(*(jnp.full(batch_size, value) for value in SAMPLING))
    draft = ss.Draft(draft_logits.argmax(-1).astype("i4"), draft_logits, sampling)
    arguments = target_logits, draft, sampling
    return jax.random.split(jax.random.key(0), batch_size), *jax.tree.map(jnp.asarray, arguments)


def there_and_back(fn, arguments):
    """The function after a round trip through its exported bytes."""
    (batch,) = export.symbolic_shape("b")
    return export.deserialize(export.export(jax.jit(fn))(*shapes(arguments, batch)).serialize())


def sample(keys, target_logits, draft, sampling):
    return ss.sample(keys, target_logits[:, 0], sampling)


def coupled(keys, target_logits, draft, sampling):
    """A coupled step, and the draft that it verified."""
    tokens, _ = ss.sample_coupled(keys, draft.logits[:, 0], sampling)
    draft = draft._replace(tokens=draft.tokens.at[:, 0].set(tokens), noise=ss.CoupledNoise())
    return draft, ss.verify_coupled(keys, target_logits, draft, sampling)


# docs/guides/export.md exports the kernel, and test_kernel_lowering looks for it.
@pytest.mark.optimised(False)
@pytest.mark.parametrize("fn", [ss.verify, ss.verify_block, ss.verify_sigmoid, sample, coupled])
def test_a_function_with_a_symbolic_batch_survives_the_round_trip(fn):
    exported, arguments = there_and_back(fn, inputs(2)), inputs(3)
    result, expected = exported.call(*arguments), jax.jit(fn)(*arguments)
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.both_programs(False)
@pytest.mark.optimised(False)
def test_generate_and_step_survive_the_round_trip():
    model = tables.model(tables.table(0))
    options = {"target": model, "draft": tables.model(tables.table(1)), "num_draft": 2}
    prompt, keys = jnp.array([[1, 2], [3, 0]]), jax.random.split(jax.random.key(0), 2)

    def write(fn, *arguments):
        return export.deserialize(export.export(jax.jit(fn))(*arguments).serialize())

    generate = functools.partial(ss.generate, max_new_tokens=5, **options)
    result = write(generate, keys, prompt).call(keys, prompt)
    assert isinstance(result, ss.Generation)
    state = jax.jit(functools.partial(ss.init, max_new_tokens=5, **options))(prompt)
    step = jax.jit(write(functools.partial(ss.step, **options), keys, state).call)
    while not state.finished.all():
        state, info = step(keys, state)
    assert isinstance(state, ss.DecodeState)
    assert isinstance(info, ss.StepInfo)
    # Written step by step, the text is that of `generate`; test_generate compares both without a round trip.
    assert (result.tokens == state.tokens[:, : result.tokens.shape[1]]).all()


@pytest.mark.both_programs(False)
@pytest.mark.optimised(False)
def test_the_caches_of_the_models_survive_the_round_trip():
    target = from_nnx(make_llama(num_hidden_layers=1))
    options = {"target": target, "draft": ss.NGramDrafter(), "num_draft": 2}
    key = jax.random.key(0)
    state = ss.init(jnp.array([[1, 2, 1]]), max_new_tokens=3, **options)
    exported = export.export(jax.jit(functools.partial(ss.step, **options)))(key, state)
    after, _ = export.deserialize(exported.serialize()).call(key, state)
    assert isinstance(after.target_cache[0], LayerCache)
    expected, _ = jax.jit(functools.partial(ss.step, **options))(key, state)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_the_cache_of_whisper_survives_the_round_trip():
    cache = (KeysValues(jnp.ones((1, 2, 3, 4)), jnp.zeros((1, 2, 3, 4))),)
    exported = export.deserialize(export.export(jax.jit(lambda cache: cache))(cache).serialize())
    assert isinstance(exported.call(cache)[0], KeysValues)


def test_the_version_is_that_of_the_distribution():
    root = Path(__file__).parent.parent
    assert ss.__version__ == tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    for package in ("specsamp_jax", "pallas_kernels"):
        assert (root / package / "py.typed").exists()


def test_all_public_names_are_listed():
    public = [name for name, value in vars(ss).items() if name[0] != "_" and not hasattr(value, "__path__")]
    assert len(set(ss.__all__)) == len(ss.__all__)
    assert {name for name in public if type(getattr(ss, name)).__name__ != "module"} == set(ss.__all__)


def test_a_model_is_shown_without_its_weights():
    model = ss.Model({"a": jnp.zeros((100, 20)), "b": jnp.zeros(3)}, tables.apply_fn, tables.init_cache_fn)
    expected = "Model(params=<2,003 numbers in 2 arrays>, apply_fn=apply_fn, init_cache_fn=init_cache_fn)"
    assert repr(model) == expected
