"""The rules that the experiments compare, and the closed form of what they emit, against the oracle."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import caches
import claims
import evaluate
import jax
import jax.numpy as jnp
import law
import laws
import methods
import metrics
import ml_dtypes
import numpy as np
import oracle
import pack
import plots
import pytest
import report
import rows as page_rows
import runs
import safetensors.numpy
import score
import settings
import summarization_data
from inputs import QUICK

import specsamp_jax as ss

RNG = np.random.default_rng(3)
Z_P = (2 * RNG.normal(size=(3, 5))).astype(np.float32)
Z_Q = (Z_P[:2] + RNG.normal(size=(2, 5))).astype(np.float32)
NUM_DRAWS = 20_000
RUN = Path(__file__).parents[1] / "bench" / "experiments" / "run.sh"
SIGMOIDS = {f"sigmoid {width}": (-width / 2, width / 2) for width in (1.5, 2e4)}


def step_law(method, z_p, z_q):
    """The oracle's law of a step with two drafts."""
    q = [oracle.distribution(z) for z in z_q]
    if method == "sigmoid as released":
        accept_probs = functools.partial(oracle.sigmoid_as_released_accept_probs, z_p, z_q)

        def accept(prefix):
            tokens = [[x] * 2 for x in range(z_p.shape[1])]
            return np.array([accept_probs(np.array(each))[len(prefix)] for each in tokens])

        return oracle._step_law(
            2,
            draft=lambda prefix: q[len(prefix)],
            accept=accept,
            replace=lambda prefix: oracle.sigmoid_as_released_residual(z_p[len(prefix)], z_q[len(prefix)]),
            bonus=lambda prefix: oracle.sigmoid_as_released_bonus(z_p[len(prefix)]),
        )
    if method in SIGMOIDS:
        return oracle.sigmoid_step_law(z_p, z_q, np.stack(q), *SIGMOIDS[method])
    return oracle.speculative_law(lambda s: oracle.distribution(z_p[len(s)]), lambda s: q[len(s)], 2)


def first(found, vocab_size=5):
    """The law of the first token."""
    return np.array([sum(mass for tokens, mass in found.items() if tokens[0] == x) for x in range(vocab_size)])


@pytest.mark.parametrize("method", ["ours", "sigmoid as released", *SIGMOIDS])
def test_the_closed_form_of_the_first_token_is_the_oracles(method):
    z_p, z_q = Z_P.astype(float), Z_Q.astype(float)
    found = step_law(method, z_p, z_q)
    np.testing.assert_allclose(law.first_token(method, z_p[:1], z_q[:1])[0], first(found), atol=1e-9)
    accepted = sum(mass for tokens, mass in found.items() if len(tokens) == 3)
    rates = law.acceptance(method, z_p[:2], z_q)
    np.testing.assert_allclose(rates.prod(), accepted, atol=1e-9)
    last = np.array([sum(mass for t, mass in found.items() if len(t) == 3 and t[2] == x) for x in range(5)])
    np.testing.assert_allclose(law.bonus(method, z_p[2:])[0], last / accepted, atol=1e-9)


@pytest.mark.parametrize("error", [0.0, -0.7, 0.4])
def test_the_closed_form_of_the_calibrated_rule_is_the_oracles(error):
    z_p, z_q = Z_P[:1].astype(float), Z_Q[:1].astype(float)
    estimate, offset = law.log_normalizer(z_p) + error, 1.5
    q = oracle.distribution(z_q[0])
    target, options = (lambda prefix: z_p[0]), {"estimate": lambda prefix: estimate[0], "offset": offset}
    expected = first(oracle.calibrated_law(target, lambda prefix: q, 1, **options))
    found, accept = law.calibrated(z_p, z_q, estimate, offset)
    np.testing.assert_allclose(found[0], expected, atol=1e-9)
    np.testing.assert_allclose(accept[0], oracle.calibrated_accept(z_p[0], q, estimate[0], offset), atol=1e-9)


def test_the_acceptance_of_the_coupled_rule_is_the_oracles():
    z_p, z_q = (law.keep_top_k(rows[:2].astype(float), 4) for rows in (Z_P, Z_Q))
    expected = [oracle.coupled_acceptance(*map(oracle.distribution, pair)) for pair in zip(z_p, z_q, strict=True)]
    np.testing.assert_allclose(law.acceptance("coupled", z_p, z_q), expected, atol=1e-9)


def test_a_filtered_token_is_never_emitted_but_by_the_released_code():
    z_p, z_q = (law.keep_top_k(rows[:2].astype(float), 2) for rows in (Z_P, Z_Q))
    for method, leaks in {"ours": False, "sigmoid 20000.0": False, "sigmoid as released": True}.items():
        dropped = np.isinf(z_p) & np.isinf(z_q)
        assert np.any(law.first_token(method, z_p, z_q)[dropped] > 0) == leaks


OWN = {name: value for name, (value,) in settings.QWEN_OWN.items()}
FILTERS = OWN, {**OWN, "temperature": 1.0}, {**OWN, "top_k": 0}, {**OWN, "top_p": 1.0}, {**OWN, "top_k": 300}
TIED = np.concatenate([np.round(2 * RNG.normal(size=(20, 300))) / 2, 2 * RNG.normal(size=(20, 300))]).astype(np.float32)


@pytest.mark.parametrize("parameters", FILTERS, ids=str)
def test_filtered_logits_are_those_of_the_oracle_and_of_the_package(parameters):
    found = law.filtered(TIED.astype(float), parameters["temperature"], parameters["top_k"], parameters["top_p"])
    expected = [oracle.distribution(row, **parameters) for row in TIED.astype(float)]
    np.testing.assert_allclose(law.softmax(found), expected, atol=1e-12)
    certain = jnp.zeros((1, len(TIED)), jnp.int32)
    dense = np.asarray(methods.dense(jnp.asarray(TIED)[None], ss.SamplingParams(**parameters), certain))
    assert np.array_equal(found > -np.inf, dense[0] > -np.inf)
    np.testing.assert_allclose(found, dense[0], rtol=1e-6)


@pytest.mark.parametrize("method", ["ours", "sigmoid 2e4", "sigmoid as released", "calibrated +4"])
def test_the_law_at_a_checkpoints_own_parameters_is_that_of_the_rules_step(method):
    num_texts, vocab_size, sampling = 3, 40, ss.SamplingParams(**OWN)
    rng = np.random.default_rng(7)
    target = np.round(4 * rng.normal(size=(num_texts, 4, vocab_size))).astype(np.float32) / 2
    draft = (target + rng.normal(size=target.shape)).astype(np.float32)
    # The context of text i is row 1 + i; a sequence for each text and token, which is drafted there.
    text = np.arange(num_texts)
    z_p, z_q = (np.repeat(rows[text, 1 + text], vocab_size, axis=0)[:, None] for rows in (target, draft))
    drafts = np.tile(np.arange(vocab_size, dtype=np.int32), num_texts)[:, None]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(target_logits, tokens, logits, *state):
        found = methods.VERIFY_FNS[method](
            jax.random.key(0), target_logits, ss.Draft(tokens, logits, sampling), sampling, *state
        )
        return found if state else (found, None)

    state = ()
    if method in methods.CALIBRATED:
        states = [methods.CALIBRATED[method].init(num_texts)]
        for i in range(num_texts):  # a step without drafts reads its row
            nothing = np.zeros((num_texts, 0), np.int32), np.zeros((num_texts, 0, vocab_size), np.float32)
            states.append(step(target[:, i : i + 1], *nothing, states[-1])[1])
        state = (jax.tree.map(lambda *each: np.repeat(np.stack(each)[1 + text, text], vocab_size), *states),)
    accepted = step(np.concatenate([z_p, z_p], axis=1), drafts, z_q, *state)[0].accept_prob
    q = np.array([oracle.distribution(row, **OWN) for row in draft[text, 1 + text].astype(float)])
    row = laws.measure(settings.Setting(method)._replace(**OWN), target, draft)
    expected = np.where(q > 0, q * np.reshape(accepted, q.shape), 0).sum(1).mean()
    np.testing.assert_allclose(row["acceptance"], expected, rtol=1e-5)


FILTERED = ss.SamplingParams(temperature=0.5, top_k=3)


@pytest.mark.parametrize(
    ("method", "sampling"),
    [("baseline", FILTERED), ("exact", ss.SamplingParams()), ("sigmoid as released", FILTERED)],
    ids=["baseline", "exact", "released"],
)
def test_emitted_tokens_follow_the_oracles_law(assert_law, method, sampling):
    settings = {"temperature": sampling.temperature, "top_k": sampling.top_k}
    z_p, z_q = (
        np.array([np.where(oracle.distribution(z, **settings) > 0, z / sampling.temperature, -np.inf) for z in rows])
        for rows in (Z_P.astype(float), Z_Q.astype(float))
    )
    q = [oracle.distribution(z) for z in z_q]
    rng = np.random.default_rng(1)
    tokens = np.stack([rng.choice(5, size=NUM_DRAWS, p=row) for row in q], axis=1).astype(np.int32)
    rows = [np.tile(z, (NUM_DRAWS, 1, 1)) for z in (Z_P, Z_Q)]

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(key, target_logits, tokens, logits):
        return methods.FUNCTIONS[method](key, target_logits, ss.Draft(tokens, logits, sampling), sampling).tokens

    assert_law(step(jax.random.key(0), rows[0], tokens, rows[1]), step_law(method, z_p, z_q))


@pytest.mark.parametrize("method", ["baseline"])
def test_deterministic_and_missing_drafts_are_exact(assert_law, method):
    # One draft by a drafter without logits; the second position has none.
    tokens = np.tile(np.array([[1, -1]], np.int32), (NUM_DRAWS, 1))
    rows = np.tile(Z_P, (NUM_DRAWS, 1, 1))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(key, target_logits, tokens):
        return methods.FUNCTIONS[method](key, target_logits, ss.Draft(tokens), None).tokens

    p = [oracle.distribution(z.astype(float)) for z in Z_P]
    expected = oracle.speculative_law(lambda s: p[len(s)], lambda s: oracle.one_hot(1, 5), 1)
    assert_law(step(jax.random.key(0), rows, tokens)[:, :2], expected)


def test_a_greedy_row_takes_the_largest_logits():
    greedy = ss.SamplingParams(temperature=0.0)
    drafts = np.stack([Z_P[:2].argmax(-1), [int(Z_P[0].argmax()), 0]]).astype(np.int32)
    target, draft = np.tile(Z_P, (2, 1, 1)), ss.Draft(jnp.array(drafts), jnp.array(np.tile(Z_Q, (2, 1, 1))), greedy)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def step(key):
        return methods.verify_exact(key, target, draft, greedy)

    result = step(jax.random.key(0))
    expected = np.cumprod(drafts == Z_P[:2].argmax(-1), axis=1).sum(1)
    assert result.num_accepted.tolist() == expected.tolist()
    for row, n in zip(np.asarray(result.tokens), expected, strict=True):
        assert row[: n + 1].tolist() == Z_P.argmax(-1)[: n + 1].tolist()


# Data, measures and packed weights


def paragraph(name, synopsis, num_words):
    words = " ".join(f"{name}{i}" for i in range(num_words // 2))
    return f"Package: {name}\nDescription-md5: 0\nDescription-en: {synopsis}\n {words}\n .\n {words}\n\n"


def test_pairs_are_parsed_filtered_and_held_out_by_the_hash_of_their_names():
    text = "".join(paragraph(f"p{i}", f"synopsis {i}", 40) for i in range(500))
    text += paragraph("short", "too short", 20) + paragraph("twin", "synopsis 3", 40)
    train, held_out = summarization_data.split(summarization_data.usable(summarization_data.parse(text)))
    assert len(held_out) == 400
    assert len(train) == 100
    assert all(len(pair.description.split()) == 40 for pair in train + held_out)
    hashes = [summarization_data.digest(pair.name) for pair in held_out]
    assert max(hashes) < min(summarization_data.digest(pair.name) for pair in train)
    # A description that is held out is not trained on under another name.
    copies = "".join(paragraph(pair.name, f"of {pair.name}", 40) for pair in held_out)
    text += copies.replace("Package: ", "Package: x")
    train, held_out = summarization_data.split(summarization_data.usable(summarization_data.parse(text)))
    assert 0 < len(train) < 500
    assert not {pair.description for pair in train} & {pair.description for pair in held_out}


def test_the_interval_of_a_difference_holds_it_and_is_paired():
    rng = np.random.default_rng(0)
    errors = rng.integers(0, 8, 300)
    scores, others = (np.stack([e, np.full(300, 10)], 1)[..., None].astype(float) for e in (errors + 1, errors))
    value, low, high = metrics.interval(scores, others)
    assert low <= value <= high
    # Each text has one error in ten words more: the difference is the same in every resample.
    np.testing.assert_allclose([value, low, high], 10, atol=1e-9)
    _, low, high = metrics.interval(scores)
    assert high - low > 1


def test_weights_of_four_bits_are_packed_without_loss(tmp_path):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (4, 64))
    codes.reshape(-1, 32)[:, :2] = 0, 15
    matrix = (0.25 * codes - 2).astype(ml_dtypes.bfloat16)
    vector = rng.normal(size=5).astype(ml_dtypes.bfloat16)
    (tmp_path / "from").mkdir()
    safetensors.numpy.save_file({"matrix": matrix, "vector": vector}, tmp_path / "from" / "model.safetensors")
    (tmp_path / "from" / "config.json").write_text("{}")
    pack.pack(tmp_path / "from", str(tmp_path / "piece"))
    pack.unpack(str(tmp_path / "piece"), tmp_path / "to")
    found = safetensors.numpy.load_file(tmp_path / "to" / "model.safetensors")
    assert np.array_equal(found["matrix"], matrix)
    assert np.array_equal(found["vector"], vector)
    assert (tmp_path / "to" / "config.json").read_text() == "{}"


# The page


def table(tmp_path, rows, **about):
    """A table of summaries with these rows."""
    about = {
        "models": "two models",
        "metric": "rouge",
        "groups": {"Debian": 9},
        "all_texts": 9,
        "machines": [],
        **about,
    }
    rows = [*rows, {"kind": "trivial", "method": "trivial", "texts": 9, "quality": [9.0, 9.0, 9.0]}]
    (tmp_path / "summarization.json").write_text(json.dumps({"about": about, "rows": rows}))
    return page_rows.Table(tmp_path / "summarization.json")


def texts(method, **values):
    """A row of texts."""
    numbers = {"texts": 9, "quality": [30.0, 30.0, 9.0], "tokens": 10.0, "calls": 5.0, "batch_calls": 6.0, "ms": 2.0}
    return {"kind": "text", "method": method, "acceptance": [0.5], "accepted": 0.5, **numbers, **values}


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        ([0.0, -1.0, 1.0], "equal within the margin"),
        ([0.0, -1.1, 1.0], "not decided"),
        ([-2.0, -3.0, -1.1], "worse by more than the margin"),
        ([-1.0, -3.0, -0.1], "worse, perhaps within the margin"),
        ([2.0, 1.1, 3.0], "better by more than the margin"),
    ],
)
def test_a_verdict_compares_the_whole_interval_with_the_margin(tmp_path, difference, words):
    row = texts("ours", difference=difference)
    assert page_rows.verdict(table(tmp_path, [row]), row) == words


@pytest.mark.parametrize(
    ("difference", "words"),
    [([0.5, -0.1, 1.1], "No loss of more than the margin"), ([0.5, -1.1, 2.1], "about 38 seeds")],
)
def test_an_interval_that_leaves_the_margin_on_the_side_of_a_gain_is_told_so(tmp_path, difference, words):
    rows = [texts("ours", seeds=15, difference=difference)]
    assert words in claims.exactness(table(tmp_path, rows))[-1]


@pytest.mark.parametrize(
    ("longer", "words"), [([-8.0, -9.5, -6.5], "seen to be smaller"), ([-3.0, -4.0, -2.0], "loss smaller")]
)
def test_a_loss_is_smaller_only_if_the_intervals_do_not_meet(tmp_path, longer, words):
    rows = [
        texts("drafter alone"),
        texts("sigmoid 2e4", difference=[-9.0, -10.0, -8.0], to_drafter=[-2.0, -3.0, -1.0]),
        {"kind": "law", "method": "sigmoid 2e4", "bonus_to_target": 0.9},
        texts("sigmoid 2e4", num_draft="heuristic", difference=longer),
    ]
    (line,) = [line for line in claims.cost(table(tmp_path, rows)) if "heuristic" in line]
    assert words in line


def test_times_of_several_days_are_told(tmp_path):
    machines = [{"kernels": "on", "date": "1"}, {"kernels": "on", "date": "2"}]
    calls = [{"kind": "call", "method": m, "us": 50.0, "machine": i} for i, m in enumerate(("baseline", "ours"))]
    rows = [texts("target alone"), texts("baseline"), texts("ours"), *calls]
    found = table(tmp_path, rows, machines=machines)
    said = page_rows.days(found, found.all("call"))
    assert "Those of ours were timed on 2" in said
    assert "The texts of ours ran before" in said
    assert not page_rows.days(found, found.all("call")[:1])


def test_a_claim_without_its_row_says_that_it_is_not_measured(tmp_path):
    rows = [texts("baseline"), texts("sigmoid 2e4", difference=[-9.0, -10.0, -8.0])]
    text = report.page([table(tmp_path, rows, missing={"text": {}, "call": {"defaults": ["ours"]}})], ".")
    assert "- Calls not measured yet: all." in text
    assert "**Summarisation**\n\n- Not measured yet." in text.partition("## Is one call faster?")[2]
    # Calls per text are there, the time of a call is not.
    ratio = next(line for line in text.splitlines() if line.startswith("| sigmoid 2e4 / baseline ("))
    assert ratio.endswith("| 5 | 8 | 1.00 | not measured yet | not measured yet |")


def test_a_share_of_wall_time_needs_texts_and_calls_of_one_program(tmp_path):
    calls = [{"kind": "call", "method": method, "us": 50.0} for method in ("baseline", "ours")]
    rows = [texts("baseline"), texts("ours"), *calls]
    calls_on = [*rows[:2], *({**call, "machine": 1} for call in calls)]
    found = table(tmp_path, calls_on, machines=[{"kernels": "off"}, {"kernels": "on"}])
    baseline, ours = found.all("text")
    assert baseline["share"] == pytest.approx(6 * 0.05 / 9 / 2)
    assert "share" not in ours
    assert "call_ms" not in ours
    as_data = {**calls[1], "method": "ours" + settings.AS_DATA, "machine": 0}
    assert "share" in table(tmp_path, [*rows, as_data]).all("text")[1]


def test_a_cell_of_a_call_is_missing_only_if_it_was_planned(tmp_path):
    call = {"kind": "call", "method": "ours", "us": 50.0, "dtype": "bfloat16"}
    lines = claims.one_call(table(tmp_path, [call]))
    cells = next(line for line in lines if line.startswith("| 8 texts, bfloat16")).split(" | ")
    assert cells[1:4] == ["not measured yet", "not measured yet", ""]  # baseline, exact, sigmoid as released
    assert "- Empty cells were not planned." in lines


def test_quality_is_told_at_each_support_and_missing_only_where_it_was_planned(tmp_path):
    rows = [texts(m, difference=[0.0, -1.0, 1.0], **page_rows.OWN) for m in ("ours", "drafter alone")]
    found = table(tmp_path, rows)
    lines = [line.split(" | ")[:3] for line in claims.cost(found) if line.startswith(("| [", "| ours"))]
    own = "temperature 0.7, top-k 20, top-p 0.8"
    assert lines[:2] == [["| ours", "full", "not measured yet"], ["| ours", "top-k 50", "not measured yet"]]
    assert [each[1] for each in lines[2:]] == [own, own]
    assert not any(line.startswith("| sigmoid") and own in line for line in claims.cost(found))
    assert any(f"| {own} | " in line for line in claims.exactness(found))
    call = {"kind": "call", "method": "ours" + settings.AS_DATA, "us": 50.0, **page_rows.OWN}
    assert "ours 50.0" in claims.own_parameters(table(tmp_path, [call]))[0]
    assert not claims.own_parameters(found)


def law_row(method, **values):
    """A row of laws."""
    numbers = {"to_target": 0.3, "to_draft": 0.2, "bonus_to_target": 0.8, "acceptance": 0.7, "between": 0.4}
    return {"kind": "law", "method": method, "contexts": 200, **numbers, **values}


def test_laws_are_told_at_each_support_and_missing_only_where_they_were_planned(tmp_path, monkeypatch):
    own = "temperature 0.7, top-k 20, top-p 0.8"
    full = [law_row("ours"), law_row("sigmoid 2e4", to_draft=1e-5)]
    rows = [*full, law_row("ours", to_target=0.0, **OWN), law_row("sigmoid 2e4", **OWN)]
    found = table(tmp_path, rows)
    lines = claims.emitted(found)
    cells = [line.split(" | ")[:4] for line in lines if line.startswith("| [")]
    assert [each[1:] for each in cells[2:]] == [[own, "0", "0.2"], [own, "0.3", "0.2"]]
    full_line, own_line = (line for line in lines if "the first token of sigmoid 2e4" in line)
    assert full_line.startswith("- Full support: ")
    assert "so it follows the drafter's law" in full_line
    assert own_line.startswith(f"- {own.capitalize()}: ")
    assert "so it is nearer to the drafter's law" in own_line
    assert "(#summarization-law-4)" in own_line
    page = report.page([found], ".")
    assert f'"summarization-law-4"></a>SL4 | sigmoid 2e4 | {own} | 0.3 | 0.2 | 0.8' in page
    assert f"at {own}: its first token is at 0.3 from the target's law and 0.2 from the drafter's ([SL4]" in page
    plots.draw(found, tmp_path)
    assert "top-p 0.8" in (tmp_path / "experiments_summarization_laws.svg").read_text()

    missing = f"- {own.capitalize()}: not measured yet."
    assert missing not in claims.emitted(table(tmp_path, full))
    monkeypatch.setitem(settings.PLANS, "summarization", settings.PLANS["pair"])
    assert missing in claims.emitted(table(tmp_path, full))
    assert missing not in lines


def test_raw_laws_alone_join_the_rows_of_a_table(tmp_path, monkeypatch):
    machines = [{"device": "a GPU"}, {"device": "a CPU"}]
    old = [texts("ours"), law_row("ours", machine=1), law_row("ours", machine=1, top_k=50)]
    table(tmp_path, old, machines=machines, notes=["a note"])
    before = json.loads((tmp_path / "summarization.json").read_text())
    folder = tmp_path / "raw" / "summarization"
    folder.mkdir(parents=True)
    (folder / "task.json").write_text(json.dumps({"metric": "rouge", "references": []}))
    monkeypatch.setattr(caches, "CACHE", tmp_path)
    monkeypatch.setattr(caches, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["score", "summarization", "--laws"])

    def joined(*raw):
        (folder / "laws.jsonl").write_text("".join(json.dumps(each) + "\n" for each in raw))
        score.main()
        return json.loads((tmp_path / "summarization.json").read_text())

    assert joined() == before
    names = [settings.Setting("ours")._replace(**each).name for each in (OWN, {})]
    after = joined(*({"name": name, "to_target": 0.125, "device": "a new CPU"} for name in names))
    assert after["about"]["notes"] == ["a note"]
    # The row of the old machine's that is left, and the others, keep their places.
    assert after["about"]["machines"] == [machines[0], {"device": "a new CPU"}, machines[1]]
    assert [each["kind"] for each in after["rows"]] == ["text", "law", "law", "trivial", "law"]
    replaced, kept, _, new = after["rows"][1:]
    assert replaced == {"kind": "law", "method": "ours", "to_target": 0.125, "machine": 1}
    assert kept == {**before["rows"][2], "machine": 2}
    assert new == {**replaced, **OWN}


def test_the_calls_of_a_text_are_those_with_parameters_as_data(tmp_path):
    names = ("ours", "ours" + settings.AS_DATA)
    calls = [{"kind": "call", "method": name, "us": us} for name, us in zip(names, (50.0, 80.0), strict=True)]
    (row,) = table(tmp_path, [texts("ours"), *calls]).all("text")
    assert (row["call_us"], row["loop_us"]) == (50, 80)
    assert row["share"] == pytest.approx(6 * 0.08 / 9 / 2)


def test_parts_of_a_file_are_read_as_one_and_in_the_order_of_the_settings(tmp_path):
    for name, methods_of_part in {"runs": ["ours", "exact"], "runs-0": ["baseline"], "runs-10": ["ours"]}.items():
        rows = [{"name": settings.Setting(method).name, "from": name} for method in methods_of_part]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = score.in_order(score.read(tmp_path / "runs.jsonl"), [{"method": ("baseline", "ours", "exact")}])
    assert [(row["name"].split("|")[0], row["from"]) for row in found] == [
        ("baseline", "runs-0"),
        ("ours", "runs-10"),
        ("exact", "runs"),
    ]


def test_a_top_p_is_part_of_a_row_and_data_of_its_program():
    (plain,), (own,) = (settings.expand([{"method": ("ours",), **each}]) for each in ({}, settings.QWEN_OWN))
    assert [each.name.count("|") for each in (plain, own)] == [7, 8]
    for each in (plain, own):
        expected = {name: value for name, value in each._asdict().items() if name != "seed"}
        assert score.setting({"name": each.name}) == expected
    assert score.describe({**score.DEFAULTS, **own._asdict()}) == "temperature 0.7, top-k 20, top-p 0.8"
    assert runs.program(own) == runs.program(own._replace(top_p=0.5, temperature=1.0, seed=2))
    assert runs.program(own) != runs.program(own._replace(top_p=1.0))


def test_settings_without_a_row_are_listed(tmp_path, monkeypatch):
    folder = tmp_path / "summarization"
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"metric": "rouge", "references": []}))
    wanted = [{"method": ("ours", "exact"), "top_k": (50,)}, {"method": ("ours",), "seed": (0, 1)}]
    monkeypatch.setitem(settings.PLANS, "summarization", settings.Plan(wanted, [], []))
    names = [each.name for each in settings.expand(wanted) if each.method == "ours" and not each.seed]
    (folder / "runs.jsonl").write_text("".join(json.dumps({"name": name}) + "\n" for name in names))
    assert score.Tables(folder).missing("text") == {"top-k 50": ["exact"], "more seeds": ["ours"]}


# The command


@pytest.mark.optimised(False)
def test_quick_rows_answer_the_claims(tmp_path, monkeypatch, one_layer_pair):
    """The programs that the command runs, in this process and with models of one layer."""
    monkeypatch.setattr(caches, "CACHE", tmp_path)
    for module, arguments in (
        (evaluate, ["summarization", "--quick"]),
        (score, ["summarization", "--quick"]),
        (report, ["--tables", str(tmp_path / "quick"), "--out", str(tmp_path / "quick")]),
    ):
        monkeypatch.setattr(sys, "argv", [module.__name__, *arguments])
        module.main()
    check_quick(tmp_path)


@pytest.mark.slow
def test_the_quick_command_answers_the_claims_from_its_rows(tmp_path):
    environment = {
        **os.environ,
        "SPECSAMP_EXPERIMENTS": str(tmp_path),
        "PYTHON": sys.executable,
        "JAX_PLATFORMS": "cpu",
    }
    command = [str(RUN), "--quick", "--task", "summarization"]
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=300)
    check_quick(tmp_path)


def check_quick(tmp_path):
    page = (tmp_path / "quick" / "REPORT.md").read_text()
    assert "These are fixtures" in page
    # Greedy, the exact rule writes what the target writes; the wide sigmoid accepts whatever is drafted.
    assert "Greedy, ours wrote 4 of 4 texts as the target alone does" in page
    assert "sigmoid 2e4 accepts 1.00 of first drafts" in page
    assert "so it follows the drafter's law" in page
    for plot in ("calls", "quality", "laws"):
        assert (tmp_path / "quick" / f"experiments_summarization_{plot}.svg").exists()
    # A row that is there is not computed again.
    rows = (tmp_path / "raw" / "summarization_quick" / "runs.jsonl").read_text().splitlines()
    assert len(rows) == 5
