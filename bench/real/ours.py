"""Worker of `compare_real.py` for this library."""

# ruff: noqa: E402 (memory is touched before JAX is imported)

import gc
import json
import sys
from typing import Any

import specsamp


def folders(specification: dict[str, Any]) -> list[str]:
    """Returns the folders of the models of text, the target's first."""
    if specification["kind"] != "text":
        return []
    drafter = specification["drafter"]
    return [specification["target"], *([] if drafter in (None, "ngram") else [drafter])]


# As the command does, before JAX is imported.
MEMORY = specsamp.touch(folders(json.loads(sys.argv[1]))) if __name__ == "__main__" else None

import jax
import numpy as np
import worker

import specsamp_jax as ss
from specsamp_jax.cli.draft_length import AUTO, LENGTHS, program
from specsamp_jax.cli.folders import NGRAM
from specsamp_jax.cli.prompts import pad
from specsamp_jax.decoding.ahead import compile_generate
from specsamp_jax.decoding.memory import num_bytes
from specsamp_jax.models import vocab_size, with_vocab_size
from specsamp_jax.models.checkpoints.folder import begin_all, open_checkpoint
from specsamp_jax.sampling.dispatch import for_this_machine

gc.set_threshold(50_000)  # as the command does


class Text:
    """Greedy decoding of a decoder-only model; the draft length is the command's, from measured costs."""

    def __init__(self, specification: dict[str, Any]):
        dtype, drafter = specification["dtype"], specification["drafter"]
        self.prompts, self.lengths = pad(specification["inputs"], 2**31)
        self.max_new_tokens = specification["max_new_tokens"]
        # As the command does: compiled before the weights are loaded.
        checkpoints = [open_checkpoint(folder, dtype=dtype, rows_in_file=True) for folder in folders(specification)]
        self._set_models([checkpoint.shapes() for checkpoint in checkpoints], drafter)
        checkpoints = begin_all(checkpoints, MEMORY)
        self.num_draft = program(AUTO, self.drafter)
        compile_generate(self.prompts[:1], **self._options(0))
        models = [checkpoint.load() for checkpoint in checkpoints]
        self._set_models(models, drafter)
        self.num_bytes = sum(num_bytes(model.params) for model in models)
        if drafter is not None:
            options = {name: value for name, value in self._options(0).items() if name != "num_draft"}
            self.num_draft = ss.measure_goodput(self.prompts[:1], lengths=LENGTHS, **options)

    def _set_models(self, models: list[ss.Model], drafter: str | None) -> None:
        self.target, *drafters = models
        self.drafter: Any = ss.NGramDrafter() if drafter == NGRAM else None
        for model in drafters:
            self.drafter = with_vocab_size(model, vocab_size(self.target))

    def _options(self, index: int) -> dict[str, Any]:
        return {
            "target": self.target,
            "draft": self.drafter,
            "num_draft": self.num_draft,
            "max_new_tokens": self.max_new_tokens,
            "prompt_lengths": self.lengths[index : index + 1],
            "sampling": ss.SamplingParams(temperature=0.0),
        }

    def run(self, index: int) -> tuple[list[int], int, int]:
        """Returns the new tokens, their number, and the passes of the target."""
        key, prompt = jax.random.key(0), self.prompts[index : index + 1]
        result = jax.block_until_ready(ss.generate(key, prompt, **self._options(index)))
        begin, end = int(self.lengths[index]), np.asarray(result.lengths).item()
        return np.asarray(result.tokens)[0, begin:end].tolist(), end - begin, int(result.stats.num_steps)


class Speech:
    """Greedy transcription of sounds of up to 30 seconds, by the function that the command calls."""

    def __init__(self, specification: dict[str, Any]):
        from specsamp_jax.speech import load_speech

        self.speech = load_speech(specification["target"], dtype=specification["dtype"])
        self.sounds = [np.load(file) for file in specification["inputs"]]
        self.num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.speech.module))

    def run(self, index: int) -> tuple[str, int, int]:
        """Returns the text, the number of its tokens with the end token, and the passes of the decoder."""
        from specsamp_jax.speech import transcribe

        options: dict[str, Any] = {"target": self.speech, "draft": None, "language": "en"}
        result = transcribe(jax.random.key(0), [self.sounds[index]], **options)
        num_tokens = int(np.sum(result.stats.num_emitted))
        return result.transcripts[0].text.strip(), num_tokens, num_tokens


def load(specification: dict[str, Any]) -> Text | Speech:
    """Switches the cache of compiled programs on as the command does, and loads the target."""
    jax.config.update("jax_compilation_cache_dir", specification["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return (Speech if specification["kind"] == "speech" else Text)(specification)


if __name__ == "__main__":
    with for_this_machine(True):  # as the command does
        worker.serve(load)
