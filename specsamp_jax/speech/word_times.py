"""Times of tokens, from the attention that a Whisper's decoder pays to the sound (Radford et al., 2022, released code).

Some heads of the decoder look at the sound of the token that is spoken next. Their weights over tokens and time are
normalised, smoothed and averaged; the path through them along which both go forward gives each token its span.
"""

import jax
import numpy as np
from jaxtyping import Float, Int

from specsamp_jax._types import Model
from specsamp_jax.models.whisper.features import HOP, SAMPLE_RATE
from specsamp_jax.models.whisper.model import cross_attention
from specsamp_jax.speech.windows import STEP

_SHORTEST = 16  # tokens of the shortest text for which a program is compiled; others have double its length, and so on
_SECONDS = STEP * HOP / SAMPLE_RATE  # of a state of the encoder


def token_edges(
    model: Model,
    tokens: Int[np.ndarray, "B L"],
    lengths: Int[np.ndarray, "B"],
    num_states: Int[np.ndarray, "B"],
    *,
    begin: int,
    heads: tuple[tuple[int, int], ...],
    filter_width: int,
) -> list[Float[np.ndarray, "_"]]:
    """Returns the times of each row's generated tokens, in seconds from the start of its window.

    Token i of n is spoken from edge i to edge i + 1 of n + 1. Edge 0 is 0: the first token is a timestamp. The last
    token of a row, which is its end unless the row met its limit, is not read by the decoder and takes no time.

    Args:
      model: The target of the rows, from `decoder_model`.
      tokens: Prompts and generated tokens, as in `Generation`.
      lengths: Tokens of each row.
      num_states: The encoder's states of each row that have sound.
      begin: Tokens of each prompt.
      heads: See `cross_attention`.
      filter_width: States in the median filter.
    """
    longest, width = int(np.max(lengths, initial=0)), _SHORTEST
    while width < longest:
        width *= 2
    # The tokens after a row's end change no weights before it.
    weights = jax.device_get(cross_attention(model, tokens[:, :width], heads=heads))
    edges = []
    for row, length, states in zip(weights, lengths, num_states, strict=True):
        starts = spoken_from(row[:, begin : length - 1, :states], filter_width) * _SECONDS
        edges.append(np.concatenate([np.zeros(1), starts, starts[-1:] if starts.size else np.zeros(1)]))
    return edges


def spoken_from(weights: Float[np.ndarray, "H T S"], filter_width: int) -> Int[np.ndarray, "T"]:
    """Returns the state at which each of T tokens is first attended, along the best path.

    Each head's weights have mean 0 and deviation 1 over the tokens at each state, then a median filter over states, and
    the heads are averaged. States that all tokens attend alike have no say.
    """
    if 0 in weights.shape:
        return np.zeros(weights.shape[1], int)
    centred = weights - weights.mean(1, keepdims=True)
    deviation = weights.std(1, keepdims=True)
    scores = np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 0)
    return best_path(-median_filter(scores, filter_width).mean(0).astype(np.float64))


def median_filter(x: Float[np.ndarray, "*B S"], width: int) -> Float[np.ndarray, "*B S"]:
    """Returns the median of the `width` elements around each, mirrored at the ends; `x` itself if it is too short."""
    half = width // 2
    if x.shape[-1] <= half:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1), axis=-1)


def best_path(cost: Float[np.ndarray, "T S"]) -> Int[np.ndarray, "T"]:
    """Returns the first column of each row on the path of least cost from the first cell to the last.

    A path goes to the next row, the next column or both at each step (Sakoe and Chiba, 1978, dynamic time warping). Of
    equally good steps it takes the one from the column before, then that from both.
    """
    num_rows, num_columns = cost.shape
    # total[i, j] is the cost of the best path to cell (i - 1, j - 1). In float32, as in the published code.
    total = np.full((num_rows + 1, num_columns + 1), np.inf, np.float32)
    total[0, 0] = 0
    # Cells of equal i + j depend on those before them alone, and are computed together.
    for diagonal in range(2, num_rows + num_columns + 1):
        i = np.arange(max(1, diagonal - num_columns), min(num_rows, diagonal - 1) + 1)
        j = diagonal - i
        before = np.minimum(np.minimum(total[i - 1, j - 1], total[i - 1, j]), total[i, j - 1])
        total[i, j] = cost[i - 1, j - 1] + before
    first, i, j = np.zeros(num_rows, int), num_rows, num_columns
    while i > 0 and j > 0:
        first[i - 1] = j - 1
        both, row, column = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        if column <= min(both, row):
            j -= 1
        elif both <= row:
            i, j = i - 1, j - 1
        else:
            i -= 1
    return first
