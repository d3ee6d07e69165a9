#!/usr/bin/env bash
# One task on a GPU, after its models were trained: contexts, laws and calls, then texts. From the repository's root:
#   bench/experiments/gpu.sh summarization 570 --dtype bfloat16                   # seconds in all
#   bench/experiments/gpu.sh asr 570 --dtype float32 --texts 400
# Four processes share the GPU: they compile side by side, and one measures at a time. On several GPUs, GPU i of n, from
# 0, takes its part of the texts with GPUS=n GPU=i.
# Raw rows are kept in raw/ of $SPECSAMP_EXPERIMENTS, and copied to $OUT if it is set.
set -u
cd "$(dirname "$0")/../.."
task=$1 seconds=$2
shift 2
options=("$@")
python=${PYTHON:-python3}
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
processes=4 lock=$(mktemp)
export XLA_PYTHON_CLIENT_MEM_FRACTION=.2
# Each process would start a thread per core in NumPy's products, which spin while they wait for each other.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
quiet() { grep -v "^[IWE][0-9][0-9][0-9][0-9] "; }
evaluate() { timeout -k 5 $((seconds - SECONDS - 10)) \
  "$python" bench/experiments/evaluate.py "$task" "${options[@]}" "$@" 2>&1 | quiet; }

evaluate --stage contexts
JAX_PLATFORMS=cpu evaluate --stage laws &
for ((i = 0; i < processes; i++)); do
  # Command buffers hide kernels from the profiler.
  XLA_FLAGS=--xla_gpu_enable_command_buffer= evaluate --stage calls --part $i/$processes --lock "$lock" &
done
wait
echo "contexts, laws and calls: $SECONDS s"
gpus=${GPUS:-1} gpu=${GPU:-0}
for ((i = gpu; i < processes * gpus; i += gpus)); do
  evaluate --stage runs --part $i/$((processes * gpus)) --lock "$lock" --seconds $((seconds - SECONDS - 30)) &
done
wait
echo "all: $SECONDS s"
if [ -n "${OUT:-}" ]; then
  for file in "${SPECSAMP_EXPERIMENTS:-$HOME/.cache/specsamp/experiments}/raw/$task"/*.json*; do
    cp "$file" "$OUT/$task-$(basename "$file")"
  done
fi
