#!/usr/bin/env bash
# Makes what results are compared with: .venv-peers (Python 3.11, a CPU torch, transformers) at the project root, and
# three files of tpu-inference, which run on the project's own JAX, under .work/peers.
set -euo pipefail
cd "$(dirname "$0")/../.."
"${PYTHON:-python3.11}" -m venv .venv-peers
.venv-peers/bin/python -m pip install --quiet --upgrade pip
.venv-peers/bin/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 safetensors numpy gguf accelerate
.venv-peers/bin/python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
PYTHON=.venv-peers/bin/python bench/peers/fetch_tpu_inference.sh
