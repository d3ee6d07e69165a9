"""GPU kernels of speculative sampling: arrays in, arrays out. Knows JAX only."""

from pallas_kernels._config import MAX_DRAFTS as MAX_DRAFTS
from pallas_kernels._config import TILE as TILE
from pallas_kernels._launch import Filter as Filter
from pallas_kernels._launch import Flags as Flags
from pallas_kernels._sigmoid import SigmoidResult as SigmoidResult
from pallas_kernels._sigmoid import verify_sigmoid as verify_sigmoid
from pallas_kernels._token import TokenResult as TokenResult
from pallas_kernels._token import verify_token as verify_token
