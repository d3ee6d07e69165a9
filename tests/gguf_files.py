"""GGUF files for tests: headers byte by byte, and checkpoints as llama.cpp's converter writes them."""

import json
import struct

import numpy as np
import safetensors.numpy

_FORMATS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
_SETTINGS = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "head_dim": "attention.key_length",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "sliding_window": "attention.sliding_window",
}
_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def text(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_of(value):
    """A setting with its type."""
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if isinstance(value, np.ndarray):
        kind = {"bool": 7, "int32": 5, "float32": 6}[value.dtype.name]
        return struct.pack("<IIQ", 9, kind, len(value)) + value.tobytes()
    kind, form = _FORMATS[type(value)]
    return struct.pack("<I", kind) + struct.pack(form, value)


def write(path, settings, tensors=None, alignment=32):
    """Writes a GGUF file of settings and tensors: name to array, or to (shape, type, bytes)."""
    infos, data = b"", b""
    for name, tensor in (tensors or {}).items():
        if isinstance(tensor, np.ndarray):
            tensor = tensor.shape, {"float32": 0, "float16": 1}[tensor.dtype.name], tensor.tobytes()
        shape, kind, content = tensor
        infos += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        infos += struct.pack("<IQ", kind, len(data))
        data += content + bytes(-len(content) % alignment)
    header = b"GGUF" + struct.pack("<IQQ", 3, len(tensors or {}), len(settings))
    header += b"".join(text(key) + value_of(value) for key, value in settings.items()) + infos
    path.write_bytes(header + bytes(-len(header) % alignment) + data)
    return path


def convert(folder, path, quantize_fn=lambda name, values: values, **more):
    """Writes the checkpoint in `folder` as GGUF; `quantize_fn` makes what `write` takes of a name and its values."""
    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"].removesuffix("_text")
    rope = config.get("rope_parameters") or config
    settings = {f"{kind}.{_SETTINGS[key]}": config[key] for key in _SETTINGS if config.get(key) is not None}
    if "sliding_attention" in rope:
        settings[f"{kind}.rope.freq_base_swa"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    settings[f"{kind}.rope.freq_base"] = rope["rope_theta"]
    if rope.get("rope_type") == "linear":
        settings |= {f"{kind}.rope.scaling.type": "linear", f"{kind}.rope.scaling.factor": rope["factor"]}
    if kind == "gemma3":
        slides = [layer == "sliding_attention" for layer in config["layer_types"]]
        settings[f"{kind}.attention.sliding_window_pattern"] = np.array(slides)
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, values in safetensors.numpy.load_file(file).items():
            new = _renamed(name, four_norms=kind in ("gemma2", "gemma3"))
            tensors[new] = quantize_fn(new, _stored(new, values, kind, config))
    return write(path, {"general.architecture": kind, **settings, **more}, tensors)


def _renamed(name, four_norms):
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    base, _, ending = name.rpartition(".")
    if base in outer:
        return f"{outer[base]}.{ending}"
    _, _, layer, part = base.split(".", 3)
    norms = {"post_attention_layernorm": "post_attention_norm" if four_norms else "ffn_norm"}
    norms |= {"pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm"}
    return f"blk.{layer}.{(_NAMES | norms)[part]}.{ending}"


def _stored(name, values, kind, config):
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if kind == "llama" and (".attn_q." in name or ".attn_k." in name):
        heads = config["num_attention_heads" if ".attn_q." in name else "num_key_value_heads"]
        halves = values.reshape(heads, 2, -1, values.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
    return values
