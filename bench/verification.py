"""Contenders of the verification benchmark, their calls, and the check that their results are equivalent."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from baseline import verify_baseline
from cases import Case, Inputs, make_inputs
from peers import tpu_inference
from timing import Contender, jax_contender

import specsamp_jax as ss

Call = tuple[Callable[..., Any], Callable[[int], tuple]]  # the timed function; its arguments for the i-th call


class Task(NamedTuple):
    """Inputs and settings of a comparison.

    Attributes:
      reference: Name of the contender whose time the others are divided by.
      sampling: Sampling parameters of target and draft.
      one_hot: Whether the drafter is deterministic. The contenders then get no draft logits.
    """

    reference: str
    sampling: ss.SamplingParams = ss.SamplingParams()
    one_hot: bool = False


PLAIN = Task("specsamp")
ONE_HOT = Task("specsamp_one_hot", one_hot=True)
FILTERS = Task("specsamp_filters", ss.SamplingParams(top_k=50, top_p=0.95))


class Sets(NamedTuple):
    """The inputs of a case for a task, through which the calls rotate, and their keys."""

    case: Case
    task: Task
    inputs: list[Inputs]  # on the device
    keys: list[jax.Array]

    def pick(self, index: int) -> tuple[jax.Array, Inputs]:
        """The key and the inputs of call number `index`."""
        return self.keys[index % len(self.keys)], self.inputs[index % len(self.inputs)]


def make_sets(case: Case, task: Task) -> Sets:
    """All inputs of a case. Tasks share the logits; with filters the drafts are sampled again."""
    inputs = [Inputs(*map(jnp.asarray, make_inputs(case, seed))) for seed in range(case.num_sets)]
    keys = list(jax.random.split(jax.random.key(0), 4 * len(inputs)))

    @jax.jit
    def redraw(key, i):
        rows = i.draft_logits.reshape(-1, case.vocab_size)
        tokens, normalizers = (x.reshape(i.draft_tokens.shape) for x in ss.sample(key, rows, task.sampling))
        return i._replace(draft_tokens=tokens, log_normalizers=normalizers)

    if task == FILTERS:
        inputs = [redraw(key, i) for key, i in zip(keys, inputs, strict=False)]
    return Sets(case, task, inputs, keys)


def arrays(sampling: ss.SamplingParams, batch_size: int) -> ss.SamplingParams:
    """The parameters as arrays with one value per row, which a compiled program treats as data."""
    return ss.SamplingParams(*(jnp.full(batch_size, value) for value in sampling))


def specsamp(sets: Sets) -> Call:
    """`verify` without normalizers, so that it reads all logits."""

    def verify(key, i):
        draft = ss.Draft(i.draft_tokens, None if sets.task.one_hot else i.draft_logits)
        return ss.verify(key, i.target_logits, draft)

    return jax.jit(verify), sets.pick


def specsamp_normalizers(sets: Sets) -> Call:
    """`verify` with the draft's log-normalizers, which `sample` returned to the drafter."""

    def verify(key, i):
        draft = ss.Draft(i.draft_tokens, i.draft_logits, log_normalizers=i.log_normalizers)
        return ss.verify(key, i.target_logits, draft)

    return jax.jit(verify), sets.pick


def specsamp_arrays(sets: Sets) -> Call:
    """`verify` with one value of each sampling parameter per row."""

    def verify(key, i, sampling):
        return ss.verify(key, i.target_logits, ss.Draft(i.draft_tokens, i.draft_logits, sampling), sampling)

    sampling = arrays(sets.task.sampling, sets.case.batch_size)
    return jax.jit(verify), lambda index: (*sets.pick(index), sampling)


def specsamp_sigmoid(sets: Sets) -> Call:
    """`verify_sigmoid`, an approximation. Its log-probabilities are left out: they would read all rows."""

    def verify(key, i):
        result = ss.verify_sigmoid(key, i.target_logits, ss.Draft(i.draft_tokens, i.draft_logits))
        return result.tokens, result.num_accepted

    return jax.jit(verify), sets.pick


def baseline(sets: Sets) -> Call:
    """`verify_baseline`, which writes all softmaxes and residuals to memory."""
    return jax.jit(lambda key, i: verify_baseline(key, *i[:3])), sets.pick


def read_once(sets: Sets) -> Call:
    """The floor for the time: one maximum over all logits."""
    return jax.jit(lambda key, i: (i.target_logits.max(-1), i.draft_logits.max(-1))), sets.pick


def _peer(make_call: Callable[[Sets], Callable[..., Any]]) -> Callable[[Sets], Call]:
    def tpu_inference(sets: Sets) -> Call:
        """tpu-inference's step; the draft probabilities and the bonus tokens are computed outside the timed call."""

        @jax.jit
        def prepare(key, i):
            rows = (-1, sets.case.vocab_size)
            draft_logits = i.draft_logits.reshape(rows)
            if sets.task == FILTERS:
                draft_logits = keep(draft_logits, sets.task.sampling)
            bonus, _ = ss.sample(key, i.target_logits[:, -1], sets.task.sampling)
            probs = None if sets.task.one_hot else jax.nn.softmax(draft_logits)
            return i.draft_tokens.reshape(-1), probs, i.target_logits[:, :-1].reshape(rows), bonus

        # Prepared for all inputs at once: computed just before a call, they would be in the cache for this peer only.
        prepared = [prepare(key, i) for key, i in zip(sets.keys, sets.inputs, strict=False)]
        return make_call(sets), lambda index: (sets.pick(index)[0], *prepared[index % len(prepared)])

    return tpu_inference


def keep(logits: jax.Array, sampling: ss.SamplingParams) -> jax.Array:
    """Logits after top-k and then top-p, by sorting."""
    order = jnp.argsort(logits, axis=-1, descending=True)
    sorted_ = jnp.take_along_axis(logits, order, axis=-1)
    sorted_ = jnp.where(jnp.arange(logits.shape[-1]) < sampling.top_k, sorted_, -jnp.inf)
    probs = jax.nn.softmax(sorted_)
    sorted_ = jnp.where(jnp.cumsum(probs, axis=-1) - probs < sampling.top_p, sorted_, -jnp.inf)
    return jnp.put_along_axis(logits, order, sorted_, axis=-1, inplace=False)


def _whole(sets: Sets) -> Callable[..., Any]:
    return tpu_inference.rejection_sampler(sets.case.batch_size, sets.case.num_draft, sets.task.sampling)


def _rejection_only(sets: Sets) -> Callable[..., Any]:
    return tpu_inference.rejection_sample(sets.case.batch_size, sets.case.num_draft)


CALLS: dict[str, tuple[Task, Callable[[Sets], Call]]] = {
    "specsamp": (PLAIN, specsamp),
    "specsamp_normalizers": (PLAIN, specsamp_normalizers),
    "specsamp_array_sampling": (PLAIN, specsamp_arrays),
    "specsamp_sigmoid": (PLAIN, specsamp_sigmoid),
    "baseline": (PLAIN, baseline),
    "read_once": (PLAIN, read_once),
    "specsamp_one_hot": (ONE_HOT, specsamp),
    "specsamp_filters": (FILTERS, specsamp_arrays),
}
if tpu_inference.is_installed():
    CALLS |= {
        "tpu_inference": (PLAIN, _peer(_whole)),
        "tpu_inference_rejection_only": (PLAIN, _peer(_rejection_only)),
        "tpu_inference_one_hot": (ONE_HOT, _peer(_whole)),
        "tpu_inference_filters": (FILTERS, _peer(_whole)),
    }


def contender(name: str, sets: Sets) -> Contender:
    """The contender of this name in `CALLS`, ready to run."""
    return jax_contender(name, *CALLS[name][1](sets))


def expected_accepted(sets: Sets) -> tuple[float, float]:
    """Mean and standard deviation of the number of accepted drafts per row, from the acceptance probabilities."""

    @jax.jit
    def accept_prob(i):
        params = sets.task.sampling
        soft = ss.Draft(i.draft_tokens, i.draft_logits, params)
        draft = ss.Draft(i.draft_tokens) if sets.task.one_hot else soft
        return ss.verify(sets.keys[0], i.target_logits, draft, params).accept_prob

    at_least = np.concatenate([np.cumprod(accept_prob(i), axis=1) for i in sets.inputs])
    mean = at_least.sum(1).mean()
    # E[n^2] is the sum over i of (2 i - 1) P(n >= i).
    square = (at_least * (2 * np.arange(sets.case.num_draft) + 1)).sum(1).mean()
    return float(mean), float(np.sqrt(square - mean**2))


def emitted(result: Any, case: Case) -> np.ndarray:
    """The result of a contender as tokens `[B, K+1]`, padded with -1."""
    if isinstance(result, dict):  # transformers: a list of tokens per row
        return np.array([row + [-1] * (case.num_draft + 1 - len(row)) for row in result["tokens"]])
    if isinstance(result, tuple):  # a Verification, or the baseline's tuple
        return np.asarray(result[0])
    # tpu-inference: K tokens per row for all rows, then one bonus token per row
    drafts, bonus = np.split(np.asarray(result), [case.batch_size * case.num_draft])
    return np.concatenate([drafts.reshape(-1, case.num_draft), bonus[:, None]], axis=1)


def check(contender: Contender, sets: Sets, expected: tuple[float, float] | None) -> float:
    """Checks a contender's results; returns its mean number of accepted drafts per row.

    Args:
      contender: The contender.
      sets: Its inputs.
      expected: Mean and standard deviation of the accepted drafts of one row; None skips this check.

    Raises:
      ValueError: If a row is not accepted drafts, one more token of the vocabulary, then padding; or if the mean is
        more than five standard errors from the expected one.
    """
    case, counts = sets.case, []
    _, results = contender.run_fn(range(len(sets.keys)))
    for index, result in enumerate(results):
        tokens, drafts = emitted(result, case), np.asarray(sets.pick(index)[1].draft_tokens)
        valid = (tokens >= 0) & (tokens < case.vocab_size)
        num_accepted = valid.sum(1) - 1
        position = np.arange(case.num_draft + 1)
        laid_out = valid == (position <= num_accepted[:, None])
        copied = (tokens[:, :-1] == drafts) | (position[:-1] >= num_accepted[:, None])
        if not (tokens.shape == (*drafts.shape[:1], position.size) and valid.any(1).all() and laid_out.all()):
            raise ValueError(
                f"{contender.name} on {case.name}: tokens must be drafts, one more token, and padding; got {tokens}"
            )
        if not copied.all():
            raise ValueError(f"{contender.name} on {case.name}: tokens must begin with {drafts}; got {tokens}")
        counts.append(num_accepted)
    mean = float(np.mean(counts))
    if expected is not None and abs(mean - expected[0]) > 5 * expected[1] / np.sqrt(np.size(counts)) + 1e-3:
        raise ValueError(
            f"{contender.name} on {case.name}: must accept {expected[0]:.3f} drafts on average; got {mean:.3f}"
        )
    return mean
