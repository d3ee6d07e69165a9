#!/usr/bin/env bash
# Makes .venv-peers at the project root: the libraries that results are compared with. Python 3.11 and a CPU torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
"${PYTHON:-python3.11}" -m venv .venv-peers
.venv-peers/bin/python -m pip install --quiet --upgrade pip
.venv-peers/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors numpy
.venv-peers/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
