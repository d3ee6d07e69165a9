"""Worker of `compare_real.py` for transformers, in an environment with torch."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import worker
from tokenizers import Tokenizer

RATE = 16000


def num_bytes(model: torch.nn.Module) -> int:
    """The bytes of the parameters, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


class Text:
    """Greedy decoding, alone or with transformers' own defaults of assisted decoding."""

    def __init__(self, specification: dict[str, Any]):
        self.dtype = getattr(torch, specification["dtype"])
        self.target = self._load(specification["target"])
        self.prompts = [torch.tensor([prompt]) for prompt in specification["inputs"]]
        # The settings that a checkpoint's generation_config.json may hold are switched off, as on the other side.
        self.options: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        self.options |= {"repetition_penalty": 1.0, "eos_token_id": None, "pad_token_id": 0}
        self.options |= {"max_new_tokens": specification["max_new_tokens"]}
        self.num_bytes, self.num_passes = num_bytes(self.target), 0
        self.target.register_forward_hook(self._count)
        self.assistant = self._assistant(specification["drafter"])

    def _load(self, folder: str) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=self.dtype).eval()

    def _count(self, *_: Any) -> None:
        self.num_passes += 1

    def _assistant(self, drafter: str | None) -> dict[str, Any]:
        """Loads a drafter, or switches on the look-up of n-grams in the text."""
        if drafter is None:
            return {}
        if drafter == "ngram":
            return {"prompt_lookup_num_tokens": 10}  # of transformers' documentation
        model = self._load(drafter)
        self.num_bytes += num_bytes(model)
        return {"assistant_model": model}

    def run(self, index: int) -> tuple[list[int], int, int]:
        """Returns the new tokens, their number, and the passes of the target."""
        prompt, self.num_passes = self.prompts[index], 0
        options = self.options | self.assistant
        text = self.target.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        return text[0, prompt.shape[1] :].tolist(), text.shape[1] - prompt.shape[1], self.num_passes


class Speech:
    """Greedy transcription of sounds of up to 30 seconds, from the waveform to the tokens."""

    def __init__(self, specification: dict[str, Any]):
        self.dtype, kind = getattr(torch, specification["dtype"]), transformers.WhisperForConditionalGeneration
        self.target = kind.from_pretrained(specification["target"], dtype=self.dtype).eval()
        self.tokenizer = Tokenizer.from_file(str(Path(specification["target"]) / "tokenizer.json"))
        self.extract = transformers.WhisperFeatureExtractor()
        self.sounds = [np.load(file) for file in specification["inputs"]]
        self.num_bytes, self.num_passes = num_bytes(self.target), 0
        self.target.model.decoder.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.num_passes += 1

    def run(self, index: int) -> tuple[str, int, int]:
        """Returns the text, the number of its tokens with the end token, and the passes of the decoder."""
        self.num_passes = 0
        features = self.extract(self.sounds[index], sampling_rate=RATE, return_tensors="pt").input_features
        options = {"language": "en", "task": "transcribe", "do_sample": False}
        text = self.target.generate(features.to(self.dtype), **options)
        return self.tokenizer.decode(text[0].tolist()).strip(), self.num_passes, self.num_passes


def load(specification: dict[str, Any]) -> Text | Speech:
    """Loads the target."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_grad_enabled(False)
    return (Speech if specification["kind"] == "speech" else Text)(specification)


if __name__ == "__main__":
    worker.serve(load)
