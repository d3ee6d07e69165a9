"""Compares compiled kernels with the XLA core on equal uniforms at real shapes, and tests the law of emitted tokens.

    python bench/gpu/correctness.py OUT.json           # all cases
    python bench/gpu/correctness.py OUT.json B64 law   # cases whose name contains one of these words

Compiling a case takes longer than running it, so several processes share the cases.
"""

import concurrent.futures
import functools
import multiprocessing
import os
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import results
from kernel_inputs import make

import specsamp_jax as ss
from specsamp_jax._types import ROUNDS, Draft, Filter, SamplingParams, Uniforms
from specsamp_jax.rules import block, kernels, sigmoid, token
from specsamp_jax.sampling.filters import make_filter

kernel, core = jax.jit(kernels.verify_token), jax.jit(token.verify_token)

block_pair = jax.jit(kernels.verify_block), jax.jit(block.verify_block)

WIDE = {"alpha": -1e4, "beta": 1e4}
sigmoid_kernel = jax.jit(functools.partial(kernels.verify_sigmoid, **WIDE))
sigmoid_core = jax.jit(functools.partial(sigmoid.verify_sigmoid, **WIDE))

PROCESSES = 8

ROUNDED_APART = 1e-4
"""Share of sequences that may differ, because a uniform lies within rounding (about 1e-6) of a threshold."""


def compare(args, kernel=kernel, core=core):
    """Compares kernel and core: number of sequences that differ, and the largest difference of a float output."""
    got, expected = jax.device_get((kernel(*args), core(*args)))
    # If rows after the first rejection are not read, `accept_prob` is 0 there.
    read = np.arange(got.accept_prob.shape[1]) <= got.num_accepted[:, None]
    got, expected = (x._replace(accept_prob=np.where(read, x.accept_prob, 0)) for x in (got, expected))
    same = (
        (got.num_accepted == expected.num_accepted)
        & (got.tokens == expected.tokens).all(1)
        & (got.status == expected.status)
    )
    apart = {}
    for name in ("log_probs", "accept_prob"):
        differences = np.abs(np.nan_to_num(getattr(got, name) - getattr(expected, name)))[same]
        apart[name] = float(f"{np.nanmax(differences, initial=0):.3g}")
    limit = 1 + ROUNDED_APART * same.size
    where = np.flatnonzero(~same)[:3]
    return {
        "ok": bool((~same).sum() <= limit and max(apart.values()) < 1e-3),
        "different": int((~same).sum()),
        "of": int(same.size),
        "apart": apart,
        "accepted": float(got.num_accepted.mean()),
        "examples": [(got.tokens[i].tolist(), expected.tokens[i].tolist()) for i in where],
    }


def plain(batch_size, num_draft, vocab_size, dtype=jnp.bfloat16, kind="logits", seed=0):
    return compare(make(jax.random.key(seed), batch_size, num_draft, vocab_size, dtype, kind))


def plain_block(batch_size, num_draft, vocab_size, dtype=jnp.bfloat16, kind="normalizers"):
    return compare(make(jax.random.key(7), batch_size, num_draft, vocab_size, dtype, kind), *block_pair)


def block_without_success(vocab_size):
    """Coins with which nearly no round succeeds: the blocks of a sequence go on together by the sums of rows."""
    target, row_filter, draft, other, uniforms = make(jax.random.key(8), 16, 4, vocab_size, jnp.bfloat16, "logits")
    uniforms = uniforms._replace(rounds=uniforms.rounds.at[:, 0].set(1 - 2.0**-20))
    return compare((target, row_filter, draft, other, uniforms), *block_pair)


def plain_sigmoid(batch_size, vocab_size, dtype=jnp.bfloat16, kind="logits"):
    return compare(make(jax.random.key(3), batch_size, 4, vocab_size, dtype, kind), sigmoid_kernel, sigmoid_core)


def edges(kernel=kernel, core=core):
    """Filters, greedy rows, ragged rows, degenerate rows, all in one batch of 50,257."""
    target, _, draft, _, uniforms = make(jax.random.key(1), 12, 3, 50257, jnp.bfloat16, "logits")
    params = SamplingParams(
        temperature=jnp.array([0.0, 0.7, 1.3, 1.0] * 3), top_k=jnp.array([0, 50, 0, 7] * 3), top_p=0.9
    )
    tokens = draft.tokens.at[4].set(-1).at[5, 1:].set(-1).at[6, 0].set(50257)
    target = target.at[7, 0, 5].set(jnp.nan).at[8, 0, 7].set(jnp.inf).at[9, 0].set(-jnp.inf)
    logits = draft.logits.at[10, 0, 3].set(jnp.nan)
    filters = make_filter(target, params), make_filter(logits, params)
    return compare((target, filters[0], Draft(tokens, logits), filters[1], uniforms), kernel, core)


def law(verify_fn=kernels.verify_token, num_draft=1, vocab_size=32000, batch_size=1024, calls=48):
    """Chi-square test of the first emitted token against p, in 64 cells; false alarms have probability 1e-6."""
    one = make(jax.random.key(2), 1, num_draft, vocab_size, jnp.bfloat16, "logits")
    target, logits = (jnp.broadcast_to(x, (batch_size, *x.shape[1:])) for x in (one[0] * 1.5, one[2].logits * 1.5))
    p = np.asarray(jax.nn.softmax(target[0, 0].astype(jnp.float32)), np.float64)
    likely = np.argsort(-p)[:63]

    @jax.jit
    def draw(key):
        keys = jax.random.split(key, 4)
        shapes = (batch_size, num_draft), (batch_size, 2), (batch_size, 3, ROUNDS)
        tokens = jax.random.categorical(keys[0], logits[0].astype(jnp.float32), shape=shapes[0])
        uniforms = Uniforms(*(jax.random.uniform(key, shape) for key, shape in zip(keys[1:], shapes, strict=True)))
        draft = Draft(tokens.astype(jnp.int32), logits)
        return verify_fn(target, Filter(), draft, Filter(), uniforms).tokens[:, 0]

    # 63 degrees of freedom: 134.9 is exceeded once in a million.
    return chi_square(draw, p, likely, calls, 134.9)


def law_from_keys(batch_size, calls, vocab_size=32000):
    """Chi-square test of the first token of `verify` with filters, after drafts of `sample`, from keys alone."""
    sampling = ss.SamplingParams(temperature=1.2, top_k=40, top_p=0.95)
    one = make(jax.random.key(6), 1, 1, vocab_size, jnp.bfloat16, "logits")
    target, logits = (jnp.broadcast_to(x, (batch_size, *x.shape[1:])) for x in (one[0], one[2].logits))
    row = np.asarray(target[0, 0].astype(jnp.float32), np.float64)
    p = np.exp((row - row.max()) / 1.2) * (row >= np.sort(row)[-40])
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    # Ties at the cutoff are kept.
    cutoff = row[order[np.searchsorted(np.cumsum(p[order]), 0.95)]]
    p = np.where(row >= cutoff, p, 0) / p[row >= cutoff].sum()

    @jax.jit
    def draw(target, logits, key):
        keys = jax.random.split(key)
        tokens, normalizers = ss.sample(keys[0], logits[:, 0], sampling)
        draft = ss.Draft(tokens[:, None], logits, sampling, normalizers[:, None])
        return ss.verify(keys[1], target, draft, sampling).tokens[:, 0]

    likely = np.flatnonzero(p)
    degrees = len(likely) - 1
    # Above this value once in a million, by Wilson and Hilferty's approximation.
    limit = degrees * (1 - 2 / (9 * degrees) + 4.753 * (2 / (9 * degrees)) ** 0.5) ** 3
    return chi_square(functools.partial(draw, target, logits), p, likely, calls, limit)


def law_of_sample(batch_size, calls, vocab_size=32000):
    """Chi-square test of `sample` without filters, at a temperature, in 64 cells."""
    row = make(jax.random.key(7), 1, 1, vocab_size, jnp.bfloat16, "logits")[0][0, 0] * 1.5
    p = np.asarray(jax.nn.softmax(row.astype(jnp.float32) / 0.8), np.float64)
    logits = jnp.broadcast_to(row, (batch_size, vocab_size))
    draw = jax.jit(lambda key: ss.sample(key, logits, ss.SamplingParams(0.8))[0])
    return chi_square(draw, p, np.argsort(-p)[:63], calls, 134.9)


def chi_square(draw, p, cells, calls, limit):
    """Chi-square statistic of the tokens of many calls of `draw(key)`; all tokens outside `cells` are one cell."""
    counts = np.zeros(len(cells) + 1)
    for call in range(calls):
        found = np.asarray(draw(jax.random.key(100 + call)))[:, None] == cells
        counts[:-1] += found.sum(0)
        counts[-1] += (~found.any(1)).sum()
    expected = np.append(p[cells], max(1 - p[cells].sum(), 0)) * counts.sum()
    possible = expected > 1e-6 * counts.sum()
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    result = {"chi_square": statistic, "degrees": int(possible.sum()) - 1, "samples": int(counts.sum())}
    return {"ok": bool(statistic < limit and counts[~possible].sum() == 0)} | result


def unusable():
    """Checks normalizers that are NaN or too large, for which the draft's rows are read."""
    target, row_filter, draft, other, uniforms = make(jax.random.key(4), 8, 4, 50257, jnp.bfloat16, "normalizers")
    normalizers = draft.log_normalizers.at[0, 0].set(jnp.nan).at[3].set(jnp.inf).at[5, 1].set(1e6)
    return compare((target, row_filter, draft._replace(log_normalizers=normalizers), other, uniforms))


def again(*shape, calls=300, kernel=kernel, core=core):
    """Checks that many calls give equal bits, although the order in which blocks finish varies."""
    args = make(jax.random.key(5), *shape, jnp.bfloat16, "normalizers")
    first, *others = [kernel(*args) for _ in range(calls)]
    same = [all(bool((a == b).all()) for a, b in zip(first, other, strict=True)) for other in others]
    return compare(args, kernel, core) | {"ok": all(same), "calls": calls, "same": sum(same) + 1}


CASES = {
    "small": lambda: plain(2, 2, 4096, jnp.float32),
    "B8 V50257": lambda: plain(8, 4, 50257),
    "B64 V151936": lambda: plain(64, 4, 151936),
    "B64 V151936 normalizers": lambda: plain(64, 4, 151936, kind="normalizers"),
    "law V32000": law,
    "law from keys V32000 B1024": lambda: law_from_keys(1024, 200),
    "law from keys V32000 B16": lambda: law_from_keys(16, 4000),
    "law of sample V32000 B64": lambda: law_of_sample(64, 3200),
    "law of sample V32000 B256": lambda: law_of_sample(256, 800),
    "edges": edges,
    "B1 V151936": lambda: plain(1, 4, 151936),
    "B256 K8 V151936 normalizers": lambda: plain(256, 8, 151936, kind="normalizers"),
    "B256 K4 V151936 normalizers": lambda: plain(256, 4, 151936, kind="normalizers"),
    "B8 V151936, 300 calls": lambda: again(8, 4, 151936),
    "B64 V151936, 300 calls": lambda: again(64, 4, 151936),
    "B64 K8 V151936 normalizers": lambda: plain(64, 8, 151936, kind="normalizers"),
    "B256 K1 V32000 normalizers": lambda: plain(256, 1, 32000, kind="normalizers"),
    "B1 V151936 normalizers": lambda: plain(1, 4, 151936, kind="normalizers"),
    "unusable normalizers": unusable,
    "one draft": lambda: plain(16, 1, 50257),
    "no drafts": lambda: plain(16, 0, 51864, kind="one_hot"),
    "sigmoid B64 V50257": lambda: plain_sigmoid(64, 50257),
    "B256 K8 V32000 f16": lambda: plain(256, 8, 32000, jnp.float16),
    "sigmoid B1 V151936": lambda: plain_sigmoid(1, 151936),
    "sigmoid B256 V151936 f32": lambda: plain_sigmoid(256, 151936, jnp.float32, "normalizers"),
    "B3 V1999999": lambda: plain(3, 2, 1999999),
    "B64 V51865 f32": lambda: plain(64, 4, 51865, jnp.float32),
    "B64 V128256 one-hot": lambda: plain(64, 4, 128256, kind="one_hot"),
    "block rule B1 V151936": lambda: plain_block(1, 4, 151936),
    "block rule B64 V151936": lambda: plain_block(64, 4, 151936),
    "block rule B256 K8 V32000 f16": lambda: plain_block(256, 8, 32000, jnp.float16, "logits"),
    "block rule B64 V51865 f32": lambda: plain_block(64, 4, 51865, jnp.float32),
    "block rule B8 V50257 one-hot": lambda: plain_block(8, 4, 50257, kind="one_hot"),
    "block rule edges": lambda: edges(*block_pair),
    "block rule without success V32000": lambda: block_without_success(32000),
    "block rule without success V50257": lambda: block_without_success(50257),
    "block rule B64 V151936, 300 calls": lambda: again(64, 4, 151936, kernel=block_pair[0], core=block_pair[1]),
    "block rule law V32000": lambda: law(kernels.verify_block, 4),
}


def run(name):
    """Runs one case and reports its duration."""
    start = time.time()
    try:
        result = CASES[name]()
    except Exception as error:
        traceback.print_exc()
        result = {"ok": False, "error": repr(error)[:500]}
    return name, result | {"seconds": round(time.time() - start, 1)}


def main():
    about: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    rows: list[dict[str, Any]] = []
    path, *words = sys.argv[1:]
    names = [name for name in CASES if not words or any(word in name for word in words)]
    with concurrent.futures.ProcessPoolExecutor(PROCESSES, multiprocessing.get_context("spawn")) as pool:
        for done in concurrent.futures.as_completed([pool.submit(run, name) for name in names]):
            name, result = done.result()
            rows.append({"case": name} | result)
            print(name, result, flush=True)
            results.write(path, about, rows)


if __name__ == "__main__":
    main()
