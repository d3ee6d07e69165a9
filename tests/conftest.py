"""Fixtures of several test files, and the choice of the kernels' cases that run on every push."""

import gc
import os
import re
from pathlib import Path

import hypothesis
import pytest

# JAX and the library are imported in functions, which the process that hands tests to others does not call.

# `few` runs the same examples each time; `thorough` draws new ones.
_SLOW = {"deadline": None, "database": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("few", max_examples=200, derandomize=True, **_SLOW)
hypothesis.settings.register_profile("thorough", max_examples=3000, **_SLOW)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "few"))

# A waiting block of an interpreted kernel holds one thread of XLA's pool, which has one thread per core. On two cores,
# two blocks and the call itself would deadlock. XLA reads NPROC once, at its first use.
os.environ.setdefault("NPROC", "8")

FALSE_ALARM = 1e-4
"""Probability that a chi-square test fails although the law holds. Keys are fixed, so results do not vary."""

# Names of the tests that compare a kernel with its specification, one per path through the kernel.
PATHS = re.compile(r"test_equals_(xla|numpy|the_oracle)(_filtered|_one_hot)?|test_early_exit_decides_the_same")


WITHOUT_KERNELS = {
    *("certificate", "cli", "decoding", "examples", "models", "rules", "sampling", "speech", "train"),
    *(f"test_{name}.py" for name in ("docs", "examples", "experiments", "export", "properties")),
}
"""Folders and files whose tests trace no GPU kernel: a program for a CPU drops it, after a fifth of the time."""

WITH_ONE_PROGRAM = {
    *("cli", "decoding", "examples", "models", "speech", "train"),
    *(f"test_{name}.py" for name in ("docs", "examples", "experiments")),
}
"""Folders and files whose tests compile filters that are data without the program for filters that are off.

Rows have the same bits in both, as tests/sampling/test_filters_off.py shows; the second costs a fifth of the time.
"""

LONG = {
    f"test_{name}.py"
    for name in ("distill", "docs", "examples", "experiments", "export", "fresh_process", "losses", "properties")
}
"""Files of 5 to 70 s at the end of the alphabet. They run first, so that no process is left with one at the end."""


def _marked(item, name, without):
    """The argument of a test's nearest mark of this name; without a mark, whether it is in no folder of `without`."""
    mark = item.get_closest_marker(name)
    if mark is not None:
        return mark.args != (False,)
    return item.path.relative_to(Path(__file__).parent).parts[0] not in without


def traces_kernels(item):
    """Whether a test traces the GPU kernels beside the plain JAX cores, as programs of users do."""
    return _marked(item, "kernels", WITHOUT_KERNELS)


def compiles_both(item):
    """Whether a test compiles programs with and without filters where the filters are data, as users do."""
    return _marked(item, "both_programs", WITH_ONE_PROGRAM)


def is_optimised(item):
    """Whether a test compiles with all optimisations: True unless its nearest mark is `optimised(False)`."""
    mark = item.get_closest_marker("optimised")
    return mark is None or mark.args != (False,)


def settings(item):
    return is_optimised(item), traces_kernels(item), compiles_both(item)


@pytest.hookimpl(tryfirst=True)  # before tests are selected by their markers
def pytest_collection_modifyitems(items):
    """Marks with `each_push` the first slow case of each test in `PATHS`, or of the file if it has no such test."""
    items.sort(key=lambda item: (item.path.name not in LONG, item.path, *settings(item)))
    slow = [item for item in items if item.get_closest_marker("slow") and "interpreted" in item.fixturenames]
    paths = {(item.path, item.originalname): item for item in reversed(slow) if PATHS.fullmatch(item.originalname)}
    firsts = {item.path: item for item in reversed(slow)}
    with_paths = {path for path, _ in paths}
    for item in [*paths.values(), *(item for path, item in firsts.items() if path not in with_paths)]:
        item.add_marker("each_push")


@pytest.fixture(scope="session")
def assert_law():
    """A chi-square test of drawn rows of tokens, padded with -1, against a law from `oracle`."""

    import numpy as np
    import oracle

    def assert_law(tokens, law):
        tokens = np.asarray(tokens)
        # Encode each row as one number, which `np.unique` counts many times faster than rows.
        _, first, counts = np.unique(
            (tokens + 1) @ 100 ** np.arange(tokens.shape[1]), return_index=True, return_counts=True
        )
        drawn = tokens[first]
        observed = {
            tuple(int(t) for t in row if t >= 0): count for row, count in zip(drawn.tolist(), counts, strict=True)
        }
        assert observed.keys() <= law.keys(), "something was emitted that has probability zero"
        cells = sorted(law)
        p_value = oracle.chi_square(
            np.array([observed.get(cell, 0) for cell in cells]), np.array([law[cell] for cell in cells])
        )
        assert p_value > FALSE_ALARM

    return assert_law


@pytest.fixture(scope="session")
def _one_layer_folder(tmp_path_factory):
    import small_pair

    return small_pair.write(tmp_path_factory.mktemp("pair"), num_layers=1)


@pytest.fixture
def one_layer_pair(_one_layer_folder, monkeypatch):
    """The folder of the trained pair with one layer per model, which takes the place of the whole pair."""
    from specsamp_jax.cli import generation, pair

    for module in (pair, generation):
        monkeypatch.setattr(module, "ASSETS", _one_layer_folder)
    return _one_layer_folder


def pytest_collection_finish():
    """Collects garbage less often: tracing creates many objects, and each collection visits all live ones."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(200_000, 20, 50)


@pytest.hookimpl(tryfirst=True)  # before the fixtures, which compile too
def pytest_runtest_setup(item):
    """Compiles the programs of a test as its marks say."""
    import programs

    programs.compile_with(*settings(item))


@pytest.fixture(scope="module", autouse=True)
def _few_compiled_programs():
    """Drops compiled programs after a file if the process has more than 20,000 memory maps.

    Each program takes several maps and Linux allows 65,530; beyond that the compiler aborts.
    """
    import jax

    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > 20_000:
        jax.clear_caches()
        gc.collect()
