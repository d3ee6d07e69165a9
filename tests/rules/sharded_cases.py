"""Cases for eight devices, run by `test_sharding.py` in a process with eight virtual devices.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest tests/rules/sharded_cases.py

Each rule, each way to give parameters and each kind of mesh axis has a case that runs on every push. Further
combinations are marked slow.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import specsamp_jax as ss
from specsamp_jax._types import TILE
from specsamp_jax.rules.rounds import GROUP
from specsamp_jax.sampling.cutoff import NUM_LARGEST, TILE_WIDTH
from specsamp_jax.sampling.draw import tile_sums
from specsamp_jax.sampling.filters import make_filter
from specsamp_jax.sampling.reduce import num_chunks

B, K, V = 8, 2, 64
SAMPLINGS = {
    "none": None,
    "warm": ss.SamplingParams(0.7),
    "top_k": ss.SamplingParams(0.7, 5),
    "top_p": ss.SamplingParams(0.7, top_p=0.9),
    "min_p": ss.SamplingParams(0.7, min_p=0.05),
    "all": ss.SamplingParams(0.7, 5, 0.9, 0.05),
    "greedy": ss.SamplingParams(0.0),
    "rows": ss.SamplingParams(
        np.array([0, 0.5, 1, 2] * 2, "f"),
        np.array([0, 9, 0, 3] * 2),
        np.array([1, 1, 0.5, 0.9] * 2, "f"),
        np.array([0, 0.1, 0, 0.01] * 2, "f"),
    ),
}
SHARDED = {"batch": P("x", None, None), "vocabulary": P(None, None, "x"), "both": P("x", None, "y")}


def verify(keys, target_logits, draft, sampling):
    return ss.verify(keys, target_logits, draft._replace(sampling=sampling), sampling)


def verify_sigmoid(keys, target_logits, draft, sampling):
    return ss.verify_sigmoid(keys, target_logits, draft._replace(sampling=sampling), sampling)


def verify_block(keys, target_logits, draft, sampling):
    return ss.verify_block(keys, target_logits, draft._replace(sampling=sampling), sampling)


def coupled(keys, target_logits, draft, sampling):
    tokens, _ = ss.sample_coupled(keys, draft.logits[:, 0], sampling)
    draft = draft._replace(tokens=draft.tokens.at[:, 0].set(tokens), sampling=sampling, noise=ss.CoupledNoise())
    return ss.verify_coupled(keys, target_logits, draft, sampling)


def verify_with_normalizers(keys, target_logits, draft, sampling):
    draft = draft._replace(log_normalizers=jax.nn.logsumexp(draft.logits, axis=-1))
    return ss.verify(keys, target_logits, draft, sampling)


def step_with_model_drafter(keys, target_logits, draft, sampling):
    table = jnp.sin(jnp.arange(V * V, dtype=jnp.float32)).reshape(V, V)
    model = ss.Model(table, lambda table, tokens, positions, cache: (table[tokens], cache), lambda *_: ())
    drafter = ss.ModelDrafter(model)
    state = ss.init(jnp.maximum(draft.tokens, 0), target=model, draft=drafter, num_draft=2, max_new_tokens=8)
    state, info = ss.step(keys, state, target=model, draft=drafter, num_draft=2, sampling=sampling)
    return state.tokens, info.num_accepted


def verify_one_hot(keys, target_logits, draft, sampling):
    return ss.verify(keys, target_logits, ss.Draft(draft.tokens), sampling)


def step_with_end_tokens(keys, prompt, end_tokens):
    model = ss.Model(jnp.eye(V), lambda table, tokens, positions, cache: (table[tokens], cache), lambda *_: ())
    state = ss.init(prompt, target=model, draft=None, max_new_tokens=8)
    return ss.step(keys, state, target=model, draft=None, eos_token=end_tokens)[0].tokens


def sample(keys, target_logits, draft, sampling):
    return ss.sample(keys, target_logits[:, 0], sampling)


def on_one_device(fn, name):
    with programs.without_kernels():
        return jax.jit(lambda *arguments: fn(*arguments, SAMPLINGS[name]))(*inputs())


@functools.cache
def optimised_on_one_device(name):
    """`verify` on one device for several cases with all optimisations: other levels may round otherwise."""
    return on_one_device(verify, name)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def inputs(vocab_size=V):
    rng = np.random.default_rng(0)
    target_logits = rng.normal(size=(B, K + 1, vocab_size)).astype("f") * 2
    draft_logits = target_logits[:, :K] + rng.normal(size=(B, K, vocab_size)).astype("f")
    tokens = draft_logits.argmax(-1).astype("i4")
    tokens[0, 1:] = -1
    arrays = target_logits, ss.Draft(tokens, draft_logits)
    return jax.random.split(jax.random.key(0), B), *jax.tree.map(jnp.asarray, arrays)


def put(arguments, mesh, spec):
    keys, target_logits, draft = arguments
    specs = P(spec[0]), spec, ss.Draft(P(spec[0], None), spec)
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), (keys, target_logits, draft), specs)


def mesh_for(kind, which):
    names, shape = (("x", "y"), (2, 4)) if which == "both" else (("x",), (8,))
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(names))


def assert_same(result, expected):
    for a, b in zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


EXPLICIT, AUTOMATIC = AxisType.Explicit, AxisType.Auto
# Bits are compared at the level of fewer optimisations, too.
QUICK = pytest.mark.optimised(False)
# One case with explicit axes and all under shard_map trace the kernels.
pytestmark = pytest.mark.kernels
NO_KERNELS = pytest.mark.kernels(False)
# Not in the cases that choose by a flag of all devices whether filters are on.
ONE_PROGRAM = pytest.mark.both_programs(False)


@pytest.mark.parametrize(
    ("fn", "name", "which", "kind"),
    [
        (verify, "rows", "both", EXPLICIT),
        # Axes that are automatic are for the compiler: the traced program is that of one device.
        pytest.param(verify, "rows", "both", AUTOMATIC, marks=NO_KERNELS),
        pytest.param(sample, "rows", "both", EXPLICIT, marks=[NO_KERNELS, ONE_PROGRAM]),
        *(
            pytest.param(fn, "none", "both", EXPLICIT, marks=[QUICK, NO_KERNELS])
            for fn in (verify_sigmoid, verify_block)
        ),
        slow(verify, "rows", "batch", EXPLICIT),
        slow(verify, "none", "vocabulary", EXPLICIT),
        slow(verify, "all", "both", AUTOMATIC),
        slow(sample, "rows", "both", AUTOMATIC),
        *(slow(fn, "rows", "both", EXPLICIT) for fn in (verify_sigmoid, verify_block)),
        slow(coupled, "none", "both", EXPLICIT),
    ],
)
def test_bits_are_those_of_one_device(fn, name, which, kind):
    run = jax.jit(lambda *arguments: fn(*arguments, SAMPLINGS[name]))
    result = run(*put(inputs(), mesh_for(kind, which), SHARDED[which]))
    assert_same(result, optimised_on_one_device(name) if (fn, name) == (verify, "rows") else on_one_device(fn, name))
    if kind == EXPLICIT:
        assert all(jax.typeof(leaf).sharding.spec[0] == SHARDED[which][0] for leaf in jax.tree.leaves(result))


@pytest.mark.slow
@pytest.mark.optimised(False)
def test_without_jit():
    mesh = jax.make_mesh((8,), ("x",))
    arguments = put(inputs(), mesh, SHARDED["batch"])
    expected = sample(*inputs(), SAMPLINGS["warm"])
    assert_same(sample(*arguments, SAMPLINGS["warm"]), expected)
    with jax.set_mesh(mesh):
        assert_same(sample(*arguments, SAMPLINGS["warm"]), expected)


@QUICK
@NO_KERNELS
def test_one_key_for_all_rows_and_a_draft_and_parameters_that_alone_are_sharded():
    mesh = jax.make_mesh((8,), ("x",))
    _, target_logits, draft = inputs()
    _, _, sharded_draft = put(inputs(), mesh, SHARDED["batch"])
    temperature = jnp.array([0, 0.5, 1, 2] * 2, jnp.float32)
    sharded = jax.device_put(temperature, NamedSharding(mesh, P("x")))
    replicated_logits = jax.device_put(target_logits, NamedSharding(mesh, P()))
    key = jax.random.key(3)
    expected = jax.jit(verify)(key, target_logits, draft, ss.SamplingParams(temperature))
    result = jax.jit(verify)(key, replicated_logits, sharded_draft, ss.SamplingParams(sharded))
    assert_same(result, expected)
    assert jax.typeof(result.tokens).sharding.spec[0] == "x"


@QUICK
@pytest.mark.parametrize(
    ("fn", "name"),
    [
        # A step samples drafts too.
        (step_with_model_drafter, "warm"),
        (verify, "rows"),
        *((fn, "none") for fn in (verify_sigmoid, verify_block, coupled)),
        *(slow(verify, name) for name in ("none", "warm", "top_k", "top_p", "min_p", "all", "greedy")),
        *(slow(fn, "none") for fn in (verify_one_hot, verify_with_normalizers)),
        *(slow(fn, "rows") for fn in (verify_sigmoid, verify_block, verify_one_hot)),
        *(slow(sample, name) for name in ("none", "top_k", "greedy", "rows", "all")),
    ],
)
def test_it_runs_under_shard_map_over_the_batch(fn, name):
    sampling = SAMPLINGS[name]
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    specs = P("x"), P("x"), ss.Draft(P("x"), P("x"))
    if name == "rows":
        mapped = jax.shard_map(fn, mesh=mesh, in_specs=(*specs, P("x")), out_specs=P("x"))
        result = jax.jit(mapped)(*inputs(), sampling)
    else:
        mapped = jax.shard_map(lambda *args: fn(*args, sampling), mesh=mesh, in_specs=specs, out_specs=P("x"))
        result = jax.jit(mapped)(*inputs())
    assert_same(result, on_one_device(fn, name))


@QUICK
def test_inputs_without_elements_under_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    keys, target_logits, draft = inputs()
    target_logits, draft = target_logits[:, :1], jax.tree.map(lambda array: array[:, :0], draft)
    specs = P("x"), P("x"), ss.Draft(P("x"), P("x"))
    mapped = jax.jit(jax.shard_map(ss.verify, mesh=mesh, in_specs=specs, out_specs=P("x")))
    assert_same(mapped(keys, target_logits, draft), jax.jit(ss.verify)(keys, target_logits, draft))


@QUICK
def test_a_step_without_end_tokens_under_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    keys, _, draft = inputs()
    arguments = keys, jnp.maximum(draft.tokens, 0), jnp.zeros((0,), jnp.int32)
    mapped = jax.shard_map(step_with_end_tokens, mesh=mesh, in_specs=(P("x"), P("x"), P()), out_specs=P("x"))
    assert_same(jax.jit(mapped)(*arguments), jax.jit(step_with_end_tokens)(*arguments))


@QUICK
def test_replicated_inputs_under_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    keys, target_logits, draft = inputs()
    # Every device has all rows of the target and its own of the draft.
    specs = P("x"), P("x"), ss.Draft(P("x"), P("x"))
    one_row = jax.tree.map(lambda x: x[:1], (keys, target_logits))
    mapped = jax.shard_map(ss.verify, mesh=mesh, in_specs=(P(), P(), specs[2]), out_specs=P("x"))
    result = jax.jit(mapped)(*one_row, draft)
    for row in (0, B - 1):
        take = functools.partial(jax.tree.map, functools.partial(take_rows, row=row))
        assert_same(take(result), jax.jit(ss.verify)(*one_row, take(draft)))


def take_rows(array, row):
    return array[row : row + 1]


def collectives(program):
    """Number of elements of each array that a collective operation sends between devices."""
    found = re.findall(
        r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program
    )
    shapes = (shape for line in found for shape in re.findall(r"\w+\[([\d,]*)\]", line))
    return [math.prod(int(size) for size in shape.split(",") if size) for shape in shapes]


LONG = 8 * 8 * 1024


@functools.cache
def long_rows_on_one_device(rule, name):
    return jax.jit(lambda *args: rule(*args, SAMPLINGS[name]))(*inputs(LONG))


@NO_KERNELS
@pytest.mark.parametrize(
    ("rule", "which", "kind", "name"),
    [
        (verify, "batch", EXPLICIT, "warm"),
        (verify, "vocabulary", AUTOMATIC, "warm"),
        slow(verify, "vocabulary", EXPLICIT, "warm"),
        slow(verify, "batch", AUTOMATIC, "warm"),
        slow(verify, "vocabulary", EXPLICIT, "none"),
        slow(verify_block, "batch", EXPLICIT, "warm"),
        slow(verify_block, "vocabulary", AUTOMATIC, "warm"),
    ],
)
def test_no_row_is_sent_and_long_rows_have_the_bits_of_one_device(rule, which, kind, name):
    # No chunk of a row's sum is on two devices.
    assert num_chunks(LONG) % 8 == 0
    sharded = put(inputs(LONG), mesh_for(kind, which), SHARDED[which])
    run = jax.jit(lambda *args: rule(*args, SAMPLINGS[name]))
    compiled = run.lower(*sharded).compile()
    sent = collectives(compiled.as_text())
    # Sharded batch: only scalar flags are reduced. Sharded vocabulary: at most one tile per row and round is sent.
    num_tiles = GROUP if rule is verify_block else 1
    assert max(sent) <= (1 if which == "batch" else B * num_tiles * TILE)
    assert_same(compiled(*sharded), long_rows_on_one_device(rule, name))


@NO_KERNELS
def test_acceptance_of_a_sharded_vocabulary():
    _, target_logits, draft = put(inputs(), mesh_for(EXPLICIT, "vocabulary"), SHARDED["vocabulary"])
    assert ss.accept_prob(target_logits[:, :K], draft.logits, draft.tokens).shape == (B, K)


SHIPPED = (32_000, 128_256, 151_936, 262_144)
"""Vocabularies of checkpoints that 8 devices can share; most shares are no multiple of a tile."""


def sharded_row(vocab_size, num_devices):
    devices = jax.devices()[:num_devices]
    mesh = jax.make_mesh((num_devices,), ("x",), axis_types=(AxisType.Auto,), devices=devices)
    row = np.random.default_rng(vocab_size).random((2, vocab_size), "f")
    return row, jax.device_put(row, NamedSharding(mesh, P(None, "x")))


@pytest.mark.parametrize(
    ("vocab_size", "num_devices"),
    [
        *((vocab_size, 8) for vocab_size in SHIPPED),
        *(slow(vocab_size, num_devices) for vocab_size in SHIPPED for num_devices in (2, 4)),
    ],
)
def test_the_sums_of_tiles_send_a_few_tiles_and_have_the_bits_of_one_device(vocab_size, num_devices):
    row, sharded = sharded_row(vocab_size, num_devices)
    compiled = jax.jit(tile_sums).lower(sharded).compile()
    assert max(collectives(compiled.as_text()), default=0) <= len(row) * 4 * TILE
    assert_same(compiled(sharded), jax.jit(tile_sums)(row))


def test_the_search_of_a_cutoff_sends_the_largest_logits_of_a_row():
    row, sharded = sharded_row(151_936, 8)
    # Top-k beyond the logits that are sorted, and top-p: all parts of the search are in the program.
    sampling = ss.SamplingParams(np.float32(0.7), np.int32(500), np.float32(0.9))
    compiled = jax.jit(lambda row: make_filter(row[:, None], sampling).cutoff).lower(sharded).compile()
    # The maxima of tiles of 32 logits, or 128 tiles of them.
    assert max(collectives(compiled.as_text())) <= len(row) * 1.01 * max(151_936 / TILE_WIDTH, NUM_LARGEST * TILE_WIDTH)
    assert_same(compiled(sharded), jax.jit(lambda row: make_filter(row[:, None], sampling).cutoff)(row))
