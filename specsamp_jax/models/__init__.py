"""Language models in Flax: the families, their caches and checkpoints, and adapters for any other module."""

from specsamp_jax.models.adapters import from_linen as from_linen
from specsamp_jax.models.adapters import from_nnx as from_nnx
from specsamp_jax.models.checkpoints import load_checkpoint as load_checkpoint
from specsamp_jax.models.checkpoints import load_module as load_module
from specsamp_jax.models.checkpoints import save_checkpoint as save_checkpoint
from specsamp_jax.models.llama import Llama as Llama
from specsamp_jax.models.llama import LlamaConfig as LlamaConfig
from specsamp_jax.models.vocab import vocab_size as vocab_size
from specsamp_jax.models.vocab import with_vocab_size as with_vocab_size
