"""The choice of block sizes, and that groups of tiles leave none out."""

import dataclasses

import jax.numpy as jnp
import pytest

from pallas_kernels import block_trial, config, reading, scan
from pallas_kernels.types import ROUNDS


@pytest.mark.parametrize("vocab_size", [37, 1024, 32000, 50257, 151936, 256000, 1999999])
@pytest.mark.parametrize("batch_size", [1, 8, 64, 256, 4096])
@pytest.mark.parametrize("most", [1, 3, 8, 10])
def test_groups_hold_every_tile_once(vocab_size, batch_size, most):
    for choose in (config.token_config, config.sigmoid_config):
        chosen = dataclasses.replace(choose(batch_size, vocab_size), max_tiles=most)
        # float32: a thread has registers for half as many tiles, or for the few that always fit.
        groups = config.groups(vocab_size, [jnp.float32], chosen)
        assert groups.size <= max(most // 2, min(most, config.FEW_TILES))
        assert groups.size == groups.pairs * groups.pair_size
        assert groups.pairs <= chosen.pairs
        # The last group ends with the last tile, and the first one lacks no more than a part of its own.
        assert groups.num_slots - groups.before == config.num_tiles(vocab_size)
        assert 0 <= groups.before < groups.size


@pytest.mark.parametrize("vocab_size", [37, 1024, 32000, 151936, 1999999])
def test_blocks_do_not_exceed_tiles_and_fit_the_machine_unless_they_are_few(vocab_size):
    limit = config.EMITTING_BLOCKS * config.num_multiprocessors()
    for batch_size in (1, 7, 64, 131, 132, 500, 10_000):
        blocks = config.token_config(batch_size, vocab_size).blocks
        assert 1 <= blocks <= config.num_tiles(vocab_size)
        assert blocks <= config.FEWEST_BLOCKS or blocks * batch_size <= limit


def test_early_exit_where_it_was_measured_to_be_faster():
    def early(batch_size, num_draft, vocab_size=151936, dtypes=(jnp.bfloat16,)):
        return config.exits_early(batch_size, num_draft, vocab_size, list(dtypes))

    assert [early(256, num_draft) for num_draft in (0, 1, 2, 4, 8)] == [False, False, True, True, True]
    assert [early(batch_size, 4) for batch_size in (1, 64, 96, 128)] == [False, False, True, True]
    assert [early(64, num_draft) for num_draft in (4, 6, 8)] == [False, True, True]
    assert early(64, 4, dtypes=[jnp.float32])
    assert early(64, 4, dtypes=[jnp.bfloat16] * 2)


def test_early_exit_reads_several_chunks_per_block_where_it_was_measured_to_be_faster():
    def per_block(batch_size, vocab_size=151936, *, reads_draft=False):
        return config.early_exit_config(batch_size, vocab_size, reads_draft).chunks

    assert [per_block(batch_size) for batch_size in (64, 128, 256, 512)] == [1, 1, 3, 3]
    assert [per_block(batch_size, reads_draft=True) for batch_size in (64, 128)] == [1, 3]
    assert per_block(512, vocab_size=51864) == 1


def test_a_smaller_gpu_has_fewer_blocks(monkeypatch):
    monkeypatch.setattr(config, "num_multiprocessors", lambda: 66)
    assert config.token_config(16, 151936).blocks == 16


def test_the_block_rule_tries_fewer_rounds_at_once_in_small_batches():
    chosen = {batch_size: config.block_config(batch_size) for batch_size in (1, 8, 9, 33, 64, 4096)}
    assert [each.blocks * each.rounds for each in chosen.values()] == [16, 16, 32, 32, 32, 32]
    assert chosen[64].blocks == chosen[4096].blocks == 8
    assert all(each.blocks * each.rounds * reading.MAX_PASSES >= ROUNDS for each in chosen.values())


@pytest.mark.parametrize("num_slots", [1, 149, 250, 512, 513, 1024, 1955, 2048])
def test_the_rounds_that_a_block_tries_at_once_fit_its_registers(num_slots):
    rounds = block_trial.most_rounds(num_slots)
    assert rounds * config.to_lanes(num_slots) <= scan.MAX_LOADS * config.THREADS
    # With the fewest blocks the passes suffice for all rounds.
    assert rounds * config.FEWEST_BLOCKS * reading.MAX_PASSES >= ROUNDS


def test_the_block_rule_sums_few_rows_by_blocks_of_their_own_and_many_not():
    one, many = (config.block_sum_config(batch_size, 5, 151936) for batch_size in (1, 64))
    assert (one.row_parts, many.row_parts) == (5, 1)
    assert one.blocks * 5 <= config.EMITTING_BLOCKS * config.num_multiprocessors()
    assert many.blocks == config.block_sum_config(4096, 5, 151936).blocks == config.BLOCK_RULE_BLOCKS
    assert config.block_sum_config(4096, 5, 1024).blocks == 1
