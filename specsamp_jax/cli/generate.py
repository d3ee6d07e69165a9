"""`specsamp generate`: writes text to standard output as it is accepted, and messages to standard error."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import jax

from specsamp_jax._types import Model, Verification
from specsamp_jax.cli import generation, memory
from specsamp_jax.cli.folders import NGRAM
from specsamp_jax.cli.settings import describe, replace_settings, settings_options
from specsamp_jax.cli.shared import DTYPES, FOLDER, Text, say, seed_option
from specsamp_jax.decoding.generate import stream
from specsamp_jax.models import sampling_and_processor, vocab_size
from specsamp_jax.rules.verify import verify, verify_sigmoid
from specsamp_jax.text import TextStream

RULES: dict[str, Callable[..., Verification]] = {"token": verify, "sigmoid": verify_sigmoid}


@click.command("generate")
@click.option(
    "--target", type=FOLDER, help="Folder of a checkpoint in Hugging Face's layout. Default: the trained pair."
)
@click.option("--draft", help="Folder of a smaller checkpoint with the same tokens, or 'ngram'. Default: no drafter.")
@click.option("--tokenizer", type=FOLDER, help="Folder of the tokenizer. Default: the target's.")
@click.option("--prompt", "prompts", type=Text(), multiple=True, help="A text to continue. Several are one batch.")
@click.option("--prompt-file", "files", type=FOLDER, multiple=True, help="A file with a text to continue; - is stdin.")
@click.option("--chat", "chats", type=Text(), multiple=True, help="A user's message to answer, by the chat template.")
@click.option("--system", type=Text(), help="The system message before each --chat.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Most tokens per text.")
@click.option(
    "--num-draft", type=click.IntRange(0, 32), default=4, show_default=True, help="Drafts per step; 0: no drafter."
)
@settings_options
@seed_option
@click.option(
    "--verify", "rule", type=click.Choice(list(RULES)), default="token", show_default=True, help="Verification rule."
)
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of the computation. Default: the checkpoint's.")
@click.option("--ignore", multiple=True, help="A setting of generation_config.json to leave out.")
def generate_command(
    target: Path | None,
    draft: str | None,
    tokenizer: Path | None,
    prompts: tuple[str, ...],
    files: tuple[Path, ...],
    chats: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    num_draft: int,
    seed: int,
    rule: str,
    dtype: str | None,
    ignore: tuple[str, ...],
    **settings: int | float | None,
) -> None:
    """Continue texts, or answer in a chat, with your own target and drafter or with the trained pair.

    Text is written to standard output as it is accepted, messages to standard error. Several texts are decoded as one
    batch and written in order, with an empty line between them.
    """
    if not (prompts or files or chats):
        raise click.UsageError("Missing option '--prompt', '--prompt-file' or '--chat'.")
    if chats and (prompts or files):
        raise click.UsageError("'--chat' is answered and '--prompt' continued: give one of the two.")
    if system is not None and not chats:
        raise click.UsageError("'--system' comes before '--chat', which is missing.")
    if target is None and (tokenizer is not None or draft not in (None, NGRAM)):
        raise click.UsageError("'--draft' and '--tokenizer' go with '--target', which is missing.")
    began, texts = time.perf_counter(), [*prompts, *map(generation.read_prompt, files)]
    setup = generation.load(target, draft, tokenizer, dtype=dtype, ignore=ignore)
    before = [] if system is None else [{"role": "system", "content": system}]
    tokens = [setup.tokenizer.encode(text) for text in texts]
    tokens += [setup.tokenizer.encode_chat([*before, {"role": "user", "content": message}]) for message in chats]
    padded, lengths = generation.pad(tokens, vocab_size(setup.target))
    models = (setup.target, setup.draft) if isinstance(setup.draft, Model) else (setup.target,)
    batch_size, length = padded.shape
    memory.check(models, batch_size, length, max_new_tokens, num_heads=setup.num_heads, max_length=setup.max_length)
    config, notes = replace_settings(setup.config, settings)
    sampling, process_logits_fn = sampling_and_processor(config, lengths)
    for note in [*setup.notes, f"loaded in {time.perf_counter() - began:.1f} s, now compiling", *notes]:
        say(note)
    say(describe(config))
    if setup.max_length is not None and padded.shape[1] + max_new_tokens > setup.max_length:
        say(f"the target was trained on texts of up to {setup.max_length} tokens, and this one may become longer")
    if rule == "sigmoid":
        say("the sigmoid rule is approximate: its text follows the drafter more than the target")
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
            eos_token=config.eos_token,
            verify_fn=RULES[rule],
            process_logits_fn=process_logits_fn,
        )
    )
    # A continuation depends on its prompt, whose last word may need a space after it; a reply is a separate text.
    contexts = [[] for _ in tokens] if chats else tokens
    streams = [TextStream(setup.tokenizer.tokenizer, context) for context in contexts]
    try:
        _print(generation.in_order(meter, streams, lengths.tolist()), texts)
    finally:
        # After Ctrl-C, too, the line ends and the counts are written.
        click.echo()
        for line in meter.summary():
            say(line)


def _print(pieces: Iterator[tuple[int, str]], texts: list[str]) -> None:
    """Writes each text (none, in a chat) and the pieces that follow it."""
    current = -1
    for row, piece in pieces:
        if row > current:
            click.echo(("\n\n" if row else "") + (texts[row] if texts else ""), nl=False)
            current = row
        click.echo(piece, nl=False)
        sys.stdout.flush()
