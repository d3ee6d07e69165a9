"""The command: what it prints, and the one sentence that a wrong option gets."""

import re
import sys

import pytest

from specsamp_jax import cli


def run(monkeypatch, capsys, *arguments):
    """Exit status, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["specsamp", *arguments])
    status = 0
    try:
        cli.main()
    except SystemExit as error:
        status = error.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_prompt_is_continued_and_the_seed_decides(monkeypatch, capsys):
    prompt = "Return the"
    options = ("--prompt", prompt, "--max-new-tokens", "12", "--top-k", "40", "--num-draft", "2")
    status, text, progress = run(monkeypatch, capsys, "generate", *options)
    assert status == 0
    assert text.startswith(prompt)
    assert len(text) > len(prompt) + 10
    assert "compiling" in progress
    assert run(monkeypatch, capsys, "generate", *options)[1] == text
    assert run(monkeypatch, capsys, "generate", *options, "--seed", "1")[1] != text


def test_the_sigmoid_rule_says_that_it_is_approximate(monkeypatch, capsys):
    options = ("--prompt", "Compute", "--max-new-tokens", "4", "--verify", "sigmoid")
    status, text, progress = run(monkeypatch, capsys, "generate", *options)
    assert status == 0
    assert text.startswith("Compute")
    assert "approximate" in progress


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("generate",), "Missing option '--prompt'."),
        (("generate", "--prompt", "a", "--num-draft", "-1"), "'--num-draft': -1 is not in the range 0<=x<=32."),
        (("generate", "--prompt", "a", "--top-p", "1.5"), "'--top-p': 1.5 is not in the range 0<=x<=1."),
        (("generate", "--prompt", "a", "--temperature", "hot"), "'hot' is not a valid float range."),
        (("generate", "--prompt", "a", "--verify", "block"), "'block' is not one of 'token', 'sigmoid'."),
        (("generate", "--prompt", "a", "--sead", "1"), "No such option"),
        (("dance",), "No such command 'dance'."),
    ],
)
def test_a_wrong_option_gets_one_sentence(monkeypatch, capsys, arguments, sentence):
    status, text, complaint = run(monkeypatch, capsys, *arguments)
    assert status == 2
    assert text == ""
    assert sentence in complaint
    assert complaint.startswith("specsamp: ")
    assert complaint.count("\n") == 1


def test_the_demo_shows_a_text_a_race_and_a_check(monkeypatch, capsys):
    monkeypatch.setattr(cli._demo, "NUM_CHECKED", 1024)
    monkeypatch.setattr(cli._demo, "NUM_PROMPTS", 2)
    status, text, _ = run(monkeypatch, capsys, "demo")
    assert status == 0
    assert "a docstring from a file that was not trained on" in text
    alone, speculative = (re.search(rf"{name} +(\d+) +([\d.]+)", text) for name in ("target alone", "with 4 drafts"))
    assert alone
    assert speculative
    assert float(alone[2]) == 1.0
    assert 1.2 < float(speculative[2]) <= 5
    check = re.search(r"chi-square [\d.]+ on \d+ degrees of freedom, p = ([\d.]+): (.*)", text)
    assert check
    assert float(check[1]) > 1e-3
    assert check[2] == "nothing speaks against it"
