"""Peak memory of a process that loads a large checkpoint: the size of the model, once."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from specsamp_jax.models import Llama, LlamaConfig, save_checkpoint
from specsamp_jax.models.decoder import checkpoint_layout

pytestmark = pytest.mark.optimised(False)

# 244 MB in bfloat16, of which the embedding and the head are 33 MB each and gate and up of a layer 12 MB.
CONFIG = LlamaConfig(16_000, 1024, 2816, num_hidden_layers=7, num_attention_heads=16, num_key_value_heads=16)
# The small one brings in all code and what tracing leaves behind.
LOAD = """
import json, sys
import jax
from specsamp_jax.models import load_checkpoint

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

small, large = sys.argv[1:]
load_checkpoint(small)
before = memory("VmRSS")
model = load_checkpoint(large)
# Not getrusage's, which begins with what the parent had when it made this process.
peak = memory("VmHWM")
num_bytes = sum(x.nbytes for x in jax.tree.leaves(model.params))
print(json.dumps({"peak": (peak - before) * 1024, "num_bytes": num_bytes}))
"""


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint written tensor by tensor, so that this process never holds all of it; deleted after the test."""
    module = nnx.eval_shape(lambda: Llama(CONFIG, rngs=nnx.Rngs(0)))
    shapes = {name: shape for slot in checkpoint_layout(module) for name, shape in slot.tensors.items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng, path = np.random.default_rng(0), tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in range(0, end, 1 << 22):
            # Every pattern below 1.0 in size is a number.
            file.write(rng.integers(0x3F80, size=min(1 << 21, (end - begin) // 2), dtype=np.uint16).tobytes())
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    yield tmp_path, end
    path.unlink()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads the process's memory where Linux tells it")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts what lies in the host's memory")
def test_a_checkpoint_is_in_memory_once(checkpoint):
    path, num_bytes = checkpoint
    small = path.parent / "small"
    module = Llama(LlamaConfig(8, 8, 8, 1, 1, 1), rngs=nnx.Rngs(0))
    save_checkpoint(small, module)
    run = subprocess.run([sys.executable, "-c", LOAD, small, path], check=True, capture_output=True, text=True)
    told, largest = json.loads(run.stdout), 2 * CONFIG.vocab_size * CONFIG.hidden_size
    assert told["num_bytes"] == num_bytes
    assert told["peak"] < num_bytes + largest + 12e6  # 1.19 times the weights; 279 MB were measured
