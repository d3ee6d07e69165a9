"""Exact, batched speculative sampling in JAX: the verification step and the decoding loop."""

from specsamp_jax._types import DEGENERATE_DRAFT as DEGENERATE_DRAFT
from specsamp_jax._types import DEGENERATE_TARGET as DEGENERATE_TARGET
from specsamp_jax._types import EMPTY_RESIDUAL as EMPTY_RESIDUAL
from specsamp_jax._types import PAD_TOKEN as PAD_TOKEN
from specsamp_jax._types import CoupledNoise as CoupledNoise
from specsamp_jax._types import Draft as Draft
from specsamp_jax._types import Generation as Generation
from specsamp_jax._types import Model as Model
from specsamp_jax._types import SamplingParams as SamplingParams
from specsamp_jax._types import Stats as Stats
from specsamp_jax._types import Verification as Verification
from specsamp_jax.certificate.checks import certify as certify
from specsamp_jax.certificate.report import Certificate as Certificate
from specsamp_jax.certificate.report import Check as Check
from specsamp_jax.decoding.confidence import ConfidenceDrafter as ConfidenceDrafter
from specsamp_jax.decoding.costs import measure_goodput as measure_goodput
from specsamp_jax.decoding.drafters import Drafter as Drafter
from specsamp_jax.decoding.drafters import ModelDrafter as ModelDrafter
from specsamp_jax.decoding.drafters import NGramDrafter as NGramDrafter
from specsamp_jax.decoding.generate import generate as generate
from specsamp_jax.decoding.generate import stream as stream
from specsamp_jax.decoding.goodput import GoodputNumDraft as GoodputNumDraft
from specsamp_jax.decoding.num_draft import HeuristicNumDraft as HeuristicNumDraft
from specsamp_jax.decoding.state import DecodeState as DecodeState
from specsamp_jax.decoding.state import StepInfo as StepInfo
from specsamp_jax.decoding.step import init as init
from specsamp_jax.decoding.step import step as step
from specsamp_jax.rules.calibration import CalibratedRule as CalibratedRule
from specsamp_jax.rules.calibration import Calibration as Calibration
from specsamp_jax.rules.calibration import verify_calibrated as verify_calibrated
from specsamp_jax.rules.verify import verify as verify
from specsamp_jax.rules.verify import verify_block as verify_block
from specsamp_jax.rules.verify import verify_coupled as verify_coupled
from specsamp_jax.rules.verify import verify_sigmoid as verify_sigmoid
from specsamp_jax.sampling.atoms import accept_prob as accept_prob
from specsamp_jax.sampling.atoms import acceptance_rate as acceptance_rate
from specsamp_jax.sampling.atoms import expected_num_tokens as expected_num_tokens
from specsamp_jax.sampling.atoms import residual_logits as residual_logits
from specsamp_jax.sampling.draw import sample as sample
from specsamp_jax.sampling.gumbel import sample_coupled as sample_coupled

__version__ = "0.1.0"

__all__ = [
    "DEGENERATE_DRAFT",
    "DEGENERATE_TARGET",
    "EMPTY_RESIDUAL",
    "PAD_TOKEN",
    "CalibratedRule",
    "Calibration",
    "Certificate",
    "Check",
    "ConfidenceDrafter",
    "CoupledNoise",
    "DecodeState",
    "Draft",
    "Drafter",
    "Generation",
    "GoodputNumDraft",
    "HeuristicNumDraft",
    "Model",
    "ModelDrafter",
    "NGramDrafter",
    "SamplingParams",
    "Stats",
    "StepInfo",
    "Verification",
    "accept_prob",
    "acceptance_rate",
    "certify",
    "expected_num_tokens",
    "generate",
    "init",
    "measure_goodput",
    "residual_logits",
    "sample",
    "sample_coupled",
    "step",
    "stream",
    "verify",
    "verify_block",
    "verify_calibrated",
    "verify_coupled",
    "verify_sigmoid",
]
