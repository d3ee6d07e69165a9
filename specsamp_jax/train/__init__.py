"""Training with optax: a model on text, and a drafter on its target's distribution."""

from specsamp_jax.train.distill import Options as Options
from specsamp_jax.train.distill import distill_speech as distill_speech
from specsamp_jax.train.distill import distill_text as distill_text
from specsamp_jax.train.drafters import layers_of as layers_of
from specsamp_jax.train.drafters import smaller_config as smaller_config
from specsamp_jax.train.folder import Report as Report
from specsamp_jax.train.loop import Progress as Progress
from specsamp_jax.train.losses import distillation_loss as distillation_loss
from specsamp_jax.train.losses import fit as fit
from specsamp_jax.train.losses import kl_divergence as kl_divergence
from specsamp_jax.train.losses import model_loss as model_loss
from specsamp_jax.train.losses import next_token_loss as next_token_loss
from specsamp_jax.train.losses import random_windows as random_windows
from specsamp_jax.train.losses import text_logits as text_logits
from specsamp_jax.train.losses import total_variation as total_variation
