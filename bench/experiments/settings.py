"""The runs of the experiments: one table of blocks, each a product of methods and settings. Most important first."""

import itertools
from typing import NamedTuple

import methods

import specsamp_jax as ss


class Setting(NamedTuple):
    """One row of the tables.

    Attributes:
      method: A name in `methods.VERIFY_FNS`; "target alone" or "drafter alone" for plain decoding.
      drafter: "model" or "n-grams".
      temperature: 0 is greedy.
      top_k: 0 is the full support.
      dtype: Dtype of the logits of both models.
      batch_size: Texts that are decoded together.
      num_draft: A name in `NUM_DRAFT`.
      top_p: 1 is the full support.
      seed: The seed of the draws.
    """

    method: str
    drafter: str = "model"
    temperature: float = 1.0
    top_k: int = 0
    dtype: str = "float32"
    batch_size: int = 8
    num_draft: str = "5"
    top_p: float = 1.0
    seed: int = 0

    @property
    def name(self) -> str:
        """The row's key in result files; a top-p that is off is not in it."""
        *values, top_p, seed = self
        return "|".join(map(str, [*values, *([top_p] if top_p != 1 else []), seed]))


NUM_DRAFT: dict[str, ss.HeuristicNumDraft | int] = {
    "5": 5,
    "heuristic": ss.HeuristicNumDraft(lengths=(5, 12)),
}
"""Draft lengths. The heuristic is the paper's, up to 12 drafts; two lengths are compiled."""

ALONE = "target alone", "drafter alone"
SIGMOIDS = tuple(name for name in methods.VERIFY_FNS if name.startswith("sigmoid"))
CALIBRATED = tuple(methods.CALIBRATED)
RULES = *methods.EXACT, *SIGMOIDS, *CALIBRATED
MAIN = "baseline", "ours", "sigmoid 2e4", "calibrated"
AS_DATA = ", parameters as data"
"""Ends the name of a method whose call is timed with sampling parameters that are arrays, as in the decoding loop."""

BLOCKS: list[dict[str, tuple]] = [
    # Quality and acceptance of every rule, greedy and sampled, at a fixed draft length. The checkpoints' own parameters
    # are greedy. Greedy rows of the sigmoid as described are exact; as released, greedy decoding takes another path.
    {"method": ("target alone", "ours", "exact", "baseline"), "temperature": (0.0, 1.0)},
    {"method": SIGMOIDS},
    {"method": ("sigmoid 2e4", "drafter alone"), "temperature": (0.0,)},
    {"method": ("drafter alone", *CALIBRATED, "block", "coupled")},
    {"method": ("block", "coupled"), "temperature": (0.0,)},
    # Filtered support: a sigmoid scores what is filtered out 0.
    {"method": ("target alone", *RULES, "drafter alone"), "top_k": (50,)},
    # The paper's draft length.
    {"method": MAIN, "num_draft": ("heuristic",)},
    {"method": ("sigmoid as released",), "num_draft": ("heuristic",)},
    # One text at a time.
    {"method": ("target alone", *MAIN, "exact"), "batch_size": (1,)},
    # Logits of 16 bits.
    {"method": ("target alone", "ours", "sigmoid 2e4", *CALIBRATED), "dtype": ("bfloat16", "float16")},
    # A drafter without a model.
    {"method": ("ours", "sigmoid 2e4"), "drafter": ("n-grams",), "temperature": (1.0, 0.0)},
    # More seeds, for narrower intervals of what is sampled.
    {"method": ("target alone", *methods.EXACT, "sigmoid 2e4", *CALIBRATED), "seed": (1, 2, 3)},
    {"method": ("target alone", *methods.EXACT, *CALIBRATED), "seed": tuple(range(4, 16))},
]
"""Unlisted settings have the defaults of `Setting`."""

QUICK: list[dict[str, tuple]] = [
    {"method": ("target alone", "ours"), "temperature": (0.0, 1.0), "batch_size": (4,)},
    {"method": ("sigmoid 2e4",), "batch_size": (4,)},
]
"""The runs of `run.sh --quick`."""

QWEN: list[dict[str, tuple]] = [
    {"method": ("target alone",), "temperature": (0.0, 1.0)},
    {"method": ("ours",), "drafter": ("n-grams",), "temperature": (0.0, 1.0)},
    {"method": ("sigmoid 2e4",), "drafter": ("n-grams",)},
]
"""The runs of Qwen2.5-Coder, which answers without training, with drafts by n-grams."""

QWEN_OWN: dict[str, tuple] = {"temperature": (0.7,), "top_k": (20,), "top_p": (0.8,)}
"""The sampling parameters that Qwen2.5 is published with, without its penalty of repetitions."""

QWEN_PAIR: list[dict[str, tuple]] = [
    {"method": ("target alone", "ours", "exact", "baseline"), "temperature": (1.0, 0.0)},
    {"method": (*SIGMOIDS, "drafter alone", *CALIBRATED, "block", "coupled")},
    {"method": ("target alone", *MAIN, "exact", "drafter alone", "block", "coupled"), **QWEN_OWN},
    {"method": ("drafter alone", "sigmoid 2e4", "block", "coupled"), "temperature": (0.0,)},
    {"method": ("target alone", *MAIN), "top_k": (50,)},
    {"method": MAIN, "num_draft": ("heuristic",)},
    {"method": ("target alone", *MAIN, "exact"), "batch_size": (1,)},
    {"method": ("target alone", "ours", "sigmoid 2e4", "calibrated"), "dtype": ("bfloat16", "float16")},
    {"method": ("ours", "sigmoid 2e4"), "drafter": ("n-grams",), "temperature": (1.0, 0.0)},
    {"method": ("target alone", *methods.EXACT, "calibrated"), "seed": tuple(range(1, 16))},
    # After 16 seeds the interval of ours excluded 0; 24 more tell whether that was chance.
    {"method": ("target alone", "ours", "block"), "seed": tuple(range(16, 40))},
]
"""The runs of a large Qwen2.5-Coder with a small one as its drafter."""

CALLS: list[dict[str, tuple]] = [
    {"method": (*RULES, "calibrated unreported"), "batch_size": (8, 1)},
    {"method": tuple(f"{rule}{AS_DATA}" for rule in RULES), "batch_size": (8, 1)},
    {"method": tuple(f"{rule}{AS_DATA}" for rule in (*MAIN, "exact")), "top_k": (50,)},
    {"method": tuple(f"{rule}{AS_DATA}" for rule in (*MAIN, "exact")), "temperature": (0.0,)},
    {"method": (*MAIN, "exact"), "dtype": ("bfloat16",), "batch_size": (8, 1)},
    {"method": (*MAIN, "exact"), "top_k": (50,), "batch_size": (8, 1)},
    {"method": (*MAIN, "exact"), "temperature": (0.0,), "batch_size": (8, 1)},
    {"method": (*MAIN, "exact"), "dtype": ("float16",)},
]
"""Settings at which one sampling call is timed. "calibrated unreported" has the estimates and reports no bound."""

QWEN_CALLS: list[dict[str, tuple]] = [
    {"method": tuple(f"{rule}{AS_DATA}" for rule in RULES), "batch_size": (8, 1)},
    {"method": RULES, "batch_size": (8, 1)},
    {"method": tuple(f"{rule}{AS_DATA}" for rule in (*MAIN, "exact", "block")), **QWEN_OWN},
    {"method": tuple(f"{rule}{AS_DATA}" for rule in (*MAIN, "exact")), "temperature": (0.0,)},
    {"method": (*MAIN, "exact"), "dtype": ("bfloat16",), "batch_size": (8, 1)},
]
"""Settings at which one sampling call is timed on the logits of the pair of Qwen2.5-Coder."""

LAWS: list[dict[str, tuple]] = [
    {"method": (*RULES, "calibrated exact"), "top_k": (0, 50)},
    {"method": ("ours", "sigmoid 2e4", *CALIBRATED), "dtype": ("bfloat16", "float16")},
]
"""Settings at which the emitted law is computed."""

QWEN_LAWS: list[dict[str, tuple]] = [*LAWS, {"method": (*RULES, "calibrated exact"), **QWEN_OWN}]
"""Settings at which the emitted law of the pair of Qwen2.5-Coder is computed."""


class Plan(NamedTuple):
    """The blocks of a task's runs, timed calls and laws."""

    runs: list[dict[str, tuple]]
    calls: list[dict[str, tuple]]
    laws: list[dict[str, tuple]]


PLANS = {"qwen": Plan(QWEN, [], []), "pair": Plan(QWEN_PAIR, QWEN_CALLS, QWEN_LAWS)}
"""The plans of the tasks that have their own."""


def plan(task: str) -> Plan:
    """The plan of a task by its name."""
    return PLANS.get(task, Plan(BLOCKS, CALLS, LAWS))


def expand(blocks: list[dict[str, tuple]]) -> list[Setting]:
    """The settings of some blocks, each once, in order."""
    found = {}
    for block in blocks:
        for values in itertools.product(*block.values()):
            setting = Setting(**dict(zip(block, values, strict=True)))
            found[setting.name] = setting
    return list(found.values())
