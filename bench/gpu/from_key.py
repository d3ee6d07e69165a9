"""`sample`, `verify` and `verify_block` from a key to tokens, with filters that checkpoints ship: checked, then timed.

    python bench/gpu/from_key.py OUT.json SECONDS [words]     # cases with such a word in their name, all without one
    PART=1/8 LOCK=/tmp/gpu0 python bench/gpu/from_key.py ...  # every eighth case; measures while no other process does

A case is checked against the XLA core on the same keys first. Times are of the profiler, inputs rotated past the L2:
`us` is how long at least one kernel of a call runs, the median over calls, `mean_us` their mean, `span_us` from the
start of its first kernel to the end of its last. With LOOP=1 only `loop_us` is measured: the host's clock over a
compiled loop of calls, each of which waits for the one before, divided by their number. XLA_FLAGS choose between
command buffers of at least five operations (default), of any (--xla_gpu_graph_min_graph_size=1) and none.
"""

import functools
import json
import os
import statistics
import sys
import time
import traceback
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timings

import specsamp_jax as ss
from specsamp_jax.rules import verify as verify_module
from specsamp_jax.sampling import draw

V = 151_936
ROTATED = 240e6
SHIPPED = ss.SamplingParams(temperature=0.7, top_k=20, top_p=0.8)
"""The parameters of Qwen2.5's generation_config.json."""
SAMPLINGS = {
    "none": lambda batch_size: None,
    "T .7 k 20 p .8": lambda batch_size: SHIPPED,
    "T .7 k 20 p .8 arrays": lambda batch_size: jax.tree.map(lambda x: jnp.full((batch_size,), x), SHIPPED),
    "k 50 p .95": lambda batch_size: ss.SamplingParams(top_k=50, top_p=0.95),
    "p .95": lambda batch_size: ss.SamplingParams(top_p=0.95),
    "min-p .05": lambda batch_size: ss.SamplingParams(min_p=0.05),
}


def logits(key, shape, kind):
    """Normal logits times 3, whose nucleus holds tens of thousands, or peaked ones like a trained model's."""
    keys = jax.random.split(key, 3)
    if kind == "flat":
        return 3 * jax.random.normal(keys[0], shape, jnp.float32)
    likely = jax.random.bernoulli(keys[1], 3e-4, shape)
    return 2 * jax.random.normal(keys[0], shape) + jnp.where(likely, 8 + 3 * jax.random.exponential(keys[2], shape), 0)


@functools.partial(jax.jit, static_argnames=("batch_size", "num_draft", "dtype", "kind", "name"))
def make(key, batch_size, num_draft, dtype, kind, name):
    """A key, logits and what is drafted from the draft's own filtered logits, normalizers handed over."""
    keys = jax.random.split(key, 4)
    target = logits(keys[0], (batch_size, num_draft + 1, V), kind)
    noise = 0.5 * jax.random.normal(keys[1], (batch_size, num_draft, V), jnp.float32)
    drafted = (target[:, :-1] + noise).astype(dtype)
    return keys[2], target.astype(dtype), drafted


def parameters(name, batch_size):
    """Sampling parameters, and those of them that are arguments of a program: arrays."""
    sampling = SAMPLINGS[name](batch_size)
    return sampling, sampling if name.endswith("arrays") else None


def sample_step(batch_size, dtype, kind, name):
    """`sample` of one case, and a function from a seed to its arguments."""
    sampling, arrays = parameters(name, batch_size)

    def step(key, target, arrays):
        return ss.sample(key, target, sampling if arrays is None else arrays)

    def arguments(seed):
        key, target, _ = make(jax.random.key(seed), batch_size, 0, dtype, kind, name)
        return key, target[:, 0], arrays

    return step, arguments


RULES = {"verify": ss.verify, "verify_block": ss.verify_block}


def verify_step(fn, batch_size, num_draft, dtype, kind, name):
    """A rule of one case, and a function from a seed to its arguments."""
    sampling, arrays = parameters(name, batch_size)

    def step(key, target, drafted, tokens, normalizers, arrays):
        used = sampling if arrays is None else arrays
        return RULES[fn](key, target, ss.Draft(tokens, drafted, used, normalizers), used)

    @jax.jit
    def drafting(key, drafted):
        rows = drafted.reshape(-1, V)
        each = jax.tree.map(lambda x: x if jnp.ndim(x) == 0 else jnp.repeat(x, num_draft), sampling)
        tokens, normalizers = draw.sample(jax.random.fold_in(key, 1), rows, each)
        return tokens.reshape(drafted.shape[:2]), normalizers.reshape(drafted.shape[:2])

    def arguments(seed):
        key, target, drafted = make(jax.random.key(seed), batch_size, num_draft, dtype, kind, name)
        return key, target, drafted, *drafting(key, drafted), arrays

    return step, arguments


def steps(case):
    """The function of one case, and a function from a seed to its arguments."""
    fn, batch_size, num_draft, *rest = case
    return sample_step(batch_size, *rest) if fn == "sample" else verify_step(fn, batch_size, num_draft, *rest)


def by_core(step, *args):
    """Builds the step on the plain JAX cores."""

    def core_only(core, kernel, arguments, why_not, implementation):
        del kernel, why_not, implementation
        return core(*arguments)

    before = draw.dispatch, verify_module.dispatch
    draw.dispatch = verify_module.dispatch = core_only
    try:
        return jax.jit(lambda *args: step(*args)).lower(*args)
    finally:
        draw.dispatch, verify_module.dispatch = before


def check(program, core, args):
    """Number of rows that differ, and the largest difference of a float output."""
    got, expected = jax.device_get((program(*args), core(*args)))
    if isinstance(got, ss.Verification):
        same = (got.tokens == expected.tokens).all(1) & (got.status == expected.status)
        apart = np.abs(got.log_probs - expected.log_probs)[same].max(initial=0)
    else:
        same = got[0] == expected[0]
        apart = np.abs(got[1] - expected[1]).max()
    return {"different": int((~same).sum()), "of": int(same.size), "apart": float(apart)}


def measure(program, sets, rounds):
    jax.block_until_ready([program(*s) for s in sets])
    launches, calls = timings.launches_of(program, sets, rounds), rounds * len(sets)
    each = len(launches) // calls
    if each * calls != len(launches):
        return {"us": round(timings.busy(launches) / calls / 1e3, 2), "launches": round(len(launches) / calls, 1)}
    parts = [launches[i * each : (i + 1) * each] for i in range(calls)]
    span = statistics.median(max(end for _, end, _ in part) - part[0][0] for part in parts) / 1e3
    each_us = [timings.busy(part) / 1e3 for part in parts]
    return {
        "us": round(statistics.median(each_us), 2),
        "mean_us": round(statistics.mean(each_us), 2),
        "span_us": round(span, 2),
        "launches": each,
    }


def in_a_loop(step, args, length=200):
    """Microseconds of a call inside a compiled loop."""

    def body(carry, _):
        key, total = carry
        out = step(key, *args[1:])
        first = out[0].reshape(-1)[0]
        return (jax.random.fold_in(key, first), total + first), None

    loop = jax.jit(lambda key: jax.lax.scan(body, (key, jnp.int32(0)), None, length=length)[0][1])
    loop(args[0]).block_until_ready()
    start = time.perf_counter()
    loop(args[0]).block_until_ready()
    return round((time.perf_counter() - start) / length * 1e6, 1)


def name_of(case):
    fn, batch_size, num_draft, dtype, kind, name = case
    return f"{fn} B{batch_size} K{num_draft} {dtype} {kind} {name}"


CASES = [
    (fn, batch_size, num_draft, dtype, kind, name)
    for dtype in ("bfloat16", "float32")
    for num_draft in (4, 8)
    for batch_size in (1, 8, 64, 256)
    for fn in ("sample", *RULES)
    for kind in ("flat", "peaked")
    for name in SAMPLINGS
    if (fn, num_draft) != ("sample", 8) and (fn != "verify_block" or name in ("none", "T .7 k 20 p .8"))
]


def compile_case(case, checked):
    """The step, its arguments' function, its program, and that of the XLA core if it is to be compared."""
    step, arguments = steps(case)
    shapes = jax.eval_shape(arguments, 0)
    core = by_core(step, *shapes).compile() if checked else None
    return step, arguments, jax.jit(step).lower(*shapes).compile(), core


def measure_case(case, in_loop):
    """Times of a case, after the comparison with the XLA core."""
    step, arguments, program, core = compile_case(case, checked=not in_loop)
    with timings.alone_on_the_gpu():
        args = arguments(0)
        if core is None:
            return {"loop_us": in_a_loop(step, args)}
        row = check(program, core, args)
        size = sum(x.nbytes for x in jax.tree.leaves(args[1:]))
        sets = [arguments(i) for i in range(timings.num_sets(size))]
        return row | measure(program, sets, max(2, 24 // len(sets)))


def main():
    path, deadline, words = sys.argv[1], time.time() + float(sys.argv[2]), sys.argv[3:]
    cases = [case for case in CASES if not words or any(word in name_of(case) for word in words)]
    # Processes, not threads: the compilers of XLA and of Mosaic wait for each other inside one process.
    part, parts = map(int, os.environ.get("PART", "0/1").split("/"))
    about: dict[str, Any] = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": []}
    about["xla_flags"] = os.environ.get("XLA_FLAGS", "")
    for case in cases[part::parts]:
        if time.time() > deadline:
            print("out of time before", name_of(case))
            break
        row: dict[str, Any] = {"case": name_of(case)}
        try:
            row |= measure_case(case, os.environ.get("LOOP") == "1")
        except Exception as error:
            traceback.print_exc(limit=-2)
            row["error"] = repr(error)[:300]
        about["rows"].append(row)
        print(json.dumps(row), flush=True)
        with open(path, "w") as file:
            file.write(json.dumps({k: v for k, v in about.items() if k != "rows"}) + "\n")
            file.writelines(json.dumps(row) + "\n" for row in about["rows"])


if __name__ == "__main__":
    main()
