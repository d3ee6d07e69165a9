"""GPU kernels of speculative sampling: arrays in, arrays out. Knows JAX only."""

from pallas_kernels._config import MAX_DRAFTS as MAX_DRAFTS
from pallas_kernels._sigmoid import verify_sigmoid as verify_sigmoid
from pallas_kernels._token import verify_token as verify_token
