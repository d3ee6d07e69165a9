"""Contenders of the decoding benchmark, and the time of each part of a step."""

import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from timing import Contender, Peers, alternate, jax_contender, spread, summary
from tokenizers import Tokenizer

import specsamp_jax as ss
from specsamp_jax.cli import docstrings
from specsamp_jax.decoding.stats import accepted_by_position
from specsamp_jax.models import load_checkpoint

ASSETS = docstrings.TOKENIZER_FILE.parent
PROMPT_LENGTH, MAX_NEW_TOKENS, NUM_DRAFT = 32, 128, 4


class Pair(NamedTuple):
    """Two models in float32.

    Attributes:
      target: The larger one.
      drafter: The smaller one.
      folders: Their checkpoints, which the peers load.
      vocab_size: Of both.
    """

    target: ss.Model
    drafter: ss.Model
    folders: tuple[Path, Path]
    vocab_size: int


def load_pair(folder: Path = ASSETS) -> Pair:
    """Loads the checkpoints `target` and `drafter` of a folder; by default the package's trained pair."""
    folders = folder / "target", folder / "drafter"
    vocab_size = json.loads((folders[0] / "config.json").read_text())["vocab_size"]
    target, drafter = (load_checkpoint(path, dtype=jnp.float32) for path in folders)
    return Pair(target, drafter, folders, vocab_size)


def held_out_prompts(num: int, batch_size: int) -> list[np.ndarray]:
    """`num` prompts `[B, 32]`: the end token, then the beginning of a held-out docstring chosen at random."""
    tokenizer = Tokenizer.from_file(str(docstrings.TOKENIZER_FILE))
    texts = list(dict.fromkeys(document.text for document in docstrings.held_out_docstrings()))
    end = tokenizer.token_to_id(docstrings.END_TOKEN)
    rows = [[end, *encoding.ids] for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    rows = np.array([row[:PROMPT_LENGTH] for row in rows if len(row) > PROMPT_LENGTH], np.int32)
    chosen = np.random.default_rng(0).choice(len(rows), (num, batch_size), replace=num * batch_size > len(rows))
    return list(rows[chosen])


def options(pair: Pair) -> dict[str, dict[str, Any]]:
    """Arguments of `generate` for each contender, by name."""
    return {
        "speculative": {"draft": pair.drafter, "num_draft": NUM_DRAFT},
        "target_alone": {"draft": None},
        "n_gram": {"draft": ss.NGramDrafter(), "num_draft": NUM_DRAFT},
        "heuristic": {"draft": pair.drafter, "num_draft": ss.HeuristicNumDraft()},
        "goodput": {"draft": pair.drafter},
    }


def generate_contender(name: str, pair: Pair, prompts: list[np.ndarray]) -> Contender:
    """`generate` at temperature 1, without an end token, so that every run generates the same number of tokens.

    The rule of "goodput" is measured here, once, on the first prompt.
    """
    chosen: dict[str, Any] = options(pair)[name]
    if name == "goodput":
        sizes = {"target": pair.target, "draft": pair.drafter, "max_new_tokens": MAX_NEW_TOKENS}
        chosen |= {"num_draft": ss.measure_goodput(prompts[0], lengths=(0, 1, 2, 4), **sizes)}

    def run(key, prompt):
        return ss.generate(key, prompt, target=pair.target, max_new_tokens=MAX_NEW_TOKENS, **chosen)

    def arguments(index):
        return jax.random.key(index), jnp.asarray(prompts[index % len(prompts)])

    return jax_contender(name, run, arguments)


# Contenders in transformers: drafts per step (None: no drafter), and threads of torch (None: torch's default).
PEERS = {
    "transformers_assisted": (NUM_DRAFT, None),
    "transformers_assisted_1_thread": (NUM_DRAFT, 1),
    "transformers_generate": (None, None),
    "transformers_generate_1_thread": (None, 1),
}


def peer_contenders(pair: Pair, prompts: list[np.ndarray], peers: Peers) -> list[Contender]:
    """The `generate` of transformers, without an assistant and, at batch 1, with it."""
    return [
        peers.contender(name, "generate", num_threads=num_threads, **peer_options(pair, prompts, num_draft))
        for name, (num_draft, num_threads) in PEERS.items()
        if num_draft is None or len(prompts[0]) == 1
    ]


def peer_options(pair: Pair, prompts: list[np.ndarray], num_draft: int | None) -> dict[str, Any]:
    """Settings for transformers' `generate` equal to ours; see peers/server.py."""
    return {
        "target": str(pair.folders[0]),
        "drafter": str(pair.folders[1]),
        "prompts": [prompt.tolist() for prompt in prompts],
        "num_draft": num_draft,
        "max_new_tokens": MAX_NEW_TOKENS,
    }


def race(
    contenders: list[Contender], pair: Pair, prompts: list[np.ndarray], *, reference: str
) -> dict[str, dict[str, Any]]:
    """Checks, then times, all contenders. Each round has a new prompt, which all of them continue."""
    counted = {c.name: statistics(check(c, prompts, pair.vocab_size)) for c in contenders}
    seconds = alternate(contenders, lambda i, _: [i], rounds=len(prompts))
    result = summary(seconds, dict.fromkeys(seconds, reference))
    for name, entry in result.items():
        rates = [len(prompts[0]) * MAX_NEW_TOKENS / value for value in entry["rounds"]]
        entry |= {"tokens_per_second": spread(rates), **counted[name]}
    return result


def check(contender: Contender, prompts: list[np.ndarray], vocab_size: int) -> list[dict[str, Any]]:
    """Checks that each text is its prompt and 128 new tokens; returns a contender's counts for each prompt."""
    counts = []
    _, results = contender.run_fn(range(len(prompts)))
    for prompt, result in zip(prompts, results, strict=True):
        peer = isinstance(result, dict)
        text = np.asarray(result["tokens"] if peer else result.tokens)
        valid = (text >= 0) & (text < vocab_size)
        right_shape = text.shape == (len(prompt), PROMPT_LENGTH + MAX_NEW_TOKENS)
        if not (right_shape and valid.all() and (text[:, :PROMPT_LENGTH] == prompt).all()):
            raise ValueError(f"{contender.name} must return {prompt} and {MAX_NEW_TOKENS} new tokens; got {text}.")
        if peer:
            counts.append({"num_steps": result["num_steps"]})
        else:
            counts.append({name: np.asarray(value).tolist() for name, value in result.stats._asdict().items()})
    return counts


def statistics(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean tokens per step and row, and the acceptance at each position if all earlier drafts were accepted."""
    tokens_per_step = MAX_NEW_TOKENS * len(counts) / sum(count["num_steps"] for count in counts)
    drafted, accepted = (np.sum([c.get(name, ()) for c in counts], axis=0) for name in ("num_drafted", "num_accepted"))
    # A position is tested only if all earlier drafts are accepted. If draft lengths vary, the counts cannot show that.
    by_position = None
    if np.size(drafted) and (drafted == drafted[0]).all():
        by_position = accepted_by_position(drafted, accepted)
    return {"tokens_per_step": tokens_per_step, "acceptance_by_position": by_position}


def parts(pair: Pair, prompt: np.ndarray, *, num_loops: int, repeats: int) -> dict[str, float]:
    """Seconds of each part of a step inside a compiled loop, which leaves out dispatch and copies of the cache.

    Each number is the least mean over `num_loops` calls among `repeats` loops. The cache is half full.
    """
    batch_size = len(prompt)
    max_length = PROMPT_LENGTH + MAX_NEW_TOKENS + NUM_DRAFT
    lengths = jnp.full(batch_size, PROMPT_LENGTH + MAX_NEW_TOKENS // 2)
    keys = jax.random.split(jax.random.key(0), batch_size)

    def passes(model, num_tokens):
        def body(params, i, carry):
            cache, tokens = carry
            positions = lengths[:, None] + jnp.arange(num_tokens)
            logits, cache = model.apply_fn(params, tokens, positions, cache)
            return cache, logits.argmax(-1).astype(jnp.int32)

        tokens = jnp.ones((batch_size, num_tokens), jnp.int32)
        return body, model.params, (model.init_cache_fn(batch_size, max_length), tokens)

    def propose(params, i, carry):
        cache, tokens = carry
        draft, cache = ss.ModelDrafter(params).propose(
            jax.vmap(jax.random.fold_in, (0, None))(keys, i),
            cache,
            tokens,
            lengths,
            num_draft=NUM_DRAFT,
            sampling=ss.SamplingParams(),
            process_logits_fn=lambda tokens, lengths, logits: logits,
        )
        # Feed the drafts to the next call, so that XLA can neither drop a call nor move it out of the loop.
        return cache, tokens.at[:, -NUM_DRAFT:].set(draft.tokens)

    def verify(logits, i, emitted):
        target, draft, normalizers = (jnp.take(x, i % len(x), axis=0) for x in logits)
        result = ss.verify(
            jax.vmap(jax.random.fold_in, (0, None))(keys, i),
            target,
            ss.Draft(jnp.maximum(emitted[:, :NUM_DRAFT], 0), draft, log_normalizers=normalizers),
        )
        return result.tokens

    rotated = jax.random.normal(jax.random.key(1), (8, batch_size, NUM_DRAFT + 1, pair.vocab_size))
    logits = rotated, rotated[:, :, 1:], jax.nn.logsumexp(rotated[:, :, 1:], axis=-1)
    tokens = jnp.ones((batch_size, max_length), jnp.int32)
    loops: dict[str, tuple[Callable, Any, Any]] = {
        "target, 1 token": passes(pair.target, 1),
        f"target, {NUM_DRAFT + 1} tokens": passes(pair.target, NUM_DRAFT + 1),
        "drafter, 1 token": passes(pair.drafter, 1),
        "drafter, 2 tokens": passes(pair.drafter, 2),
        f"{NUM_DRAFT} drafts, sampled": (
            propose,
            pair.drafter,
            (pair.drafter.init_cache_fn(batch_size, max_length), tokens),
        ),
        "verify": (verify, logits, jnp.zeros((batch_size, NUM_DRAFT + 1), jnp.int32)),
    }
    seconds = {name: _least_seconds(*loop, num_loops=num_loops, repeats=repeats) for name, loop in loops.items()}

    for name, drafter in (("prefill of both", pair.drafter), ("prefill of the target", None)):
        start = jax.jit(functools.partial(ss.init, num_draft=NUM_DRAFT, max_new_tokens=MAX_NEW_TOKENS))
        begin = functools.partial(start, jnp.asarray(prompt), target=pair.target, draft=drafter)
        seconds[name] = _least(begin, repeats)
    return seconds


def _least_seconds(body: Callable, params: Any, carry: Any, *, num_loops: int, repeats: int) -> float:
    """Seconds per call of `body(params, i, carry) -> carry` in a compiled loop."""
    loop = jax.jit(lambda params, carry: lax.fori_loop(0, num_loops, lambda i, c: body(params, i, c), carry))
    return _least(lambda: loop(params, carry), repeats) / num_loops


def _least(fn: Callable[[], Any], repeats: int) -> float:
    jax.block_until_ready(fn())
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(fn())
        seconds.append(time.perf_counter() - began)
    return min(seconds)
