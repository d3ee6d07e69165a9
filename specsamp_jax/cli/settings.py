"""Options of `specsamp generate` that replace sampling parameters and settings of a checkpoint."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import click

from specsamp_jax._types import SamplingParams
from specsamp_jax.cli.shared import TOP_K, FiniteRange
from specsamp_jax.models import GenerationConfig, LogitsSettings

_WHOLE = click.IntRange(0, 2**31 - 1)
# Name, type and help. A default is never shown: it is the checkpoint's.
_SAMPLING = {
    "temperature": (
        FiniteRange(0),
        "0 is greedy. This and the next ten default to the checkpoint's.",
    ),
    "top_k": (TOP_K, "0 is off."),
    "top_p": (FiniteRange(0, 1), "1 is off."),
    "min_p": (FiniteRange(0, 1), "0 is off."),
    "typical_p": (FiniteRange(0, 1, min_open=True), "Probability that typical decoding keeps; 1 is off."),
    "epsilon_cutoff": (FiniteRange(0, 1, max_open=True), "Smallest probability of a token; 0 is off."),
}
_LOGITS = {
    "repetition_penalty": (FiniteRange(0, min_open=True), "On tokens of prompt and text; 1 is off."),
    "presence_penalty": (FiniteRange(-2, 2), "Subtracted from logits of generated tokens; 0 is off."),
    "frequency_penalty": (FiniteRange(-2, 2), "Subtracted once per occurrence of the token; 0 is off."),
    "no_repeat_ngram_size": (_WHOLE, "n of n-grams that may not occur twice; 0 is off."),
    "min_new_tokens": (_WHOLE, "Fewest tokens before the end; 0 is off."),
}


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds an option for each setting; those that are not given are None."""
    for name, (kind, text) in reversed([*_SAMPLING.items(), *_LOGITS.items()]):
        command = click.option(f"--{name.replace('_', '-')}", name, type=kind, help=text)(command)
    return command


def replace_settings(config: GenerationConfig, options: Mapping[str, Any]) -> tuple[GenerationConfig, list[str]]:
    """Returns the checkpoint's settings with those that were given as options, and messages about them.

    An option of sampling makes a greedy checkpoint sample, with the other parameters that its file states.

    Args:
      config: The checkpoint's.
      options: The values of all options of `settings_options`; None where an option was not given.
    """
    options = {name: value for name, value in options.items() if value is not None}
    chosen = [name for name in _SAMPLING if name in options]
    sampling, notes = config.sampling, []
    if chosen and sampling.temperature == 0:
        sampling = config.stated_sampling
        # A file that states temperature 0 is greedy by choice; an option says otherwise.
        sampling = sampling._replace(temperature=sampling.temperature or 1.0)
        if "temperature" not in options:
            notes.append(f"the checkpoint is greedy, and samples because of {_names(chosen)}")
    sampling = sampling._replace(**_among(SamplingParams._fields, options))
    filters = [name for name in chosen if name != "temperature"]
    if filters and sampling.temperature == 0:
        notes.append(f"no effect of {_names(filters)}: --temperature 0 is greedy")
    return config._replace(
        sampling=sampling, logits=config.logits._replace(**_among(LogitsSettings._fields, options))
    ), notes


def describe(config: GenerationConfig) -> str:
    """Returns the sampling parameters, the settings that are on, and the end tokens in one line."""
    settings, off = config.logits._asdict(), LogitsSettings()._asdict()
    changed = {name: value for name, value in settings.items() if value != off[name]}
    parameters = config.sampling._asdict()
    if config.sampling.temperature == 0:
        parameters = {}
        changed = {name: value for name, value in changed.items() if name not in _SAMPLING}
    parts = [] if parameters else ["greedy"]
    parts += [f"{_option(name)} {_brief(value)}" for name, value in {**parameters, **changed}.items()]
    ends = config.eos_token
    return f"{', '.join(parts)}; {f'ends at token {" or ".join(map(str, ends))}' if ends else 'no end token'}"


def _among(names: Collection[str], options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in names}


def _option(name: str) -> str:
    return name.replace("_", "-")


def _names(names: list[str]) -> str:
    return ", ".join(f"--{_option(name)}" for name in names)


def _brief(value: Any) -> str:
    return f"({len(value)})" if isinstance(value, tuple) else str(value)
