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

Call = tuple[Callable[..., Any], Callable[[int], tuple]]  # the timed function, and its arguments by index of the call


class Task(NamedTuple):
    """Inputs and settings of a comparison.

    Attributes:
      reference: Name of the contender whose time the others are divided by.
      sampling: Sampling parameters of target and draft.
      one_hot: Whether the drafter is deterministic, so that there are no draft logits.
    """

    reference: str
    sampling: ss.SamplingParams = ss.SamplingParams()
    one_hot: bool = False


PLAIN = Task("specsamp")
ONE_HOT = Task("specsamp_one_hot", one_hot=True)
FILTERS = Task("specsamp_filters", ss.SamplingParams(top_k=50, top_p=0.95))


class Sets(NamedTuple):
    """The rotated inputs of a case for a task, and keys for them."""

    case: Case
    task: Task
    inputs: list[Inputs]  # on the device
    keys: list[jax.Array]

    def pick(self, index: int) -> tuple[jax.Array, Inputs]:
        """The key and inputs of call `index`, which rotates through all of them."""
        return self.keys[index % len(self.keys)], self.inputs[index % len(self.inputs)]


def make_sets(case: Case, task: Task) -> Sets:
    """All inputs of a case; the logits are the same for all tasks."""
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
    """The parameters as arrays with one value per row, which are traced, not static."""
    return ss.SamplingParams(*(jnp.full(batch_size, value) for value in sampling))


def specsamp(sets: Sets) -> Call:
    """`verify`, reading all logits."""

    def verify(key, i):
        draft = ss.Draft(i.draft_tokens, None if sets.task.one_hot else i.draft_logits)
        return ss.verify(key, i.target_logits, draft)

    return jax.jit(verify), sets.pick


def specsamp_normalizers(sets: Sets) -> Call:
    """`verify`, with the normalizers that `sample` returned to the drafter."""

    def verify(key, i):
        draft = ss.Draft(i.draft_tokens, i.draft_logits, log_normalizers=i.log_normalizers)
        return ss.verify(key, i.target_logits, draft)

    return jax.jit(verify), sets.pick


def specsamp_arrays(sets: Sets) -> Call:
    """`verify` with sampling parameters that differ from row to row, or could."""

    def verify(key, i, sampling):
        return ss.verify(key, i.target_logits, ss.Draft(i.draft_tokens, i.draft_logits, sampling), sampling)

    sampling = arrays(sets.task.sampling, sets.case.batch_size)
    return jax.jit(verify), lambda index: (*sets.pick(index), sampling)


def specsamp_sigmoid(sets: Sets) -> Call:
    """The paper's approximation, which is not the target's distribution. Its log-probabilities would read all rows."""

    def verify(key, i):
        result = ss.verify_sigmoid(key, i.target_logits, ss.Draft(i.draft_tokens, i.draft_logits))
        return result.tokens, result.num_accepted

    return jax.jit(verify), sets.pick


def baseline(sets: Sets) -> Call:
    """The step with all softmaxes and residuals written to memory."""
    return jax.jit(lambda key, i: verify_baseline(key, *i[:3])), sets.pick


def read_once(sets: Sets) -> Call:
    """The floor: one maximum over all logits."""
    return jax.jit(lambda key, i: (i.target_logits.max(-1), i.draft_logits.max(-1))), sets.pick


def _peer(make_call: Callable[[Sets], Callable[..., Any]]) -> Callable[[Sets], Call]:
    def tpu_inference(sets: Sets) -> Call:
        """The peer's step, with the draft's probabilities and the bonus tokens computed outside the timed call."""

        @jax.jit
        def prepare(key, i):
            rows = (-1, sets.case.vocab_size)
            draft_logits = i.draft_logits.reshape(rows)
            if sets.task == FILTERS:
                draft_logits = keep(draft_logits, sets.task.sampling)
            bonus, _ = ss.sample(key, i.target_logits[:, -1], sets.task.sampling)
            probs = None if sets.task.one_hot else jax.nn.softmax(draft_logits)
            return i.draft_tokens.reshape(-1), probs, i.target_logits[:, :-1].reshape(rows), bonus

        # Computed beforehand: just before a call they would be in the cache, for this peer only.
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
    """One of `CALLS`, ready to run."""
    return jax_contender(name, *CALLS[name][1](sets))


def expected_accepted(sets: Sets) -> tuple[float, float]:
    """Mean and standard deviation of the accepted drafts per row, from exact acceptance probabilities."""

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
    if isinstance(result, dict):  # transformers: the tokens of each row
        return np.array([row + [-1] * (case.num_draft + 1 - len(row)) for row in result["tokens"]])
    if isinstance(result, tuple):  # a Verification, or what the baseline returns
        return np.asarray(result[0])
    # tpu-inference: K tokens of each row, then the bonus token of each row
    drafts, bonus = np.split(np.asarray(result), [case.batch_size * case.num_draft])
    return np.concatenate([drafts.reshape(-1, case.num_draft), bonus[:, None]], axis=1)


def check(contender: Contender, sets: Sets, expected: tuple[float, float] | None) -> float:
    """Returns the mean number of drafts that a contender accepts, after checking its results.

    Raises:
      ValueError: A result is not drafts, one more token of the vocabulary, and padding; or the mean is five
        standard errors from `expected`, a mean and the standard deviation of one row.
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
            raise ValueError(f"{contender.name} on {case.name}: emitted {tokens}, which does not begin as {drafts}")
        counts.append(num_accepted)
    mean = float(np.mean(counts))
    if expected is not None and abs(mean - expected[0]) > 5 * expected[1] / np.sqrt(np.size(counts)) + 1e-3:
        raise ValueError(f"{contender.name} on {case.name}: accepts {mean:.3f} drafts, not {expected[0]:.3f}")
    return mean
