"""Every kernel lowers for CUDA, on any machine, at real shapes: the interpreter accepts what that refuses."""

import functools
import itertools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import pytest
from jax import export
from jax.experimental import pallas as pl
from jax.extend.core import jaxprs_in_params
from kernel_inputs import LOWERED

import specsamp_jax as ss
from pallas_kernels import config, slices
from specsamp_jax._types import ROUNDS, TILE, Draft, Filter, Uniforms
from specsamp_jax.rules import kernels
from specsamp_jax.sampling import kernels as sampling_kernels

RULES = {
    "token": kernels.verify_token,
    "block": kernels.verify_block,
    "sigmoid": functools.partial(kernels.verify_sigmoid, alpha=-1e4, beta=1e4),
}


def arg(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def arguments(shape, row_filter):
    batch_size, num_draft, vocab_size, dtype, kind = shape
    rows, drafts = (batch_size, num_draft + 1, vocab_size), (batch_size, num_draft, vocab_size)
    draft = Draft(
        arg(*drafts[:2], dtype=jnp.int32),
        None if kind == "one_hot" else arg(*drafts, dtype=dtype),
        None,
        arg(*drafts[:2]) if kind == "normalizers" else None,
    )
    uniforms = Uniforms(arg(*drafts[:2]), arg(batch_size, 2), arg(batch_size, 3, ROUNDS))
    draft_filter = Filter() if kind == "one_hot" else row_filter(*drafts[:2])
    return arg(*rows, dtype=dtype), row_filter(*rows[:2]), draft, draft_filter, uniforms


def row_filter(batch_size, num_rows):
    """A filter with all fields."""
    return Filter(arg(batch_size), arg(batch_size, num_rows), arg(batch_size, dtype=bool))


def launches(rule, args):
    text = jax.jit(rule).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count('call_target_name = "mosaic_gpu') + text.count("custom_call @mosaic_gpu")


def vector_stores(jaxpr):
    """Type of the shared memory and first element of every vector stored to a part of it, in a jaxpr and inside it."""
    for eqn in jaxpr.eqns:
        for inner in jaxprs_in_params(eqn.params):
            yield from vector_stores(inner)
        if eqn.primitive.name not in ("swap", "store") or "smem" not in str(eqn.invars[0].aval):
            continue
        for indexer in jax.tree.unflatten(eqn.params["tree"], eqn.invars[2:]):
            last = indexer.indices[-1]
            if isinstance(last, type(pl.ds(0, 1))):
                yield eqn.invars[0].aval, last.start


@pytest.mark.parametrize("num_draft", [4, 11], ids=lambda k: f"K{k}")
@pytest.mark.parametrize("rule", ["token", "block"])
def test_vectors_in_shared_memory_begin_at_multiples_of_16_bytes(rule, num_draft):
    """Those of a warp's lanes are moved by matrix instructions, which fault on the GPU if they do not."""
    args = arguments((1, num_draft, 2048, jnp.float32, "normalizers"), lambda *_: Filter())
    stores = list(vector_stores(jax.make_jaxpr(RULES[rule])(*args).jaxpr))
    assert stores
    for ref, start in stores:
        assert start * ref.dtype.itemsize % 16 == 0, (ref, start)


def shapes(on_oldest_jax=(), slow=()):
    """The shapes that are lowered, marked by their index in `LOWERED`."""
    params = []
    for i, shape in enumerate(LOWERED):
        marks = [] if i in on_oldest_jax else [pytest.mark.newest_jax]
        marks += [pytest.mark.slow] if i in slow else []
        params.append(pytest.param(shape, marks=marks, id=f"B{shape[0]}-K{shape[1]}-V{shape[2]}-{shape[3]}-{shape[4]}"))
    return params


@pytest.mark.parametrize("shape", shapes(on_oldest_jax=(0, 4, 5), slow=(1, 2, 3, 6)))
def test_the_token_rule_lowers_to_two_launches_or_three_with_early_exit(shape):
    dtypes = [shape[3]] * (1 + (shape[4] == "logits"))
    early = config.exits_early(*shape[:3], dtypes)
    assert launches(RULES["token"], arguments(shape, lambda *_: Filter())) == 2 + early


@pytest.mark.parametrize("shape", shapes(on_oldest_jax=(0,), slow=range(1, len(LOWERED))))
def test_the_block_rule_lowers_to_two_launches_or_three_without_chunks_of_tiles(shape):
    expected = 3 if shape[1] and config.chunks(shape[3], shape[2]).tiles is None else 2
    assert launches(RULES["block"], arguments(shape, lambda *_: Filter())) == expected


@pytest.mark.parametrize("shape", shapes(on_oldest_jax=(0,), slow=range(1, len(LOWERED))))
def test_the_sigmoid_rule_lowers_to_one_launch(shape):
    assert launches(RULES["sigmoid"], arguments(shape, lambda *_: Filter())) == 1


@pytest.mark.parametrize("shape", [LOWERED[1], pytest.param(LOWERED[2], marks=pytest.mark.slow)], ids=str)
def test_lowers_with_every_filter(shape):
    assert launches(RULES["token"], arguments(shape, row_filter)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("shape", LOWERED[1:3], ids=str)
def test_the_block_rule_lowers_with_every_filter(shape):
    assert launches(RULES["block"], arguments(shape, row_filter)) == 3


# On every push a part of a tile; all pairs, in both types, with the slow tests.
EACH_PUSH = {(5, 4): "float32"}


def small_vocabularies():
    params = []
    for *pair, dtype in itertools.product((5, 29, 1024, 1025, 2048), (0, 1, 4), ("float32", "bfloat16")):
        marks = [] if EACH_PUSH.get(tuple(pair)) == dtype else [pytest.mark.slow]
        marks += [] if pair == [5, 4] else [pytest.mark.newest_jax]
        params.append(pytest.param(*pair, dtype, marks=marks))
    return params


@pytest.mark.parametrize(("vocab_size", "num_draft", "dtype"), small_vocabularies())
def test_lowers_for_small_vocabularies(vocab_size, num_draft, dtype):
    shape = (2, num_draft, vocab_size, dtype, "logits")
    assert launches(RULES["token"], arguments(shape, lambda *_: Filter())) == 2
    has_tiles = config.chunks(dtype, max(vocab_size, TILE)).tiles is not None
    assert launches(RULES["block"], arguments(shape, lambda *_: Filter())) == (2 if has_tiles or not num_draft else 3)
    assert launches(RULES["sigmoid"], arguments(shape, lambda *_: Filter())) == 1


@pytest.mark.slow
def test_the_block_rule_lowers_for_a_large_vocabulary_in_a_large_batch():
    shape = (64, 2, 1_000_000, jnp.bfloat16, "one_hot")
    assert launches(RULES["block"], arguments(shape, lambda *_: Filter())) == 2


@pytest.mark.parametrize("num_draft", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_lowers_for_one_tile_in_large_batches(num_draft):
    shape = (1024, num_draft, 1024, jnp.bfloat16, "logits")
    assert launches(RULES["token"], arguments(shape, lambda *_: Filter())) == (3 if num_draft > 1 else 2)


NO_GPU = pytest.mark.skipif(cases.ON_GPU, reason="what a process without a GPU compiles for others")


def step_arguments():
    target, _, draft, _, _ = arguments((2, 3, 2048, jnp.float32, "logits"), lambda *_: Filter())
    return jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2)), target, draft


@NO_GPU
@pytest.mark.parametrize(
    "num_tiles", [13, pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_sample_lowers_for_every_number_of_tiles_per_block(monkeypatch, num_tiles):
    """Tiles are summed four at a time, and the last group may hold one tile: Whisper's vocabulary at B 256."""
    monkeypatch.setattr(slices, "num_blocks", lambda *shape: 4)
    vocab_size = 4 * 1024 * num_tiles - 1383
    words, logits = arg(2, dtype=jnp.uint32), arg(8, vocab_size, dtype=jnp.bfloat16)
    sample = functools.partial(sampling_kernels.sample, sampling=ss.SamplingParams(jnp.full(8, 0.7)))
    assert launches(sample, (words, logits)) == 1


FROM_KEYS = {
    "token": kernels.verify_token_from_keys,
    "block": kernels.verify_block_from_keys,
    "sigmoid": functools.partial(kernels.verify_sigmoid_from_keys, alpha=-1e4, beta=1e4),
}


def array_parameters():
    """Rules and shapes, lowered with parameters that are arrays; on every push a rule that `cutoffs` serves."""
    wide, many = (8, 5, 51865), (64, 4, 151936)
    for rule, shape, dtype in itertools.product(FROM_KEYS, ((2, 1, 2048), wide, many), ("float32", "bfloat16")):
        quick = (rule, shape, dtype) == ("sigmoid", (2, 1, 2048), "float32")
        yield pytest.param(rule, shape, dtype, marks=[] if quick else pytest.mark.slow)


@NO_GPU
@pytest.mark.parametrize(("rule", "shape", "dtype"), list(array_parameters()))
def test_lowers_from_keys_with_parameters_as_arrays(monkeypatch, rule, shape, dtype):
    """Mosaic GPU guesses layouts, and takes them back: an unused vector without a layout lets it try for minutes."""
    layout_inference = pytest.importorskip("jax.experimental.mosaic.gpu.layout_inference")
    monkeypatch.setitem(layout_inference.infer_layout.__kwdefaults__, "fuel", 1000)
    batch_size, num_draft, vocab_size = shape
    target, draft = arg(batch_size, num_draft + 1, vocab_size, dtype=dtype), arg(*shape, dtype=dtype)
    sampling = ss.SamplingParams(arg(batch_size), arg(batch_size, dtype=jnp.int32), arg(batch_size), arg(batch_size))

    def verify(words, target, tokens, draft, sampling):
        return FROM_KEYS[rule](words, target, sampling, Draft(tokens, draft), sampling).tokens

    tokens = arg(batch_size, num_draft, dtype=jnp.int32)
    assert launches(verify, (arg(2, dtype=jnp.uint32), target, tokens, draft, sampling)) > 0


@pytest.mark.parametrize("rule", list(FROM_KEYS))
def test_traces_with_64_bit_types(rule):
    """Values without a type are of 64 bits then, and do not fit the kernels' memory."""
    draft = Draft(arg(2, 1, dtype=jnp.int32), arg(2, 1, 2048), None, arg(2, 1))
    args = arg(2, dtype=jnp.uint32), arg(2, 2, 2048), ss.SamplingParams(0.7), draft, ss.SamplingParams(0.7)
    expected = jax.eval_shape(FROM_KEYS[rule], *args)
    with jax.enable_x64(True):
        assert jax.eval_shape(FROM_KEYS[rule], *args) == expected


@pytest.mark.parametrize("rule", [ss.verify, ss.verify_sigmoid])
def test_one_implementation_for_each_platform_that_is_compiled_for(rule):
    def text(platform):
        return str(export.export(jax.jit(rule), platforms=[platform])(*step_arguments()).mlir_module())

    assert "mosaic_gpu" in text("cuda")
    assert "mosaic_gpu" not in text("cpu")
    assert "mosaic_gpu" not in text("tpu")


@NO_GPU
def test_one_artifact_for_two_platforms_is_refused_with_a_kernel_in_it():
    def exported(implementation):
        step = jax.jit(functools.partial(ss.verify, implementation=implementation))
        return export.export(step, platforms=["cuda", "cpu"])(*step_arguments())

    with pytest.raises((NotImplementedError, ValueError), match="multi-platform"):
        exported(None)
    assert exported("xla").platforms == ("cuda", "cpu")


@NO_GPU
def test_a_vmapped_step_lowers_to_the_kernel():
    keys, target, draft = step_arguments()
    mapped = jax.vmap(ss.verify, in_axes=(None, 0, 0))
    target, draft = jax.tree.map(lambda x: jax.ShapeDtypeStruct((3, *x.shape), x.dtype), (target, draft))
    text = str(export.export(jax.jit(mapped), platforms=["cuda"])(keys, target, draft).mlir_module())
    assert "mosaic_gpu" in text


def test_what_keeps_the_kernels_away():
    def why_not(*shape, dtype=jnp.float32):
        reasons = []
        draft = Draft(jnp.zeros((shape[0], 0), jnp.int32))
        jax.eval_shape(lambda logits: reasons.append(kernels.why_not(logits, draft)), arg(*shape, dtype=dtype))
        return reasons[0]

    assert why_not(1, 1, 1024) is None
    assert "2**31" in why_not(2**11, 2**10, 2**10)
    assert "2**31" in why_not(2**15, 2**6, 8)  # each row is padded to 1,024
    assert "65535 sequences" in why_not(65_536, 1, 1024)
    assert "vocabulary of at most 2000000" in why_not(1, 1, 2_000_001)
    assert "float8" in why_not(1, 1, 8, dtype=jnp.float8_e5m2)
