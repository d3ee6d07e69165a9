"""The checks of a verification rule, on inputs whose exact results are enumerated."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from specsamp_jax import _checks
from specsamp_jax._rank_promotion import allow_rank_promotion
from specsamp_jax._types import PAD_TOKEN, Draft, SamplingParams, Verification
from specsamp_jax.certificate import boundary, law
from specsamp_jax.certificate.report import FALSE_ALARM, Certificate, Check, check_law, chi_square, normal_p_value
from specsamp_jax.sampling.draw import sample

VerifyFn = Callable[..., Any]
DraftFn = Callable[..., Any]

BATCH, NUM_BATCHES = 512, 64
LARGE_VOCAB, LARGE_BATCH, LARGE_NUM_BATCHES = 1200, 128, 128
FILTERED = SamplingParams(0.8, 3, 0.95, 0.05)


@allow_rank_promotion
def certify(
    verify_fn: VerifyFn,
    *,
    draft_fn: DraftFn = sample,
    checks: Sequence[str] | None = None,
    seed: int = 0,
) -> Certificate:
    """Returns a certificate of a verification rule: whether its texts have the target's distribution, and how it fails.

    Laws of texts of three tokens (four in the vocabulary, two drafts) are enumerated in float64 and held against 32,768
    draws by chi-square; so is the first token at a vocabulary of 1,200. Other checks look at single rows. The checks:

    - "form": drafts that count as accepted are the ones that are emitted; one token follows, then -1.
    - "sampled", "filtered", "ragged", "deterministic": the law, with drafts drawn by `draft_fn`; with temperature,
      top-k, top-p and min-p; with rows that draft fewer tokens; with drafts that come without logits.
    - "same key": the law if the drafts were drawn with the key that the rule gets.
    - "greedy rows": half of a batch is greedy. Its rows emit the target's first largest logits, the others keep the
      law.
    - "large": the law of the first token at the large vocabulary.
    - "acceptance": no exact rule accepts the first draft more often than with probability sum min(p, q).
    - "rows": neighbouring rows are independent, and other inputs in one leave the other's bits as they are.
    - "keys": one key gives one result, and another key another.
    - "boundary": no token of probability zero is emitted if all random bits are 0, or all 1. The rule gets keys of an
      own implementation, so this reaches rules that draw with `jax.random` alone.

    A rule that does not support something raises NotImplementedError there; the check then says so and does not count.
    The rule fails each law with probability `FALSE_ALARM` = 1e-5 although it is exact. `checks` that pass are evidence,
    not proof: distances below the upper end of the interval go unnoticed.

    Args:
      verify_fn: A function with the first four parameters of `verify`. Of its result `tokens` and `num_accepted` are
        read.
      draft_fn: Draws the drafts: a function with the signature of `sample`, whose second result is not used.
      checks: Names of the checks to run. None: all.
      seed: Of the inputs and the keys.

    Raises:
      ValueError: A name of `checks` is unknown or there is none, a rule is no function, or `seed` is not from 0 to
        2**31 - 1.

    Example:
      >>> import specsamp_jax as ss
      >>> certificate = ss.certify(ss.verify, checks=["boundary"])
      >>> certificate.passed, [check.name for check in certificate.checks]
      (True, ['boundary, all bits 0', 'boundary, all bits 1'])
    """
    for name, fn in (("verify_fn", verify_fn), ("draft_fn", draft_fn)):
        if not callable(fn):
            raise ValueError(f"{name} must be a function, such as specsamp_jax.verify or sample; got {fn!r}.")
    _checks.count("seed", seed, 0)
    if checks is not None and (isinstance(checks, str) or not isinstance(checks, Sequence) or not checks):
        raise ValueError(f"checks must be None, or a list of at least one of {', '.join(CHECKS)}; got {checks!r}.")
    unknown = set(checks or ()) - set(CHECKS)
    if unknown:
        raise ValueError(f"checks must be among {', '.join(CHECKS)}; got {', '.join(sorted(unknown))}.")
    subject = _Subject(verify_fn, draft_fn, seed)
    found = []
    for name in CHECKS if checks is None else checks:
        try:
            found += CHECKS[name](subject)
        except NotImplementedError as error:
            found.append(Check(name, None, f"not implemented by the rule: {error}"))
    return Certificate(tuple(found))


class _Subject:
    """A rule with its compiled programs and inputs."""

    def __init__(self, verify_fn: VerifyFn, draft_fn: DraftFn, seed: int):
        self.verify_fn, self.draft_fn, self.seed = verify_fn, draft_fn, seed
        self.target, self.draft = law.table(seed + 1, 1.5), law.table(seed + 2, 1.0)
        self.key = jax.random.key(seed)
        self.small = jax.jit(functools.partial(_small, verify_fn, draft_fn))
        self.certain = jax.jit(functools.partial(_small, verify_fn, None))

    @functools.cached_property
    def sampled(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draws under temperature 1 without filters, which several checks read."""
        return self.run(self.small)

    def run(
        self,
        program: Callable[..., Any],
        sampling: Sequence[Any] = SamplingParams(),
        *,
        keys: tuple[int, int] = (0, 1),
        same_draft_key: bool = False,
        num_drafts: np.ndarray | None = None,
        temperature: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns the emitted tokens `[N, K + 1]`, the counts of accepted drafts `[N]`, and the drafts `[N, K]`.

        `keys` number the streams of keys for drafts and verification.
        """
        draft_keys, verify_keys = (
            jax.random.split(jax.random.fold_in(self.key, number), NUM_BATCHES) for number in keys
        )
        if same_draft_key:
            draft_keys = jnp.broadcast_to(draft_keys[0], draft_keys.shape)
        types = jnp.float32, jnp.int32, jnp.float32, jnp.float32
        fields = (jnp.full(BATCH, value, dtype) for value, dtype in zip(sampling, types, strict=True))
        rows = SamplingParams(*fields)
        if temperature is not None:
            rows = rows._replace(temperature=jnp.asarray(temperature, jnp.float32))
        count = np.full(BATCH, law.NUM_DRAFT) if num_drafts is None else num_drafts
        results = program(draft_keys, verify_keys, self.target, self.draft, rows, jnp.asarray(count, jnp.int32))
        tokens, accepted, drafts = (np.asarray(result) for result in results)
        return tokens.reshape(-1, tokens.shape[-1]), accepted.reshape(-1), drafts.reshape(-1, drafts.shape[-1])

    def law(self, name: str, tokens: np.ndarray, sampling: Sequence[Any] = SamplingParams()) -> Check:
        """Holds completed texts against the target's law."""
        if ((tokens >= law.VOCAB) | (tokens[:, :1] < 0)).any():
            return Check(name, False, "a row emitted no token, or one that is not in the vocabulary", len(tokens))
        p = law.probs(self.target, *sampling)
        texts = law.text_index(law.complete(tokens, p, self.seed))
        expected = law.text_law(p)
        return check_law(name, np.bincount(texts, minlength=len(expected)), expected)


def _small(
    verify_fn: VerifyFn,
    draft_fn: DraftFn | None,
    draft_keys: Any,
    verify_keys: Any,
    target: Any,
    draft: Any,
    sampling: SamplingParams,
    num_drafts: Int[Array, "B"],
) -> Any:
    """Steps of `BATCH` rows for each pair of keys; without a `draft_fn`, each draft is the largest of the table."""

    def logits_after(table, drafts):
        before = jnp.pad(drafts, ((0, 0), (2, 0)), constant_values=law.VOCAB)[:, -2:]
        return jnp.asarray(table)[before[:, 0], before[:, 1]]

    def one_batch(keys):
        draft_key, verify_key = keys

        def one_draft(before, key):
            row = jnp.asarray(draft)[before[:, 0], before[:, 1]]
            token = row.argmax(-1) if draft_fn is None else draft_fn(key, row, sampling)[0]
            token = token.astype(jnp.int32)
            return jnp.stack([before[:, 1], token], axis=1), (token, row)

        # A loop, so that `draft_fn` is compiled once. The first draft gets the key itself.
        draft_keys = jnp.stack([jax.random.fold_in(draft_key, i) if i else draft_key for i in range(law.NUM_DRAFT)])
        none = jnp.full((BATCH, 2), law.VOCAB, jnp.int32)
        drafts, rows = (jnp.moveaxis(x, 0, 1) for x in lax.scan(one_draft, none, draft_keys)[1])
        p = jnp.stack([logits_after(target, drafts[:, :i]) for i in range(law.NUM_DRAFT + 1)], axis=1)
        shown = jnp.where(jnp.arange(law.NUM_DRAFT) < num_drafts[:, None], drafts, PAD_TOKEN)
        proposal = Draft(shown) if draft_fn is None else Draft(shown, rows, sampling)
        result: Verification = verify_fn(verify_key, p, proposal, sampling)
        return result.tokens, result.num_accepted, shown

    return lax.map(one_batch, (draft_keys, verify_keys))


def _form(subject: _Subject) -> list[Check]:
    tokens, accepted, drafts = subject.sampled
    position = np.arange(tokens.shape[1])
    kept = position[:-1] < accepted[:, None]
    wrong = (kept & (tokens[:, :-1] != drafts)).any(1)
    wrong |= ((tokens >= 0) != (position <= accepted[:, None])).any(1) | (tokens >= law.VOCAB).any(1)
    detail = f"{wrong.sum():,} rows are not their accepted drafts, one token, and -1"
    return [Check("form", not wrong.any(), detail, len(tokens))]


def _sampled(subject: _Subject) -> list[Check]:
    return [subject.law("sampled", subject.sampled[0], SamplingParams())]


def _filtered(subject: _Subject) -> list[Check]:
    return [subject.law("filtered", subject.run(subject.small, FILTERED)[0], FILTERED)]


def _ragged(subject: _Subject) -> list[Check]:
    count = np.arange(BATCH) % (law.NUM_DRAFT + 1)
    return [subject.law("ragged", subject.run(subject.small, num_drafts=count)[0], SamplingParams())]


def _deterministic(subject: _Subject) -> list[Check]:
    return [subject.law("deterministic", subject.run(subject.certain)[0], SamplingParams())]


def _same_key(subject: _Subject) -> list[Check]:
    return [subject.law("same key", subject.run(subject.small, keys=(2, 2))[0], SamplingParams())]


def _greedy_rows(subject: _Subject) -> list[Check]:
    greedy = np.arange(BATCH) % 2 == 0
    tokens, _, _ = subject.run(subject.small, temperature=np.where(greedy, 0.0, 1.0))
    rows = np.tile(greedy, NUM_BATCHES)
    return [
        subject.law("greedy rows", tokens[rows], SamplingParams(0.0)),
        subject.law("sampled rows beside them", tokens[~rows], SamplingParams()),
    ]


def _large(subject: _Subject) -> list[Check]:
    """The law of the first token, and the acceptance, at one draft and a large vocabulary."""
    rng = np.random.default_rng(subject.seed)
    target, draft = (rng.normal(size=LARGE_VOCAB) * 2.0).astype("f"), rng.normal(size=LARGE_VOCAB).astype("f")
    draft = (0.5 * target + draft).astype("f")

    @jax.jit
    def run(draft_keys, verify_keys):
        def one_batch(keys):
            q = jnp.broadcast_to(draft, (LARGE_BATCH, LARGE_VOCAB))
            tokens, _ = subject.draft_fn(keys[0], q, SamplingParams())
            proposal = Draft(tokens[:, None].astype(jnp.int32), q[:, None], SamplingParams())
            p = jnp.broadcast_to(target, (LARGE_BATCH, 2, LARGE_VOCAB))
            result = subject.verify_fn(keys[1], p, proposal, SamplingParams())
            return result.tokens[:, 0], result.num_accepted

        return lax.map(one_batch, (draft_keys, verify_keys))

    keys = jax.random.split(jax.random.fold_in(subject.key, 3), (2, LARGE_NUM_BATCHES))
    tokens, accepted = (np.ravel(result) for result in run(*keys))
    p, q = law.probs(target), law.probs(draft)
    if ((tokens < 0) | (tokens >= LARGE_VOCAB)).any():
        return [Check("large", False, "a row emitted no token, or one that is not in the vocabulary", len(tokens))]
    most = float(np.minimum(p, q).sum())
    share = float(accepted.mean())
    above = (share - most) / np.sqrt(most * (1 - most) / len(accepted))
    note = ", less than possible" if normal_p_value(-above) < FALSE_ALARM else ""
    detail = f"{share:.4f} of the drafts accepted, sum min(p, q) is {most:.4f}{note}"
    p_value = normal_p_value(above)
    return [
        check_law("large", np.bincount(tokens, minlength=LARGE_VOCAB), p),
        Check("acceptance", p_value > FALSE_ALARM, detail, len(accepted), p_value=p_value),
    ]


def _rows(subject: _Subject) -> list[Check]:
    tokens, accepted, _ = subject.sampled
    outcome = accepted * law.VOCAB + tokens[:, 0]
    num_outcomes = law.VOCAB * (law.NUM_DRAFT + 1)
    counts = np.bincount(outcome[::2] * num_outcomes + outcome[1::2], minlength=num_outcomes**2)
    shares = np.bincount(outcome, minlength=num_outcomes) / len(outcome)
    p_value = chi_square(counts, np.outer(shares, shares).ravel())
    pairs = Check("rows are independent", p_value > FALSE_ALARM, "pairs of neighbours", len(counts), p_value=p_value)
    even = np.arange(BATCH) % 2 == 0
    changed, changed_accepted, _ = subject.run(subject.small, temperature=np.where(even, 1.0, 0.5))
    rows = np.tile(even, NUM_BATCHES)
    differ = int(((changed != tokens).any(1) | (changed_accepted != accepted))[rows].sum())
    detail = f"{differ:,} rows changed when their neighbours' temperature did"
    return [
        pairs._replace(num_samples=int(counts.sum())),
        Check("rows stand alone", differ == 0, detail, int(rows.sum())),
    ]


def _keys(subject: _Subject) -> list[Check]:
    first, again = (subject.run(subject.small, same_draft_key=True)[0] for _ in range(2))
    same = bool((first == again).all())
    batches = first.reshape(NUM_BATCHES, -1)
    differ = bool((batches[1:] != batches[0]).any(1).all())
    detail = {
        (True, True): "one key gives one result, another key another",
        (True, False): "other keys give the same result",
        (False, True): "one key gives several results",
        (False, False): "one key gives several results, and other keys the same",
    }
    return [Check("keys", same and differ, detail[same, differ], len(first))]


def _boundary(subject: _Subject) -> list[Check]:
    return boundary.checks(subject.verify_fn)


CHECKS: dict[str, Callable[[_Subject], list[Check]]] = {
    "form": _form,
    "sampled": _sampled,
    "filtered": _filtered,
    "ragged": _ragged,
    "deterministic": _deterministic,
    "same key": _same_key,
    "greedy rows": _greedy_rows,
    "large": _large,
    "rows": _rows,
    "keys": _keys,
    "boundary": _boundary,
}
"""Each check by its name; "large" reports the acceptance too."""
