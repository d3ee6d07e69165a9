"""`specsamp generate`: text to standard output as it is accepted, all else to standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import click
import jax

from specsamp_jax._types import Verification
from specsamp_jax.cli import generation
from specsamp_jax.decoding.generate import stream
from specsamp_jax.models import vocab_size
from specsamp_jax.rules.verify import verify, verify_sigmoid
from specsamp_jax.text import TextStream

RULES: dict[str, Callable[..., Verification]] = {"token": verify, "sigmoid": verify_sigmoid}
DTYPES = ["float32", "bfloat16", "float16"]
FOLDER = click.Path(path_type=Path)


@click.command("generate")
@click.option("--target", type=FOLDER, help="A checkpoint's folder in Hugging Face's layout; the trained pair if none.")
@click.option("--draft", help="The folder of a smaller one with the same tokens, or ngram; the target alone if none.")
@click.option("--tokenizer", type=FOLDER, help="The folder of the tokenizer, where it is not the target's.")
@click.option("--prompt", "prompts", multiple=True, help="A text to continue. Several are one batch.")
@click.option("--prompt-file", "files", multiple=True, type=click.File(encoding="utf-8"), help="A file; - is stdin.")
@click.option("--chat", "chats", multiple=True, help="What a user says, to be answered by the chat template.")
@click.option("--system", help="The system's message before each --chat.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True)
@click.option("--num-draft", type=click.IntRange(0, 32), default=4, show_default=True, help="0: the target alone.")
@click.option("--temperature", type=click.FloatRange(0), help="0 is greedy. What is not given is the checkpoint's.")
@click.option("--top-k", type=click.IntRange(0), help="0 is off.")
@click.option("--top-p", type=click.FloatRange(0, 1), help="1 is off.")
@click.option("--min-p", type=click.FloatRange(0, 1), help="0 is off.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="Of all the chance.")
@click.option("--verify", "rule", type=click.Choice(list(RULES)), default="token", show_default=True)
@click.option("--dtype", type=click.Choice(DTYPES), help="To compute in; the checkpoint's own if none.")
@click.option("--ignore", multiple=True, help="A setting of generation_config.json that is to be left out.")
def generate_command(
    target: Path | None,
    draft: str | None,
    tokenizer: Path | None,
    prompts: tuple[str, ...],
    files: tuple[TextIO, ...],
    chats: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    num_draft: int,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    min_p: float | None,
    seed: int,
    rule: str,
    dtype: str | None,
    ignore: tuple[str, ...],
) -> None:
    """Continue texts, or answer in a chat, with a target and a drafter of your own or with the trained pair.

    Text goes to standard output as it is accepted, all else to standard error. Several texts are decoded as one batch
    and printed in order, with an empty line between them.
    """
    if not (prompts or files or chats):
        raise click.UsageError("Missing option '--prompt', '--prompt-file' or '--chat'.")
    if chats and (prompts or files):
        raise click.UsageError("'--chat' is answered and '--prompt' continued: give one of the two.")
    if system is not None and not chats:
        raise click.UsageError("'--system' comes before '--chat', which is missing.")
    if target is None and (tokenizer is not None or draft not in (None, generation.NGRAM)):
        raise click.UsageError("'--draft' and '--tokenizer' go with '--target', which is missing.")
    began, texts = time.perf_counter(), [*prompts, *(file.read() for file in files)]
    try:
        setup = generation.load(target, draft, tokenizer, dtype=dtype, ignore=ignore)
        before = [] if system is None else [{"role": "system", "content": system}]
        tokens = [setup.tokenizer.encode(text) for text in texts]
        tokens += [setup.tokenizer.encode_chat([*before, {"role": "user", "content": said}]) for said in chats]
        padded, lengths = generation.pad(tokens, vocab_size(setup.target))
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from error
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    sampling = setup.sampling._replace(**{name: value for name, value in given.items() if value is not None})
    for note in [*setup.notes, f"loaded in {time.perf_counter() - began:.1f} s, now compiling"]:
        _say(note)
    _say(generation.describe(sampling, setup.eos_token))
    if setup.max_length is not None and padded.shape[1] + max_new_tokens > setup.max_length:
        _say(f"the target was trained on texts of up to {setup.max_length} tokens, and this one may become longer")
    if rule == "sigmoid":
        _say("the sigmoid rule is approximate: its text follows the drafter more than the target")
    meter = generation.Meter(
        stream(
            jax.random.key(seed),
            padded,
            target=setup.target,
            draft=setup.draft,
            num_draft=num_draft,
            max_new_tokens=max_new_tokens,
            prompt_lengths=lengths,
            sampling=sampling,
            eos_token=setup.eos_token,
            verify_fn=RULES[rule],
        )
    )
    # A continuation goes on from its prompt; a reply is a text of its own.
    contexts = [[] for _ in tokens] if chats else tokens
    streams = [TextStream(setup.tokenizer.tokenizer, context) for context in contexts]
    try:
        _print(generation.in_order(meter, streams, lengths.tolist()), texts)
    finally:
        # Ctrl-C ends the line too, and tells what was counted until then.
        click.echo()
        for line in meter.summary():
            _say(line)


def _print(pieces: Iterator[tuple[int, str]], texts: list[str]) -> None:
    """Writes each text (none, in a chat) and the pieces that follow it."""
    begun = -1
    for row, piece in pieces:
        if row > begun:
            click.echo(("\n\n" if row else "") + (texts[row] if texts else ""), nl=False)
            begun = row
        click.echo(piece, nl=False)
        sys.stdout.flush()


def _say(what: str) -> None:
    click.secho(what, err=True, dim=True)
