"""Worker of `compare_real.py` for this library."""

from typing import Any

import jax
import numpy as np
import worker

import specsamp_jax as ss
from specsamp_jax.cli.draft_length import LENGTHS
from specsamp_jax.cli.prompts import pad
from specsamp_jax.decoding.ahead import compile_generate
from specsamp_jax.decoding.memory import num_bytes
from specsamp_jax.models import load_checkpoint, vocab_size, with_vocab_size
from specsamp_jax.models.checkpoints.folder import open_checkpoint


class Text:
    """Greedy decoding of a decoder-only model; the draft length is the command's, from measured costs."""

    def __init__(self, specification: dict[str, Any]):
        self.dtype = specification["dtype"]
        self.prompts, self.lengths = pad(specification["inputs"], 2**31)
        self.max_new_tokens = specification["max_new_tokens"]
        # As the command does, before the weights are loaded.
        checkpoint = open_checkpoint(specification["target"], dtype=self.dtype)
        self.target = checkpoint.shapes()
        compile_generate(self.prompts[:1], draft=None, **self._options(0))
        self.target = checkpoint.load()
        self.num_bytes = num_bytes(self.target.params)
        self.drafter: Any = None

    def _options(self, index: int) -> dict[str, Any]:
        return {
            "target": self.target,
            "max_new_tokens": self.max_new_tokens,
            "prompt_lengths": self.lengths[index : index + 1],
            "sampling": ss.SamplingParams(temperature=0.0),
        }

    def add_drafter(self, drafter: str) -> None:
        """Loads a drafter and measures costs and acceptance, as the command does."""
        if drafter == "ngram":
            self.drafter = ss.NGramDrafter()
        else:
            self.drafter = with_vocab_size(load_checkpoint(drafter, dtype=self.dtype), vocab_size(self.target))
            self.num_bytes += num_bytes(self.drafter.params)
        self.num_draft = ss.measure_goodput(self.prompts[:1], draft=self.drafter, lengths=LENGTHS, **self._options(0))

    def run(self, index: int, assisted: bool) -> tuple[list[int], int, int]:
        """Returns the new tokens, their number, and the passes of the target."""
        models = {"draft": self.drafter, "num_draft": self.num_draft} if assisted else {"draft": None}
        key, prompt = jax.random.key(0), self.prompts[index : index + 1]
        result = jax.block_until_ready(ss.generate(key, prompt, **models, **self._options(index)))
        begin, end = int(self.lengths[index]), int(result.lengths[0])
        return np.asarray(result.tokens)[0, begin:end].tolist(), end - begin, int(result.stats.num_steps)


class Speech:
    """Greedy transcription of sounds of up to 30 seconds, by the function that the command calls."""

    def __init__(self, specification: dict[str, Any]):
        from specsamp_jax.speech import load_speech

        self.speech = load_speech(specification["target"], dtype=specification["dtype"])
        self.sounds = [np.load(file) for file in specification["inputs"]]
        self.num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.speech.module))

    def run(self, index: int, assisted: bool) -> tuple[str, int, int]:
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
    worker.serve(load)
