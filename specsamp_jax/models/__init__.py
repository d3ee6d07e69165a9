"""Language models in Flax: the families, their caches and checkpoints, and adapters for any other module."""

from specsamp_jax.models.adapters import from_linen as from_linen
from specsamp_jax.models.adapters import from_nnx as from_nnx
from specsamp_jax.models.checkpoints import load_checkpoint as load_checkpoint
from specsamp_jax.models.checkpoints import load_module as load_module
from specsamp_jax.models.checkpoints import save_checkpoint as save_checkpoint
from specsamp_jax.models.llama import Llama as Llama
from specsamp_jax.models.llama import LlamaConfig as LlamaConfig
from specsamp_jax.models.whisper import Whisper as Whisper
from specsamp_jax.models.whisper import WhisperConfig as WhisperConfig
