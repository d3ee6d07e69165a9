"""Writes the page of the experiments from their tables: REPORT.md here, docs/experiments.md, and the plots.

    python bench/experiments/report.py [--tables FOLDER] [--out FOLDER]

No measured number of the page is typed: sentences take theirs from rows, and point at them.
"""

import argparse
from pathlib import Path

import caches
import claims
import plots
from claims_qwen import QWEN, zero_shot
from rows import AS_DATA, MISSING, OWN, TITLES, Row, Table, change, line, loses, ref, short, signed, span
from score import describe

ROOT = Path(__file__).parents[2]


def findings(found: list[Table]) -> list[str]:
    """The results in a few lines."""
    if all(t.fixture for t in found):
        return []
    same = "; ".join(said for t in found if not t.fixture and (said := claims.losses(t)))
    out = [
        f"- **No loss beyond the margin was seen by exact rules**: {same}. The intervals of the others that are not "
        "decided are too wide for the margin."
    ]
    for t in found:
        calls = {size: [t.find("call", m, batch_size=size) for m in claims.COLUMNS[:5]] for size in (1, 8)}
        whole = {size: [row["us"] for row in rows if row] for size, rows in calls.items() if all(rows)}
        if whole:
            by = [span([100 * (1 - us[i] / us[0]) for us in whole.values()]) for i in range(1, 5)]
            sizes = " and ".join(f"{size} text{'s' * (size > 1)}" for size in whole)
            out.append(f"- **One call is faster** ([{t.title}](#is-one-call-faster), {sizes}): against "
                       f"the baseline the exact method saves {by[0]} % and the sigmoid as released {by[1]} %, both "
                       f"compiled by XLA. This package's exact kernel saves {by[2]} %, its sigmoid kernel {by[3]} %: "
                       f"the kernel gains more than the approximation.{in_the_loop(t)}")  # fmt: skip
    laws = [(t, t.find("law", claims.SIGMOID), t.find("text", claims.SIGMOID)) for t in found if not t.fixture]
    said = "; ".join(f"{t.title}: {law['acceptance']:.7g} accepted, {law['to_draft']:.0e} from the drafter's "
                     f"law, "
                     f"{law['bonus_to_target']:.2f} from the target's after full acceptance {ref(law)}"
                     for t, law, _ in laws if law)  # fmt: skip
    own = "".join(
        f" {t.title}, at {describe(law)}: its first token is at {law['to_target']:.2g} from the target's law and "
        f"{law['to_draft']:.2g} from the drafter's {ref(law)}."
        for t, _, _ in laws if (law := t.find("law", claims.SIGMOID, **OWN)))  # fmt: skip
    out.append("- **The sigmoid emits what the drafter wrote**, over the full support, and after five accepted drafts "
               f"nearly any token: {said}. It makes fewer calls because it does not decide.{own}")  # fmt: skip
    said = "; ".join(f"{t.measure} {signed(row['difference'])} to the target alone, {signed(row['to_drafter'])} to "
                     f"the drafter "
                     f"alone {ref(row)}" for t, _, row in laws if row and "to_drafter" in row)  # fmt: skip
    worse = all(loses(t, row["to_drafter"]) for t, _, row in laws if row and "to_drafter" in row)
    own = "".join(
        f" With the parameters that the checkpoint is published with ({describe(row)}), which leave few tokens, it is "
        f"at {signed(row['difference'])} to the target alone and {signed(row['to_drafter'])} to the drafter {ref(row)}."
        for t, _, _ in laws if (row := t.find("text", claims.SIGMOID, **OWN)))  # fmt: skip
    out.append("- **It costs much when sampling** at temperature 1 from all tokens"
               f"{', more than decoding with the drafter alone' if worse else ''}: {said}.{own}")  # fmt: skip
    out.append("- **A calibrated sigmoid is nearer, and takes longer than an exact kernel**: its total variation to the "
               f"target, the drafts that it accepts and its time are below. {calibrated_in_short(found)}. What would "
               "make it exact is the sum it was to avoid.")  # fmt: skip
    out += wall_in_short(found)
    return ["", "## In short", "", *out]


def in_the_loop(table: Table) -> str:
    """A sentence on the call as the decoding loop makes it."""
    ours, sigmoid = (table.find("call", name + AS_DATA) for name in ("ours", claims.SIGMOID))
    if not (ours and sigmoid):
        return ""
    return (f" In the decoding loop, where a row may be greedy, XLA compiles the sigmoid: {sigmoid['us']:.0f} us for 8 "
            f"texts beside {ours['us']:.0f} {ref(sigmoid, ours)}.")  # fmt: skip


def calibrated_in_short(found: list[Table]) -> str:
    """Results on the calibrated sigmoid: its law, its drafts and the time of a call, for each task."""
    said = []
    for t in found:
        law, row = t.find("law", "calibrated"), t.find("text", "calibrated")
        slow, ours = (t.find("call", name) for name in ("calibrated", "ours"))
        if law and row and "bound" in row and slow and ours:
            said.append(f"{t.title}: total variation {law['to_target']:.2f}, of which the loop knows that it is at most "
                        f"{row['bound'][0]:.2f}; {law['acceptance']:.2f} of first drafts on these contexts, the exact "
                        f"rule {1 - law['between']:.2f}; {t.measure} {signed(row['difference'])}; a call takes "
                        f"{slow['us'] / ours['us']:.1f} times as long as ours {ref(law, row, slow, ours)}")  # fmt: skip
    return "; ".join(said)


def wall_in_short(found: list[Table]) -> list[str]:
    """A line on wall time."""
    said = []
    for t in found:
        ours, alone, base = (t.find("text", name) for name in ("ours", "target alone", "baseline"))
        if ours and alone and base and "share" in base and ours["machine"] == alone["machine"]:
            said.append(f"{t.title}: {change(ours['ms'], alone['ms'])} than the target alone, and all sampling of the "
                        f"baseline is {100 * base['share']:.1f} % of its wall time {ref(ours, alone, base)}")  # fmt: skip
    if not said:
        return []
    return [
        "- **Wall time** of ours with five drafts, 8 texts at a time, on these fast cards: " + "; ".join(said) + "."
    ]


def setting(table: Table) -> list[str]:
    """Lines on how a task was run, and what is missing."""
    about = table.about
    tested = sum(about["groups"].values())
    sets = ", ".join(f"{n} of {group}" for group, n in about["groups"].items())
    out = [
        f"Models: {about['models']}. Texts: {tested} of {about['all_texts']}"
        + (f" ({sets})." if len(about["groups"]) > 1 else ".")
    ]
    if table.fixture:
        out.append(
            "**These are fixtures: no weights were fetched. The numbers show that the scripts run, nothing else.**"
        )
    for i, machine in enumerate(about["machines"]):
        kinds = (row["kind"] for row in table.rows if row["machine"] == i and row["kind"] != "trivial")
        of = f" ({', '.join(f'{kind}s' for kind in dict.fromkeys(kinds))})"
        out.append(f"Machine {i + 1}{of}: {', '.join(f'{k} {v}' for k, v in machine.items() if k != 'models')}.")
    lines = [f"- {text}" for text in [*out, *about.get("notes", [])]]
    for kind, words in (("text", "Texts"), ("call", "Calls")):
        absent = about.get("missing", {}).get(kind, {})
        every = "; ".join(f"{name}: {', '.join(methods)}" for name, methods in absent.items())
        if absent:
            lines.append(
                f"- {words} {MISSING}: " + ("all." if kind == "call" and not table.all("call") else f"{every}.")
            )
    return lines


def number(row: Row, key: str, form: str = ".4g") -> str:
    """A cell."""
    return format(row[key], form) if row.get(key) is not None else ""


def settings_of(row: Row) -> str:
    """The settings of a row that are not the defaults, with its machine."""
    parts = describe(row), f"machine {row['machine'] + 1}" if row["machine"] else ""
    return ", ".join(part for part in parts if part)


def anchor(row: Row) -> str:
    """The label of a row, with the target of links to it."""
    return f'<a id="{row["id"]}"></a>{short(row["id"])}'


def tables(table: Table) -> list[str]:
    """All rows in three tables."""
    scale = [table.measure] + (["ROUGE-1", "ROUGE-2"] if table.measure == "ROUGE-L" else [])
    head = ["row", "method", "settings", "texts", *scale, "to target alone", "acceptance by position", "tokens/call"]
    head += ["calls/text", "us/call", "ms of calls/text", "share", "ms/text", "same", "empty"]
    lines = [
        "Texts. Settings that are not named: a model drafts, temperature 1, full support, float32 logits, 8 texts at a "
        "time, 5 drafts, one seed. Acceptance at a position is among the calls that accepted all drafts before it. "
        "`ms/text` is "
        "the host's clock over a batch, divided by its texts; `ms of calls/text` are of the batch's calls, with parameters "
        "as data where those were timed, and `share` is their part of `ms/text`: both only where texts and calls ran the "
        "same program. `same`: texts equal to the target's.",
        "", line(head), line(["---"] * len(head)),
    ]  # fmt: skip
    for row in [*table.all("text"), *table.all("trivial")]:
        accepted = " ".join(f"{x:.2f}" for x in row.get("acceptance", []))
        difference = signed(row["difference"]) if "difference" in row else ""
        share = f"{100 * row['share']:.1f} %" if "share" in row else ""
        cells = [anchor(row), row["method"], settings_of(row) if row["kind"] == "text" else "", str(row["texts"])]
        cells += [f"{value:.2f}" for value in row["quality"]] + [difference, accepted]
        cells += [number(row, key) for key in ("tokens_per_call", "calls", "call_us", "call_ms")] + [share]
        cells += [number(row, key) for key in ("ms", "same", "empty")]
        lines.append(line(cells))
    if table.all("call"):
        head = ["row", "method", "settings", "us", "launches", "MB", "of these temporary"]
        lines += ["", "One sampling call of 5 drafts, from the key, on logits of real texts; device time by the "
                      "profiler on a "
                  "GPU, the host's clock elsewhere. Memory as the compiler counts it: arguments, results and "
                  "temporaries. "
                  "*Calibrated unreported* has the estimates and reports no bound.",
                  "", line(head), line(["---"] * len(head))]  # fmt: skip
    for row in table.all("call"):
        if "error" in row:
            lines.append(line([anchor(row), row["method"], settings_of(row), row["error"].split(":")[0], "", "", ""]))
            continue
        sizes = [f"{row[key] / 1e6:.2f}" for key in ("bytes", "temporary_bytes")]
        lines.append(
            line([anchor(row), row["method"], settings_of(row), number(row, "us"), number(row, "launches"), *sizes])
        )
    if not table.all("law"):
        return lines
    head = [
        "row",
        "method",
        "settings",
        "to target",
        "to drafter",
        "bonus to target",
        "acceptance",
        "TV(p, q)",
        "contexts",
    ]
    lines += ["", "Total variation of the emitted law, from logits in float64 by the rule's formula, without "
                  "sampling. It says what "
              "a rule computes, not that a program computes it: the tests hold draws of every rule against its "
              "law.", ""]  # fmt: skip
    lines += [line(head), line(["---"] * len(head))]
    for row in table.all("law"):
        keys = "to_target", "to_draft", "bonus_to_target", "acceptance", "between", "contexts"
        lines.append(line([anchor(row), row["method"], settings_of(row), *(number(row, key, ".3g") for key in keys)]))
    return lines


def page(tables_of_tasks: list[Table], images: str) -> str:
    """The page, with links to plots that begin with `images`."""
    others = [table for table in tables_of_tasks if table.name in QWEN]
    found = [table for table in tables_of_tasks if table.name not in QWEN]
    intro = (Path(__file__).parent / "introduction.md").read_text()
    lines = ["<!-- Written by bench/experiments/report.py from bench/experiments/results. -->", ""]
    before, _, after = intro.partition("## How it was done")
    lines += [before.rstrip(), *findings(found), "", "## How it was done", "", after.strip()]
    for table in [*found, *others]:
        lines += ["", f"**{table.title}**", "", *setting(table)]
    for title, claim_fn in claims.CLAIMS:
        lines += ["", f"## {title}"]
        if not found:
            lines += ["", "No row answers this yet: the experiments have not run."]
        for table in found:
            lines += ["", f"**{table.title}**", "", *(claim_fn(table) or [f"- {MISSING.capitalize()}."])]
            shown = {
                name: text
                for name, text in plots.names(table).items()
                if plots.QUESTIONS[name.rpartition("_")[2]] == title
            }
            for name, text in shown.items():
                lines += ["", f"![{text}]({images}/{name}.svg)"]
    if others:
        lines += ["", "## A model with n-grams as its drafter"]
    for table in others:
        lines += ["", f"**{table.title}**", "", *zero_shot(table)]
    for table in [*found, *others]:
        lines += ["", f"## Rows: {table.title}", "", *tables(table)]
        if "training" in table.about:
            lines += ["", "Training: " + ", ".join(f"{key} {value}" for key, value in trained(table).items()) + "."]
    text = "\n".join(lines)
    while "\n\n\n" in text:
        text = text.replace("\n\n\n", "\n\n")
    return text + "\n"


def trained(table: Table) -> Row:
    """Numbers of a training, without its folders."""
    values = table.about["training"]
    found = {key.replace("_", " "): value for key, value in values.items() if not isinstance(value, dict)}
    return {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes the page of the experiments.")
    parser.add_argument("--tables", type=Path, default=caches.RESULTS)
    parser.add_argument("--out", type=Path, help="a folder for the page and its plots, in place of the repository's")
    options = parser.parse_args()
    found = [Table(path) for name in TITLES if (path := options.tables / f"{name}.json").exists()]
    images = options.out or ROOT / "docs" / "images"
    images.mkdir(parents=True, exist_ok=True)
    for table in found:
        if table.name not in QWEN:
            plots.draw(table, images)
    if options.out:
        (options.out / "REPORT.md").write_text(page(found, "."))
        print(options.out / "REPORT.md")
        return
    (Path(__file__).parent / "REPORT.md").write_text(page(found, "../../docs/images"))
    (ROOT / "docs" / "experiments.md").write_text(page(found, "images"))


if __name__ == "__main__":
    main()
