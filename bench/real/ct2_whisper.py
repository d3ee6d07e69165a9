"""Turns a CTranslate2 Whisper into a folder in Hugging Face's layout: ct2_whisper.py CT2_FOLDER FOLDER."""

import json
import shutil
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

FLOATS = {0: np.float32, 4: np.float16}  # CTranslate2's numbers of dtypes


def read_variables(content: bytes) -> dict[str, np.ndarray]:
    """Returns the arrays of a model.bin of version 6: a header, the variables, and second names of some of them."""
    position = 0

    def take(layout: str) -> int:
        nonlocal position
        (value,) = struct.unpack_from(f"<{layout}", content, position)
        position += struct.calcsize(layout)
        return value

    def name() -> str:
        nonlocal position
        size = take("H")
        position += size
        return content[position - size : position - 1].decode()  # without the zero at the end

    version, kind, _ = take("I"), name(), take("I")
    if (version, kind) != (6, "WhisperSpec"):
        raise ValueError(f"model.bin must be a WhisperSpec of version 6, got a {kind} of version {version}.")
    variables = {}
    for _ in range(take("I")):
        variable = name()
        shape = [take("I") for _ in range(take("B"))]
        dtype, size = take("B"), take("I")
        if dtype in FLOATS:  # the others are settings; a quantised matrix is then missed by its name
            variables[variable] = np.frombuffer(content, FLOATS[dtype], size // FLOATS[dtype]().nbytes, position)
            variables[variable] = variables[variable].reshape(shape)
        else:
            variables[variable] = np.frombuffer(content, np.int8, size, position)
        position += size
    for _ in range(take("I")):
        alias, variable = name(), name()
        variables[alias] = variables[variable]
    return variables


def tensors(variables: dict[str, np.ndarray], num_layers: dict[str, int]) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors by Hugging Face's names; matrices that read the same input are one in CTranslate2."""

    def norm(source: str, target: str) -> Iterator[tuple[str, np.ndarray]]:
        yield f"{target}.weight", variables[f"{source}/gamma"]
        yield f"{target}.bias", variables[f"{source}/beta"]

    def linear(source: str, *targets: str) -> Iterator[tuple[str, np.ndarray]]:
        for part in ("weight", "bias"):
            for target, value in zip(targets, np.split(variables[f"{source}/{part}"], len(targets)), strict=True):
                if part == "weight" or not target.endswith("k_proj"):  # keys have no bias; it is 0 in the file
                    yield f"{target}.{part}", value

    for side in ("encoder", "decoder"):
        for i in range(num_layers[side]):
            source, target = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            yield from norm(f"{source}/self_attention/layer_norm", f"{target}.self_attn_layer_norm")
            own = [f"{target}.self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
            yield from linear(f"{source}/self_attention/linear_0", *own[:3])
            yield from linear(f"{source}/self_attention/linear_1", own[3])
            if side == "decoder":
                yield from norm(f"{source}/attention/layer_norm", f"{target}.encoder_attn_layer_norm")
                cross = [f"{target}.encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")]
                yield from linear(f"{source}/attention/linear_0", cross[0])
                yield from linear(f"{source}/attention/linear_1", *cross[1:3])
                yield from linear(f"{source}/attention/linear_2", cross[3])
            yield from norm(f"{source}/ffn/layer_norm", f"{target}.final_layer_norm")
            yield from linear(f"{source}/ffn/linear_0", f"{target}.fc1")
            yield from linear(f"{source}/ffn/linear_1", f"{target}.fc2")
        yield from norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        yield f"model.{side}.embed_positions.weight", variables[f"{side}/position_encodings/encodings"]
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"model.encoder.{conv}.{part}", variables[f"encoder/{conv}/{part}"]
    yield "model.decoder.embed_tokens.weight", variables["decoder/embeddings/weight"]


def convert(source: Path, folder: Path) -> None:
    """Writes weights in the dtype of the file, config, generation config and tokenizer."""
    variables = read_variables((source / "model.bin").read_bytes())
    sides = ("encoder", "decoder")
    num_layers = {side: sum(f"{side}/layer_{i}/ffn/linear_0/bias" in variables for i in range(99)) for side in sides}
    found = {name: np.ascontiguousarray(value) for name, value in tensors(variables, num_layers)}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    settings = json.loads((source / "config.json").read_text())
    added = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    tokens = {token["content"]: token["id"] for token in added}
    start, end = tokens["<|startoftranscript|>"], tokens["<|endoftext|>"]
    vocab_size, d_model = found["model.decoder.embed_tokens.weight"].shape
    sizes = {
        f"{side}_{name}": value
        for side in sides
        for name, value in (
            ("layers", num_layers[side]),
            ("attention_heads", int(variables[f"{side}/num_heads"].view(np.int16)[0])),
            ("ffn_dim", len(found[f"model.{side}.layers.0.fc1.bias"])),
        )
    }
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "decoder_start_token_id": start}
    config = {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": vocab_size,
        "d_model": d_model,
        "num_mel_bins": found["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": len(found["model.encoder.embed_positions.weight"]),
        "max_target_positions": len(found["model.decoder.embed_positions.weight"]),
        **sizes,
        **special,
    }
    generation = {
        **special,
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "alignment_heads": settings["alignment_heads"],
        "no_timestamps_token_id": tokens["<|notimestamps|>"],
        "prev_sot_token_id": tokens["<|startofprev|>"],
        "max_initial_timestamp_index": 50,
        "max_length": config["max_target_positions"],
        "is_multilingual": True,
        "lang_to_id": {name: index for name, index in tokens.items() if index in settings["lang_ids"]},
        "task_to_id": {task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")},
    }
    for name, values in (("config", config), ("generation_config", generation)):
        (folder / f"{name}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
