"""Temporary memory of the verification step compiled for a TPU; needs libtpu (`pip install libtpu`) but no TPU.

Prints the bytes of temporaries of each program at B 64, K 4, V 151,936, bfloat16, and for comparison the bytes of one
float32 array [B, V].
"""

import importlib.util
import os

BATCH_SIZE, NUM_DRAFT, VOCAB_SIZE = 64, 4, 151_936


def main() -> None:
    if importlib.util.find_spec("libtpu") is None:
        print("libtpu is not installed (pip install libtpu): nothing is compiled.")
        return
    # Without this, libtpu asks a metadata server about a TPU.
    os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1")
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    import specsamp_jax as ss

    topology = topologies.get_topology_desc("v6e:2x2", platform="tpu")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])

    def shape(*sizes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=device)

    def compiled(sampling):
        def verify(keys, target, tokens, logits):
            draft = ss.Draft(tokens, logits, sampling)
            return ss.verify(keys, target, draft, sampling, implementation="xla")

        return jax.jit(verify).lower(*arguments).compile()

    arguments = (
        shape(BATCH_SIZE, dtype=jax.random.key(0).dtype),
        shape(BATCH_SIZE, NUM_DRAFT + 1, VOCAB_SIZE),
        shape(BATCH_SIZE, NUM_DRAFT, dtype=jnp.int32),
        shape(BATCH_SIZE, NUM_DRAFT, VOCAB_SIZE),
    )
    print(f"one float32 array [B, V]: {BATCH_SIZE * VOCAB_SIZE * 4 / 1e6:.1f} MB")
    for name, sampling in (
        ("no filter", None),
        ("temperature .7, top-k 20, top-p .8", ss.SamplingParams(0.7, 20, 0.8)),
        ("top-p .95", ss.SamplingParams(1.0, 0, 0.95)),
    ):
        memory = compiled(sampling).memory_analysis()
        num_bytes = "unknown" if memory is None else f"{memory.temp_size_in_bytes / 1e6:.1f} MB"
        print(f"verify, {name}: {num_bytes}", flush=True)


if __name__ == "__main__":
    main()
