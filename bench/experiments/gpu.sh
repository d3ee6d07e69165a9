#!/usr/bin/env bash
# One task on the GPUs of a machine, after its models were trained: contexts, laws, calls and texts, side by side. From the
# repository's root:
#   bench/experiments/gpu.sh summarization 570 --dtype bfloat16                   # seconds in all
#   bench/experiments/gpu.sh asr 570 --dtype float32 --texts 400
#   SPECSAMP_QWEN=TARGET_FOLDER:DRAFTER_FOLDER GPUS=4 bench/experiments/gpu.sh qwen 570 --dtype bfloat16
# Processes compile at once; on each GPU one measures at a time, while none compiles for that GPU. Finished rows are kept:
# a second call does what is missing. Rows are in raw/ of $SPECSAMP_EXPERIMENTS; all of them go to $OUT/rows.tgz if OUT is
# set. On four H200s the 78 rows, 65 calls and 32 laws of the pair of Qwen took 326 s.
set -u
cd "$(dirname "$0")/../.."
task=$1 seconds=$2
shift 2
options=("$@")
python=${PYTHON:-python3} gpus=${GPUS:-1} writers=${WRITERS:-4} callers=${CALLERS:-2} # processes for each GPU
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
raw=${SPECSAMP_EXPERIMENTS:-$HOME/.cache/specsamp/experiments}/raw
mkdir -p "$raw"
# Each process would start a thread per core in NumPy's products, which spin while they wait for each other.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# All rules have the same matrix products: those that cuBLAS takes by itself. Trying several compiles longer, and each
# process may choose others; XLA's own products take seven times as long when none are tried.
products="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
evaluate() { # GPU SHARE_OF_MEMORY XLA_FLAGS OPTION...
  local gpu=$1 share=$2 flags=$3
  shift 3
  CUDA_VISIBLE_DEVICES=$gpu XLA_PYTHON_CLIENT_MEM_FRACTION=$share XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}" \
    timeout -k 5 $((seconds - SECONDS - 10)) \
    "$python" bench/experiments/evaluate.py "$task" "${options[@]}" --lock "$raw/lock-$gpu" "$@" >>"$raw/log" 2>&1
}

total=$((writers * gpus))
for ((i = 0; i < total; i++)); do
  evaluate $((i % gpus)) .13 "$products" --stage runs --part $i/$total --seconds $((seconds - SECONDS - 20)) &
done
(
  evaluate 0 .1 "$products" --stage contexts || exit
  echo "contexts: $SECONDS s"
  total=$((callers * gpus))
  for ((i = 0; i < total; i++)); do
    # Command buffers hide kernels from the profiler.
    evaluate $((i % gpus)) .06 --xla_gpu_enable_command_buffer= --stage calls --part $i/$total &
  done
  JAX_PLATFORMS=cpu evaluate 0 .1 "" --stage laws &
  wait
  echo "laws and calls: $SECONDS s"
) &
wait
echo "all: $SECONDS s"
wc -l "$raw"/*/*.jsonl
grep -v '^\[' "$raw/log" | grep -v '^[IWE][0-9]\{4\} ' | tail -30
if [ -n "${OUT:-}" ]; then
  tar czf "$OUT/rows.tgz" -C "$raw" --exclude '*.npy' --exclude 'lock-*' .
fi
