#!/usr/bin/env bash
# Draft length by goodput on a GPU: the trained pair, good and bad drafter and n-grams, batch 1 and 16, in under four
# minutes. Results are written after each drafter, so a run that is cut off leaves what it measured. From the root:
#   bench/gpu_draft_length.sh
#   SECONDS_AT_MOST=400 bench/gpu_draft_length.sh --cells 1:256 16:256 64:128
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
limit=${SECONDS_AT_MOST:-230}
mkdir -p "$out"
PYTHONPATH=.:bench PYTHONUNBUFFERED=1 timeout -k 5 "$limit" "${PYTHON:-python3}" bench/compare_draft_length.py \
  --out "$out/draft_length_gpu" --cells 1:256 16:256 --lengths 0 1 2 4 --seconds 6 --seconds-at-most "$((limit - 25))" \
  "$@" 2>&1 | grep -v "^[IWE][0-9][0-9][0-9][0-9] "
