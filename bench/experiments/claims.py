"""The claims of the page. Each function returns lines for one task; no number is typed, each comes from a row."""

from claims_gain import RELEASED, gain
from claims_law import SIGMOID, calibrated, emitted, widths
from rows import (
    AS_DATA,
    EXACT_METHODS,
    MARGINS,
    MISSING,
    OWN,
    SUPPORTS,
    Row,
    Table,
    cell,
    change,
    days,
    excludes_loss,
    grid,
    loses,
    points,
    ref,
    signed,
    span,
    support_words,
    verdict,
)
from score import describe

PAPER_EXACT = 6, 13
"""Percent of time saved in the paper's abstract; with that of `claims_gain` all that is taken from it."""

NAMED_ACCEPTANCE = 0.6
"""Share of accepted drafts, of five, greedy, on test speech, that was aimed at before the drafter was trained."""


def drafters(table: Table) -> list[str]:
    """Lines on the models, without which no other row means anything."""
    out = []
    rows = [
        table.find("text", method, temperature=t) for t in (0.0, 1.0) for method in ("target alone", "drafter alone")
    ]
    if all(rows):
        greedy, sampled = rows[:2], rows[2:]
        words = "; ".join(
            f"{name}: target {a['quality'][0]:.1f}, drafter {b['quality'][0]:.1f} {ref(a, b)}"
            for name, (a, b) in (("greedy", greedy), ("sampled at temperature 1", sampled))
            if a and b
        )
        trivial = table.all("trivial")[0]
        out.append(f"- {table.measure} of the models alone, {words}. A trivial system has {trivial['quality'][0]:.1f} "
                   f"{ref(trivial)}.")  # fmt: skip
        last = rows[3]
        if last and "difference" in last and not table.fixture and last["difference"][1] <= 0 <= last["difference"][2]:
            out.append(f"- Sampled, the drafter alone is not seen to be worse than the target {ref(last)}: there, "
                       "quality cannot tell text by the target's law from text by the drafter's.")  # fmt: skip
    greedy, sampled = (table.find("text", "ours", temperature=t) for t in (0.0, 1.0))
    if greedy and sampled and "accepted" in greedy:
        out.append(f"- The exact rule accepts {greedy['accepted']:.2f} of all drafts greedy and "
                   f"{sampled['accepted']:.2f} sampled, and {first(greedy)} and {first(sampled)} of first drafts "
                   f"{ref(greedy, sampled)}. {counting(table, greedy)}")  # fmt: skip
        if table.name == "asr" and not table.fixture:
            reached = "reached" if greedy["accepted"] >= NAMED_ACCEPTANCE else "missed"
            held = table.about.get("training", {}).get("held_out_synthetic_speech", {})
            more = (" On held-out synthetic speech, read along the target's transcripts, a sampled draft is accepted "
                    f"with probability {held['acceptance_at_temperature_1']:.2f} and the most probable tokens agree "
                    f"at {held['same_most_probable_token']:.2f} of positions.") if held else ""  # fmt: skip
            out.append(f"- Aimed at before training: {NAMED_ACCEPTANCE} of five drafts accepted, greedy, on test "
                       f"speech. It was {reached}: {greedy['accepted']:.2f} {ref(greedy)}.{more}")  # fmt: skip
    groups = [(m, t, r) for m in ("target alone", "drafter alone", SIGMOID) for t in (0.0, 1.0)
              if (r := table.find("text", m, temperature=t)) and "groups" in r and (m != SIGMOID or t)]  # fmt: skip
    if groups:
        out += grid([table.measure, *groups[0][2]["groups"]],
                    [[cell(row, f"{m}, {'sampled' if t else 'greedy'}"), *(f"{x:.1f}" for x in row["groups"].values())]
                     for m, t, row in groups])  # fmt: skip
    return out


def counting(table: Table, row: Row) -> str:
    """The sentence on the drafts that a row counts."""
    if "drafts" in table.about["machines"][row["machine"]]:
        return "Drafts after the end of a text are not counted."
    return "Five drafts are counted in every call, also those after the end of a text."


def first(row: Row) -> str:
    """Acceptance at the first position."""
    return f"{row['acceptance'][0]:.2f}" if row["acceptance"] else "none"


def losses(table: Table) -> str:
    """The result of the exact rules in a few words: equal greedy texts, and the tests of sampled ones."""
    greedy = next((r for m in ("ours", *EXACT_METHODS) if (r := table.find("text", m, temperature=0.0))), None)
    tested: dict[str, list[tuple[str, Row]]] = {}
    for method in EXACT_METHODS:
        if (row := table.find("text", method)) and "difference" in row:
            result = verdict(table, row)
            if result == "not decided" and excludes_loss(table, row):
                result += " but without a loss beyond the margin"
            if result.startswith("equal") and not row["difference"][1] <= 0 <= row["difference"][2]:
                result += ", but for intervals without 0"
            tested.setdefault(result, []).append((method, row))
    said = [f"{greedy['same']} of {greedy['texts']} greedy texts are the target's own {ref(greedy)}"] if greedy else []
    said += [f"sampled {', '.join(m for m, _ in some)} {result} {ref(*(r for _, r in some))}"
             for result, some in tested.items()]  # fmt: skip
    own = [row for m in EXACT_METHODS if (row := table.find("text", m, **OWN)) and "difference" in row]
    if own:
        results = dict.fromkeys(verdict(table, row) for row in own)
        said.append(f"with the checkpoint's own parameters {' or '.join(results)} {ref(*own)}")
    return f"{table.title}: {', '.join(said)}" if said else ""


def exactness(table: Table) -> list[str]:
    """Lines on whether exact rules lose anything."""
    lines, out, margin = [], [], MARGINS[table.measure]
    for method in EXACT_METHODS:
        greedy, sampled, own = (table.find("text", method, **each) for each in ({"temperature": 0.0}, {}, OWN))
        if greedy and "same" in greedy:
            lines.append([cell(greedy, method), "greedy", f"{greedy['same']} of {greedy['texts']}",
                          signed(greedy["difference"]), verdict(table, greedy)])  # fmt: skip
        if sampled and "difference" in sampled:
            lines.append([cell(sampled, method), f"sampled, seeds: "
                                                 f"{sampled['seeds']}", "", signed(sampled["difference"]),
                          verdict(table, sampled)])  # fmt: skip
        if own and "difference" in own:
            lines.append([cell(own, method), describe(own), "", signed(own["difference"]), verdict(table, own)])
        if not (greedy or sampled or table.fixture):
            lines.append([method, MISSING, "", "", ""])
    if lines:
        out += grid(
            ["method", "", "same text as the target", f"{table.measure} to target alone", f"margin {margin}"], lines
        )
    ours = table.find("text", "ours", temperature=0.0)
    if ours and "same" in ours:
        others = [r for m in ("baseline", "exact", SIGMOID) if (r := table.find("text", m, temperature=0.0))]
        agree = min((r["same_as_ours"] for r in others), default=0)
        count = f"all {agree}" if agree == ours["texts"] else f"at least {agree}"
        same = f" Among themselves the rules agree on {count} {ref(*others)}." if others else ""
        out.append(f"- Greedy, ours wrote {ours['same']} of {ours['texts']} texts as the target alone does "
                   f"{ref(ours)}.{same}"
                   + (" So the rest is not the rule's doing: the model reads six positions at once where the target "
                      "alone "
                      "reads one, which rounds its sums "
                      "otherwise." if others and ours["same"] < ours["texts"] else ""))  # fmt: skip
    sampled = table.find("text", "ours")
    if sampled and "difference" in sampled and verdict(table, sampled) == "not decided":
        _, low, high = sampled["difference"]
        needed = sampled["seeds"] * ((high - low) / 2 / margin) ** 2
        if excludes_loss(table, sampled):
            out.append("- Sampled, ours is not decided because its interval ends beyond the margin on the side of "
                       f"better texts: {signed(sampled['difference'])} {ref(sampled)}. No loss of more than the margin "
                       "is left in it; that ours is better is not shown either.")  # fmt: skip
            return out
        out.append("- Sampled, the margin is narrower than what these runs can resolve: to decide it, ours would "
                   f"need about {needed:.0f} seeds where it has {sampled['seeds']}, if its difference were 0 "
                   f"{ref(sampled)}. No loss was seen, and none is excluded at the margin.")  # fmt: skip
    return out


CASES = [
    (size, settings)
    for settings in ({}, {"dtype": "bfloat16"}, {"top_k": 50}, {"temperature": 0.0})
    for size in (1, 8, 4)
]
COLUMNS = "baseline", "exact", RELEASED, "ours", SIGMOID, "calibrated", "block", "coupled"


def one_call(table: Table) -> list[str]:
    """Lines on the time of one call."""
    lines, saved, shown = [], [], []
    for size, settings in CASES:
        rows = {m: table.find("call", m, batch_size=size, **settings) for m in COLUMNS}
        base, exact = rows["baseline"], rows["exact"]
        if not any(rows.values()):
            continue
        words = ", ".join([f"{size} text{'s' * (size > 1)}", *(f"{k} {v}" for k, v in settings.items())]).replace(
            "_", "-"
        )
        lines.append(
            [
                words.replace("temperature 0.0", "greedy").replace("dtype ", ""),
                *(
                    cell(r, f"{r['us']:.1f}")
                    if r
                    else MISSING * (table.fixture or table.plans("call", m, batch_size=size, **settings))
                    for m, r in rows.items()
                ),
            ]
        )
        shown += [r for r in rows.values() if r]
        if base and exact:
            saved.append((100 * (1 - exact["us"] / base["us"]), settings.get("top_k", 0), exact, base))
    if not lines:
        return []
    out = grid(["us per call", *COLUMNS], lines)
    if any("" in cells for cells in lines):
        out.append("- Empty cells were not planned.")
    used = sorted({r["machine"] + 1 for r in shown})
    if len(used) > 1 and len({table.about["machines"][i - 1].get("device") for i in used}) == 1:
        words = f"{', '.join(map(str, used[:-1]))} and {used[-1]}"
        out.append(f"- The calls are of machines {words}, whose cards are of one kind; times are the card's own, not "
                   f"the host's.{days(table, shown)}")  # fmt: skip
    if saved:
        low, high = PAPER_EXACT
        parts = [
            (words, [s for s in saved if bool(s[1]) == kept])
            for words, kept in (("over the full support", False), ("with top-k 50", True))
        ]
        said = " and ".join(
            f"{span([s[0] for s in some])} % {words} {ref(*(r for s in some for r in s[2:]))}"
            for words, some in parts
            if some
        )
        out.append(f"- **Exact against the baseline**: the paper's formulation, left to the compiler, saves {said}. "
                   f"The abstract has {low} to {high} %. Not the same: their kernel is CUDA under PyTorch; this "
                   "baseline writes each intermediate of all rows to memory, and JAX launches it as one program. A "
                   "baseline that computes the rejected row's residual alone is faster than exact in XLA: "
                   "docs/benchmarks.md.")  # fmt: skip
    for size in (1, 8):
        base, exact, released, ours, sigmoid = (table.find("call", m, batch_size=size) for m in COLUMNS[:5])
        if not (base and exact and released and ours and sigmoid):
            continue
        where = f"{size} text{'s' * (size > 1)}"
        out.append(f"- **Sigmoid, {where}**: compiled by XLA as the exact method is, the released formulation takes "
                   f"{change(released['us'], exact['us'])} than exact and {change(released['us'], base['us'])} than "
                   f"the baseline {ref(released, exact, base)}. As a kernel, which ours is too, {SIGMOID} takes "
                   f"{change(sigmoid['us'], ours['us'])} than ours {ref(sigmoid, ours)}. Ours takes "
                   f"{change(ours['us'], released['us'])} than the sigmoid that XLA compiles: a kernel gains more "
                   "than leaving softmax out.")  # fmt: skip
    ours, sigmoid = (table.find("call", m, top_k=50) for m in ("ours", SIGMOID))
    if ours and sigmoid:
        out.append(f"- With top-k 50, 8 texts, the sigmoid's kernel takes {change(sigmoid['us'], ours['us'])} than "
                   f"ours: the cutoff has to be found in either {ref(sigmoid, ours)}.")  # fmt: skip
    return out + as_data(table)


def as_data(table: Table) -> list[str]:
    """A line on calls whose sampling parameters are arrays."""
    pairs = [(m, table.find("call", m), table.find("call", m + AS_DATA)) for m in COLUMNS]
    said = [f"{m} {old['us']:.1f} to {new['us']:.1f} {ref(old, new)}" for m, old, new in pairs if old and new]
    if not said:
        return []
    return [f"- **With parameters as data**, as the decoding loop passes them, a row may be greedy. 8 texts, us from "
            f"numbers to arrays: {'; '.join(said)}. The sigmoid's kernel takes no row that may be greedy, so that XLA "
            "compiles it in the loop.", *own_parameters(table)]  # fmt: skip


def own_parameters(table: Table) -> list[str]:
    """A line on calls with the sampling parameters of a checkpoint that is not greedy."""
    rows = [(m, row) for m in COLUMNS if (row := table.find("call", m + AS_DATA, **OWN))]
    if not rows:
        return []
    times = dict(rows)
    said = ", ".join(f"{m} {row['us']:.1f} {ref(row)}" for m, row in rows)
    least = ""
    if "ours" in times and "exact" in times:
        least = f" Ours takes {change(times['ours']['us'], times['exact']['us'])} than exact."
    return [f"- With the parameters that the checkpoint is published with ({describe(rows[0][1])}; its penalty of "
            f"repetitions is left out), as data, 8 texts, us: {said}.{least}"]  # fmt: skip


def cost(table: Table) -> list[str]:
    """Lines on what the sigmoid costs."""
    out, lines = [], []
    for support in SUPPORTS:
        words = support_words(support)
        for method in (
            "ours",
            "sigmoid 2e3",
            SIGMOID,
            "sigmoid 2e5",
            RELEASED,
            "calibrated",
            "calibrated +4",
            "drafter alone",
        ):
            row = table.find("text", method, **support)
            if not row or "difference" not in row:
                if table.plans("text", method, **support):
                    lines.append([method, words, *[MISSING] * 2, *[""] * 4])
                continue
            accepts, speed = (first(row), f"{row['tokens_per_call']:.2f}") if row["acceptance"] else ("", "")
            lines.append([cell(row, method), words, accepts, speed,
                          f"{row['quality'][0]:.1f}",
                          signed(row["difference"]), signed(row["to_drafter"]) if "to_drafter" in row else "",
                          verdict(table, row)])  # fmt: skip
    if lines:
        out += grid(["method", "support", "first draft accepted", "tokens/call", table.measure, "to target alone",
                     "to drafter alone", f"margin {MARGINS[table.measure]}"], lines)  # fmt: skip
    row, drafter = table.find("text", SIGMOID), table.find("text", "drafter alone")
    if row and "difference" in row:
        out.append(f"- Full support, sampled, 5 drafts: {SIGMOID} accepts {first(row)} of first drafts; "
                   f"{table.measure} {points(row['difference'])} against the target alone {ref(row)}.")  # fmt: skip
        law = table.find("law", SIGMOID)
        if drafter and "to_drafter" in row and law and loses(table, row["to_drafter"]):
            out.append(f"- It is also worse than its drafter alone, by {points(row['to_drafter'])} "
                       f"{ref(row, drafter)}. The drafts do follow the drafter's law; what is lost beyond it is the "
                       f"token after full acceptance, one in {row['tokens_per_call']:.1f}, whose law is at "
                       f"{law['bonus_to_target']:.2f} from the target's {ref(law)}. The drafter alone needs no target "
                       "and no rule.")  # fmt: skip
            longer = table.find("text", SIGMOID, num_draft="heuristic")
            ends = [[abs(x) for x in r["difference"][1:]] for r in (longer, row) if r]
            if longer and max(ends[0]) < min(ends[1]):
                out.append("- With the paper's heuristic, here up to 12 drafts, that token is one in "
                           f"{longer['tokens_per_call']:.1f} and the loss smaller: {points(longer['difference'])} "
                           f"{ref(longer)}. Where everything is accepted the heuristic's length grows without end, so "
                           "that the text becomes the drafter's own; that may be why the paper reports a slight "
                           "loss. We did not test it.")  # fmt: skip
            elif longer:
                out.append("- The paper reports a slight loss, with its heuristic. Here, with at most 12 drafts, it is "
                           f"not seen to be smaller than with five: {points(longer['difference'])} {ref(longer)}, and "
                           "the intervals overlap.")  # fmt: skip
            else:
                out.append(f"- The paper reports a slight loss, with its heuristic; here the heuristic is {MISSING}.")
        trivial = table.all("trivial")[0]
        if loses(table, 3 * [row["quality"][0] - trivial["quality"][0]]):
            out.append(
                f"- It is worse than the trivial system, which has {trivial['quality'][0]:.1f} {ref(row, trivial)}."
            )
    n_grams = table.find("text", SIGMOID, drafter="n-grams")
    if n_grams and (n_grams["quality"][0] > 100 if table.measure == "WER" else n_grams["quality"][0] < 1):
        out.append("- With n-grams, which often draft nothing, nearly every token comes from that flat law: "
                   f"{table.measure} {n_grams['quality'][0]:.3g}, {n_grams['tokens']:.0f} tokens in every text, the "
                   f"most that are allowed {ref(n_grams)}.")  # fmt: skip
    greedy = table.find("text", SIGMOID, temperature=0.0)
    if greedy and "same_as_ours" in greedy:
        ours = table.find("text", "ours", temperature=0.0)
        other = ", which ran on another machine" if ours and ours["machine"] != greedy["machine"] else ""
        out.append(f"- Greedy rows are exact by construction in `verify_sigmoid`: {greedy['same_as_ours']} of "
                   f"{greedy['texts']} texts are those of ours {ref(greedy)}{other}. A greedy test does not see the "
                   "loss.")  # fmt: skip
    return out


CLAIMS = [
    ("How good are the models?", drafters),
    ("Does the exact method lose nothing?", exactness),
    ("Is one call faster?", one_call),
    ("Where does the sigmoid's gain come from: fewer calls, or a faster call?", gain),
    ("What does it cost in quality, at a fixed draft length, and at what acceptance?", cost),
    ("What does it emit: the target's law, or the drafter's?", emitted),
    ("Which alpha and beta mean anything?", widths),
    ("What does the calibrated sigmoid keep?", calibrated),
]
