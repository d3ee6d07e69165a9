"""tpu-inference's rejection sampler, from the files that fetch_tpu_inference.sh unpacked, on the JAX at hand.

The package itself imports vLLM and TPU libraries. Of those the sampler needs one name, that of the mesh axis which
carries the batch, so the modules it imports are stood in for and its own three files are run as they are.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp

FOLDER = Path(__file__).parents[2] / ".work" / "peers" / "tpu-inference"


def is_installed() -> bool:
    """Whether the files are there."""
    return (FOLDER / "VERSION").exists()


def version() -> str:
    return (FOLDER / "VERSION").read_text().strip()


class _AxisName:
    ATTN_DATA = "data"  # what the package takes unless its environment says otherwise


_STAND_INS = {
    "tpu_inference.layers.common.sharding": {"ShardingAxisName": _AxisName},
    "tpu_inference.runner.input_batch": {"InputBatch": object},
    "tpu_inference.utils": {"device_array": None},
}
_FILES = {
    "tpu_inference.layers.common.binary_search": "binary_search.py",
    "tpu_inference.layers.jax.sample.sampling_metadata": "sampling_metadata.py",
    "tpu_inference.layers.jax.sample.rejection_sampler": "rejection_sampler.py",
}


def _load() -> tuple[ModuleType, ModuleType]:
    """Its modules sampling_metadata and rejection_sampler."""
    if "tpu_inference" not in sys.modules:
        for name in (*_STAND_INS, *_FILES):
            parts = name.split(".")[:-1]
            for i in range(len(parts)):
                package = ModuleType(".".join(parts[: i + 1]))
                package.__path__ = []
                sys.modules.setdefault(package.__name__, package)
        for name, attributes in _STAND_INS.items():
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(attributes)
        for name, file in _FILES.items():
            spec = importlib.util.spec_from_file_location(name, FOLDER / file)
            sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
    _, metadata, sampler = (sys.modules[name] for name in _FILES)
    return metadata, sampler


def rejection_sampler(batch_size: int, num_draft: int, sampling):
    """`(key, draft_tokens [B K], draft_probs [B K, V] | None, target_logits [B K, V], bonus_tokens [B]) -> tokens`.

    The package's own call and its own jit. It flattens sequences, applies temperature, top-k and top-p of `sampling`
    to the target, and is handed the draft's probabilities and the bonus tokens ready-made. Tokens are `[B K + B]`:
    the drafts' places, then the bonus.
    """
    metadata, module = _load()
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    sampler = module.RejectionSampler(jax.make_mesh((1, 1), ("data", "model"), axis_types))
    params = metadata.TPUSupportedSamplingMetadata(
        temperature=jnp.full(batch_size, sampling.temperature, jnp.float32),
        top_k=jnp.full(batch_size, sampling.top_k, jnp.int32),
        top_p=jnp.full(batch_size, sampling.top_p, jnp.float32),
        do_sampling=True,
    )
    num_drafts = jnp.full(batch_size, num_draft, jnp.int32)

    def call(key, draft_tokens, draft_probs, target_logits, bonus_tokens):
        return sampler(draft_tokens, num_drafts, draft_probs, target_logits, bonus_tokens, params, key)

    return call


def rejection_sample(batch_size: int, num_draft: int):
    """As `rejection_sampler`, less its search for a top-k and a top-p that are off: softmax and rejection alone."""
    _, module = _load()
    num_drafts = jnp.full(batch_size, num_draft, jnp.int32)

    @jax.jit
    def call(key, draft_tokens, draft_probs, target_logits, bonus_tokens):
        target_probs = jax.nn.softmax(target_logits)
        return module.rejection_sample(draft_tokens, num_drafts, draft_probs, target_probs, bonus_tokens, True, key=key)

    return call
