#!/usr/bin/env bash
# Steps of decoding at real shapes, unattended on a GPU with 40 GB or more: under ten minutes. From the repository's root:
#   bench/gpu_models.sh
#   SECONDS_AT_MOST=300 bench/gpu_models.sh
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
mkdir -p "$out"
# Command buffers hide kernels from the profiler.
XLA_FLAGS="--xla_gpu_enable_command_buffer=" PYTHONPATH=.:bench/gpu:bench/experiments \
  timeout -k 5 580 "${PYTHON:-python3}" bench/gpu/models.py "$out/gpu_models.json" "$out/gpu_models.md" \
  "${SECONDS_AT_MOST:-400}" "$@" 2>&1 | grep -v "^[IWE][0-9][0-9][0-9][0-9] "
