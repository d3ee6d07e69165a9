"""Writes a GGUF model as a folder in Hugging Face's layout, in bfloat16: gguf_folder.py MODEL.gguf FOLDER."""

import json
import sys
from pathlib import Path

from specsamp_jax.models import load_generation_config, load_module, save_checkpoint
from specsamp_jax.text import load_tokenizer


def convert(source: Path, folder: Path) -> None:
    """Writes weights, config, tokenizer with its chat template, and the end tokens. Needs the extra `gguf`."""
    save_checkpoint(folder, load_module(source, dtype="bfloat16"))
    tokenizer = load_tokenizer(source)
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    template = tokenizer.chat_templates.get("default")
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.add_bos_token,
        **tokenizer.special_tokens,
        **({} if template is None else {"chat_template": template}),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(values, indent=1) + "\n")
    ends = load_generation_config(source).eos_token or (tokenizer.eos_token,)
    generation = {"do_sample": False, "eos_token_id": list(ends), "pad_token_id": ends[0]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
