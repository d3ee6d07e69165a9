#!/usr/bin/env bash
# One task on the GPUs of a machine, after its models were trained: contexts, laws, calls and texts, side by side. From the
# repository's root:
#   bench/experiments/gpu.sh summarization 570 --dtype bfloat16                   # seconds in all
#   bench/experiments/gpu.sh asr 570 --dtype float32 --texts 400
#   SPECSAMP_QWEN=TARGET_FOLDER:DRAFTER_FOLDER GPUS=4 bench/experiments/gpu.sh qwen 570 --dtype bfloat16
# GPUS is the number of GPUs, the first ones of CUDA_VISIBLE_DEVICES. Processes compile at once; on each GPU one measures at
# a time, while none compiles for that GPU, in the first half of the seconds. Finished rows are kept: a second call does what
# is missing. Rows are in raw/ of $SPECSAMP_EXPERIMENTS; all of them go to $OUT/rows.tgz if OUT is set. On four H200s 78 rows
# of texts, 65 calls and 32 laws of the pair of Qwen took 326 s. Fails if a process failed.
set -u
cd "$(dirname "$0")/../.."
task=$1 seconds=$2
shift 2
options=("$@")
python=${PYTHON:-python3} gpus=${GPUS:-1} writers=${WRITERS:-4} callers=${CALLERS:-2} # processes for each GPU
if [ -n "${GPU:-}" ]; then
  echo "GPU=$GPU names one of several machines in an earlier version: use GPUS and CUDA_VISIBLE_DEVICES" >&2
  exit 2
fi
IFS=, read -ra cards <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((gpus - 1)))}"
if [ "${#cards[@]}" -lt "$gpus" ]; then
  echo "GPUS=$gpus, but CUDA_VISIBLE_DEVICES names ${#cards[@]}" >&2
  exit 2
fi
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
raw=${SPECSAMP_EXPERIMENTS:-$HOME/.cache/specsamp/experiments}/raw
mkdir -p "$raw"
log=$raw/log
: >"$log"
# Each process would start a thread per core in NumPy's products, which spin while they wait for each other.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# All rules have the same matrix products: those that cuBLAS takes by itself. Trying several compiles longer, and each
# process may choose others; XLA's own products take seven times as long when none are tried.
products="--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
evaluate() { # GPU SHARE_OF_MEMORY XLA_FLAGS OPTION...
  local gpu=$1 share=$2 flags=$3 left=$((seconds - SECONDS - 10))
  shift 3
  CUDA_VISIBLE_DEVICES=${cards[gpu]} XLA_PYTHON_CLIENT_MEM_FRACTION=$share XLA_FLAGS="$flags${XLA_FLAGS:+ $XLA_FLAGS}" \
    timeout -k 5 $((left > 1 ? left : 1)) \
    "$python" bench/experiments/evaluate.py "$task" "${options[@]}" --lock "$raw/lock-$gpu" "$@" >>"$log" 2>&1
}
all() { # waits for PROCESS...; fails if one failed
  local status=0 process
  for process; do wait "$process" || status=1; done
  return $status
}

processes=() share=$(awk "BEGIN { print .52 / $writers }")
total=$((writers * gpus))
for ((i = 0; i < total; i++)); do
  evaluate $((i % gpus)) "$share" "$products" --stage runs --part $i/$total --seconds $((seconds - SECONDS - 20)) &
  processes+=("$!")
done
(
  evaluate 0 .1 "$products" --stage contexts || exit
  echo "contexts: $SECONDS s"
  called=() total=$((callers * gpus))
  for ((i = 0; i < total; i++)); do
    # Command buffers hide kernels from the profiler.
    evaluate $((i % gpus)) .06 --xla_gpu_enable_command_buffer= --stage calls --part $i/$total &
    called+=("$!")
  done
  JAX_PLATFORMS=cpu evaluate 0 .1 "" --stage laws &
  all "${called[@]}" "$!" || exit
  echo "laws and calls: $SECONDS s"
) &
status=0
all "${processes[@]}" "$!" || status=1
echo "all: $SECONDS s"
wc -l "$raw"/*/*.jsonl
grep -v '^\[' "$log" | grep -v '^[IWE][0-9]\{4\} ' | tail -30
if [ -n "${OUT:-}" ]; then
  tar czf "$OUT/rows.tgz" -C "$raw" --exclude '*.npy' --exclude 'lock-*' . || status=1
fi
exit $status
