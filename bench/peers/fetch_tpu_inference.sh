#!/usr/bin/env bash
# Unpacks tpu-inference's rejection sampler, and the two files that it needs, into .work/peers/tpu-inference.
# Nothing is installed: the wheel is downloaded without what it depends on.
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=.work/peers/tpu-inference
rm -rf "$folder"
"${PYTHON:-python3}" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest "$folder" tpu-inference==0.32.0
"${PYTHON:-python3}" - "$folder" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(wheel,) = folder.glob("*.whl")
with zipfile.ZipFile(wheel) as archive:
    sample = "tpu_inference/layers/jax/sample"
    names = f"{sample}/rejection_sampler.py", f"{sample}/sampling_metadata.py", "tpu_inference/layers/common/binary_search.py"
    for name in names:
        (folder / Path(name).name).write_bytes(archive.read(name))
    version = wheel.name.split("-")[1]
(folder / "VERSION").write_text(version + "\n")
wheel.unlink()
print("tpu-inference", version)
PYTHON
