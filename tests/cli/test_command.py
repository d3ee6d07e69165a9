"""The command as a process: its start, its standard streams, and Ctrl-C."""

import os
import signal
from pathlib import Path

import click
import pytest
from processes import process

import specsamp
from specsamp_jax.cli.certify import certify_command
from specsamp_jax.cli.demo import demo_command
from specsamp_jax.cli.distill import distill_command
from specsamp_jax.cli.generate import generate_command
from specsamp_jax.cli.main import main
from specsamp_jax.cli.transcribe import transcribe_command

ROOT = Path(__file__).parents[2]


COMMAND = "import specsamp; specsamp.main()"


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], [], ["--version"]])
def test_help_imports_neither_jax_nor_what_the_subcommands_need(arguments):
    code = f"""
import sys, specsamp
status = specsamp.run({arguments})
loaded = {{name.split(".")[0] for name in sys.modules}}
assert not loaded & {{"jax", "numpy", "flax", "tokenizers", "specsamp_jax"}}, loaded
sys.exit(status)
"""
    result = process(code)
    assert (result.returncode, result.stderr) == (0, "")
    assert "specsamp" in result.stdout


def test_help_lists_the_subcommands_by_the_first_lines_of_their_help(capsys):
    assert main is specsamp.main
    commands = {
        "certify": certify_command,
        "demo": demo_command,
        "distill": distill_command,
        "generate": generate_command,
        "transcribe": transcribe_command,
    }
    assert specsamp.COMMANDS.keys() == commands.keys()
    for name, command in commands.items():
        assert command.help.split("\n\n")[0].replace("\n", " ") == specsamp.COMMANDS[name]
        assert specsamp.run([name, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith(f"Usage: specsamp {name} ")
        assert "--seed" in text


def test_help_is_whole(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in specsamp.COMMANDS)):
        assert specsamp.run(arguments) == 0
        text = capsys.readouterr().out
        assert "None]" not in text  # a range without bounds
        assert "...\n" not in text.partition("\n")[2]  # a line that is cut


def test_no_option_of_a_subcommand_lacks_a_help_text():
    for command in (certify_command, demo_command, generate_command, transcribe_command):
        for option in command.params:
            assert not isinstance(option, click.Option) or option.help, option.name


def test_a_full_device_is_reported_in_one_sentence():
    with Path("/dev/full").open("w") as full:
        result = process(COMMAND, "--help", stdout=full)
    assert (result.returncode, result.stderr) == (1, "specsamp: standard output: No space left on device\n")


def test_a_closed_standard_output_is_reported_in_one_sentence():
    result = process(COMMAND, "--help", closed=">&-")
    assert (result.returncode, result.stderr) == (
        1,
        "specsamp: standard output is closed, and the text goes there\n",
    )


def test_a_closed_standard_input_is_reported_in_one_sentence():
    code = "from specsamp_jax.cli import prompts; import pathlib; prompts.read_prompt(pathlib.Path('-'))"
    result = process(code, closed="<&-")
    assert result.stderr.endswith("ValueError: --prompt-file - needs standard input, which is closed.\n")


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_a_reader_that_leaves_ends_the_command_without_a_message(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = process(COMMAND, *arguments, stdout=writer)
    os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_ctrl_c_during_the_imports_ends_the_command_without_a_traceback():
    code = """
import importlib, os, signal, sys, specsamp
signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job ignores it.
imported = importlib.import_module
def interrupted(name):
    os.kill(os.getpid(), signal.SIGINT)
    return imported(name)
importlib.import_module = interrupted
specsamp.main()
"""
    result = process(code, "generate", "--prompt", "a")
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


def test_ctrl_c_after_the_imports_can_be_handled():
    code = """
import click, os, signal, sys, types, specsamp
signal.signal(signal.SIGINT, signal.default_int_handler)
@click.command()
def demo_command():
    os.kill(os.getpid(), signal.SIGINT)
sys.modules["specsamp_jax.cli.demo"] = types.SimpleNamespace(demo_command=demo_command)
sys.modules["specsamp_jax.cli"] = sys.modules["specsamp_jax"] = types.ModuleType("specsamp_jax")
specsamp.main()
"""
    result = process(code, "demo")
    assert (result.returncode, result.stderr.strip()) == (130, "")


def test_ctrl_c_in_a_callback_of_the_garbage_collector_is_not_lost():
    code = """
import click, gc, os, signal, sys, time, types, specsamp
signal.signal(signal.SIGINT, signal.default_int_handler)
def interrupted(*_):
    gc.callbacks.remove(interrupted)
    os.kill(os.getpid(), signal.SIGINT)
    return None
@click.command()
def demo_command():
    gc.callbacks.append(interrupted)
    gc.collect()
    for _ in range(300):
        time.sleep(0.1)
sys.modules["specsamp_jax.cli.demo"] = types.SimpleNamespace(demo_command=demo_command)
sys.modules["specsamp_jax.cli"] = sys.modules["specsamp_jax"] = types.ModuleType("specsamp_jax")
specsamp.main()
"""
    result = process(code, "demo")
    assert (result.returncode, result.stderr.strip()) == (130, "")


@pytest.mark.parametrize(
    ("error", "status", "sentence"),
    [
        ("ValueError('top_k must be small.')", 2, "top_k must be small."),
        ("OSError(5, 'Input/output error', '/some/file')", 1, "/some/file: Input/output error"),
        ("MemoryError()", 1, "out of memory: no reason was given"),
        ("RuntimeError('RESOURCE_EXHAUSTED: 3 GB\\nand more')", 1, "out of memory: RESOURCE_EXHAUSTED: 3 GB"),
    ],
)
def test_known_errors_are_one_sentence(monkeypatch, capsys, error, status, sentence):
    def raise_error(*arguments, **options):
        raise eval(error)

    monkeypatch.setattr(demo_command, "callback", raise_error)
    assert specsamp.run(["demo"]) == status
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", f"specsamp: {sentence}\n")


@pytest.mark.parametrize(
    "error", ["ValueError('wrapped')", "RuntimeError('INTERNAL: wrapped')", "OSError(4, 'wrapped')"]
)
def test_ctrl_c_that_a_library_made_another_error_of_ends_the_command(monkeypatch, capsys, error):
    def wrap(**options):
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise eval(error) from None

    monkeypatch.setattr(demo_command, "callback", wrap)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert specsamp.run(["demo"]) == 130
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err == ""


def test_other_errors_keep_their_traceback(monkeypatch):
    def raise_error(*arguments, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo_command, "callback", raise_error)
    with pytest.raises(RuntimeError, match="a bug"):
        specsamp.run(["demo"])
