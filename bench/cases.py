"""Named benchmark shapes, and random inputs of these shapes with logits like those of language models."""

from typing import Any, NamedTuple

import numpy as np

VOCABULARIES = {"whisper": 51_864, "llama2": 32_000, "llama3": 128_256, "qwen": 151_936, "gemma": 256_000}
NUM_DRAFTS = (4, 5, 8)
BATCH_SIZES = (1, 8, 32)

# Standard deviation of the target logits. It gives an entropy of 2 to 4 nats, as language models have.
TARGET_SPREAD = 4.0
# s in q ~ p exp(s n) with normal n. The acceptance rate is then about 2 Phi(-s / 2), here .8.
DRAFT_NOISE = 0.507
# Calls rotate through inputs of this total size, four times the L2 of an H100, so that no call finds them in a cache.
ROTATED_BYTES = 256 * 2**20


class Case(NamedTuple):
    """Shape of a benchmark: K+1 target rows and K draft rows per sequence."""

    model: str
    vocab_size: int
    num_draft: int
    batch_size: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """Name of the case, such as "qwen-K5-B1"."""
        return f"{self.model}-K{self.num_draft}-B{self.batch_size}"

    @property
    def num_bytes(self) -> int:
        """Bytes of all logits. A step that is not given the drafter's normalizers reads each of them at least once."""
        return self.batch_size * (2 * self.num_draft + 1) * self.vocab_size * np.dtype(self.dtype).itemsize

    @property
    def num_sets(self) -> int:
        """Number of sets of inputs to rotate through."""
        return max(2, -(-ROTATED_BYTES // self.num_bytes))


CASES = {
    case.name: case
    for model, vocab_size in VOCABULARIES.items()
    for num_draft in NUM_DRAFTS
    for batch_size in BATCH_SIZES
    for case in [Case(model, vocab_size, num_draft, batch_size)]
}


class Inputs(NamedTuple):
    """One set of inputs, as NumPy or JAX arrays. The draft tokens are sampled from the draft logits."""

    target_logits: Any  # [B, K+1, V]
    draft_logits: Any  # [B, K, V]
    draft_tokens: Any  # [B, K]
    log_normalizers: Any  # [B, K]


def make_inputs(case: Case, seed: int) -> Inputs:
    """Random inputs of a case. The draft logits are the target logits plus noise."""
    rng = np.random.default_rng(seed)
    shape = case.batch_size, case.num_draft + 1, case.vocab_size
    target = TARGET_SPREAD * rng.standard_normal(shape, np.float32)
    draft = target[:, :-1] + DRAFT_NOISE * rng.standard_normal(target[:, :-1].shape, np.float32)
    target, draft = target.astype(case.dtype), draft.astype(case.dtype)

    rows = draft.astype(np.float32).reshape(-1, case.vocab_size)
    largest = rows.max(-1)
    tokens, normalizers = np.empty(len(rows), np.int32), np.empty(len(rows), np.float32)
    for i, row in enumerate(rows):
        running = np.cumsum(np.exp(row - largest[i]), dtype=np.float64)
        tokens[i] = np.searchsorted(running, rng.random() * running[-1], side="right")
        normalizers[i] = largest[i] + np.log(running[-1])
    drafted = case.batch_size, case.num_draft
    return Inputs(target, draft, tokens.reshape(drafted), normalizers.reshape(drafted))
