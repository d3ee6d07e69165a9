"""Speech recognition: the words of short utterances, clean and noisy.

The target is Whisper base, the drafter its encoder with two decoder layers, which `train_asr.py` distils. `asr_data.py`
writes the utterances.
"""

import collections
import functools
import hashlib
from pathlib import Path
from typing import NamedTuple

import asr_audio
import caches
import jax
import jax.numpy as jnp
import numpy as np
from tasks import Task, pad

from specsamp_jax.models.whisper.features import HOP, SAMPLE_RATE
from specsamp_jax.models.whisper.model import decoder_model, encode
from specsamp_jax.speech import Speech, load_speech, load_wav
from specsamp_jax.speech.windows import FixedWindows

FOLDER = caches.CACHE / "asr"
TARGET, DRAFTER = FOLDER / "target", FOLDER / "drafter"
MAX_NEW_TOKENS = 96
TRIVIAL_WORDS = 5
FIXTURE = Path(__file__).parents[2] / "tests" / "fixtures" / "whisper" / "english"


class Utterance(NamedTuple):
    """A sound and its words.

    Attributes:
      name: A unique name.
      group: The test set.
      text: The words.
      waveform: The sound.
    """

    name: str
    group: str
    text: str
    waveform: np.ndarray


def read(folder: Path) -> list[Utterance]:
    """The utterances in test/ of a folder, or else in its test.zip, that fit a window: first the few, then sets mixed.

    Raises:
      ValueError: There are none.
    """
    found = []
    for table in sorted(folder.glob("test/*/transcripts.tsv")):
        for name, text, group, _ in asr_audio.read_table(table.read_text(encoding="utf-8")):
            found.append(Utterance(name, group, text, load_wav(table.parent / f"{name}.wav")))
    if not found and (folder / "test.zip").exists():
        for (name, text, group, _), content in asr_audio.read_pack(folder / "test.zip"):
            found.append(Utterance(name, group, text, asr_audio.decode(content)))
    if not found:
        raise ValueError(f"{folder} must hold test/ or test.zip of asr_data.py, and holds neither.")
    fitting = [each for each in found if each.waveform.size <= 30 * SAMPLE_RATE]
    return sorted(fitting, key=lambda each: (each.group != "librivox", hashlib.sha256(each.name.encode()).digest()))


class States:
    """The encoder's states of utterances, computed once and kept."""

    def __init__(self, speech: Speech, utterances: list[Utterance]):
        self.speech, self.utterances = speech, utterances
        self.kept: dict[int, jax.Array] = {}

    def __call__(self, index: np.ndarray) -> jax.Array:
        """The states of some utterances."""
        for i in index:
            if i not in self.kept:
                module = self.speech.module
                features = FixedWindows(self.utterances[i].waveform, module.config).features(0)
                self.kept[i] = encode(module, features[None])[0]
        return jnp.stack([self.kept[i] for i in index])


def build(target: Speech, draft: Speech, utterances: list[Utterance], models: str, max_new_tokens: int) -> Task:
    """The task on some utterances."""
    settings = target.settings
    prompt = settings.prompt(language="en" if settings.languages else None, task=None, timestamps=False)
    states = States(target, utterances)
    # The drafter reads the target's states: its encoder is the target's, which training leaves as it is.
    modules = target.module, draft.module
    answers = [target.tokenizer.encode(" " + each.text, add_special_tokens=False).ids for each in utterances]
    counts = collections.Counter(word for each in utterances for word in each.text.lower().split())
    frequent = " ".join(word for word, _ in counts.most_common(TRIVIAL_WORDS))
    return Task(
        name="asr",
        models=models,
        metric="wer",
        ids=[each.name for each in utterances],
        groups=[each.group for each in utterances],
        references=[each.text for each in utterances],
        trivial=[frequent] * len(utterances),
        prompts=np.tile(np.array(prompt, np.int32), (len(utterances), 1)),
        lengths=np.full(len(utterances), len(prompt), np.int32),
        texts=pad([[*prompt, *answer[:max_new_tokens], settings.end_tokens[0]] for answer in answers], -1)[0],
        max_new_tokens=max_new_tokens,
        end_tokens=tuple(settings.end_tokens),
        processor=settings.rules(len(prompt), timestamps=False),
        models_fn=lambda index: (decoder_model(modules[0], states(index)), decoder_model(modules[1], states(index))),
        prepare_fn=lambda num_texts: jax.block_until_ready([states(np.array([i])) for i in range(num_texts)]),
        decode=functools.partial(_decode, target),
    )


def _decode(speech: Speech, tokens: list[int]) -> str:
    return speech.tokenizer.decode(list(tokens), skip_special_tokens=True).strip()


def make_task(dtype: str | None = None) -> Task:
    """The task on the test sets with Whisper base and its drafter."""
    target, draft = (load_speech(folder, dtype=jnp.dtype(dtype or "float32")) for folder in (TARGET, DRAFTER))
    return build(target, draft, read(FOLDER), "Whisper base, distilled drafter", MAX_NEW_TOKENS)


def make_fixture(num_texts: int) -> Task:
    """The task on an untrained Whisper of the tests and sounds of random pitch: it shows that the scripts run."""
    speech = load_speech(FIXTURE)
    rng, num_samples = np.random.default_rng(0), speech.module.config.num_frames * HOP
    time = np.arange(num_samples) / SAMPLE_RATE
    sounds = [np.sin(2 * np.pi * pitch * time).astype(np.float32) for pitch in rng.uniform(100, 2000, num_texts)]
    utterances = [Utterance(f"tone {i}", "tones", "a tone", sound) for i, sound in enumerate(sounds)]
    return build(speech, speech, utterances, "fixture: an untrained Whisper on tones", 8)
