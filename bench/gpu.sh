#!/usr/bin/env bash
# Everything that needs a GPU, unattended: compiled kernels against the XLA core, the law of what is emitted,
# then times. Results as json under $OUT (default bench/results), a table last. From the repository's root:
#   bench/gpu.sh                     # under ten minutes: 131 s and 454 s on an H100 with 16 cores
#   bench/gpu.sh tests               # or times: one half of it
#   TEST_SECONDS=200 TIME_SECONDS=300 bench/gpu.sh
set -u
cd "$(dirname "$0")/.."
part=${1:-all}
out=${OUT:-bench/results}
python=${PYTHON:-python3}
parts=$(mktemp -d)
mkdir -p "$out"
export PYTHONPATH=.:bench/gpu:bench/experiments
# Several processes compile at once: each gives back what it does not use.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_ALLOCATOR=platform
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader || true
quiet() { grep -v "^[IWE][0-9][0-9][0-9][0-9] "; }

# A kernel that hangs or aborts takes its process with it: each part has its own, and a limit.
if [ "$part" != times ]; then
  # These time nothing.
  timeout -k 5 150 "$python" bench/gpu/launches.py 2>/dev/null >"$out/gpu_launches.md" &
  timeout -k 5 150 "$python" bench/gpu/dispatch.py 2>&1 | quiet &
  # Once more where both launches, which overlap, are one command buffer.
  XLA_FLAGS=--xla_gpu_graph_min_graph_size=1 timeout -k 5 150 \
    "$python" bench/gpu/correctness.py "$out/gpu_command_buffers.json" "300 calls" 2>&1 | quiet &
  timeout -k 5 "${TEST_SECONDS:-150}" "$python" bench/gpu/correctness.py "$out/gpu_correctness.json" 2>&1 | quiet
  echo "correctness: exit ${PIPESTATUS[0]}"
  wait
fi
[ "$part" != tests ] || exit 0
timeout -k 5 90 "$python" bench/gpu/torch_step.py "$out/gpu_torch.json" 2>&1 | quiet
# Command buffers hide kernels from the profiler.
seconds=${TIME_SECONDS:-380}
workers=${WORKERS:-14}
for i in $(seq 0 $((workers - 1))); do
  XLA_FLAGS="--xla_gpu_enable_command_buffer= --xla_gpu_autotune_level=0" \
    timeout -k 5 $((seconds + 40)) "$python" bench/gpu/timings.py "$parts/$i.json" "$seconds" "$i/$workers" 2>&1 | quiet &
done
wait
# The host's clock wants a quiet machine, and an allocator that keeps what it has.
for flags in --xla_gpu_autotune_level=0 "--xla_gpu_autotune_level=0 --xla_gpu_graph_min_graph_size=1"; do
  XLA_FLAGS=$flags XLA_PYTHON_CLIENT_ALLOCATOR=default \
    timeout -k 5 60 "$python" bench/gpu/timings.py "$parts/host-${#flags}.json" 50 host 2>&1 | quiet
done
"$python" bench/gpu/table.py "$out/gpu_timings.json" "$out/gpu.md" "$parts"/*.json
cp "$parts"/host-*.json "$out"
