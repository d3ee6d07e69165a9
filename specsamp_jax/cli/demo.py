"""`specsamp demo`: shows a text as it is accepted, its speed, and a check of its distribution."""

import time

import click
import jax

from specsamp_jax.cli import demo_checks, draft_length
from specsamp_jax.cli.cache import cache_option
from specsamp_jax.cli.pair import load_pair
from specsamp_jax.cli.shared import doing, primed, seed_option, table, verbosity_options

FALSE_ALARM = 1e-3  # share of seeds at which the check fails although the distribution is right
WORTH = 1.03  # a smaller gain is called none: it is within the noise of the measurement
COLOURS = {"accepted": "green", "residual": "red", "bonus": "cyan"}


@click.command("demo")
@seed_option
@cache_option
@verbosity_options
def demo_command(seed: int) -> None:
    """Continue a docstring with the trained pair, time it, test it.

    The docstring is of a file that the pair was not trained on. The time is compared with that of the target alone, and
    many tokens after one context with the target's distribution.
    """
    began = time.perf_counter()
    with doing("loading the trained pair"):
        pair = load_pair()
        prompts = demo_checks.held_out_prompts(pair, seed)
    first = prompts[0]
    with doing("compiling the speculative step"):
        pieces = primed(demo_checks.continuation(pair, first.tokens, jax.random.key(seed)))
    click.echo(f"\n{click.style(first.name, bold=True)}, a docstring from a file that was not trained on,")
    click.echo(f"continued at temperature 1, {demo_checks.NUM_DRAFT} drafts per step:")
    click.echo("  ".join(["the prompt", *(click.style(kind, fg=colour) for kind, colour in COLOURS.items())]) + "\n")
    click.echo(first.text, nl=False)
    for text, kind in pieces:
        click.secho(text, fg=COLOURS[kind], nl=False)
    click.echo("\n")

    with doing("compiling steps of " + ", ".join(map(str, draft_length.LENGTHS)) + " drafts, and measuring them"):
        rule = demo_checks.measure_rule(pair, first)
    with doing(f"continuing {len(prompts)} held-out docstrings with speculation and without"):
        speculative, alone, gain = demo_checks.race(pair, prompts, rule, seed)
    with doing(f"drawing {demo_checks.NUM_CHECKED:,} speculative tokens after one context"):
        check = demo_checks.check_exactness(pair, first.tokens, seed)

    click.echo(f"\nOn {jax.devices()[0].device_kind}, one prompt at a time, {demo_checks.NEW_TOKENS} tokens each:\n")
    runs = [(run.name, f"{run.tokens_per_second:.0f}", f"{run.tokens_per_step:.2f}") for run in (speculative, alone)]
    table([("", "tokens per second", "tokens per step"), *runs])
    click.echo(
        f"\nSpeculation was {gain:.2f} times as fast as the target alone. Here {draft_length.describe(rule.costs)}."
    )
    click.echo(f"So {speculative.share_drafted:.0%} of its steps drafted, as many tokens as pay.")
    if gain < WORTH:
        click.echo("Speculation brings nothing here: longer steps cost more than the accepted drafts save.")
    if any(speculative.num_drafted):
        reached = [i for i, count in enumerate(speculative.num_drafted) if count]
        click.echo()
        table(
            [
                ("draft position", *(str(i + 1) for i in reached)),
                ("drafted", *(str(speculative.num_drafted[i]) for i in reached)),
                ("accepted, at least", *(f"{speculative.acceptance[i]:.2f}" for i in reached)),
            ]
        )
    click.echo(f"\nDoes the text have the target's own distribution? {check.num_samples:,} tokens after one context:\n")
    table([("token", "counted", "expected"), *check.rows(pair.tokenizer)])
    verdict = "no evidence of a difference" if check.p_value > FALSE_ALARM else "the distributions DIFFER"
    click.echo(
        f"\nchi-square {check.statistic:.1f} on {check.degrees} degrees of freedom, p = {check.p_value:.3f}: {verdict}"
    )
    click.echo(f"{time.perf_counter() - began:.0f} seconds in all")
