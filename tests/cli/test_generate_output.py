"""`specsamp generate`: stop strings, JSON lines, prompts in files, and fewer messages if a program reads the output."""

import json
import os
import re
import shutil
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import specsamp
import specsamp_jax as ss
from specsamp_jax.cli import generate as generate_module
from specsamp_jax.cli import prompts, shared, verification
from specsamp_jax.cli.rows import Row
from specsamp_jax.models import Llama, LlamaConfig, save_checkpoint
from specsamp_jax.models.checkpoints import slots
from specsamp_jax.sampling.dispatch import for_this_machine
from specsamp_jax.text import load_tokenizer

pytestmark = pytest.mark.optimised(False)

TOKENIZER = Path(__file__).parents[1] / "fixtures" / "text" / "byte_level"
CHATML = TOKENIZER.parent / "templates" / "chatml.jinja"
END = 281


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TOKENIZER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "target"
    shutil.copytree(TOKENIZER, folder)
    shutil.copy(CHATML, folder / "chat_template.jinja")
    save_checkpoint(folder, Llama(LlamaConfig(300, 8, 8, 1, 1, 1), rngs=nnx.Rngs(0)), dtype="float32")
    return folder


@pytest.fixture
def generate(run, replace_stream, folder):
    """Runs `generate` with a `stream` that yields these texts; returns output, messages and calls of `stream`."""

    def generate(continuations, *options, per_step=1):
        calls, rest = [], list(continuations)

        def stream(keys, prompt, *, prompt_lengths, max_new_tokens, **others):
            others |= {"max_new_tokens": max_new_tokens}
            calls.append({"keys": keys, "prompt": prompt, "lengths": prompt_lengths, **others})
            size = len(prompt)
            new, rest[:size] = rest[:size], []
            tokens = np.full((size, prompt.shape[1] + max_new_tokens), -1)
            for row, (before, length, after) in enumerate(zip(prompt, prompt_lengths, new, strict=True)):
                tokens[row, :length] = before[:length]
                tokens[row, length : length + len(after)] = after
            for step in range(1, -(-max(map(len, new)) // per_step) + 1):
                calls[-1]["num_steps"] = step
                ends = prompt_lengths + np.minimum(step * per_step, list(map(len, new)))
                stats = ss.Stats(*map(jnp.asarray, (step, ends - prompt_lengths, [size], [1], np.zeros(size, "i"))))
                yield ss.Generation(jnp.asarray(tokens), jnp.asarray(ends), jnp.asarray(-0.5 * (tokens > 0)), stats)

        replace_stream(stream)
        status, text, told = run("generate", "--target", folder, *options)
        assert status == 0, told
        return text, told, calls

    return generate


def test_a_stop_string_ends_a_text_and_no_part_of_it_is_written(generate, tokenizer):
    texts = [tokenizer.tokenizer.encode(text).ids for text in ("on the tree END more", "no end EN")]
    options = ["--prompt", "a", "--prompt", "b", "--stop", "END", "--stop", "xyz"]
    text, _, calls = generate(texts, *options)
    assert text == "aon the tree \n\nbno end EN\n"
    text, _, calls = generate([texts[0] + texts[1]], "--prompt", "a", "--stop", "END")
    assert text == "aon the tree \n"
    # Nothing is computed after the step with the stop string.
    assert calls[0]["num_steps"] < len(texts[0])


def test_a_stop_string_may_be_spread_over_several_tokens(tokenizer):
    tokens = tokenizer.tokenizer.encode("tree 🙂 and").ids
    assert "\ufffd" in [tokenizer.decode([token]) for token in tokens]
    row, written = Row(tokenizer.tokenizer, max_tokens=99, stops=[" 🙂"]), ""
    for token in tokens:
        written += row.push([token])
        assert "tree".startswith(written)
    assert (written + row.flush(), row.stopped) == ("tree", " 🙂")
    assert tokenizer.decode(tokens[: row.num_tokens]) == "tree 🙂"


def test_a_special_token_as_stop_string_is_an_end_token(generate):
    _, told, calls = generate([[5]], "--prompt", "a", "--stop", "<bos>", "--stop", "x")
    assert calls[0]["eos_token"] == (END, 280)
    assert "ends at token 281 or 280" in told


def test_lines_of_json_hold_tokens_log_probabilities_and_statistics(generate, tokenizer):
    the = tokenizer.tokenizer.encode("the").ids
    texts = [[*the, END], the, tokenizer.tokenizer.encode("the tree").ids]
    options = ["--prompt", "a 🙂", "--prompt", "b", "--prompt", "c", "--json", "--stop", " tree"]
    text, _, _ = generate(texts, *options)
    *lines, last = map(json.loads, text.splitlines())
    assert lines == [
        {"prompt": "a 🙂", "text": "the", "tokens": texts[0], "log_probs": [-0.5] * len(texts[0])}
        | {"finish_reason": "stop", "stop": None},
        {"prompt": "b", "text": "the", "tokens": the, "log_probs": [-0.5] * len(the)}
        | {"finish_reason": "length", "stop": None},
        {"prompt": "c", "text": "the", "tokens": texts[2], "log_probs": [-0.5] * len(texts[2])}
        | {"finish_reason": "stop", "stop": " tree"},
    ]
    statistics = last["statistics"]
    assert statistics["num_tokens"] == sum(map(len, texts))
    assert statistics["num_steps"] == max(map(len, texts))
    assert (statistics["num_drafted"], statistics["num_accepted"]) == ([3], [1])


def test_shapes_are_rounded_up_so_that_texts_share_programs(generate, tokenizer):
    tokens = tokenizer.tokenizer.encode("three threads of the tree").ids
    text, told, calls = generate(
        [tokens, tokens[:2]], "--prompt", "a", "--prompt", "b", "--max-new-tokens", 3, per_step=2
    )
    assert (calls[0]["prompt"].shape, calls[0]["max_new_tokens"]) == ((2, 32), 32)
    assert text == f"a{tokenizer.decode(tokens[:3])}\n\nb{tokenizer.decode(tokens[:2])}\n"
    assert calls[0]["num_steps"] == 2
    assert "5 tokens in 2 steps" in told


def test_prompts_in_a_file_are_decoded_in_batches_and_written_in_order(generate, tokenizer, tmp_path):
    (tmp_path / "list.txt").write_text("one\n\ntwo \r\nthree\n", encoding="utf-8")
    texts = [tokenizer.tokenizer.encode(text).ids for text in ("x", "y", "z")]
    options = ["--prompts", tmp_path / "list.txt", "--batch-size", 2]
    text, told, calls = generate(texts, *options)
    assert text == "onex\n\ntwo y\n\nthreez\n"
    assert [call["prompt"].shape[0] for call in calls] == [2, 1]
    assert calls[0]["prompt"].shape[1] == calls[1]["prompt"].shape[1]
    num_tokens = sum(map(len, texts))
    num_steps = sum(call["num_steps"] for call in calls)
    assert f"{num_tokens} tokens in {num_steps} steps" in told
    # The key of a text follows from its index, not from its batch.
    whole = generate(texts, "--prompts", tmp_path / "list.txt")[2][0]["keys"]
    assert (jnp.concatenate([call["keys"] for call in calls]) == whole).all()


def test_prompts_and_conversations_are_read_from_lines_of_json(generate, tmp_path):
    lines = ['"one"', '{"prompt": "two", "id": 7}', '{"messages": [{"role": "user", "content": "three"}]}']
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    text, _, _ = generate([[5], [5], [5]], "--prompts", tmp_path / "list.jsonl", "--json")
    asked = [json.loads(line) for line in text.splitlines()[:-1]]
    assert [each.get("prompt") for each in asked] == ["one", "two", None]
    assert asked[2]["messages"] == [{"role": "user", "content": "three"}]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "list.jsonl' must hold a prompt per line, and holds none."),
        ('"a"\n{"prompt"', "list.jsonl', line 2: it must be JSON, but it cannot be parsed"),
        ("[1]", "line 1: it must be a text, or an object with a text `prompt` or a list `messages`"),
        ('{"prompt": 3}', "and `content`, got {'prompt': 3}."),
        ('{"messages": ["hello"]}', "and `content`, got {'messages': ['hello']}."),
    ],
)
def test_a_broken_line_is_reported_in_one_sentence(run, tmp_path, content, sentence):
    (tmp_path / "list.jsonl").write_text(content)
    status, text, told = run("generate", "--prompts", tmp_path / "list.jsonl")
    assert (status, text) == (2, "")
    assert sentence in told
    assert told.count("\n") == 1


def test_an_empty_stop_string_is_reported(run):
    assert "'--stop' must have a character or more." in run("generate", "--prompt", "a", "--stop", "")[2]


def test_only_warnings_are_written_if_a_program_reads_the_output(generate, monkeypatch):
    options = ["--prompt", "a", "--draft", "ngram", "--num-draft", 1, "--temperature", 1, "--verify", "sigmoid"]
    _, told, _ = generate([[5]], *options, "--quiet")
    warning = "the sigmoid rule is approximate: its text follows the drafter more than the target\n"
    assert told == warning
    monkeypatch.setattr(shared, "stdout_is_terminal", lambda: False)
    assert generate([[5]], *options)[1] == warning
    assert re.search(
        r"loading target, 0.00 GB, on cpu \(cpu\) ... [\d.]+ s\n", generate([[5]], *options, "--verbose")[1]
    )


def test_loading_shows_its_share_on_a_terminal_alone(monkeypatch, capsys):
    monkeypatch.setattr(shared, "stderr_is_terminal", lambda: True)
    with shared.doing("loading") as progress_fn:
        for done in (1, 2, 200):
            progress_fn(done, 200)
    assert re.fullmatch(r"loading \.\.\. 0%\x08\x081%\x08\x08100%\x08\x08\x08\x08[\d.]+ s\n", capsys.readouterr().err)
    monkeypatch.setattr(shared, "stderr_is_terminal", lambda: False)
    with shared.doing("loading") as progress_fn:
        progress_fn(1, 2)
    assert re.fullmatch(r"loading \.\.\. [\d.]+ s\n", capsys.readouterr().err)
    monkeypatch.setattr(shared, "stdout_is_terminal", lambda: False)
    with shared.doing("loading") as progress_fn:
        progress_fn(1, 2)
    assert not capsys.readouterr().err


def test_rules_are_chosen_by_name_and_say_how_far_they_are_from_the_target(generate, capsys):
    options = ["--prompt", "a", "--draft", "ngram", "--num-draft", 1, "--quiet", "--verify"]
    _, told, calls = generate([[5]], *options, "block")
    assert (calls[0]["verify_fn"], told) == (ss.verify_block, "")
    rule = generate([[5]], *options, "sigmoid", "--alpha", "0", "--beta", "1.5")[2][0]["verify_fn"]
    assert (rule.func, rule.keywords) == (ss.verify_sigmoid, {"alpha": 0, "beta": 1.5})
    assert generate([[5]], *options, "sigmoid")[2][0]["verify_fn"] == ss.verify_sigmoid
    rows, empty = jnp.array([2, 3]), ss.Calibration(*jnp.zeros((6, 1)))
    state = ss.Calibration(rows, rows, rows, jnp.array([0.5, 1]), jnp.array([0.25, 0.75]), jnp.array([4.0, 1]))
    verification.warn_about_rule("calibrated", [state, empty], is_greedy=False)
    verification.warn_about_rule("calibrated", [empty], is_greedy=False)
    verification.warn_about_rule("token", [()], is_greedy=False)
    assert capsys.readouterr().err.splitlines() == [
        "the calibrated rule is approximate: its estimates were off by 1.00 nats on average, and each "
        "token's distribution differs from the target's by at most 0.300 on average, 0.750 at worst "
        "(total variation; 5 drafts)",
        "the calibrated rule is approximate, but here no draft was decided by an estimate",
    ]


def test_compiled_programs_are_kept_in_the_user_s_cache(run, monkeypatch, tmp_path):
    updates = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setattr(generate_module.generation, "open_models", lambda *_, **options: 1 / 0)

    def folder_used(*options, **environment):
        updates.clear()
        monkeypatch.delenv("SPECSAMP_CACHE", raising=False)
        for name, value in {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": "", **environment}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ZeroDivisionError):
            run("generate", "--prompt", "a", *options)
        return updates.get("jax_compilation_cache_dir")

    assert folder_used() == str(tmp_path / "home" / ".cache" / "specsamp" / "programs")
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
    assert folder_used(**xdg) == str(tmp_path / "xdg" / "specsamp" / "programs")
    assert (tmp_path / "xdg" / "specsamp" / "programs").is_dir()
    assert folder_used("--cache", tmp_path / "mine", **xdg) == str(tmp_path / "mine")
    assert folder_used("--cache", "off") is None
    assert folder_used(SPECSAMP_CACHE="off") is None
    (tmp_path / "file").write_text("")
    assert folder_used(XDG_CACHE_HOME=str(tmp_path / "file")) is None
    status, _, told = run("generate", "--prompt", "a", "--cache", tmp_path / "file" / "below")
    assert status == 2
    assert "below cannot be made: Not a directory." in told


def test_a_command_traces_programs_for_this_machine_alone(run, monkeypatch):
    used = []
    monkeypatch.setattr(generate_module.generation, "open_models", lambda *_, **__: used.append(for_this_machine.value))
    with pytest.raises(AttributeError):  # of None in place of models
        run("generate", "--prompt", "a")
    assert (used, for_this_machine.value) == ([True], False)


def test_the_cache_s_folder_is_reported_with_verbose(run, monkeypatch, tmp_path):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    told = run("generate", "--prompt", "a", "--cache", tmp_path, "--verbose", "--target", "nowhere")[2]
    assert f"compiled programs are kept in {tmp_path}\n" in told
    assert "programs" not in run("generate", "--prompt", "a", "--cache", tmp_path, "--target", "nowhere")[2]


def test_prompts_may_come_from_standard_input(monkeypatch, tmp_path):
    file = tmp_path / "lines"
    file.write_bytes("a\u2028b\nc".encode())
    with file.open() as opened:
        monkeypatch.setattr("sys.stdin", opened)
        assert [prompt.text for prompt in prompts.read_prompts(Path("-"))] == ["a\u2028b", "c"]


def test_a_pipe_without_a_writer_is_reported_and_one_with_a_writer_is_read(run, monkeypatch, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    monkeypatch.setattr(prompts, "_PIPE_SECONDS", 0.1)
    status, _, told = run("generate", "--prompt-file", pipe)
    assert (status, told) == (2, f"specsamp: {pipe} is a pipe that no program opened for writing in 0.1 seconds.\n")
    writer = threading.Thread(target=pipe.write_text, args=("text",))
    writer.start()
    assert prompts.read_prompt(pipe) == "text"
    writer.join()


def test_a_text_does_not_depend_on_touched_memory(run, folder, monkeypatch):
    monkeypatch.setattr(slots, "_PIECE", 16)
    taken, take = [], specsamp.TouchedMemory.take
    monkeypatch.setattr(
        specsamp.TouchedMemory, "take", lambda memory, size: taken.append(take(memory, size)) or taken[-1]
    )
    arguments = ["generate", "--target", folder, "--prompt", "ab", "--max-new-tokens", 4, "--seed", 1, "--json"]
    expected = run(*arguments)
    assert expected[0] == 0
    assert not taken
    monkeypatch.setattr(specsamp, "_SMALLEST", 1)
    monkeypatch.setattr(specsamp, "_ACCELERATORS", ())
    texts = [json.loads(output.splitlines()[0]) for output in (expected[1], run(*arguments)[1])]
    assert texts[0] == texts[1]
    assert any(view is not None for view in taken)
