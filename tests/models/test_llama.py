import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_llama import SIZES, make_llama

from specsamp_jax.models import Llama, LlamaConfig
from specsamp_jax.models.decoder import checkpoint_layout

pytestmark = pytest.mark.optimised(False)

B, T, S = 3, 11, 16
RTOL = 2e-5  # of the largest logit; float32, two layers

apply = nnx.jit(lambda module, tokens, positions, cache=None: module(tokens, positions, cache))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (B, T), 0, SIZES["vocab_size"])


def straight(start=0, stop=T):
    return jnp.broadcast_to(jnp.arange(start, stop), (B, stop - start))


def assert_close(actual, expected, rtol=RTOL):
    assert np.isfinite(expected).all()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=rtol * np.abs(expected).max())


def hugging_face_tensors(module):
    """The parameters by their names in a checkpoint, each `[out, in]`, in float64."""
    tensors = {}
    for slot in checkpoint_layout(module):
        value = np.asarray(slot.param[...], np.float64)
        value = value.T if slot.transposed else value
        for name, shape in slot.tensors.items():
            tensors[name], value = value[: shape[0]], value[shape[0] :]
        assert len(value) == 0
    return tensors


def oracle(module, tokens):
    """Logits of one text in float64, one position at a time, with rotations as complex numbers."""
    config, w = module.config, hugging_face_tensors(module)
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_size

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w[name + ".weight"]

    def turn(x):  # [T, N, D]
        steps = np.arange(len(x))[:, None] * config.rope_theta ** (-2 * np.arange(dim // 2) / dim)
        turned = (x[..., : dim // 2] + 1j * x[..., dim // 2 :]) * np.exp(1j * steps)[:, None]
        return np.concatenate([turned.real, turned.imag], -1)

    x = w["model.embed_tokens.weight"][np.asarray(tokens)]
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}."
        h = norm(x, layer + "input_layernorm")
        q, k, v = (
            (h @ w[f"{layer}self_attn.{name}_proj.weight"].T).reshape(len(x), -1, dim) for name in ("q", "k", "v")
        )
        q, k = turn(q), turn(k)
        out = np.zeros((len(x), heads, dim))
        for t in range(len(x)):
            for n in range(heads):
                kv = n // (heads // kv_heads)
                scores = k[: t + 1, kv] @ q[t, n] / np.sqrt(dim)
                weights = np.exp(scores - scores.max())
                out[t, n] = weights @ v[: t + 1, kv] / weights.sum()
        x = x + out.reshape(len(x), -1) @ w[layer + "self_attn.o_proj.weight"].T
        h = norm(x, layer + "post_attention_layernorm")
        gate, up = (h @ w[f"{layer}mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[layer + "mlp.down_proj.weight"].T
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def test_uncached_is_the_papers_formulas(llama, tokens):
    logits, cache = apply(llama, tokens, straight())
    assert cache is None
    assert logits.dtype == jnp.float32
    for row in range(B):
        assert_close(logits[row], oracle(llama, tokens[row]))


def test_one_token_at_a_time_is_the_uncached_pass(llama, tokens):
    expected, _ = apply(llama, tokens, straight())
    cache = llama.init_cache_fn(B, S)
    for t in range(T):
        logits, cache = apply(llama, tokens[:, t : t + 1], straight(t, t + 1), cache)
        assert_close(logits[:, 0], expected[:, t])


def test_several_tokens_at_each_rows_own_positions(llama, tokens):
    expected, _ = apply(llama, tokens, straight())
    lengths = np.array([2, 7, 5])
    # A left-aligned prefill: columns past a row's length hold tokens that the next step replaces.
    prompt = jnp.where(np.arange(7) < lengths[:, None], tokens[:, :7], 9)
    _, cache = apply(llama, prompt, straight(0, 7), llama.init_cache_fn(B, S))
    positions = jnp.asarray(lengths[:, None] + np.arange(4))
    logits, _ = apply(llama, jnp.take_along_axis(tokens, positions, 1), positions, cache)
    assert_close(logits, np.take_along_axis(np.asarray(expected), np.asarray(positions)[..., None], 1))


def test_tokens_may_be_written_in_any_order(llama, tokens):
    expected, _ = apply(llama, tokens, straight())
    order = jax.random.permutation(jax.random.key(2), T)
    logits, _ = apply(llama, tokens[:, order], straight()[:, order], llama.init_cache_fn(B, S))
    assert_close(logits, expected[:, order])


def test_a_token_written_again_at_a_position_replaces_the_old_one(llama, tokens):
    expected, _ = apply(llama, tokens, straight())
    wrong = (tokens + 5) % SIZES["vocab_size"]
    _, cache = apply(llama, jnp.concatenate([tokens[:, :4], wrong[:, 4:]], 1), straight(), llama.init_cache_fn(B, S))
    logits, _ = apply(llama, tokens[:, 4:8], straight(4, 8), cache)
    assert_close(logits, expected[:, 4:8])


def test_slots_ahead_are_not_read(llama, tokens):
    _, cache = apply(llama, tokens[:, :5], straight(0, 5), llama.init_cache_fn(B, S))
    garbage = jax.tree.map(lambda x: x.at[:, 6:].set(1e6), cache)
    clean, _ = apply(llama, tokens[:, 5:6], straight(5, 6), cache)
    logits, _ = apply(llama, tokens[:, 5:6], straight(5, 6), garbage)
    np.testing.assert_array_equal(logits, clean)


@pytest.mark.parametrize("cached", [False, True])
def test_rows_do_not_influence_each_other(llama, tokens, cached):
    cache = llama.init_cache_fn(B, S) if cached else None
    others = tokens.at[1].set((tokens[1] + 3) % SIZES["vocab_size"])
    first, _ = apply(llama, tokens, straight(), cache)
    second, _ = apply(llama, others, straight(), cache)
    np.testing.assert_array_equal(first[::2], second[::2])
    assert (np.abs(first[1] - second[1]).max(-1) > 1e-2).all()


def test_later_tokens_do_not_influence_earlier_ones(llama, tokens):
    others = tokens.at[:, 6:].set((tokens[:, 6:] + 3) % SIZES["vocab_size"])
    first, _ = apply(llama, tokens, straight())
    second, _ = apply(llama, others, straight())
    np.testing.assert_array_equal(first[:, :6], second[:, :6])


def test_the_same_token_twice_at_one_position(llama, tokens):
    expected, _ = apply(llama, tokens, straight())
    twice = jnp.array([0, 1, 2, 2, 3, 3, 3])
    logits, cache = apply(llama, tokens[:, twice], straight()[:, twice], llama.init_cache_fn(B, S))
    assert_close(logits, expected[:, twice])
    logits, _ = apply(llama, tokens[:, 4:6], straight(4, 6), cache)
    assert_close(logits, expected[:, 4:6])


@pytest.mark.parametrize("outside", [-1, -S, S, S + 5, 2**31 - 1, -(2**31)])
def test_positions_outside_are_dropped(llama, tokens, outside):
    _, before = apply(llama, tokens[:, :5], straight(0, 5), llama.init_cache_fn(B, S))
    positions = straight(5, 8).at[1].set(outside)
    logits, after = apply(llama, tokens[:, 5:8], positions, before)
    expected, _ = apply(llama, tokens[:, 5:8], straight(5, 8), before)
    np.testing.assert_array_equal(logits[::2], expected[::2])
    assert np.isfinite(logits).all()
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(x[1], y[1])
        assert (x[0] != y[0]).any()


@pytest.mark.parametrize(("token", "nearest"), [(-1, 0), (31, 30), (2**31 - 1, 30)])
def test_a_token_outside_the_vocabulary_is_clamped(llama, tokens, token, nearest):
    logits, _ = apply(llama, tokens.at[1, 3].set(token), straight())
    expected, _ = apply(llama, tokens.at[1, 3].set(nearest), straight())
    np.testing.assert_array_equal(logits, expected)


def test_only_differences_of_positions_matter(llama, tokens):
    logits, _ = apply(llama, tokens, straight() + 40)
    expected, _ = apply(llama, tokens, straight())
    assert_close(logits, expected, 2e-4)  # angles near 50 are rounded to 4e-6


def test_each_shape_is_traced_once(llama, tokens):
    count = 0

    @jax.jit
    def step(params, tokens, positions, cache):
        nonlocal count
        count += 1
        return nnx.merge(graphdef, params)(tokens, positions, cache)

    graphdef, params = nnx.split(llama)
    cache = llama.init_cache_fn(B, S)
    for t in range(3):
        _, cache = step(params, tokens[:, t : t + 1], straight(t, t + 1), cache)
    for t in (3, 5):
        _, cache = step(params, tokens[:, t : t + 2], straight(t, t + 2), cache)
    assert count == 2


def test_bfloat16(tokens):
    exact, half = make_llama(), make_llama(dtype="bfloat16")
    expected, _ = apply(exact, tokens, straight())
    logits, cache = apply(half, tokens, straight(), half.init_cache_fn(B, S))
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(cache)} == {jnp.dtype("bfloat16")}
    assert_close(logits, expected, 0.03)  # 8 bits of mantissa, two layers


def test_every_parameter_has_a_gradient(llama, tokens):
    def loss(module):
        logits, _ = module(tokens, straight())
        return -jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], -1).mean()

    for path, gradient in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(nnx.jit(nnx.grad(loss))(llama))):
        assert np.isfinite(gradient).all(), path
        assert np.abs(gradient).max() > 1e-5, path


def test_initial_scales():
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 8, "vocab_size": 512}
    module = Llama(LlamaConfig(**{**SIZES, **sizes}), rngs=nnx.Rngs(0))
    block = module.blocks[3]
    for param in (
        module.vocabulary.embedding,
        module.vocabulary.head,
        block.attention.qkv.kernel,
        block.mlp.gate_up.kernel,
    ):
        assert np.std(param[...]) == pytest.approx(0.02, rel=0.05)
    for param in (block.attention.out.kernel, block.mlp.down.kernel):
        assert np.std(param[...]) == pytest.approx(0.02 / 4, rel=0.05)
    assert (block.mlp_norm.weight[...] == 1).all()
    assert not np.array_equal(block.mlp.down.kernel[...], module.blocks[4].mlp.down.kernel[...])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers must be above 0, got 0."),
        ({"rope_theta": -1.0}, "rope_theta must be above 0, got -1.0."),
        ({"num_key_value_heads": 4}, "num_key_value_heads must divide num_attention_heads = 6, got 4."),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"head_dim": None, "hidden_size": 25}, "head_dim must be given where num_attention_heads = 6 does not divide"),
    ],
)
def test_impossible_sizes_raise_an_error(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        LlamaConfig(**{**SIZES, **changes})


def test_head_dim_follows_from_the_hidden_size():
    assert LlamaConfig(**{**SIZES, "head_dim": None}).head_size == 4


@pytest.mark.parametrize("theta", [{"rope_theta": 500.0}, {"rope_parameters": {"rope_theta": 500.0}}])
def test_config_json_in_its_old_and_its_new_form(theta):
    config = LlamaConfig(**SIZES)
    values = config.to_dict()
    assert values["architectures"] == ["LlamaForCausalLM"]
    assert values["model_type"] == "llama"
    assert LlamaConfig.from_dict(values) == config
    del values["rope_theta"]
    assert LlamaConfig.from_dict({**values, **theta, "eos_token_id": 2}) == config


def test_config_json_of_the_first_llama_has_no_key_value_heads():
    values = LlamaConfig(**{**SIZES, "num_key_value_heads": 6}).to_dict()
    del values["num_key_value_heads"]
    assert LlamaConfig.from_dict(values).num_key_value_heads == 6


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model_type": "mamba"}, "model_type must be 'llama', got 'mamba'"),
        ({"model_type": None}, "model_type must be 'llama', got None"),
        ({"attention_bias": True}, "attention_bias must be False, got True; this is not supported."),
        ({"mlp_bias": True}, "mlp_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config must be None, got {'bits': 4}"),
    ],
)
def test_config_json_with_an_unsupported_setting_raises_an_error(changes, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        LlamaConfig.from_dict({**LlamaConfig(**SIZES).to_dict(), **changes})


def test_config_json_without_sizes_raises_an_error():
    values = LlamaConfig(**SIZES).to_dict()
    del values["vocab_size"], values["intermediate_size"]
    with pytest.raises(ValueError, match="The config must hold vocab_size, intermediate_size, which it does not"):
        LlamaConfig.from_dict(values)
