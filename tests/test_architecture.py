"""Design rules that no output shows: import layers, docstrings, and the memory and traces of a compiled step."""

import ast
import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from inputs import QUICK

import specsamp_jax as ss

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"_types", "_files", "_rank_promotion", "_resident"},
    {"_checks", "_gguf"},
    {"_hub"},
    {"sampling"},
    {"rules"},
    {"decoding"},
    {"models", "text"},
    {"speech", "certificate"},
    {"train"},
    {"cli"},
]
"""Subpackages of specsamp_jax, lowest layer first: each imports from lower layers only."""


# Imports


def sources(package):
    return sorted((ROOT / package).rglob("*.py"))


def imports(path, inside_functions=True):
    """Full names of all that a file imports: modules, and what is taken from them."""
    rest = [ast.parse(path.read_text())]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif inside_functions or not isinstance(node, ast.FunctionDef):
            rest += ast.iter_child_nodes(node)


def layer(name):
    """The layer of a full name such as `specsamp_jax.rules.token.verify_token`."""
    package = name.split(".")[1]
    found = [i for i, packages in enumerate(LAYERS) if package in packages]
    assert found, f"specsamp_jax.{package} is in no layer"
    return found[0]


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", sources("specsamp_jax"), ids=module_name)
def test_imports_go_down_only(path):
    name = module_name(path)
    if name == "specsamp_jax.__init__":
        return
    for imported in imports(path):
        if imported.startswith("specsamp_jax."):
            same_package = imported.split(".")[1] == name.split(".")[1] and path.parent.name != "specsamp_jax"
            assert same_package or layer(imported) < layer(name), f"{name} imports {imported}"


@pytest.mark.parametrize(
    ("package", "where"),
    [
        ("flax", {"models", "train"}),
        ("optax", {"train"}),
        ("safetensors", {"models"}),
        ("tokenizers", {"text", "speech", "cli"}),
        ("jinja2", {"text"}),
        ("click", {"cli"}),
        ("gguf", set()),
        ("huggingface_hub", set()),
        ("pallas_kernels", {"_types", "sampling", "rules"}),
    ],
)
def test_what_is_imported_in_few_places_only(package, where):
    for path in sources("specsamp_jax"):
        if any(imported.split(".")[0] == package for imported in imports(path)):
            assert module_name(path).split(".")[1] in where


@pytest.mark.parametrize("path", sources("pallas_kernels"), ids=module_name)
def test_kernels_know_jax_only(path):
    for imported in imports(path):
        assert imported.split(".")[0] in {
            "pallas_kernels",
            "jax",
            "jaxtyping",
            "numpy",
            "functools",
            "math",
            "dataclasses",
            "typing",
            "collections",
        }
        assert not imported.startswith("jax.random"), "kernels draw nothing"


def test_kernels_and_heavy_packages_are_imported_when_they_are_needed():
    """Follows the imports that `import specsamp_jax` runs."""
    reached, packages, rest = set(), set(), ["specsamp_jax.__init__"]
    while rest:
        name = rest.pop()
        path = ROOT / (name.replace(".", "/") + ".py")
        if name in reached or not path.exists():
            continue
        reached.add(name)
        for imported in imports(path, inside_functions=False):
            packages.add(imported.split(".")[0])
            # A module, a package, or something that is taken from one.
            rest += [imported, f"{imported}.__init__", imported.rpartition(".")[0]]
    assert {"specsamp_jax.rules.verify", "specsamp_jax.rules.token"} <= reached
    assert packages >= {"jax", "specsamp_jax"}
    assert not packages & {"flax", "optax", "tokenizers", "click", "safetensors"}


@pytest.mark.parametrize("path", sources("specsamp_jax") + sources("pallas_kernels"), ids=module_name)
def test_a_file_holds_one_idea(path):
    limit = 330
    assert len(path.read_text().splitlines()) <= limit


RIDDLES = re.compile(r"(What|Where|Who|Whoever|How|The same|Room for)\b")
DOCUMENTED = [path for folder in ("specsamp_jax", "pallas_kernels", "bench", "examples") for path in sources(folder)]


@pytest.mark.parametrize("path", DOCUMENTED, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_docstring_begins_with_a_verb_or_a_noun_phrase(path):
    # A string after an assignment documents its constant or field.
    strings = [
        (node.lineno, node.value.value)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    assert [line for line, text in strings if RIDDLES.match(text)] == []


def test_the_names_of_the_design_are_there():
    for name, fields in {
        "SamplingParams": ("temperature", "top_k", "top_p", "min_p"),
        "Draft": ("tokens", "logits", "sampling", "log_normalizers", "noise"),
        "Verification": ("tokens", "num_accepted", "log_probs", "accept_prob", "status"),
    }.items():
        assert getattr(ss, name)._fields == fields
    assert tuple(ss.SamplingParams()) == (1.0, 0, 1.0, 0.0)
    assert (ss.PAD_TOKEN, ss.DEGENERATE_TARGET, ss.DEGENERATE_DRAFT, ss.EMPTY_RESIDUAL) == (-1, 1, 2, 4)
    # Every rule has the signature of `verify`, so that any of them can be passed as verify_fn.
    expected = list(inspect.signature(ss.verify).parameters)
    assert expected == ["key", "target_logits", "draft", "sampling", "implementation"]
    assert list(inspect.signature(ss.verify_coupled).parameters) == [*expected, "positions"]
    assert list(inspect.signature(ss.verify_sigmoid).parameters) == [*expected, "alpha", "beta"]


# What a compiled step is made of

B, V = 4, 50_000
ARRAYS = ss.SamplingParams(
    np.array([0.0, 0.5, 1, 2], "f"),
    np.array([0, 50, 0, 3]),
    np.array([1, 0.9, 0.5, 1], "f"),
    np.array([0, 0.1, 0, 0], "f"),
)


def compiled(rule, num_draft, *, dtype="float32", sampling=None, normalizers=False, certain=False, vocab_size=V):
    """The compiled step of B rows, not optimised below the level on which buffers are assigned."""

    def shape(*sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype)

    draft = ss.Draft(shape(B, num_draft, dtype="int32"))
    if not certain:
        draft = draft._replace(logits=shape(B, num_draft, vocab_size))
    if normalizers:
        draft = draft._replace(log_normalizers=shape(B, num_draft, dtype="float32"))

    def step(key, target_logits, draft):
        return rule(key, target_logits, draft if certain else draft._replace(sampling=sampling), sampling)

    lowered = jax.jit(step).lower(jax.random.key(0), shape(B, num_draft + 1, vocab_size), draft)
    return lowered.compile(QUICK)


@pytest.mark.newest_jax
@pytest.mark.kernels(False)
@pytest.mark.both_programs(False)  # the first cases have no filters
@pytest.mark.parametrize(
    ("rule", "options"),
    [
        (ss.verify, {}),
        (ss.verify, {"vocab_size": 5000}),
        (ss.verify, {"dtype": "float16"}),
        (ss.verify, {"dtype": "bfloat16", "sampling": ARRAYS}),
        (ss.verify, {"sampling": ARRAYS, "normalizers": True}),
        (ss.verify, {"sampling": ss.SamplingParams(temperature=0.0), "certain": True}),
        (ss.verify_block, {"dtype": "bfloat16", "normalizers": True}),
        (ss.verify_sigmoid, {"dtype": "bfloat16"}),
        (ss.verify_coupled, {"dtype": "bfloat16", "normalizers": True}),
    ],
    ids=[
        "plain",
        "small vocabulary",
        "float16",
        "filtered bfloat16",
        "normalizers",
        "greedy deterministic draft",
        "block",
        "sigmoid",
        "coupled",
    ],
)
def test_no_temporary_is_as_large_as_the_logits(rule, options):
    # 24 rows of logits, even in bfloat16, are 12 rows of float32: all temporaries together are fewer.
    memory = compiled(rule, 24, **options).memory_analysis()
    assert memory.temp_size_in_bytes < 24 * B * options.get("vocab_size", V) * 2


def test_a_step_is_traced_once_a_shape_and_moves_nothing_to_or_from_the_host():
    num_traces = 0

    def counted(keys, target_logits, draft, sampling):
        nonlocal num_traces
        num_traces += 1
        return ss.verify(keys, target_logits, draft, sampling)

    step = jax.jit(counted, compiler_options=QUICK)
    rng = np.random.default_rng(0)
    arguments = [
        jax.device_put(
            (
                jax.random.split(jax.random.key(seed), B),
                rng.normal(size=(B, 3, 29)).astype("f"),
                ss.Draft(rng.integers(-1, 29, size=(B, 2)), rng.normal(size=(B, 2, 29)).astype("f"), ARRAYS),
                ss.SamplingParams(*(np.roll(field, seed) for field in ARRAYS)),
            )
        )
        for seed in range(3)
    ]
    step(*arguments[0])
    with jax.transfer_guard("disallow"):
        results = [step(*each) for each in arguments]
    assert num_traces == 1
    assert len({result.tokens.tobytes() for result in jax.device_get(results)}) == 3
    program = step.lower(*arguments[0]).as_text()
    for word in ("callback", "infeed", "outfeed", "stablehlo.send", "stablehlo.recv"):
        assert word not in program
