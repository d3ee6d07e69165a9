"""The first calls of a process: they leave the caller's compiled programs alone, and import nothing."""

from processes import process

FIRST_CALLS = """
import sys
import jax, jax.numpy as jnp
import specsamp_jax as ss

num_traces = 0

@jax.jit
def mine(x):
    global num_traces
    num_traces += 1
    return x + 1

mine(1.0)
imported = set(sys.modules)

def bigrams(table, tokens, positions, cache):
    return table[tokens], cache

def first_calls():
    target = ss.Model(jnp.eye(5), bigrams, lambda batch_size, max_length: ())
    draft = ss.Draft(jnp.zeros((1, 1), int), jnp.zeros((1, 1, 2048)))
    for rule in (ss.verify, ss.verify_sigmoid):
        jax.jit(rule)(jax.random.key(0), jnp.zeros((1, 2, 2048)), draft)
    # A program for another machine holds the kernel: it is traced too, and lowered.
    jax.jit(ss.verify).trace(jax.random.key(0), jnp.zeros((1, 2, 2048)), draft).lower(lowering_platforms=("cuda",))
    ss.generate(jax.random.key(0), jnp.array([[1]]), target=target, draft=target, max_new_tokens=2)

first_calls()
mine(1.0)
assert (num_traces, mine._cache_size()) == (1, 1), f"the caller's function was traced {num_traces} times"
packages = "jax.experimental", "specsamp", "pallas"
kernels = "jax.experimental.mosaic", "jax.experimental.pallas", "pallas_kernels."
late = sorted(name for name in set(sys.modules) - imported if name.startswith(packages))
print([name for name in late if not name.startswith(kernels)])
"""


WITHOUT_MOSAIC = """
import sys
sys.modules["jax.experimental.mosaic.gpu"] = None
import jax, jax.numpy as jnp
import specsamp_jax as ss

logits = jnp.zeros((1, 2, 2048))
draft = ss.Draft(jnp.zeros((1, 1), int), logits[:, :1])
sampling = ss.SamplingParams(0.7, 5)
jax.jit(ss.sample)(jax.random.key(0), logits[:, 0], sampling)
for rule in (ss.verify, ss.verify_sigmoid):
    jax.jit(rule).lower(jax.random.key(0), logits, draft, sampling)
    try:
        rule(jax.random.key(0), logits, draft, implementation="pallas")
    except NotImplementedError as error:
        print(error)
print(any(name.startswith("pallas_kernels.token") for name in sys.modules))
"""


FOR_THIS_MACHINE = """
import sys
import jax, jax.numpy as jnp
import specsamp_jax as ss
from specsamp_jax.sampling.dispatch import for_this_machine

with for_this_machine(True):
    jax.jit(ss.sample)(jax.random.key(0), jnp.zeros((1, 2048)), ss.SamplingParams(0.7, 5))
print("jax.experimental.mosaic.gpu" in sys.modules)
"""


def test_a_process_that_needs_no_kernel_does_not_import_mosaic_gpu():
    result = process(FOR_THIS_MACHINE)
    assert (result.returncode, result.stdout.strip()) == (0, "False"), result.stderr


def test_without_mosaic_gpu_the_package_runs_on_xla():
    result = process(WITHOUT_MOSAIC)
    assert result.returncode == 0, result.stderr
    *messages, has_kernels = result.stdout.splitlines()
    assert has_kernels == "False"
    assert len(messages) == 2
    for message in messages:
        assert 'implementation "pallas" needs a jaxlib with Mosaic GPU' in message


def test_first_calls_leave_the_callers_programs_alone():
    result = process(FIRST_CALLS)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]", f"imported while a function was traced: {result.stdout}"
