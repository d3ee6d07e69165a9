"""Packs a checkpoint of 16 bits into pieces for a machine that takes small files only, and unpacks it there.

    python bench/experiments/pack.py pack FOLDER PREFIX       # PREFIX.0, PREFIX.1, ... of at most 46 MB
    python bench/experiments/pack.py unpack PREFIX FOLDER

Matrices are rounded to 4 bits per number with a minimum and a step for each 32 numbers of a row, which is how the
weights of SmolLM2's package are stored: from those nothing is lost but the rounding of the 16-bit numbers. Embeddings
have 8 bits. Vectors and the other files of the folder are kept as they are.
"""

import io
import json
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

PIECE = 46_000_000
BLOCK = 32


def quantise(values: np.ndarray, bits: int) -> dict[str, np.ndarray]:
    """Codes of `bits` bits, with the minimum and the step of each block of 32 numbers along the last axis."""
    blocks = values.astype(np.float32).reshape(-1, BLOCK)
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    step = np.maximum((high - low) / (2**bits - 1), 1e-12)
    codes = np.clip(np.rint((blocks - low) / step), 0, 2**bits - 1).astype(np.uint8)
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return {"codes": codes, "low": low.astype(ml_dtypes.bfloat16).view(np.uint16), "step": step.astype(np.float16)}


def restore(codes: np.ndarray, low: np.ndarray, step: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The numbers of `quantise`, bfloat16."""
    if codes.shape[1] != BLOCK:
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), BLOCK)
    values = codes * step.astype(np.float32) + low.view(ml_dtypes.bfloat16).astype(np.float32)
    return values.reshape(shape).astype(ml_dtypes.bfloat16)


def pack(folder: Path, prefix: str) -> list[Path]:
    """Writes the pieces, and returns them."""
    arrays: dict[str, np.ndarray] = {}
    shapes = {}
    for name, values in safetensors.numpy.load_file(folder / "model.safetensors").items():
        shapes[name] = values.shape
        if values.ndim == 2 and values.shape[1] % BLOCK == 0:
            bits = 8 if "embed" in name else 4
            arrays |= {f"{name}/{part}": array for part, array in quantise(values, bits).items()}
        else:
            arrays[name] = values.astype(np.float32)
    others = {path.name: path.read_text() for path in folder.glob("*.json")}
    arrays["about"] = np.frombuffer(json.dumps({"shapes": shapes, "files": others}).encode(), np.uint8)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
    content, paths = buffer.getvalue(), []
    for i in range(0, len(content), PIECE):
        paths.append(Path(f"{prefix}.{i // PIECE}"))
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(content[i : i + PIECE])
    return paths


def unpack(prefix: str, folder: Path) -> None:
    """Writes the checkpoint that `pack` packed."""
    path = Path(prefix)
    pieces = sorted(path.parent.glob(path.name + ".*"), key=lambda piece: int(piece.suffix[1:]))
    with np.load(io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as arrays:
        about = json.loads(arrays["about"].tobytes())
        tensors = {}
        for name, shape in about["shapes"].items():
            if name in arrays:
                tensors[name] = arrays[name].astype(ml_dtypes.bfloat16)
            else:
                codes, low, step = (arrays[f"{name}/{part}"] for part in ("codes", "low", "step"))
                tensors[name] = restore(codes, low, step, tuple(shape))
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in about["files"].items():
        (folder / name).write_text(text)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    command, source, goal = sys.argv[1:]
    if command == "pack":
        for path in pack(Path(source), goal):
            print(path, f"{path.stat().st_size / 1e6:.1f} MB")
    else:
        unpack(source, Path(goal))


if __name__ == "__main__":
    main()
