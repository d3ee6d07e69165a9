#!/usr/bin/env bash
# Draft length by goodput on GPUs: the trained pair, good and bad drafter and n-grams, batch 1 and 16, in under four
# minutes. The six cells are spread over the GPUs of the machine, with a share of its cores for each; on fewer than four,
# the time may not be enough for all. Results are written after each cell, so a run that is cut off leaves what it
# measured. From the root:
#   bench/gpu_draft_length.sh
#   SECONDS_AT_MOST=400 GPUS="0 1" bench/gpu_draft_length.sh --seconds 20
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
limit=${SECONDS_AT_MOST:-230}
read -ra gpus <<<"${GPUS:-$(nvidia-smi --query-gpu=index --format=csv,noheader | tr '\n' ' ')}"
share=$(($(nproc) / ${#gpus[@]}))
parts=$(mktemp -d)
mkdir -p "$out"
began=$(date +%s)
# Good and bad drafter share their programs.
groups=("16:256 good bad" "1:256 good bad" "16:256 n_gram" "1:256 n_gram")

measure() { # index of the GPU among those used, then arguments of the benchmark
  for ((j = $1; j < ${#groups[@]}; j += ${#gpus[@]})); do
    read -r cell drafters <<<"${groups[j]}"
    left=$((limit - 8 - $(date +%s) + began))
    # shellcheck disable=SC2086
    CUDA_VISIBLE_DEVICES=${gpus[$1]} XLA_PYTHON_CLIENT_PREALLOCATE=false PYTHONPATH=.:bench PYTHONUNBUFFERED=1 \
      taskset -c $(($1 * share))-$((($1 + 1) * share - 1)) timeout -k 3 "$left" "${PYTHON:-python3}" \
      bench/compare_draft_length.py --out "$parts/$j" --cells "$cell" --drafters $drafters --lengths 0 1 2 4 \
      --seconds 12 --seconds-at-most $((left - 25)) "${@:2}" 2>&1 | grep "compiled\|^after\|Error\|out of time"
  done
}

for ((i = 0; i < ${#gpus[@]}; i++)); do measure "$i" "$@" & done
wait
PYTHONPATH=.:bench JAX_PLATFORMS=cpu "${PYTHON:-python3}" bench/compare_draft_length.py --out "$out/draft_length_gpu" \
  --merge "$parts"/{0,1,2,3}.json
rm -r "$parts"
