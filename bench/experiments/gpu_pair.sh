#!/usr/bin/env bash
# Qwen2.5-Coder's pair on one GPU: contexts, laws, calls and texts, side by side. From the repository's root:
#   SPECSAMP_QWEN=TARGET_FOLDER:DRAFTER_FOLDER bench/experiments/gpu_pair.sh 560 --dtype bfloat16     # seconds in all
# Processes compile at once, and one measures at a time, while none compiles. Finished rows are kept: a second call does
# what is missing. On one H200, 550 s gave the contexts, all laws, four rows of 400 texts and three calls: 245 s for
# compiling, 30 to 44 s per row. Rows are in raw/pair of $SPECSAMP_EXPERIMENTS; all of them go to $OUT/pair.tgz if OUT is set.
set -u
cd "$(dirname "$0")/../.."
seconds=$1
shift
options=("$@")
python=${PYTHON:-python3} writers=${WRITERS:-6} callers=${CALLERS:-4}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
raw=${SPECSAMP_EXPERIMENTS:-$HOME/.cache/specsamp/experiments}/raw/pair
mkdir -p "$raw"
lock=$raw/lock
# Each process would start a thread per core in NumPy's products, which spin while they wait for each other.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# All rules have the same matrix products.
flags=--xla_gpu_autotune_level=0
evaluate() { timeout -k 5 $((seconds - SECONDS - 10)) \
  "$python" bench/experiments/evaluate.py qwen "${options[@]}" --lock "$lock" "$@" >>"$raw/log" 2>&1; }

for ((i = 0; i < writers; i++)); do
  XLA_FLAGS="$flags ${XLA_FLAGS:-}" XLA_PYTHON_CLIENT_MEM_FRACTION=.11 \
    evaluate --stage runs --part $i/$writers --seconds $((seconds - SECONDS - 20)) &
done
(
  [ -f "$raw/draft.npy" ] || XLA_PYTHON_CLIENT_MEM_FRACTION=.1 evaluate --stage contexts || exit
  echo "contexts: $SECONDS s"
  for ((i = 0; i < callers; i++)); do
    # Command buffers hide kernels from the profiler.
    XLA_FLAGS="--xla_gpu_enable_command_buffer= ${XLA_FLAGS:-}" XLA_PYTHON_CLIENT_MEM_FRACTION=.06 \
      evaluate --stage calls --part $i/$callers &
  done
  JAX_PLATFORMS=cpu evaluate --stage laws &
  wait
  echo "laws and calls: $SECONDS s"
) &
wait
echo "all: $SECONDS s"
wc -l "$raw"/*.jsonl
grep -v '^\[' "$raw/log" | grep -v '^[IWE][0-9]\{4\} ' | tail -30
if [ -n "${OUT:-}" ]; then
  tar czf "$OUT/pair.tgz" -C "$raw" --exclude '*.npy' --exclude lock .
fi
