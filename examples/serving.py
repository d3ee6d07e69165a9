"""Continuous batching in a page: requests come and go, the compiled step stays the same.

    python examples/serving.py

A fixed number of rows decode together. When a row finishes, its text is handed out and the next request takes its
place, while the other rows go on. Each request has its own key, so its text does not depend on when it came or on
which requests it shared the batch with.

A real engine adds queues, timeouts and paged caches. The part that concerns speculative sampling is all here.
"""

import functools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import specsamp_jax as ss
from specsamp_jax.cli.pair import load_pair


class Request(NamedTuple):
    """A prompt to be continued.

    Attributes:
      prompt: Token ids, at least one.
      seed: The request's own random seed.
      max_new_tokens: The most tokens that are generated for it.
    """

    prompt: list[int]
    seed: int
    max_new_tokens: int


def serve(
    requests: Iterable[Request],
    *,
    target: ss.Model,
    draft: ss.Model,
    num_rows: int,
    max_prompt: int,
    max_new_tokens: int,
    num_draft: int = 2,
    eos_token: int | None = None,
) -> Iterator[tuple[int, list[int]]]:
    """Yields each request's index and its whole text, in the order in which they finish.

    Args:
      requests: Read one by one, whenever a row is free.
      target: The model whose distribution is sampled.
      draft: The smaller model that drafts.
      num_rows: Requests that are decoded together.
      max_prompt: The longest prompt. All prompts are padded to it, so that one compiled program serves all.
      max_new_tokens: The largest `max_new_tokens` of a request.
      num_draft: Tokens drafted per step.
      eos_token: Ends a text early.
    """
    models = {"target": target, "draft": draft, "num_draft": num_draft}

    @functools.partial(jax.jit, donate_argnames="state")
    def refill(state, row, prompt, length, limit):
        """The state with a new request in one row. Every leaf of the state has the batch first."""
        fresh = ss.init(prompt[None], prompt_lengths=length[None], max_new_tokens=max_new_tokens, **models)
        fresh = fresh._replace(limits=limit[None])
        return jax.tree.map(lambda rows, new: rows.at[row].set(new[0]), state, fresh)

    @functools.partial(jax.jit, donate_argnames="state")
    def advance(keys, state):
        return ss.step(keys, state, eos_token=eos_token, **models)[0]

    waiting = enumerate(requests)
    running: list[int | None] = [None] * num_rows
    seeds = np.zeros(num_rows, np.uint32)
    # An empty batch: every row is finished, and a finished row emits nothing.
    state = ss.init(jnp.zeros((num_rows, max_prompt), jnp.int32), max_new_tokens=max_new_tokens, **models)
    state = state._replace(finished=jnp.ones(num_rows, bool))
    while True:
        for row in np.flatnonzero(np.asarray(state.finished)).tolist():
            if (index := running[row]) is not None:
                yield index, np.asarray(state.tokens[row, : int(state.lengths[row])]).tolist()
            running[row], request = next(waiting, (None, None))
            if request is not None:
                length = len(request.prompt)
                prompt = np.pad(request.prompt, (0, max_prompt - length)).astype(np.int32)
                limit = length + min(request.max_new_tokens, max_new_tokens)
                seeds[row] = request.seed
                state = refill(state, row, prompt, np.int32(length), np.int32(limit))
        if all(index is None for index in running):
            return
        state = advance(jax.vmap(jax.random.key)(seeds), state)


def main() -> None:
    """Serves six requests in two rows with the pair of models in the package."""
    pair = load_pair()
    beginnings = ["Return the", "Raise an error if", "Parameters\n", "Convert a", "Iterate over", "A list of"]
    requests = [Request(pair.encode(text), seed, max_new_tokens=10 + 6 * seed) for seed, text in enumerate(beginnings)]
    sizes = {"num_rows": 2, "max_prompt": 8, "max_new_tokens": 40}
    for index, tokens in serve(requests, target=pair.target, draft=pair.drafter, eos_token=pair.end_token, **sizes):
        print(f"{index}: {pair.tokenizer.decode(tokens)!r}")


if __name__ == "__main__":
    main()
