"""Speculative sampling in float64 numpy, one row at a time, to be read beside the papers.

Words: p is the target's distribution and q the draft's; x are drafted tokens, u uniforms in [0, 1), z logits.
K tokens are drafted and V is the vocabulary. A law is a dict from tuples of tokens to their probability; tuples
of probability zero are left out. The code is slow on purpose, and imports nothing from the packages that it tests.

Sources, by the names used below:
  Leviathan: Leviathan, Kalman, Matias, 2023, arXiv 2211.17192.
  Chen: Chen et al., 2023, arXiv 2302.01318 (there q is the target and p the draft).
  Wagner: Wagner et al., 2024, arXiv 2406.11016.
  Sun: Sun et al., 2024, arXiv 2403.10444.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable

import numpy as np
import scipy.special
import scipy.stats
from jaxtyping import Float, Int

Vector = Float[np.ndarray, "V"]
Prefix = tuple[int, ...]
Law = dict[Prefix, float]
RowFn = Callable[[Prefix], Vector]
"""Maps the tokens emitted so far in the step (at first `()`) to one number per possible next token."""


# Distributions from logits


def distribution(
    logits: Vector, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Vector:
    """Probabilities of one row: temperature, then top-k, then top-p, then min-p, then renormalised.

    Each filter compares what the one before it left, renormalised, and keeps ties at its cutoff. -inf is a
    legal logit, of probability zero.

    Args:
      logits: z, `[V]`.
      temperature: Divides z. Not above 0, or without a finite reciprocal in float32: one-hot at the first
        largest logit.
      top_k: Logits not below the k-th largest are kept; 0 is off, and k >= V keeps all.
      top_p: The fewest largest probabilities whose sum is at least this are kept, the largest always; 1 is off.
      min_p: Probabilities not below this share of the largest are kept; 0 is off.

    Returns:
      Probabilities, `[V]`, with sum 1.

    Raises:
      ValueError: If a logit is NaN or +inf, or none is finite: there is no distribution.

    Source: top-k, Fan et al., 2018, arXiv 1805.04833; top-p, Holtzman et al., 2020, arXiv 1904.09751,
    section 3.1; min-p, Nguyen et al., 2024, arXiv 2407.01082.
    """
    z = np.asarray(logits, np.float64)
    if not np.all(z < np.inf) or np.all(z == -np.inf):
        raise ValueError(f"logits must be finite or -inf, and one of them finite; got {z}")

    greedy = not temperature > 0 or 1 / float(temperature) > np.finfo(np.float32).max
    if greedy:
        return one_hot(int(np.argmax(z)), len(z))
    z = z / temperature

    if 0 < top_k < len(z):
        kth_largest = np.sort(z)[-top_k]
        z = np.where(z >= kth_largest, z, -np.inf)

    if top_p < 1:
        order = np.argsort(-z, kind="stable")
        mass = np.cumsum(scipy.special.softmax(z)[order])
        # The last logit needed is where the mass first reaches top_p; the sum of all may round to below it.
        reached = np.flatnonzero(mass >= top_p)
        if reached.size > 0:
            z = np.where(z >= z[order[reached[0]]], z, -np.inf)

    if min_p > 0:
        probs = scipy.special.softmax(z)
        z = np.where(probs >= min_p * probs.max(), z, -np.inf)

    return scipy.special.softmax(z)


def one_hot(token: int, vocab: int) -> Vector:
    """The distribution with all its probability on one token.

    Args:
      token: The token.
      vocab: V.

    Returns:
      Probabilities, `[V]`.

    Source: Leviathan, section 2.2 (argmax sampling as a distribution).
    """
    probs = np.zeros(vocab)
    probs[token] = 1.0
    return probs


# The token rule


def accept_probs(p: Float[np.ndarray, "K1 V"], q: Float[np.ndarray, "K V"], tokens: Int[np.ndarray, "K"]) -> np.ndarray:
    """The probability min(1, p_i(x_i) / q_i(x_i)) of accepting each drafted token.

    Args:
      p: Target, `[K+1, V]`; the bonus row is not read.
      q: Draft, `[K, V]`.
      tokens: x, `[K]`; from the first below zero on, nothing was drafted.

    Returns:
      `[K]`; x/0 is 1, 0/0 is 0, and 0 where nothing was drafted.

    Source: Leviathan, algorithm 1; Chen, algorithm 2.
    """
    result = np.zeros(len(tokens))
    for i in range(_num_drafted(tokens)):
        result[i] = _accept(p[i], q[i])[tokens[i]]
    return result


def residual(p: Vector, q: Vector) -> Vector:
    """norm(max(p - q, 0)), from which the token after a rejection is drawn.

    Args:
      p: Target, `[V]`.
      q: Draft, `[V]`.

    Returns:
      Probabilities, `[V]`; p itself if p exceeds q nowhere.

    Source: Leviathan, section 2.3 and algorithm 1; Chen, algorithm 2 (there ( )+).
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    return _normalize(np.maximum(p - q, 0), otherwise=p)


def verify_token(
    p: Float[np.ndarray, "K1 V"],
    q: Float[np.ndarray, "K V"],
    tokens: Int[np.ndarray, "K"],
    u: Float[np.ndarray, "K"],
    u_tile: float,
    u_element: float,
    tile_width: int,
) -> tuple[list[int], int, list[float], np.ndarray]:
    """One step of the token rule for one sequence, with given uniforms.

    Drafts are accepted from the left while log u_i + log q_i(x_i) < log p_i(x_i), strictly, so that u = 0
    accepts no token of probability zero. The first rejected is replaced by a draw from the residual of its row;
    if there is none, a draw from p at the row after the last draft is added.

    Args:
      p: Target, `[K+1, V]`; the row after the last draft is the bonus row.
      q: Draft, `[K, V]`; explicit one-hot rows for a deterministic drafter.
      tokens: x, `[K]`; drafting stops at the first below zero.
      u: Uniforms of the acceptance tests, `[K]`.
      u_tile: Uniform that picks the tile of the last token.
      u_element: Uniform that picks the last token within its tile.
      tile_width: Width of the tiles.

    Returns:
      The emitted tokens; how many of them are accepted drafts (all but the last); log p of each emitted token;
      min(1, p/q) at each draft, `[K]`.

    Source: Leviathan, algorithm 1; Chen, algorithm 2.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    num_drafted = _num_drafted(tokens)

    n = 0
    while n < num_drafted and _log(u[n]) + _log(q[n, tokens[n]]) < _log(p[n, tokens[n]]):
        n += 1

    last = residual(p[n], q[n]) if n < num_drafted else p[n]
    emitted = [int(token) for token in tokens[:n]] + [sample_two_level(last, u_tile, u_element, tile_width)]
    log_probs = [_log(p[i, token]) for i, token in enumerate(emitted)]
    return emitted, n, log_probs, accept_probs(p, q, tokens)


def _accept(p: Vector, q: Vector) -> Vector:
    """min(1, p/q) for every token of a row.

    Args:
      p: Target weights, `[V]`.
      q: Draft weights, `[V]`.

    Returns:
      `[V]`; x/0 is 1 and 0/0 is 0.

    Source: Leviathan, section 2.3.
    """
    p, q = np.asarray(p, np.float64), np.asarray(q, np.float64)
    # Where p >= q > 0 the minimum is 1 without dividing, so a tiny q cannot overflow.
    less = p < q
    return np.where(less, p / np.where(less, q, 1), np.where(p > 0, 1.0, 0.0))


def _num_drafted(tokens: Int[np.ndarray, "K"]) -> int:
    """Number of tokens before the first negative one.

    Args:
      tokens: x, `[K]`.

    Returns:
      0 to K.

    Source: the padding convention of `Draft.tokens`.
    """
    return next((i for i, token in enumerate(tokens) if token < 0), len(tokens))


def _normalize(weights: Vector, otherwise: Vector) -> Vector:
    """weights / sum(weights), or `otherwise` if all weights are zero.

    Args:
      weights: `[V]`, none negative.
      otherwise: `[V]`.

    Returns:
      `[V]`.

    Source: Leviathan, section 2.3, norm.
    """
    total = weights.sum()
    return weights / total if total > 0 else otherwise


def _log(x: float) -> float:
    """log x, with log 0 = -inf.

    Args:
      x: A number not below zero.

    Returns:
      The logarithm.

    Source: the limit at zero.
    """
    return float(np.log(x)) if x > 0 else -np.inf


# Sampling with two uniforms


def sample_two_level(weights: Vector, u_tile: float, u_element: float, tile_width: int) -> int:
    """A token drawn in proportion to `weights`: first its tile, then the element within the tile.

    The tile is the first of positive sum whose running sum exceeds u_tile times the total; the element the first
    of positive weight whose running sum in the tile exceeds u_element times the tile's sum. If none exceeds, the
    last of positive weight. What has weight zero is never returned.

    Args:
      weights: `[V]`, none negative; they need not sum to one.
      u_tile: Uniform for the tile.
      u_element: Uniform for the element.
      tile_width: Width of the tiles; the last may be shorter.

    Returns:
      The index.

    Raises:
      ValueError: If no weight is positive.

    Source: inversion by sequential search in two levels, Devroye, Non-Uniform Random Variate Generation, 1986,
    chapter III.2.
    """
    tiles = _tiles(weights, tile_width)
    tile = _pick([t.sum() for t in tiles], u_tile)
    return tile * tile_width + _pick(tiles[tile], u_element)


def emission_margin(weights: Vector, u_tile: float, u_element: float, tile_width: int) -> float:
    """Distance of the uniforms of `sample_two_level` from the nearest ones that give another index.

    That is the smallest distance of u_tile * total to a running sum of tiles, over the total, and of
    u_element * tile sum to a running sum in the chosen tile, over the tile's sum. Only running sums strictly between 0
    and the total count: u = 0 and u = 1 are the ends of the range and decide between nothing. A rounded copy of
    the weights that is wrong by less than this, relative to total and tile sum, and is zero where these are,
    gives the same index. (A residual's total is 1 - sum min(p, q): rounding of p and q grows by its inverse.)

    Args:
      weights: `[V]`, none negative.
      u_tile: Uniform for the tile.
      u_element: Uniform for the element.
      tile_width: Width of the tiles.

    Returns:
      The margin; inf if there is one tile and one element to choose from.

    Raises:
      ValueError: If no weight is positive.

    Source: as `sample_two_level`.
    """
    tiles = _tiles(weights, tile_width)
    sums = [t.sum() for t in tiles]
    return min(_margin(sums, u_tile), _margin(tiles[_pick(sums, u_tile)], u_element))


def _tiles(weights: Vector, tile_width: int) -> list[np.ndarray]:
    """The weights cut in tiles.

    Args:
      weights: `[V]`.
      tile_width: Width of the tiles.

    Returns:
      Arrays `[tile_width]`, the last one perhaps shorter.

    Source: as `sample_two_level`.
    """
    weights = np.asarray(weights, np.float64)
    return [weights[start : start + tile_width] for start in range(0, len(weights), tile_width)]


def _pick(weights: Vector | list[float], u: float) -> int:
    """The first index of positive weight whose running sum exceeds u * total, or the last of positive weight.

    Args:
      weights: `[N]`, none negative.
      u: A uniform.

    Returns:
      The index.

    Raises:
      ValueError: If no weight is positive.

    Source: as `sample_two_level`.
    """
    running = np.cumsum(weights)
    positive = [i for i, weight in enumerate(weights) if weight > 0]
    if not positive:
        raise ValueError("weights must have a positive entry to draw from; got none")
    return next((i for i in positive if running[i] > u * running[-1]), positive[-1])


def _margin(weights: Vector | list[float], u: float) -> float:
    """The distance of u * total to the nearest running sum strictly between 0 and the total, over the total.

    Args:
      weights: `[N]`, none negative, one positive.
      u: A uniform.

    Returns:
      The margin; inf if only one weight is positive.

    Source: as `emission_margin`.
    """
    running = np.cumsum(weights)
    total = running[-1]
    return min((abs(r - u * total) / total for r in running if 0 < r < total), default=np.inf)


# Laws of what is emitted, by enumeration


def speculative_law(target: RowFn, draft: RowFn, num_draft: int) -> Law:
    """The law of the tokens that one step of the token rule emits.

    Args:
      target: From a prefix to p, `[V]`.
      draft: From a prefix to q, `[V]`.
      num_draft: K.

    Returns:
      The law over tuples of 1 to K+1 tokens.

    Source: Leviathan, algorithm 1; Chen, algorithm 2.
    """
    return _step_law(
        num_draft,
        draft=draft,
        accept=lambda prefix: _accept(target(prefix), draft(prefix)),
        replace=lambda prefix: residual(target(prefix), draft(prefix)),
        bonus=target,
    )


def target_law(target: RowFn, num_tokens: int) -> Law:
    """The law of `num_tokens` tokens sampled from the target alone, one after the other.

    Args:
      target: From a prefix to p, `[V]`.
      num_tokens: How many tokens.

    Returns:
      The law over tuples of `num_tokens` tokens.

    Source: the chain rule, prod_i p(x_i | x_<i).
    """
    return completed_law({(): 1.0}, target, num_tokens)


def completed_law(step_law: Law, target: RowFn, num_tokens: int) -> Law:
    """The law of `num_tokens` tokens when those that a step emitted are followed by the target's own.

    A rule is exact if and only if this equals `target_law(target, num_tokens)` for num_tokens = K+1.

    Args:
      step_law: The law over tuples of at most `num_tokens` tokens.
      target: From a prefix to p, `[V]`.
      num_tokens: How many tokens.

    Returns:
      The law over tuples of `num_tokens` tokens.

    Raises:
      ValueError: If the step may emit more than `num_tokens`.

    Source: Leviathan, appendix A.1; Chen, theorem 1, for a whole step.
    """
    law = defaultdict(float)

    def extend(prefix: Prefix, mass: float) -> None:
        if len(prefix) == num_tokens:
            law[prefix] += mass
            return
        for token, probability in enumerate(target(prefix)):
            if probability > 0:
                extend((*prefix, token), mass * float(probability))

    for emitted, mass in step_law.items():
        if len(emitted) > num_tokens:
            raise ValueError(f"step_law must emit at most num_tokens = {num_tokens} tokens; got {emitted}")
        extend(emitted, mass)
    return dict(law)


def _step_law(num_draft: int, *, draft: RowFn, accept: RowFn, replace: RowFn, bonus: RowFn) -> Law:
    """The law of a step that drafts from the left, stops at the first rejection and replaces that token.

    Args:
      num_draft: K.
      draft: From a prefix to q, `[V]`.
      accept: From a prefix to the probability of accepting each token, `[V]`.
      replace: From a prefix to the distribution of the token after a rejection, `[V]`.
      bonus: From a prefix of K accepted tokens to the distribution of the token after them, `[V]`.

    Returns:
      The law over tuples of 1 to K+1 tokens.

    Source: Leviathan, algorithm 1, its draws summed over.
    """
    law = defaultdict(float)

    def emit(prefix: Prefix, mass: float, probs: Vector) -> None:
        for token, probability in enumerate(probs):
            if mass * probability > 0:
                law[*prefix, token] += mass * float(probability)

    def extend(prefix: Prefix, mass: float) -> None:
        if len(prefix) == num_draft:
            emit(prefix, mass, bonus(prefix))
            return
        q, a = draft(prefix), accept(prefix)
        emit(prefix, mass * float(np.sum(q * (1 - a))), replace(prefix))
        for token, accepted in enumerate(q * a):
            if accepted > 0:
                extend((*prefix, token), mass * float(accepted))

    extend((), 1.0)
    return dict(law)


# The coupled rule


def coupled_text(p: Float[np.ndarray, "K1 V"], noise: Float[np.ndarray, "K1 V"], tokens: list[int]) -> list[int]:
    """The tokens of one step: the target's Gumbel samples, up to and with the first that no draft equals.

    Args:
      p: Target, `[K+1, V]`.
      noise: Gumbel noise of each position and token, `[K+1, V]`.
      tokens: The drafts, K at most, in whichever way they were drawn.

    Returns:
      1 to K+1 tokens.

    Source: Daliri et al. (2024, arXiv 2408.07978), drafter-invariant speculative decoding with Gumbel samples.
    """
    with np.errstate(divide="ignore"):
        samples = np.argmax(np.log(p) + noise, axis=-1).tolist()
    agree = next((i for i, token in enumerate(tokens) if token != samples[i]), len(tokens))
    return samples[: agree + 1]


def coupled_acceptance(p: Vector, q: Vector) -> float:
    """The probability that Gumbel samples of p and q with the same noise are equal.

    Token v is both samples if its exponential clock, scaled by p and by q, rings first under both: a race of rates
    max(p(u)/p(v), q(u)/q(v)).

    Source: Daliri et al. (2024, arXiv 2408.07978), the analysis of Gumbel coupling.
    """
    both = [v for v in range(len(p)) if p[v] > 0 and q[v] > 0]
    return float(sum(1 / np.maximum(p / p[v], q / q[v]).sum() for v in both))


# Block verification


def block_probs(
    p: Float[np.ndarray, "n1 V"], q: Float[np.ndarray, "n V"], tokens: Int[np.ndarray, "n"]
) -> tuple[np.ndarray, np.ndarray]:
    """The quantities of block verification for one sequence of n drafts.

    Returns:
      P_0 to P_n, and h_0 to h_n: the probability of keeping i drafts where no more were kept.

    Source: Sun et al. (2024, arXiv 2403.10444), algorithm 2 and equations 3 and 4.
    """
    joint, keep = np.ones(len(tokens) + 1), np.ones(len(tokens) + 1)
    for i, token in enumerate(tokens):
        joint[i + 1] = min(joint[i] * p[i, token] / q[i, token], 1.0)
    for i in range(1, len(tokens)):
        total = np.maximum(joint[i] * p[i] - q[i], 0).sum()
        keep[i] = total / (total + 1 - joint[i]) if total + 1 - joint[i] > 0 else 0.0
    if len(tokens):
        keep[-1] = joint[-1]
    return joint, keep


def _drafted(target: RowFn, draft: RowFn, num_draft: int):
    """Yields each draft of positive probability, its probability, and the rows of p and q along it."""
    vocab = len(target(()))
    for path in itertools.product(range(vocab), repeat=num_draft):
        mass = float(np.prod([draft(path[:i])[token] for i, token in enumerate(path)]))
        if mass == 0:
            continue
        p = np.stack([target(path[:i]) for i in range(num_draft + 1)])
        q = np.stack([draft(path[:i]) for i in range(num_draft)]) if num_draft else np.zeros((0, vocab))
        yield path, mass, p, q


def block_law(target: RowFn, draft: RowFn, num_draft: int) -> Law:
    """The law of the tokens that one step of block verification emits; arguments as of `speculative_law`.

    Source: Sun et al. (2024, arXiv 2403.10444), algorithm 2, its draws summed over.
    """
    law = defaultdict(float)
    for path, mass, p, q in _drafted(target, draft, num_draft):
        joint, keep = block_probs(p, q, np.array(path, int))
        for i in range(num_draft, -1, -1):
            weights = p[i] if i == num_draft else np.maximum(joint[i] * p[i] - q[i], 0)
            if keep[i] > 0:
                last = weights / weights.sum()
                for token in np.flatnonzero(last):
                    law[(*path[:i], int(token))] += mass * keep[i] * float(last[token])
            mass *= 1 - keep[i]
    return dict(law)


def rounds_law(target: RowFn, draft: RowFn, num_draft: int, num_rounds: int) -> Law:
    """The law of the tokens that one step of block verification emits if it decides in rounds.

    A round at row i steps back with probability 1 - P_i, and ends with y with probability max(P_i p(y) - q(y), 0).
    What is undecided after all rounds stops at the first row j from there with probability h_j, as in `block_law`.

    Args:
      target: As in `speculative_law`.
      draft: As in `speculative_law`.
      num_draft: As in `speculative_law`.
      num_rounds: R.

    Returns:
      The law over tuples of 1 to K+1 tokens.

    Source: docs/algorithms.md, after Sun.
    """
    law = defaultdict(float)
    for path, mass, p, q in _drafted(target, draft, num_draft):
        joint, keep = block_probs(p, q, np.array(path, int))
        residuals = np.maximum(joint[:-1, None] * p[:-1] - q, 0)
        emitted = np.zeros_like(p)
        emitted[num_draft] = mass * keep[num_draft] * p[num_draft]
        # The mass of each row that no round has ended.
        open_mass = np.zeros(num_draft)
        open_mass[-1:] = mass * (1 - keep[num_draft])
        for _ in range(num_rounds):
            emitted[:-1] += open_mass[:, None] * residuals
            back = open_mass * (1 - joint[:-1])
            open_mass = open_mass - open_mass * residuals.sum(1) - back + np.append(back[1:], 0)[:num_draft]
        for i in range(num_draft - 1, -1, -1):
            if keep[i] > 0 and residuals[i].sum() > 0:
                emitted[i] += open_mass[i] * keep[i] * residuals[i] / residuals[i].sum()
            if i:
                open_mass[i - 1] += open_mass[i] * (1 - keep[i])
        for i, token in zip(*np.nonzero(emitted), strict=True):
            law[(*path[:i], int(token))] += float(emitted[i, token])
    return dict(law)


def verify_block(
    p: Float[np.ndarray, "K1 V"],
    q: Float[np.ndarray, "K V"],
    tokens: Int[np.ndarray, "K"],
    accept: Float[np.ndarray, "K"],
    emit: Float[np.ndarray, "2"],
    rounds: Float[np.ndarray, "3 R"],
    tile_width: int,
    *,
    plays: bool = True,
) -> tuple[list[int], float, int]:
    """One step of block verification for one sequence, with given uniforms.

    Args:
      p: Target, `[K+1, V]`.
      q: Draft, `[K, V]`; explicit one-hot rows for a deterministic drafter.
      tokens: x, `[K]`; drafting stops at the first below zero.
      accept: Uniform of each draft, `[K]`.
      emit: Uniforms of the last token, if no round draws it: its tile and its place in the tile.
      rounds: Coins of the rounds, and the uniforms of the token that each draws, `[3, R]`.
      tile_width: Width of the tiles.
      plays: False for a sequence without rounds.

    Returns:
      The emitted tokens; the margin: if p and q are wrong by less than this, the tokens are still these; the number of
      rounds played, R + 1 if none decided.

    Source: docs/algorithms.md, after Sun.
    """
    n = _num_drafted(tokens)
    joint, keep = block_probs(p[: n + 1], q[:n], tokens[:n])
    margin = np.inf

    def below(u: float, bound: float) -> bool:
        nonlocal margin
        margin = min(margin, abs(u - bound))
        return u < bound

    def sample(weights: Vector, u_tile: float, u_element: float) -> int:
        nonlocal margin
        margin = min(margin, weights.sum() * emission_margin(weights, u_tile, u_element, tile_width))
        return sample_two_level(weights, u_tile, u_element, tile_width)

    if n == 0 or below(accept[n - 1], joint[n]):
        return [*tokens[:n], sample(p[n], *emit)], margin, 0
    i = n - 1
    num_rounds = rounds.shape[1] if plays else 0
    for number in range(num_rounds):
        coin, u_tile, u_element = rounds[:, number]
        if i > 0 and not below(coin, joint[i]):
            i -= 1
            continue
        token = sample(p[i], u_tile, u_element)
        if below(coin, joint[i] - q[i, token] / p[i, token]):
            return [*tokens[:i], token], margin, number + 1
    while i > 0 and not below(accept[i - 1], keep[i]):
        i -= 1
    weights = np.maximum(joint[i] * p[i] - q[i], 0)
    if weights.sum() == 0:
        return [*tokens[:i], sample(p[i], *emit)], 0.0, num_rounds + 1
    return [*tokens[:i], sample(weights, *emit)], margin, num_rounds + 1


# The sigmoid approximation, as the paper has it


def sigmoid_scores(logits: np.ndarray, alpha: float, beta: float) -> np.ndarray:
    """s(z) = sigmoid((z - alpha) / (beta - alpha)), which stands for a probability and does not sum to one.

    Args:
      logits: z, any shape; -inf scores 0.
      alpha: Where the score is 1/2.
      beta: Where the score is sigmoid(1).

    Returns:
      Scores in [0, 1], the shape of `logits`; 0 where float32 has no normal number.

    Source: Wagner, section on the sigmoid approximation.
    """
    scores = scipy.special.expit((np.asarray(logits, np.float64) - alpha) / (beta - alpha))
    return np.where(scores < np.finfo(np.float32).tiny, 0, scores)


def sigmoid_accept_probs(
    z_p: Float[np.ndarray, "K1 V"],
    z_q: Float[np.ndarray, "K V"],
    tokens: Int[np.ndarray, "K"],
    alpha: float,
    beta: float,
) -> np.ndarray:
    """The probability min(1, s_p(x_i) / s_q(x_i)) of accepting each drafted token.

    Args:
      z_p: Target logits, `[K+1, V]`.
      z_q: Draft logits, `[K, V]`.
      tokens: x, `[K]`; from the first below zero on, nothing was drafted.
      alpha: As in `sigmoid_scores`.
      beta: As in `sigmoid_scores`.

    Returns:
      `[K]`; x/0 is 1, 0/0 is 0, and 0 where nothing was drafted.

    Source: Wagner, section on the sigmoid approximation.
    """
    return accept_probs(sigmoid_scores(z_p, alpha, beta), sigmoid_scores(z_q, alpha, beta), tokens)


def sigmoid_residual(z_p: Vector, z_q: Vector, alpha: float, beta: float) -> Vector:
    """norm(max(0, s_p - s_q)), from which the token after a rejection is drawn.

    Args:
      z_p: Target logits, `[V]`.
      z_q: Draft logits, `[V]`.
      alpha: As in `sigmoid_scores`.
      beta: As in `sigmoid_scores`.

    Returns:
      Probabilities, `[V]`; `sigmoid_bonus` if s_p exceeds s_q nowhere.

    Source: Wagner, section on the sigmoid approximation; the paper does not say what an empty residual does.
    """
    s_p, s_q = sigmoid_scores(z_p, alpha, beta), sigmoid_scores(z_q, alpha, beta)
    return _normalize(np.maximum(0, s_p - s_q), otherwise=sigmoid_bonus(z_p, alpha, beta))


def sigmoid_bonus(z_p: Vector, alpha: float, beta: float) -> Vector:
    """norm(s_p), from which the token after K accepted drafts is drawn.

    Args:
      z_p: Target logits of the bonus row, `[V]`.
      alpha: As in `sigmoid_scores`.
      beta: As in `sigmoid_scores`.

    Returns:
      Probabilities, `[V]`; without a positive score, one-hot at the first largest logit.

    Source: Wagner, section on the sigmoid approximation: s_p stands for p throughout.
    """
    s_p = sigmoid_scores(z_p, alpha, beta)
    return _normalize(s_p, otherwise=one_hot(int(np.argmax(z_p)), len(s_p)))


def sigmoid_step_law(
    z_p: Float[np.ndarray, "K1 V"],
    z_q: Float[np.ndarray, "K V"],
    q: Float[np.ndarray, "K V"],
    alpha: float,
    beta: float,
) -> Law:
    """The law of the tokens that one step emits when row i does not depend on the tokens before it.

    Args:
      z_p: Target logits, `[K+1, V]`.
      z_q: Draft logits, `[K, V]`.
      q: What the drafts are sampled from, `[K, V]`: the softmax of z_q, for a drafter that samples as usual.
      alpha: As in `sigmoid_scores`.
      beta: As in `sigmoid_scores`.

    Returns:
      The law over tuples of 1 to K+1 tokens.

    Source: Wagner, section on the sigmoid approximation, in Leviathan, algorithm 1.
    """
    s_p, s_q = sigmoid_scores(z_p, alpha, beta), sigmoid_scores(z_q, alpha, beta)
    q = np.asarray(q, np.float64)
    return _step_law(
        len(q),
        draft=lambda prefix: q[len(prefix)],
        accept=lambda prefix: _accept(s_p[len(prefix)], s_q[len(prefix)]),
        replace=lambda prefix: sigmoid_residual(z_p[len(prefix)], z_q[len(prefix)], alpha, beta),
        bonus=lambda prefix: sigmoid_bonus(z_p[len(prefix)], alpha, beta),
    )


# The calibrated sigmoid: width 1 around each row's log-normaliser


def calibrated_accept(z_p: Vector, q: Vector, estimate: float, offset: float) -> Vector:
    """min(1, s_p/s_q) for every token of a row, with width 1 and alpha = log-normaliser + `offset`.

    Args:
      z_p: Target logits, `[V]`.
      q: Draft, `[V]`; its log-normaliser is exact, so its score is that of log q at alpha = `offset`.
      estimate: The estimate of the log-normaliser of z_p; no token gets a probability above 1 by it.
      offset: c.

    Returns:
      `[V]`; x/0 is 1, 0/0 is 0.

    Source: docs/algorithms.md, after Wagner.
    """
    with np.errstate(divide="ignore"):
        log_h, log_q = np.minimum(np.asarray(z_p, np.float64) - estimate, 0), np.log(q)
    return _accept(sigmoid_scores(log_h, offset, offset + 1), sigmoid_scores(log_q, offset, offset + 1))


def calibrated_residual(z_p: Vector, q: Vector, estimate: float, offset: float) -> Vector:
    """norm(max(0, p - q a)), from which the token after a rejection is drawn; p is exact.

    Args:
      z_p: Target logits, `[V]`.
      q: Draft, `[V]`.
      estimate: As in `calibrated_accept`, whose result is a.
      offset: c.

    Returns:
      Probabilities, `[V]`; p itself if p exceeds q a nowhere.

    Source: docs/algorithms.md.
    """
    p = distribution(z_p)
    return _normalize(np.maximum(0, p - q * calibrated_accept(z_p, q, estimate, offset)), otherwise=p)


def calibrated_law(target: RowFn, draft: RowFn, num_draft: int, *, estimate: Callable[[Prefix], float], offset: float):
    """The law of the tokens that one step emits.

    Args:
      target: From a prefix to z_p, `[V]`.
      draft: From a prefix to q, `[V]`.
      num_draft: K.
      estimate: From a prefix to the estimate of the log-normaliser of its row.
      offset: c.

    Returns:
      The law over tuples of 1 to K+1 tokens.

    Source: docs/algorithms.md.
    """
    return _step_law(
        num_draft,
        draft=draft,
        accept=lambda prefix: calibrated_accept(target(prefix), draft(prefix), estimate(prefix), offset),
        replace=lambda prefix: calibrated_residual(target(prefix), draft(prefix), estimate(prefix), offset),
        bonus=lambda prefix: distribution(target(prefix)),
    )


def calibrated_bound(error: float, offset: float) -> float:
    """The bound on the total variation of one token's law: 1 - 1/max(1, (1 + exp(-c)) exp(-error)).

    Args:
      error: The estimate less the log-normaliser.
      offset: c.

    Returns:
      A number from 0 to 1.

    Source: docs/algorithms.md.
    """
    return 1 - 1 / max(1.0, (1 + np.exp(-offset)) * np.exp(-error))


# The sigmoid approximation, as its authors' implementation has it (github.com/dwgnr/optimized-speculative-sampling)

_RELEASED_ALPHA, _RELEASED_BETA = -1e4, 1e4
_RELEASED_FLOOR = 1e-5
# The sum that normalises the residual starts here, not at zero, so an empty residual is 0 before the floor.
_RELEASED_SUM_START = 1e-6


def sigmoid_as_released_scores(logits: np.ndarray) -> np.ndarray:
    """`sigmoid_scores` at alpha = -1e4 and beta = 1e4, but 0 below alpha and 1 above beta.

    Args:
      logits: z, any shape.

    Returns:
      Scores, the shape of `logits`: 0, or from sigmoid(0) to sigmoid(1), or 1.

    Source: Wagner, released implementation, not the paper.
    """
    z = np.asarray(logits, np.float64)
    scores = sigmoid_scores(z, _RELEASED_ALPHA, _RELEASED_BETA)
    return np.where(z < _RELEASED_ALPHA, 0.0, np.where(z > _RELEASED_BETA, 1.0, scores))


def sigmoid_as_released_accept_probs(
    z_p: Float[np.ndarray, "K1 V"], z_q: Float[np.ndarray, "K V"], tokens: Int[np.ndarray, "K"]
) -> np.ndarray:
    """min(1, s_p(x_i) / s_q(x_i)) with the released scores.

    Args:
      z_p: Target logits, `[K+1, V]`.
      z_q: Draft logits, `[K, V]`.
      tokens: x, `[K]`; from the first below zero on, nothing was drafted.

    Returns:
      `[K]`; x/0 is 1, 0/0 is 0 (NaN there, which rejects too), and 0 where nothing was drafted.

    Source: Wagner, released implementation, not the paper.
    """
    return accept_probs(sigmoid_as_released_scores(z_p), sigmoid_as_released_scores(z_q), tokens)


def sigmoid_as_released_residual(z_p: Vector, z_q: Vector) -> Vector:
    """The residual of the released scores, normalised, then floored at 1e-5 for every token, then drawn from.

    Args:
      z_p: Target logits, `[V]`.
      z_q: Draft logits, `[V]`.

    Returns:
      Probabilities, `[V]`, all positive; uniform if s_p exceeds s_q nowhere.

    Source: Wagner, released implementation, not the paper.
    """
    a = np.maximum(0, sigmoid_as_released_scores(z_p) - sigmoid_as_released_scores(z_q))
    weights = np.maximum(a / (_RELEASED_SUM_START + a.sum()), _RELEASED_FLOOR)
    return weights / weights.sum()


def sigmoid_as_released_bonus(z_p: Vector) -> Vector:
    """norm(max(z, 1e-5)): the bonus row is used as logits, neither softmax nor sigmoid applied.

    Args:
      z_p: Target logits of the bonus row, `[V]`.

    Returns:
      Probabilities, `[V]`, all positive; adding a constant to the logits changes them.

    Source: Wagner, released implementation, not the paper.
    """
    weights = np.maximum(np.asarray(z_p, np.float64), _RELEASED_FLOOR)
    return weights / weights.sum()


def sigmoid_as_released_emits_bonus(tokens: Int[np.ndarray, "K"], num_accepted: int, eos_token: int | None) -> bool:
    """Whether a bonus token is emitted: all drafts are accepted and the last of them is not the end token.

    If the last is the end token and all are accepted, the drafts alone are emitted. After a rejection a residual
    token is emitted whatever the drafts are, and no bonus.

    Args:
      tokens: x, `[K]`; drafting stops at the first below zero.
      num_accepted: How many drafts were accepted.
      eos_token: The end token, or None.

    Returns:
      Whether the bonus row is drawn from.

    Source: Wagner, released implementation, not the paper; the end token's part is that of Hugging Face
    transformers, from which it comes.
    """
    num_drafted = _num_drafted(tokens)
    ended = num_drafted > 0 and eos_token is not None and int(tokens[num_drafted - 1]) == eos_token
    return num_accepted == num_drafted and not ended


# Numbers to compare with


def acceptance_rate(p: Vector, q: Vector) -> float:
    """sum_v min(p(v), q(v)): the probability that a token drafted from q is accepted, 1 - TV(p, q).

    Args:
      p: Target, `[V]`.
      q: Draft, `[V]`.

    Returns:
      A number from 0 to 1.

    Source: Leviathan, theorem 3.5 and corollary 3.6.
    """
    return float(np.minimum(np.asarray(p, np.float64), np.asarray(q, np.float64)).sum())


def expected_num_tokens(a: float, K: int) -> float:
    """(1 - a^(K+1)) / (1 - a), as the sum 1 + a + ... + a^K that it is, so that a = 1 gives K+1.

    Args:
      a: The probability that a draft is accepted, the same and independent for each.
      K: How many tokens are drafted.

    Returns:
      The expected number of tokens emitted by a step, 1 to K+1.

    Source: Leviathan, equation 1.
    """
    return float(sum(a**i for i in range(K + 1)))


def chi_square(counts: Int[np.ndarray, "N"], probs: Float[np.ndarray, "N"]) -> float:
    """The p-value of Pearson's test that `counts` were drawn from `probs`.

    Cells in which fewer than 5 are expected are pooled into one; if that one is still below 5, the cell next in
    size is pooled with it.

    Args:
      counts: Observations by cell, `[N]`.
      probs: Probabilities by cell, `[N]`, with sum 1.

    Returns:
      The p-value; 1 if a single cell is left, so that nothing was tested: count more.

    Raises:
      ValueError: If something was counted where the probability is zero (no p-value is as sure as that), or the
        shapes differ, or `probs` does not sum to 1.

    Source: Pearson, 1900; the 5 is Cochran's rule, Biometrics 10, 1954.
    """
    counts, probs = np.asarray(counts), np.asarray(probs, np.float64)
    if counts.shape != probs.shape or counts.ndim != 1:
        raise ValueError(f"counts and probs must be of one shape [N]; got {counts.shape} and {probs.shape}")
    # A law summed in float64 is off by far less than this; one with a cell missing by far more.
    if not abs(probs.sum() - 1) < 1e-9:
        raise ValueError(f"probs must sum to 1; got {probs.sum()}")
    if np.any(counts[probs == 0] > 0):
        cells = np.flatnonzero((probs == 0) & (counts > 0))
        raise ValueError(f"cells of probability zero must have no counts; got {counts[cells]} in cells {cells}")

    expected = counts.sum() * probs
    order = np.argsort(-probs, kind="stable")
    cells = [[i] for i in order if expected[i] >= 5]
    rest = [i for i in order if expected[i] < 5]
    if not cells or expected[rest].sum() >= 5:
        cells.append(rest)
    else:
        cells[-1] += rest
    if len(cells) == 1:
        return 1.0
    result = scipy.stats.chisquare([counts[cell].sum() for cell in cells], [expected[cell].sum() for cell in cells])
    return float(result.pvalue)
