"""The contract of `Model`, one test per clause: the calls that a recording model gets, and the state between steps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tables

import specsamp_jax as ss
from specsamp_jax.decoding import model_call

pytestmark = pytest.mark.optimised(False)

KEY = jax.random.key(0)
PROMPT = np.array([[1, 2, 3], [2, 1, 1]])
LENGTHS = np.array([3, 1])
TABLE = tables.table(0)
K, NEW = 2, 6


class Recorder:
    """A table model that keeps the tokens, the positions and the `max_length` of its calls."""

    def __init__(self, table):
        self.calls = []
        self.max_lengths = []
        self.model = ss.Model(jnp.asarray(table), self.apply_fn, self.init_cache_fn)

    def apply_fn(self, table, tokens, positions, cache):
        jax.debug.callback(
            lambda *call: self.calls.append(tuple(map(np.asarray, call))), tokens, positions, ordered=True
        )
        return tables.apply_fn(table, tokens, positions, cache)

    def init_cache_fn(self, batch_size, max_length):
        self.max_lengths.append(max_length)
        return tables.init_cache_fn(batch_size, max_length)


def options(target, num_draft: int | ss.HeuristicNumDraft = K):
    return {"target": target, "draft": tables.model(tables.table(1)), "num_draft": num_draft}


def start(target, prompt=PROMPT, lengths=LENGTHS, new=NEW, num_draft: int | ss.HeuristicNumDraft = K):
    return ss.init(prompt, **options(target, num_draft), max_new_tokens=new, prompt_lengths=lengths)


@functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
def table_step(keys, state):
    return ss.step(keys, state, **options(tables.model(TABLE)))


def run(keys, state):
    """Steps until every row has finished."""
    while not state.finished.all():
        state, _ = table_step(keys, state)
    return state


def texts(state):
    return [row[:n].tolist() for row, n in zip(np.asarray(state.tokens), state.lengths, strict=True)]


@pytest.fixture(scope="module")
def recorded():
    """The calls of the prefill and of each step, and the states before the steps."""
    recorder = Recorder(TABLE)
    state = start(recorder.model)
    step = jax.jit(
        functools.partial(ss.step, **options(recorder.model)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    states = [state]
    while not states[-1].finished.all():
        states.append(step(KEY, states[-1])[0])
    # All rows have finished: one more step shows what is fed to them.
    states.append(step(KEY, states[-1])[0])
    jax.effects_barrier()
    return recorder, states


def test_padding_columns_are_token_0_at_positions_0_to_p_minus_1(recorded):
    tokens, positions = recorded[0].calls[0]
    assert tokens.tolist() == [[1, 2, 3], [2, 0, 0]]
    assert positions.tolist() == [[0, 1, 2]] * 2


def test_max_length_is_prompt_and_new_tokens_and_longest_draft(recorded):
    recorder, _ = recorded
    assert set(recorder.max_lengths) == {PROMPT.shape[1] + NEW + K}
    assert all(positions.max() < recorder.max_lengths[0] for _, positions in recorder.calls)
    several = Recorder(TABLE)
    start(several.model, num_draft=ss.HeuristicNumDraft(1, lengths=(1, 4)))
    assert set(several.max_lengths) == {PROMPT.shape[1] + NEW + 4}


@dataclasses.dataclass(frozen=True)
class DroppingCache:
    """The table model's cache, which drops positions past its end."""

    drops_positions = True

    def __call__(self, batch_size, max_length):
        return tables.init_cache_fn(batch_size, max_length)


def test_a_cache_that_drops_positions_has_no_slots_for_drafts_past_the_limit():
    target = ss.Model(jnp.asarray(TABLE), tables.apply_fn, DroppingCache())
    state = start(target)
    assert state.target_cache.shape == (2, PROMPT.shape[1] + NEW)
    assert state.tokens.shape == (2, PROMPT.shape[1] + NEW + K)
    expected = run(KEY, start(tables.model(TABLE)))
    step = jax.jit(
        functools.partial(ss.step, **options(target)), compiler_options={"xla_backend_optimization_level": 0}
    )
    while not state.finished.all():
        state, _ = step(KEY, state)
    assert texts(state) == texts(expected)


def test_the_first_step_reads_the_last_prompt_token_again(recorded):
    tokens, positions = recorded[0].calls[1]
    assert tokens[:, 0].tolist() == [3, 2]
    assert positions[:, 0].tolist() == [2, 0]


def test_positions_are_consecutive_and_begin_at_each_rows_last_token(recorded):
    recorder, states = recorded
    steps = recorder.calls[1:]
    assert len(steps) == len(states) - 1
    for state, (tokens, positions) in zip(states, steps, strict=False):
        lengths = np.asarray(state.lengths)
        assert positions.tolist() == (lengths[:, None] - 1 + np.arange(K + 1)).tolist()
        assert tokens[:, 0].tolist() == [row[-1] for row in texts(state)]


def test_finished_rows_keep_running_on_valid_tokens_and_gain_nothing(recorded):
    recorder, states = recorded
    assert states[-2].finished.all()
    tokens, positions = recorder.calls[-1]
    assert tokens.shape == (2, K + 1)
    assert np.all((tokens >= 0) & (tokens < tables.VOCAB))
    assert positions.max() < recorder.max_lengths[0]
    assert texts(states[-1]) == texts(states[-2])


def test_a_position_that_is_written_again_replaces_a_rejected_draft():
    # The drafts are nearly always wrong: with every step, positions are written again.
    keys = jax.random.split(KEY, 2)
    state = run(keys, start(tables.model(TABLE)))
    cache = np.asarray(state.target_cache)
    for row, text in zip(cache, texts(state), strict=True):
        # The last token was never fed.
        assert row[: len(text) - 1].tolist() == text[:-1]


def test_slots_after_a_position_do_not_change_what_is_emitted():
    keys = jax.random.split(KEY, 2)
    state = start(tables.model(TABLE))
    behind = jnp.arange(state.target_cache.shape[1]) >= state.lengths[:, None]
    spoilt = state._replace(target_cache=jnp.where(behind, 10**6, state.target_cache))
    assert texts(run(keys, spoilt)) == texts(run(keys, state))


def test_every_leaf_has_the_batch_first_so_that_a_row_is_refilled_by_indexing():
    keys = jax.random.split(KEY, 2)
    state = start(tables.model(TABLE))
    batch_sizes = {leaf.shape[0] for leaf in jax.tree.leaves(state)}
    assert batch_sizes == {2}
    old, _ = table_step(keys, state)
    new = start(tables.model(TABLE), np.array([[3, 3, 2]]), np.array([2]))
    mixed = jax.tree.map(lambda leaf, row: leaf.at[1].set(row[0]), old, new)
    alone = texts(run(keys[1:], new))
    undisturbed = texts(run(keys, old))
    assert texts(run(keys, mixed)) == [undisturbed[0], alone[0]]


def test_the_caller_may_set_limits():
    keys = jax.random.split(KEY, 2)
    state = start(tables.model(TABLE))
    long, short = (run(keys, state._replace(limits=state.limits - jnp.array([0, cut]))) for cut in (0, 4))
    assert (long.lengths - short.lengths).tolist() == [0, 4]
    assert texts(short) == [texts(long)[0], texts(long)[1][:-4]]


def test_the_caller_may_set_finished():
    keys = jax.random.split(KEY, 2)
    state = start(tables.model(TABLE))
    stopped, info = table_step(keys, state._replace(finished=jnp.array([False, True])))
    assert info.num_tokens[0] > 0
    assert info.num_tokens[1] == 0
    assert texts(stopped)[1] == [2]


@pytest.mark.parametrize("wanted", [[0, 2], [1, 0]])
def test_the_caller_may_set_num_draft(wanted):
    state = start(tables.model(TABLE))._replace(num_draft=jnp.array(wanted))
    _, info = table_step(jax.random.split(KEY, 2), state)
    assert info.num_drafted.tolist() == wanted


def test_shapes_of_outputs_are_remembered_by_shape_and_dtype_of_the_parameters():
    def shapes(table, width=3):
        return model_call.output_shapes(tables.model(table), (2, width), 8)

    assert shapes(TABLE)[0] is shapes(TABLE)[0]
    half = TABLE.astype(np.float16)
    assert shapes(half)[0].dtype == np.float16
    assert shapes(TABLE)[0].dtype == np.float32
    assert shapes(TABLE, width=4)[0] is not shapes(TABLE)[0]
