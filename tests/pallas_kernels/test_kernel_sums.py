"""Running sums in shared memory, and what is chosen by them, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import _launch as launching
from pallas_kernels import _rows as rows
from pallas_kernels import _sums as summing

pytestmark = pytest.mark.slow


def search(weights, shares):
    """Running sums of [n] weights, and the first index beyond each share of their sum."""
    n = weights.shape[0]

    def body(inputs, outputs, room, barrier):
        del barrier
        summing.clear_before(room)
        found = summing.running_sums(room, plgpu.load(inputs[0], layout=rows.singles(n)))
        outputs[0][...] = found.sums
        for i in range(len(shares)):
            outputs[1][i] = summing.first_beyond(found, inputs[1][i] * found.total)

    made = [jax.ShapeDtypeStruct((n,), jnp.float32), jax.ShapeDtypeStruct((len(shares),), jnp.int32)]
    room = launching.room_to_search(n)
    return launching.launch(body, [weights, jnp.array(shares, jnp.float32)], made, {"sequence": 1}, shared=room)


# 2,048 tiles are those of the largest vocabulary allowed.
@pytest.mark.parametrize("n", [128, 256, 384, 1024, 2048])
def test_equals_numpy(interpreted, n):
    weights = np.random.default_rng(n).integers(0, 3, n).astype(np.float32)
    weights[[0, -1]] = 0
    shares = 0.0, 0.25, 0.6, 1 - 2.0**-24, 1.0
    with interpreted():
        sums, found = jax.block_until_ready(search(jnp.asarray(weights), shares))
    # Sums of small whole numbers are exact.
    expected = np.cumsum(weights)
    np.testing.assert_array_equal(sums, expected)
    last = np.flatnonzero(weights)[-1]
    beyond = [np.flatnonzero(expected > np.float32(share) * expected[-1]) for share in shares]
    assert found.tolist() == [places[0] if len(places) else last for places in beyond]
