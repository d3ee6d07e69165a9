"""How the work is spread: what is chosen, and that nothing is left out."""

import pytest

from pallas_kernels import _config as config


@pytest.mark.parametrize("vocab_size", [37, 1024, 32000, 50257, 151936, 256000, 1999999])
@pytest.mark.parametrize("batch_size", [1, 8, 64, 256, 4096])
@pytest.mark.parametrize("most", [1, 3, 8, 10])
def test_groups_hold_every_tile_once(vocab_size, batch_size, most):
    for chosen in (config.choose(batch_size, 4, vocab_size), config.choose_sigmoid(batch_size, vocab_size)):
        groups = config.groups(vocab_size, chosen.blocks, most, chosen.pairs)
        assert groups.size <= most
        assert groups.size == groups.pairs * groups.pair_size
        assert groups.pairs <= chosen.pairs
        # The last group ends with the last tile, and the first one lacks no more than a part of its own.
        assert groups.num_slots - groups.before == config.num_tiles(vocab_size)
        assert 0 <= groups.before < groups.size


@pytest.mark.parametrize("vocab_size", [37, 1024, 32000, 151936, 1999999])
@pytest.mark.parametrize("num_draft", [0, 1, 4, 8])
@pytest.mark.parametrize("reads_draft", [False, True])
def test_blocks_do_not_exceed_tiles_or_the_machine(vocab_size, num_draft, reads_draft):
    room = config.FINISHING * config.PROCESSORS
    for batch_size in (1, 7, 64, 131, 132, 500, 10_000):
        chosen = config.choose(batch_size, num_draft, vocab_size, reads_draft)
        assert 1 <= chosen.blocks <= config.num_tiles(vocab_size)
        assert chosen.blocks == 1 or chosen.blocks * batch_size <= room
        assert not chosen.early_exit or num_draft > 0


def test_early_exit_where_it_was_measured_to_be_faster():
    def early(*shape):
        chosen = config.choose(*shape)
        return chosen.blocks if chosen.early_exit else 0

    assert [early(256, num_draft, 151936) for num_draft in (1, 4, 8)] == [2, 2, 2]
    assert [early(batch_size, 8, 151936) for batch_size in (32, 64, 96, 128)] == [0, 8, 4, 4]
    assert [early(batch_size, 4, 151936) for batch_size in (1, 64, 128)] == [0, 0, 0]
    assert [early(64, 8, vocab_size) for vocab_size in (32000, 51864, 128256)] == [0, 0, 8]
    assert [early(256, num_draft, 151936, True) for num_draft in (2, 4, 8)] == [0, 2, 2]
