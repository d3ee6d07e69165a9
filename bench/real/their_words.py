"""Words and their times by the pipeline of transformers: see `word_times.py`."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer, pipeline
from word_times import LANGUAGE


def write_words(folder: str, output: Path, sounds: str) -> None:
    """Writes the words of each sound with their times."""
    # Attention weights, from which the times come, are returned by the eager attention alone.
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    tokenizer = WhisperTokenizer(tokenizer_file=f"{folder}/tokenizer.json")
    parts = {"model": model, "tokenizer": tokenizer, "feature_extractor": WhisperFeatureExtractor()}
    recognise = pipeline("automatic-speech-recognition", **parts)
    settings = {"language": LANGUAGE, "task": "transcribe", "do_sample": False, "num_beams": 1}
    words = {}
    for name, sound in np.load(sounds).items():
        chunks = recognise(sound.copy(), return_timestamps="word", generate_kwargs=settings)["chunks"]
        words[name] = [[*chunk["timestamp"], chunk["text"]] for chunk in chunks]
        output.write_text(json.dumps(words))


if __name__ == "__main__":
    write_words(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
