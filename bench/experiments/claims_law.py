"""The claims of the page that rest on the emitted law. Each function returns lines for one task."""

from rows import EXACT_METHODS, MISSING, SUPPORTS, Table, cell, grid, ref, signed, support_words, verdict

SIGMOID = "sigmoid 2e4"
"""The sigmoid at the width that was released, which stands for the others."""

FOLLOWS = 0.1
"""A law follows another if its distance to it is less than this share of that to the third; else it is nearer."""


def emitted(table: Table) -> list[str]:
    """Lines on the law that each rule emits."""
    lines, rows, absent = [], [], []
    for support in SUPPORTS:
        words = support_words(support)
        found = table.methods("law", **support)
        if not found and table.plans("law", SIGMOID, **support):
            absent.append(words)
        for method, row in found:
            if method in EXACT_METHODS and method not in ("ours", "coupled"):
                continue
            keys = "to_target", "to_draft", "bonus_to_target", "acceptance"
            lines.append([cell(row, method), words, *(f"{row[k]:.2g}" for k in keys)])
            rows.append((method, words, row))
    if not lines:
        return []
    between = rows[0][2]
    out = [f"- Target and drafter are at a total variation of {between['between']:.2f} over {between['contexts']} "
           f"real contexts {ref(between)}."]  # fmt: skip
    out += grid(
        ["first token of", "support", "to target", "to drafter", "after full acceptance, to target", "acceptance"],
        lines,
    )
    ours, coupled = (table.find("law", m) for m in ("ours", "coupled"))
    if ours and coupled:
        out.append(f"- The coupled rule accepts {coupled['acceptance']:.2f} of first drafts where the token rule "
                   f"accepts {ours['acceptance']:.2f} {ref(coupled, ours)}: that the text does not depend on the "
                   "drafter costs drafts.")  # fmt: skip
    for method, words, row in rows:
        if method == SIGMOID:
            laws = {"the target's law": row["to_target"], "the drafter's law": row["to_draft"]}
            near, far = sorted(laws, key=lambda name: laws[name])
            verb = "follows" if laws[near] < FOLLOWS * laws[far] else "is nearer to"
            out.append(f"- {'Full support' if words == 'full' else words.capitalize()}: the first token of {method} is "
                       f"at {row['to_target']:.2g} from the target's law and {row['to_draft']:.2g} from the drafter's, "
                       f"so it {verb} {near}; the token after full acceptance is at {row['bonus_to_target']:.2g} "
                       f"from the target's {ref(row)}.")  # fmt: skip
    out += [f"- {words.capitalize()}: {MISSING}." for words in absent]
    return out


def widths(table: Table) -> list[str]:
    """Lines on alpha and beta."""
    rows = [(m, r) for m, r in table.methods("law") if m.startswith("sigmoid 2")]
    if not rows:
        return []
    accepted, listed = [row["acceptance"] for _, row in rows], [row for _, row in rows]
    out = [f"- At beta - alpha of {', '.join(m.split()[1] for m, _ in rows)} around 0 the first draft is accepted "
           f"with probability {min(accepted):.7g} to {max(accepted):.7g}, where an exact rule accepts "
           f"{1 - listed[0]['between']:.2f} {ref(*listed)}: whatever is drafted passes, and which of these widths is "
           "taken does not matter."]  # fmt: skip
    exact = table.find("law", "calibrated exact")
    if exact:
        out.append("- With beta - alpha = 1 and alpha = 10 above each row's own log-normaliser the total variation "
                   f"to the target is {exact['to_target']:.1g} {ref(exact)}. Of the choices here it is the only one "
                   "that means anything, and it needs the sum over the vocabulary that the sigmoid was to "
                   "avoid.")  # fmt: skip
    return out


def calibrated(table: Table) -> list[str]:
    """Lines on the calibrated sigmoid."""
    lines = []
    ours = table.find("law", "ours")
    for method in ("calibrated", "calibrated +4"):
        law, row, call = table.find("law", method), table.find("text", method), table.find("call", method)
        if not (law or row):
            continue
        bound = row["bound"] if row and "bound" in row else None
        lines.append([method, cell(law, f"{law['to_target']:.2f}" if law else ""),
                      cell(law, f"{law['acceptance']:.2f}" if law else ""),
                      cell(ours, f"{ours['acceptance']:.2f}" if ours else ""),
                      *(cell(row if bound else None, f"{bound[i]:.2g}" if bound else "") for i in (2, 0)),
                      cell(row, f"{signed(row['difference'])}: {verdict(table, row)}") if row else MISSING,
                      cell(call, f"{call['us']:.1f}" if call else "")])  # fmt: skip
    if not lines:
        return []
    head = ["method", "TV to target", "first draft accepted", "by an exact rule", "error of the estimate, nats"]
    out = grid([*head, "mean bound on TV", f"{table.measure} to target alone", "us per call, 8 texts"], lines)
    law, row, call = table.find("law", "calibrated"), table.find("text", "calibrated"), table.find("call", "ours")
    if law and ours and row and "bound" in row:
        near = "target" if law["to_target"] < law["to_draft"] else "drafter"
        use = "no use" if row["bound"][0] > 0.5 else f"little use where the distance itself is {law['to_target']:.2g}"
        out.append(f"- Its law is nearer to the {near}'s, and its token after full acceptance is the target's own "
                   f"{ref(law)}. But a running mean misses the log-normalisers by {row['bound'][2]:.0f} nats on "
                   f"average, so that the bound that the loop reports, {row['bound'][0]:.2f} on average where 1 says "
                   f"nothing, is of {use} {ref(row)}. An estimate that does not read the row is not good enough: a "
                   "negative result.")  # fmt: skip
    if call and (slow := table.find("call", "calibrated")):
        out.append(f"- One call takes {slow['us'] / call['us']:.1f} times as long as ours; no kernel was written for "
                   f"it {ref(slow, call)}.")  # fmt: skip
    return out
