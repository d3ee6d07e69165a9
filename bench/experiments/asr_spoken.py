"""Further training speech for the drafter of recognition, spoken by espeak-ng while it is trained.

Three hours of speech hold 1,760 utterances: a drafter learns them by heart. Sentences are plenty, and espeak-ng speaks
one in 20 ms; here each is heard once, by a random voice of `asr_data`'s training voices through a random channel.
"""

import functools
import gzip
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import asr_audio
import asr_data
import jax
import jax.numpy as jnp
import numpy as np

from specsamp_jax import PAD_TOKEN
from specsamp_jax.models.whisper.features import HOP, log_mel
from specsamp_jax.models.whisper.model import encode
from specsamp_jax.speech import Speech
from specsamp_jax.train.speech import SpeechData

WINDOW = 30 * asr_audio.RATE
PAIRS_EVERY = 6
"""One of so many utterances has two sentences."""


def read_sentences(path: Path, num_utterances: int, refused: set[tuple[str, ...]]) -> list[str]:
    """Returns the texts of utterances, from a file with a sentence per line, without those that the test has.

    Raises:
      ValueError: There are too few.
    """
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        rest = iter([line.strip() for line in file if not asr_data.shingles(line) & refused])
    texts = []
    for i, text in zip(range(num_utterances), rest, strict=False):
        texts.append(f"{text} {next(rest, '')}".strip() if i % PAIRS_EVERY == 0 else text)
    if len(texts) < num_utterances:
        raise ValueError(f"{path} must have sentences for {num_utterances} utterances, it has {len(texts)}.")
    return texts


def hear(item: tuple[int, str]) -> np.ndarray:
    """Returns the features of a text that a random voice speaks, in float16, up to the end of the sound."""
    index, text = item
    rng = np.random.default_rng([asr_data.SEED, 1, index])
    voice = f"{rng.choice(asr_data.LANGUAGES)}+{rng.choice(asr_data.VARIANTS.split())}"
    waveform = asr_data.espeak(voice, int(rng.integers(125, 190)))(text)[:WINDOW]
    waveform = asr_audio.degrade(rng, waveform)
    features = log_mel(np.pad(waveform, (0, WINDOW - waveform.size)), 80).astype(np.float16)
    # A frame reads 12.5 ms after its time: from the third frame after the sound on, all are the same.
    return features[:, : waveform.size // HOP + 3]


@functools.partial(jax.jit, donate_argnums=0)
def _put(states: jax.Array, rows: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(states, rows.astype(states.dtype), (start, 0, 0))


def add(
    target: Speech,
    found: SpeechData,
    texts: list[str],
    heard: Iterable[np.ndarray],
    *,
    max_tokens: int,
    batch_size: int,
    say: Callable[[str], None],
) -> SpeechData:
    """Returns windows with as many more as there are texts; transcripts are the texts, with at most `max_tokens`.

    `heard` has the features of each text from `hear`. The number of texts is rounded down to whole batches.
    """
    settings, num_frames = target.settings, WINDOW // HOP
    language = "en" if settings.languages else None
    prompt = list(settings.prompt(language=language, task=None, timestamps=False))
    texts = texts[: len(texts) - len(texts) % batch_size]
    tokens = np.full((len(texts), len(prompt) + max_tokens), PAD_TOKEN, np.int32)
    for row, text in zip(tokens, texts, strict=True):
        encoded: Any = target.tokenizer.encode(" " + text, add_special_tokens=False)
        filled = [*prompt, *encoded.ids, settings.end_tokens[0]][: len(row)]
        row[: len(filled)] = filled
    width = max(tokens.shape[1], found.tokens.shape[1])
    num_found = len(found.tokens)
    states = jnp.zeros((num_found + len(texts), *found.states.shape[1:]), found.states.dtype)
    states = _put(states, found.states, jnp.int32(0))
    parts = []
    for i, features in zip(range(len(texts)), heard, strict=False):
        parts.append(np.pad(features, ((0, 0), (0, num_frames - features.shape[1])), mode="edge"))
        if len(parts) == batch_size:
            rows = encode(target.module, np.stack(parts).astype(np.float32))
            states, parts = _put(states, rows, jnp.int32(num_found + i + 1 - batch_size)), []
            if (i + 1) % (8 * batch_size) == 0:
                say(f"spoken {i + 1} of {len(texts)} texts")
    both = [np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=PAD_TOKEN)
            for each in (found.tokens, tokens)]  # fmt: skip
    return SpeechData(states, np.concatenate(both), found.num_prompt)
