"""`specsamp generate`: writes text to standard output as it is accepted, and messages to standard error."""

import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import jax
from tokenizers import Tokenizer

from specsamp_jax._types import Generation, Model
from specsamp_jax.cli import draft_length, generation, memory, output, prompts
from specsamp_jax.cli.cache import cache_option, padded_size
from specsamp_jax.cli.folders import NGRAM
from specsamp_jax.cli.rows import Meter, Row
from specsamp_jax.cli.settings import describe, replace_settings, settings_options
from specsamp_jax.cli.shared import DTYPES, FOLDER, Text, doing, say, seed_option, verbosity_options, warn
from specsamp_jax.cli.verification import make_rule, rule_options, warn_about_rule
from specsamp_jax.decoding.ahead import compile_stream
from specsamp_jax.decoding.generate import stream
from specsamp_jax.models import GenerationConfig, sampling_and_processor, vocab_size
from specsamp_jax.models.checkpoints.folder import TouchedMemory
from specsamp_jax.sampling.streams import row_keys


@click.command("generate")
@click.option(
    "--target",
    type=FOLDER,
    help="Folder of a checkpoint, GGUF file, or id on the Hugging Face hub. Default: the trained pair.",
)
@click.option("--draft", help="A smaller checkpoint with the same tokens, or 'ngram'. Default: no drafter.")
@click.option("--tokenizer", type=FOLDER, help="Checkpoint with the tokenizer. Default: the target's.")
@click.option("--prompt", "texts", type=Text(), multiple=True, help="A text to continue. Several are one batch.")
@click.option("--prompt-file", "files", type=FOLDER, multiple=True, help="A file with a text to continue; - is stdin.")
@click.option("--prompts", "lists", type=FOLDER, multiple=True, help="A file with a text per line, or JSON in .jsonl.")
@click.option("--chat", "chats", type=Text(), multiple=True, help="A user's message to answer, by the chat template.")
@click.option("--system", type=Text(), help="The system message before each --chat.")
@click.option("--max-new-tokens", type=click.IntRange(1), default=128, show_default=True, help="Most tokens per text.")
@click.option("--stop", "stops", type=Text(), multiple=True, help="A text that ends the output, and is not written.")
@click.option(
    "--num-draft",
    type=draft_length.NumDraft(),
    default=draft_length.AUTO,
    show_default=True,
    help="Drafts per step; 0: no drafter; auto: as many as pay, 0 to 4. With auto, a seed may give another text.",
)
@settings_options
@seed_option
@rule_options
@click.option("--batch-size", type=click.IntRange(1), default=16, show_default=True, help="Most texts at once.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Dtype of the computation. Default: the checkpoint's.")
@click.option("--ignore", multiple=True, help="A setting of generation_config.json to leave out.")
@click.option("--json", "as_json", is_flag=True, help="Write a line of JSON per text, then one with statistics.")
@cache_option
@verbosity_options
@click.pass_obj
def generate_command(
    touched: TouchedMemory | None,
    target: Path | None,
    draft: str | None,
    tokenizer: Path | None,
    texts: tuple[str, ...],
    files: tuple[Path, ...],
    lists: tuple[Path, ...],
    chats: tuple[str, ...],
    system: str | None,
    max_new_tokens: int,
    stops: tuple[str, ...],
    num_draft: int | str,
    seed: int,
    rule: str,
    alpha: float | None,
    beta: float | None,
    batch_size: int,
    dtype: str | None,
    ignore: tuple[str, ...],
    as_json: bool,
    **settings: int | float | None,
) -> None:
    """Continue texts, or answer in a chat.

    Your own target and drafter write them, or the trained pair of this package. Text is written to standard output as
    it is accepted, messages to standard error. Texts are written in order, with an empty line between them.
    """
    if not (texts or files or lists or chats):
        raise click.UsageError("Missing option '--prompt', '--prompt-file', '--prompts' or '--chat'.")
    if chats and (texts or files or lists):
        raise click.UsageError("'--chat' is answered and '--prompt' continued: give one of the two.")
    if system is not None and not chats:
        raise click.UsageError("'--system' comes before '--chat', which is missing.")
    if target is None and (tokenizer is not None or draft not in (None, NGRAM)):
        raise click.UsageError("'--draft' and '--tokenizer' go with '--target', which is missing.")
    if not all(stops):
        raise click.UsageError("'--stop' must have a character or more.")
    drafts = num_draft != 0 and (target is None or draft is not None)
    verify_fn = make_rule(rule, has_drafter=drafts, alpha=alpha, beta=beta)
    asked = [prompts.Prompt(text) for text in [*texts, *map(prompts.read_prompt, files)]]
    asked += [prompt for file in lists for prompt in prompts.read_prompts(file)]
    asked += [prompts.chat(message, system) for message in chats]
    began = time.perf_counter()

    # Small files are read, the prompts encoded and the programs compiled before weights are read.
    setup = generation.open_models(target, draft, tokenizer, dtype=dtype, ignore=ignore)
    config, notes = replace_settings(setup.config, settings)
    config, stop_texts = _split_stops(config, stops, setup.tokenizer.tokenizer)
    tokens = [prompt.encode(setup.tokenizer) for prompt in asked]
    # One width for all batches, and a few for all prompts: they share compiled programs. So do numbers of tokens.
    padded, lengths = prompts.pad(tokens, vocab_size(setup.target))
    models = (setup.target, setup.draft) if isinstance(setup.draft, Model) else (setup.target,)
    sizes = min(batch_size, len(asked)), padded.shape[1], max_new_tokens
    memory.check(models, *sizes, num_heads=setup.num_heads, max_length=setup.max_length)

    def arguments_of(setup: generation.Setup, lengths: Any) -> dict[str, Any]:
        """The arguments of `stream` for a batch of prompts with these lengths, but for `num_draft`."""
        sampling, process_logits_fn = sampling_and_processor(config, lengths)
        return {
            "target": setup.target,
            "draft": setup.draft,
            "max_new_tokens": padded_size(max_new_tokens),
            "prompt_lengths": lengths,
            "sampling": sampling,
            "eos_token": config.eos_token,
            "verify_fn": verify_fn,
            "process_logits_fn": process_logits_fn,
        }

    setup = generation.begin_weights(setup, touched)
    with doing("compiling"):
        keys = row_keys(jax.random.key(seed), len(asked))
        program = draft_length.program(num_draft, setup.draft)
        compile_stream(padded[:batch_size], num_draft=program, **arguments_of(setup, lengths[:batch_size]))
    setup = generation.read_weights(setup)
    for note in [*setup.notes, f"loaded in {time.perf_counter() - began:.1f} s", *notes]:
        say(note)
    say(describe(config))
    if setup.max_length is not None and lengths.max() + max_new_tokens > setup.max_length:
        warn(f"the target was trained on texts of up to {setup.max_length} tokens, and this one may become longer")
    meter = Meter(max_new_tokens)
    chosen: draft_length.Choice = num_draft
    rule_states: dict[int, Any] = {}
    try:
        for first in range(0, len(asked), batch_size):
            batch = slice(first, first + batch_size)
            arguments = arguments_of(setup, lengths[batch])
            # The first batch, the largest, is measured for all.
            chosen = draft_length.resolve(chosen, padded[batch], **arguments)
            generations = stream(keys[batch], padded[batch], num_draft=chosen, **arguments)
            # A continuation depends on its prompt, whose last word may need a space after it; a reply is separate.
            contexts = [row if prompt.messages is None else [] for row, prompt in zip(tokens, asked, strict=True)]
            options = {"max_tokens": max_new_tokens, "stops": stop_texts}
            rows = [Row(setup.tokenizer.tokenizer, context=context, **options) for context in contexts[batch]]
            watched = _keep_rule_state(meter.watch(generations, first), rule_states, first)
            if as_json:
                output.write_json(watched, rows, asked[batch], lengths[batch], config.eos_token)
            else:
                output.write_texts(watched, rows, asked[batch], lengths[batch], first == 0)
        if as_json:
            output.write_statistics(meter)
    finally:
        # After Ctrl-C, too, the line ends and the counts are written.
        if not as_json:
            click.echo()
        for line in meter.summary():
            say(line)
        if rule_states:
            greedy = bool(config.sampling.temperature == 0)
            warn_about_rule(rule, list(rule_states.values()), is_greedy=greedy)


def _keep_rule_state(generations: Iterable[Generation], states: dict[int, Any], batch: int) -> Iterator[Generation]:
    """Yields the items of `stream`, and keeps the latest state of the verification rule in `states[batch]`."""
    for result in generations:
        states[batch] = result.verify_state
        yield result


def _split_stops(
    config: GenerationConfig, stops: Sequence[str], tokenizer: Tokenizer
) -> tuple[GenerationConfig, list[str]]:
    """Moves the stop strings that are special tokens, which give no text, to the end tokens."""
    special = {token.content: i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    ends = [special[stop] for stop in stops if stop in special]
    new_ends = tuple(dict.fromkeys([*config.eos_token, *ends]))
    return config._replace(eos_token=new_ends), [stop for stop in stops if stop not in special]
