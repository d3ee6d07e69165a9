"""Draw every picture of the README and the site into docs/images, from the numbers in bench/results.

python docs/plots.py
"""

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

ROOT = Path(__file__).parents[1]
RESULTS, IMAGES = ROOT / "bench" / "results", ROOT / "docs" / "images"
TEAL, ORANGE, PURPLE, GREY, LIGHT = "#00796b", "#d9730d", "#6a4fb3", "#6b7280", "#d5dbe1"
STYLE = {
    "figure.facecolor": "white",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    # The same numbers give the same file.
    "svg.hashsalt": "specsamp",
}


def read(name: str) -> list[Any]:
    """Returns the rows of a result file."""
    return json.loads((RESULTS / name).read_text())["rows"]


def gpu_times(contender: str, *, draft: str, vocab_size: int = 151_936, num_draft: int = 4) -> dict[int, float]:
    """Returns microseconds by batch size, in bfloat16. `draft` is "normalizers" or "logits": what is handed over."""
    times = {}
    for row in read("gpu_h100_timings.json"):
        batch_size, *rest, found = row  # [B, K, V, dtype, draft, {name: [us, launches]}]
        if contender in found and rest == [num_draft, vocab_size, "bfloat16", draft]:
            times[batch_size] = found[contender][0]
    return times


def peer_times(contender: str) -> dict[int, float]:
    """Returns microseconds by batch size of a peer that was measured by hand."""
    return {row["B"]: row["us"] for row in read("gpu_h100_peers.json") if row["contender"] == contender}


def transformers_time() -> float:
    """Returns the microseconds of transformers' step in torch, which does one sequence only."""
    rows = read("gpu_h100_torch.json")
    return next(row["us"] for row in rows if row["point"] == [1, 4, 151_936, "bfloat16"])


def log_batches(axes: Axes, batches: list[int]) -> None:
    """Labels a logarithmic axis of batch sizes and one of microseconds."""
    axes.set(xscale="log", yscale="log", xlabel="sequences in the batch", ylabel="microseconds")
    axes.set_xticks(batches, [str(b) for b in batches])
    ticks = [5, 10, 20, 50, 100, 200, 500, 1000]
    axes.set_yticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()


def gpu_step() -> Figure:
    """Time of one verification on an H100: ours, plain XLA, the paper's two, and peers."""
    figure, axes = plt.subplots(figsize=(6.4, 4.4))
    lines: list[tuple[str, dict[int, float], dict[str, Any]]] = [
        ("specsamp, normalizers given", gpu_times("kernel", draft="normalizers"), {"color": TEAL, "lw": 3}),
        ("specsamp", gpu_times("kernel", draft="logits"), {"color": TEAL, "lw": 1.5}),
        ("specsamp's rule in XLA", gpu_times("xla", draft="logits"), {"color": ORANGE}),
        ("the paper's baseline", gpu_times("paper's baseline", draft="logits"), {"color": PURPLE}),
        ("the paper's exact method", gpu_times("paper's exact", draft="logits"), {"color": PURPLE, "ls": "--"}),
        ("SGLang *", peer_times("SGLang, blockwise"), {"color": GREY}),
        ("vLLM *", peer_times("vLLM, newer runner"), {"color": GREY, "ls": "--"}),
        ("FlashInfer *", peer_times("FlashInfer, chain and softmax"), {"color": GREY, "ls": ":"}),
    ]
    for label, times, style in lines:
        axes.plot(list(times), list(times.values()), marker="o", ms=4, label=label, **style)
    axes.plot([1], [transformers_time()], "x", color=GREY, ms=8, mew=2, label="transformers (1 sequence)")
    log_batches(axes, [1, 8, 64, 256])
    axes.set_ylim(5, 2200)
    axes.set_title("One verification on an H100: 151,936 tokens, 4 drafts", fontsize=11, loc="left")
    axes.legend(fontsize=10, loc="upper center", ncols=2, bbox_to_anchor=(0.45, -0.15))
    return figure


def gpu_vocabularies() -> Figure:
    """Time by vocabulary at 64 sequences, beside what a copy of the same bytes takes."""
    figure, axes = plt.subplots(figsize=(6.0, 3.8))
    sizes = [32_000, 51_864, 128_256, 151_936]
    bars = [
        ("kernel, normalizers", "kernel", "normalizers", TEAL),
        ("kernel, draft logits", "kernel", "logits", "#5fb3a8"),
        ("XLA", "xla", "logits", ORANGE),
        ("the paper's baseline", "paper's baseline", "logits", PURPLE),
        ("the paper's exact", "paper's exact", "logits", "#b3a3e0"),
    ]
    for i, (label, name, draft, color) in enumerate(bars):
        heights = [gpu_times(name, draft=draft, vocab_size=size)[64] for size in sizes]
        axes.bar(np.arange(len(sizes)) + 0.16 * (i - 2), heights, 0.15, label=label, color=color)
    axes.set_xticks(range(len(sizes)), [f"{size:,}" for size in sizes])
    axes.set(ylabel="microseconds", xlabel="tokens in the vocabulary")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=9)
    return figure


def decode_cpu() -> Figure:
    """Tokens per second of the trained pair on two CPU cores."""
    rows = {row["contender"]: row for row in read("decode_cpu.json") if "contender" in row}
    bars = [
        ("draft length by goodput", "goodput", TEAL),
        ("target alone", "target_alone", ORANGE),
        ("paper's draft length", "heuristic", "#5fb3a8"),
        ("4 drafts, always", "speculative", "#5fb3a8"),
        ("n-grams, 4 drafts", "n_gram", "#5fb3a8"),
        ("transformers, target alone", "transformers_generate", GREY),
        ("transformers, assisted", "transformers_assisted", GREY),
    ]
    return horizontal_bars([(label, rows[name]["tokens_per_second"], color) for label, name, color in bars])


def families_cpu() -> Figure:
    """Tokens per second of each model family on two CPU cores, beside transformers."""
    rows = read("models_cpu.json")
    families = list(dict.fromkeys(row["family"] for row in rows))

    def best(family, prefix):
        found = [
            r for r in rows if r["family"] == family and r["batch_size"] == 1 and r["contender"].startswith(prefix)
        ]
        return max(row["tokens_per_second"] for row in found)

    figure, axes = plt.subplots(figsize=(6.0, 3.6))
    bars = [
        ("specsamp, 4 drafts", "speculative", TEAL),
        ("specsamp, target alone", "target_alone", ORANGE),
        ("transformers, assisted", "transformers_assisted", GREY),
        ("transformers, target alone", "transformers_generate", LIGHT),
    ]
    for i, (label, prefix, color) in enumerate(bars):
        heights = [best(family, prefix) for family in families]
        axes.bar(np.arange(len(families)) + 0.2 * (i - 1.5), heights, 0.19, label=label, color=color)
    axes.set_xticks(range(len(families)), [name.capitalize() for name in families])
    axes.set_ylabel("tokens per second")
    axes.set_ylim(0, 900)
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=9, ncols=2, loc="upper left")
    return figure


def verify_cpu() -> Figure:
    """Milliseconds of one verification on two CPU cores."""
    rows = {(row["contender"], row["batch_size"]): row["seconds"] for row in read("verify_cpu.json")}
    bars = [
        ("specsamp", "specsamp", TEAL),
        ("transformers", "transformers", GREY),
        ("plain JAX baseline", "baseline", ORANGE),
        ("tpu-inference, rejection only", "tpu_inference_rejection_only", GREY),
        ("tpu-inference, whole sampler", "tpu_inference", GREY),
    ]
    return horizontal_bars([(label, 1e3 * rows[name, 1], color) for label, name, color in bars], unit="ms")


def horizontal_bars(bars: list[tuple[str, float, str]], unit: str = "tokens per second") -> Figure:
    """Draws labelled bars from top to bottom, with their values."""
    figure, axes = plt.subplots(figsize=(5.6, 0.42 * len(bars) + 0.6))
    labels, values, colors = zip(*bars, strict=True)
    axes.barh(range(len(bars)), values, color=colors, height=0.7)
    for i, value in enumerate(values):
        axes.text(value + 0.01 * max(values), i, f"{value:.3g}" if value < 100 else f"{value:,.0f}", va="center")
    axes.set_yticks(range(len(bars)), labels)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_xlim(0, 1.12 * max(values))
    axes.grid(axis="y", visible=False)
    return figure


# A vocabulary of six words, on which the rules can be seen.
WORDS = ["cat", "dog", "owl", "fox", "hen", "bee"]
TARGET = np.array([0.35, 0.25, 0.15, 0.12, 0.08, 0.05])
DRAFT = np.array([0.15, 0.35, 0.25, 0.05, 0.15, 0.05])


def token_rule() -> Figure:
    """Draw p and q of a small vocabulary, the accepted part of q, and the residual."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(6.4, 5.4), sharex=True)
    index, kept = np.arange(len(WORDS)), np.minimum(TARGET, DRAFT)
    above.bar(index - 0.2, TARGET, 0.38, color=TEAL, label="p, the target")
    above.bar(index + 0.2, DRAFT, 0.38, color=LIGHT, label="q, the draft: rejected part")
    above.bar(index + 0.2, kept, 0.38, color=ORANGE, label="min(p, q): accepted part of q")
    above.set_ylabel("probability")
    above.set_ylim(0, 0.42)
    above.legend(fontsize=10)
    below.bar(index, kept, 0.55, color=ORANGE, label=f"an accepted draft ({kept.sum():.2f} in all)")
    residual = TARGET - kept
    below.bar(
        index,
        residual,
        0.55,
        bottom=kept,
        color=PURPLE,
        label=f"a residual token, max(p - q, 0) ({residual.sum():.2f})",
    )
    below.plot(index, TARGET, "_", color="black", ms=34, mew=2, label="p: the sum, for each word")
    below.set_xticks(index, WORDS)
    below.set_ylabel("probability emitted")
    below.set_ylim(0, 0.48)
    below.legend(fontsize=10)
    for axes in (above, below):
        axes.grid(axis="x", visible=False)
    return figure


def sigmoid_rule() -> Figure:
    """Plots the law of the first token that the sigmoid rule emits, by enumeration, for several widths."""
    log_p, log_q = np.log(TARGET), np.log(DRAFT)

    def emitted(width):
        s_p, s_q = (1 / (1 + np.exp(-z / width)) for z in (log_p, log_q))
        kept = DRAFT * np.minimum(1, s_p / s_q)
        residual = np.maximum(s_p - s_q, 0)
        return kept + (1 - kept.sum()) * residual / residual.sum()

    figure, axes = plt.subplots(figsize=(6.4, 3.2))
    series = [
        ("p, the target", TARGET, TEAL),
        ("emitted, width 1", emitted(1.0), "#b3a3e0"),
        ("emitted, width 10", emitted(10.0), PURPLE),
        ("q, the draft", DRAFT, LIGHT),
    ]
    for i, (label, values, color) in enumerate(series):
        axes.bar(np.arange(len(WORDS)) + 0.2 * (i - 1.5), values, 0.19, color=color, label=label)
    axes.set_xticks(range(len(WORDS)), WORDS)
    axes.set_ylabel("probability")
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=10)
    return figure


def block_rule() -> Figure:
    """Probability of keeping i drafts under the token and the block rule, on the two-word example of the paper."""
    p, q = np.array([1, 2]) / 3, np.array([2, 1]) / 3
    kept = {"token": np.zeros(3), "block": np.zeros(3)}
    for first in range(2):
        for second in range(2):
            mass = q[first] * q[second]
            ratios = p[first] / q[first], p[second] / q[second]
            one, two = min(1, ratios[0]), min(1, ratios[1])
            kept["token"] += mass * np.array([1 - one, one * (1 - two), one * two])
            joint = min(1, ratios[0])
            total = np.maximum(joint * p - q, 0).sum()
            keep = total / (total + 1 - joint)
            both = min(1, joint * ratios[1])
            kept["block"] += mass * np.array([(1 - both) * (1 - keep), (1 - both) * keep, both])
    figure, axes = plt.subplots(figsize=(6.4, 3.0))
    for i, (name, color) in enumerate((("token", LIGHT), ("block", TEAL))):
        mean = kept[name] @ np.arange(3)
        label = f"{name} rule: {round(9 * mean)}/9 drafts kept on average"
        bars = axes.bar(np.arange(3) + 0.4 * (i - 0.5), kept[name], 0.38, color=color, label=label)
        axes.bar_label(bars, [f"{round(27 * value)}/27" for value in kept[name]], fontsize=10)
    axes.set_xticks(range(3), ["none", "the first", "both"])
    axes.set(xlabel="drafts kept of two", ylabel="probability")
    axes.set_ylim(0, 0.75)
    axes.grid(axis="x", visible=False)
    axes.legend(fontsize=10, loc="upper left")
    return figure


def coupled_rule() -> Figure:
    """Log-probabilities of target and draft plus one draw of Gumbel noise: shared, both have the same largest word."""
    noise = -np.log(-np.log(np.random.default_rng(8).random(len(WORDS))))
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6), sharey=True)
    index = np.arange(len(WORDS))
    for axes, title, shift in ((left, "log-probability", 0), (right, "log-probability + noise of the word", noise)):
        for offset, name, probs, color in ((-0.12, "target", TARGET, TEAL), (0.12, "draft", DRAFT, ORANGE)):
            values = np.log(probs) + shift
            axes.plot(index + offset, values, "o", color=color, label=name)
            best = int(np.argmax(values))
            axes.plot(best + offset, values[best], "o", ms=15, mfc="none", color=color)
        axes.set_xticks(index, WORDS)
        axes.set_title(title, fontsize=11)
    right.bar(index, noise, 0.7, color=LIGHT, zorder=0, label="noise")
    right.axhline(0, color=GREY, lw=0.8)
    right.legend(fontsize=9)
    return figure


def draft_length() -> Figure:
    """Speed-up over the target alone by draft length, for several acceptance rates and costs of verifying."""
    figure, panels = plt.subplots(1, 2, figsize=(7.2, 3.4), sharey=True)
    num_draft = np.arange(0, 13)
    costs = {"memory-bound target": 0.0, "each token costs 9 % more": 0.09}
    for axes, (title, per_token) in zip(panels, costs.items(), strict=True):
        for rate, color in ((0.5, LIGHT), (0.6, ORANGE), (0.7, PURPLE), (0.8, TEAL)):
            tokens = (1 - rate ** (num_draft + 1)) / (1 - rate)
            axes.plot(num_draft, tokens / (1 + (0.1 + per_token) * num_draft), color=color, label=f"acceptance {rate}")
        axes.axhline(1, color="black", lw=1)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("drafted tokens K")
    panels[0].set_ylabel("speed over the target alone")
    panels[1].legend(fontsize=9, loc="upper right")
    return figure


def tiles() -> Figure:
    """Two-level sampling: one uniform picks a tile by its sum, a second one an element inside it."""
    figure, axes = plt.subplots(figsize=(6.4, 4.3))
    rng = np.random.default_rng(3)
    weights = rng.gamma(0.6, size=(4, 8))
    weights[2] *= 1.6
    sums = weights.sum(1)
    axes.set_xlim(0, 32)
    axes.set_ylim(-0.4, 10.4)
    axes.axis("off")
    chosen, element = 2, int(np.argmax(weights[2]))
    axes.text(0, 10, "a row of weights in tiles (8 elements here, 1,024 in the code)")
    for tile in range(4):
        for i in range(8):
            color = (PURPLE if i == element else "#b3a3e0") if tile == chosen else LIGHT
            height = 1.9 * weights[tile, i] / weights.max()
            axes.add_patch(Rectangle((8 * tile + i + 0.08, 7.7), 0.84, height, color=color))
        axes.add_patch(Rectangle((8 * tile, 7.6), 8, 2.1, fill=False, ec=GREY))
        axes.text(8 * tile + 4, 7.0, f"sum {sums[tile]:.1f}", ha="center", fontsize=10)
    axes.text(0, 5.9, "first uniform: a tile, by its share of the sum")
    start = 0.0
    for tile in range(4):
        width = 32 * sums[tile] / sums.sum()
        axes.add_patch(Rectangle((start, 4.5), width, 1, fc="#b3a3e0" if tile == chosen else LIGHT, ec="white"))
        if tile == chosen:
            axes.annotate("", (start + 0.4 * width, 4.5), (start + 0.4 * width, 3.6), arrowprops={"arrowstyle": "->"})
        start += width
    axes.text(0, 2.7, "second uniform: an element, by its share of the tile")
    start = 0.0
    for i in range(8):
        width = 32 * weights[chosen, i] / sums[chosen]
        axes.add_patch(Rectangle((start, 1.3), width, 1, fc=PURPLE if i == element else "#b3a3e0", ec="white"))
        if i == element:
            axes.annotate(
                "the token",
                (start + width / 2, 1.3),
                (start + width / 2, -0.2),
                ha="center",
                arrowprops={"arrowstyle": "->"},
            )
        start += width
    return figure


def kernel_launches() -> Figure:
    """The two launches of the token kernel: who reads what, and what passes between them."""
    figure, axes = plt.subplots(figsize=(6.4, 5.0))
    axes.set_xlim(0, 32)
    axes.set_ylim(0, 19.5)
    axes.axis("off")
    axes.text(0, 18.7, "first launch: every chunk of every row, one block each", weight="bold")
    for row in range(3):
        y = 16.9 - 1.5 * row
        axes.text(0, y + 0.25, f"row {row}", fontsize=10)
        for chunk in range(4):
            axes.add_patch(Rectangle((4.4 + 5 * chunk, y), 4.7, 1.1, fc="#5fb3a8", ec="white"))
            axes.text(6.75 + 5 * chunk, y + 0.3, "max, sum", ha="center", fontsize=9, color="white")
        axes.add_patch(Rectangle((25.2, y), 6.6, 1.1, fc=ORANGE, ec="white"))
        axes.text(28.5, y + 0.3, "drafted logit", ha="center", fontsize=9, color="white")
    axes.annotate("", (16, 11.7), (16, 13.6), arrowprops={"arrowstyle": "->", "lw": 1.5})
    axes.text(16.8, 12.4, "a few numbers per chunk, in global memory", fontsize=10)
    axes.text(0, 10.9, "second launch: several blocks per sequence", weight="bold")
    boxes = [
        (9.1, "each block: decide all drafts, one row per lane", TEAL),
        (7.0, "read and sum its tiles of max(p - q, 0) in the rejected row", TEAL),
        (4.9, "count itself (one atomic); all but the last block end", PURPLE),
        (2.8, "last block: pick a tile by its sum, then a token in it", PURPLE),
    ]
    for y, label, color in boxes:
        axes.add_patch(FancyBboxPatch((0.3, y), 31.2, 1.1, boxstyle="round,pad=0.15", fc=color, ec="none"))
        axes.text(16, y + 0.32, label, ha="center", color="white", fontsize=10)
        axes.annotate("", (16, y - 0.75), (16, y - 0.15), arrowprops={"arrowstyle": "->"})
    axes.text(16, 1.0, "tokens, num_accepted, log_probs, status", ha="center", fontsize=10)
    return figure


FIGURES = [
    gpu_step,
    gpu_vocabularies,
    decode_cpu,
    families_cpu,
    verify_cpu,
    token_rule,
    block_rule,
    coupled_rule,
    sigmoid_rule,
    draft_length,
    tiles,
    kernel_launches,
]


def main() -> None:
    """Draws all figures."""
    IMAGES.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for draw in FIGURES:
            figure = draw()
            figure.savefig(IMAGES / f"{draw.__name__}.svg", bbox_inches="tight", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    main()
