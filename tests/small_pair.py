"""The trained pair with fewer layers, for tests that read none of its text: most of its time is its compilation."""

import json
import shutil

import safetensors.numpy


def write(folder, num_layers):
    """Writes the pair with the first layers of each model; returns the folder."""
    from specsamp_jax.cli.pair import ASSETS

    for source in (path for path in ASSETS.iterdir() if path.is_file()):
        shutil.copy(source, folder)
    for name in ("target", "drafter"):
        config = json.loads((ASSETS / name / "config.json").read_text())
        tensors = safetensors.numpy.load_file(ASSETS / name / "model.safetensors")
        kept = {key: tensor for key, tensor in tensors.items() if layer(key) < num_layers}
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({**config, "num_hidden_layers": num_layers}))
        safetensors.numpy.save_file(kept, folder / name / "model.safetensors")
    return folder


def layer(key):
    """The layer of a tensor such as model.layers.3.mlp.up_proj.weight; -1 if it is in none."""
    parts = key.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1
