"""The contenders that need torch, in an environment of their own: answers timing requests, one JSON object a line.

{"prepare": NAME, "kind": ..., "arguments": ..., "num_threads": ...} readies a contender. {"run": NAME, "indices": ...}
runs it on those inputs and answers with the seconds of each, measured here, and with what it made.
"""

import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.generation.utils import _speculative_sampling


class SpeculativeSampling:
    """transformers' step, on the sets of inputs that the other side saved. Batch 1 is all it can do."""

    def __init__(self, folder: str):
        self.sets = [
            {name: torch.from_numpy(array) for name, array in np.load(file).items()}
            for file in sorted(Path(folder).glob("*.npz"))
        ]

    def __call__(self, index: int) -> tuple[float, dict]:
        """Seconds, and the tokens emitted."""
        inputs = self.sets[index % len(self.sets)]
        tokens = inputs["draft_tokens"].long()
        torch.manual_seed(index)
        began = time.perf_counter()
        emitted, _ = _speculative_sampling(tokens, inputs["draft_logits"], tokens.shape[1], inputs["target_logits"])
        return time.perf_counter() - began, {"tokens": emitted.tolist()}


class Generate:
    """transformers' `generate` at temperature 1 without filters, assisted where `num_draft` is given."""

    def __init__(self, target: str, drafter: str, prompts: list, num_draft: int | None, max_new_tokens: int):
        self.target, self.drafter = (
            transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
            for folder in (target, drafter)
        )
        self.prompts = [torch.tensor(prompt) for prompt in prompts]
        # top_k is 50 unless it is switched off. No end token: every run makes max_new_tokens tokens.
        self.options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "eos_token_id": None}
        self.options |= {"max_new_tokens": max_new_tokens, "pad_token_id": 0}
        if num_draft is not None:
            config = self.drafter.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = num_draft, "constant"
            config.assistant_confidence_threshold = 0.0
            self.options["assistant_model"] = self.drafter
        self.num_passes = 0
        self.target.register_forward_hook(self._count)

    def _count(self, *_):
        self.num_passes += 1

    def __call__(self, index: int) -> tuple[float, dict]:
        """Seconds, the text, and how many times the target ran."""
        prompt = self.prompts[index % len(self.prompts)]
        torch.manual_seed(index)
        self.num_passes = 0
        began = time.perf_counter()
        text = self.target.generate(prompt, attention_mask=torch.ones_like(prompt), **self.options)
        seconds = time.perf_counter() - began
        return seconds, {"tokens": text.tolist(), "num_steps": self.num_passes}


class WhisperGenerate:
    """transformers' greedy `generate` of a Whisper, assisted by a decoder on the same encoder states if asked.

    Where `is_encoded`, the encoder runs before the clock does.
    """

    def __init__(
        self, target: str, drafter: str, features: str, num_draft: int | None, max_new_tokens: int, is_encoded: bool
    ):
        # It warns of max_length beside max_new_tokens in every step of the assistant.
        transformers.utils.logging.set_verbosity_error()
        self.target = transformers.WhisperForConditionalGeneration.from_pretrained(target, dtype=torch.float32).eval()
        self.features = [torch.from_numpy(heard) for heard in np.load(features)]
        self.encode, self.is_encoded = self.target.model.encoder.forward, is_encoded
        self.options = {"language": "en", "task": "transcribe", "temperature": 0.0}
        self.options |= {"max_new_tokens": max_new_tokens, "force_unique_generate_call": True}
        if num_draft is not None:
            assistant = transformers.WhisperForCausalLM.from_pretrained(drafter, dtype=torch.float32).eval()
            config = assistant.generation_config
            config.num_assistant_tokens, config.num_assistant_tokens_schedule = num_draft, "constant"
            config.assistant_confidence_threshold = 0.0
            self.options["assistant_model"] = assistant
        self.num_passes = 0
        self.target.model.decoder.register_forward_hook(self._count)

    def _count(self, *_):
        self.num_passes += 1

    def __call__(self, index: int) -> tuple[float, dict]:
        """Seconds, the text, and how many times the target's decoder ran."""
        self.num_passes, heard = 0, self.features[index % len(self.features)]
        if self.is_encoded:
            states = self.encode(heard)
            self.target.model.encoder.forward = lambda *_, **__: states
        began = time.perf_counter()
        text = self.target.generate(heard, **self.options)
        seconds = time.perf_counter() - began
        return seconds, {"tokens": text.tolist(), "num_steps": self.num_passes}


KINDS = {"speculative_sampling": SpeculativeSampling, "generate": Generate, "whisper": WhisperGenerate}


def main() -> None:
    # Libraries may print: only answers go to what is standard output now.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    transformers.utils.logging.disable_progress_bar()
    contenders, num_threads, default = {}, {}, torch.get_num_threads()
    for line in sys.stdin:
        request = json.loads(line)
        if "prepare" in request:
            num_threads[request["prepare"]] = request["num_threads"] or default
            contenders[request["prepare"]] = KINDS[request["kind"]](**request["arguments"])
            versions = {"python": platform.python_version()}
            versions |= {"torch": torch.__version__, "transformers": transformers.__version__}
            answer = {"versions": versions, "num_threads": num_threads}
        else:
            torch.set_num_threads(num_threads[request["run"]])
            with torch.no_grad():
                results = [contenders[request["run"]](index) for index in request["indices"]]
            answer = {"seconds": [seconds for seconds, _ in results], "made": [made for _, made in results]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
