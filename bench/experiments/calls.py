"""Times one sampling call of each rule, from the key, on real logits; and its memory, as the compiler counts it.

Sampling parameters are numbers, as a caller of `verify` writes them, or arrays, as the decoding loop passes them: then
a row may be greedy, and a call is the program that the texts run.
"""

import concurrent.futures
import functools
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from locks import Lock
from methods import CALIBRATED, FUNCTIONS, dense
from settings import AS_DATA, Setting

import specsamp_jax as ss

sys.path.append(str(Path(__file__).parents[1] / "gpu"))
import timings

THREADS = 4
"""Programs that are compiled at once: more only wait for the interpreter, in which they are lowered."""


@functools.cache
def _draw(dtype: str, temperature: float, top_k: int, top_p: float) -> Any:
    """The compiled function that casts logits and drafts from them."""
    sampling = ss.SamplingParams(temperature, top_k, top_p)

    @jax.jit
    def draw(key, target, draft):
        size = len(target)
        target, draft = target.astype(dtype), draft.astype(dtype)
        # Without the package's kernels: lowering one takes seconds, and this is not timed.
        filtered = dense(draft, sampling, draft.argmax(-1))
        tokens, normalizers = jax.random.categorical(key, filtered), jax.nn.logsumexp(filtered, axis=-1)
        estimates = jax.nn.logsumexp(target[:, 0].astype(jnp.float32), axis=-1)
        kinds = jnp.float32, jnp.int32, jnp.float32
        arrays = tuple(jnp.full(size, *each) for each in zip(sampling[:3], kinds, strict=True))
        return key, target, tokens.astype(jnp.int32), draft, normalizers, estimates, arrays

    return draw


def inputs(setting: Setting, logits: tuple[np.ndarray, np.ndarray], num_sets: int) -> list[tuple[Any, ...]]:
    """Sets of a key, target logits, a draft, estimates of log-normalisers for calibrated rules, and parameters.

    Logits are those of consecutive rows of real texts, drafts are sampled from the drafter's.
    """
    size, (target, draft) = setting.batch_size, logits
    draw = _draw(setting.dtype, setting.temperature, setting.top_k, setting.top_p)
    rows = (slice(i * size, (i + 1) * size) for i in range(min(num_sets, len(target) // size)))
    return [draw(jax.random.key(i), target[at], draft[at, :-1]) for i, at in enumerate(rows)]


def compiled(setting: Setting, example: tuple[Any, ...]) -> Any:
    """The compiled call."""
    method = setting.method.removesuffix(AS_DATA)

    def call(key, target, tokens, draft, normalizers, estimates, arrays):
        sampling = ss.SamplingParams(setting.temperature, setting.top_k, setting.top_p)
        if method != setting.method:
            temperature, top_k, top_p = arrays
            # A filter that is off is not in the loop's program either.
            filters = top_k if setting.top_k else 0, top_p if setting.top_p != 1 else 1.0
            sampling = ss.SamplingParams(temperature, *filters)
        arguments = key, target, ss.Draft(tokens, draft, sampling, normalizers), sampling
        if method in CALIBRATED:
            rule = CALIBRATED[method]
            result, state = rule(*arguments, rule.init(len(tokens))._replace(log_normalizer=estimates))
            return result.tokens, result.num_accepted, state
        if method == "calibrated unreported":
            log_normalizers = jnp.broadcast_to(estimates[:, None], tokens.shape)
            result = ss.verify_calibrated(*arguments, log_normalizers=log_normalizers)
        else:
            result = FUNCTIONS[method](*arguments)
        return result.tokens, result.num_accepted

    return jax.jit(call).lower(*example).compile()


def measure_host(fn: Any, sets: list[Any], rounds: int) -> dict[str, float]:
    """Median of the host's clock over calls one after the other, in microseconds."""
    jax.block_until_ready([fn(*each) for each in sets])
    times = []
    for _ in range(rounds):
        for each in sets:
            start = time.perf_counter()
            jax.block_until_ready(fn(*each))
            times.append(time.perf_counter() - start)
    return {"us": round(1e6 * statistics.median(times), 1)}


def measure(settings: list[Setting], logits: tuple[np.ndarray, np.ndarray], report_fn: Any, lock: Lock) -> None:
    """Calls `report_fn(setting, row)` for each setting: device time by the profiler on a GPU, else the host's.

    Programs are compiled under the shared lock, times are taken under the exclusive one.
    """
    gpu = jax.default_backend() == "gpu"
    place = functools.partial(inputs, logits=logits, num_sets=1)
    pool = concurrent.futures.ThreadPoolExecutor(THREADS)
    # Compiling also runs kernels on the GPU, so that nothing is measured meanwhile.
    with lock.shared():
        examples = {setting: place(setting)[0] for setting in settings}
        programs = {setting: pool.submit(compiled, setting, examples[setting]) for setting in settings}
        concurrent.futures.wait(programs.values())
    for setting, future in programs.items():
        try:
            program = future.result()
            size = sum(x[0].size for x in logits) * setting.batch_size * jnp.dtype(setting.dtype).itemsize
            with lock.exclusive():
                sets = inputs(setting, logits, timings.num_sets(size) if gpu else 4)
                rounds = max(2, 24 // len(sets))
                times = timings.measure(program, sets, rounds) if gpu else measure_host(program, sets, 5)
        except Exception as error:
            report_fn(setting, {"error": f"{type(error).__name__}: {str(error)[:200]}"})
            continue
        memory = program.memory_analysis()
        kept = memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes
        report_fn(setting, {**times, "bytes": sum(kept), "temporary_bytes": kept[-1]})
        del sets
