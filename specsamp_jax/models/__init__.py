"""Language models in Flax: the families, their caches and checkpoints, and adapters for any other module."""

from specsamp_jax.models.adapters import from_linen as from_linen
from specsamp_jax.models.adapters import from_nnx as from_nnx
from specsamp_jax.models.checkpoints.folder import load_checkpoint as load_checkpoint
from specsamp_jax.models.checkpoints.folder import load_module as load_module
from specsamp_jax.models.checkpoints.folder import save_checkpoint as save_checkpoint
from specsamp_jax.models.checkpoints.generation_config import GenerationConfig as GenerationConfig
from specsamp_jax.models.checkpoints.generation_config import load_generation_config as load_generation_config
from specsamp_jax.models.checkpoints.generation_config import sampling_and_processor as sampling_and_processor
from specsamp_jax.models.checkpoints.logits_settings import LogitsSettings as LogitsSettings
from specsamp_jax.models.config import DecoderConfig as DecoderConfig
from specsamp_jax.models.gemma import Gemma as Gemma
from specsamp_jax.models.gemma import Gemma2 as Gemma2
from specsamp_jax.models.gemma import Gemma2Config as Gemma2Config
from specsamp_jax.models.gemma import GemmaConfig as GemmaConfig
from specsamp_jax.models.llama import Llama as Llama
from specsamp_jax.models.llama import LlamaConfig as LlamaConfig
from specsamp_jax.models.llama import Mistral as Mistral
from specsamp_jax.models.llama import MistralConfig as MistralConfig
from specsamp_jax.models.qwen import Qwen2 as Qwen2
from specsamp_jax.models.qwen import Qwen2Config as Qwen2Config
from specsamp_jax.models.qwen import Qwen3 as Qwen3
from specsamp_jax.models.qwen import Qwen3Config as Qwen3Config
from specsamp_jax.models.vocab import vocab_size as vocab_size
from specsamp_jax.models.vocab import with_vocab_size as with_vocab_size
from specsamp_jax.models.whisper.model import Whisper as Whisper
from specsamp_jax.models.whisper.model import WhisperConfig as WhisperConfig
