#!/usr/bin/env bash
# Everything that needs a GPU, unattended: compiled kernels against the XLA core, the law of what is emitted,
# then times. Results as json under $OUT (default bench/results), a table last. From the repository's root:
#   bench/gpu.sh                     # about 5 minutes
#   TEST_SECONDS=150 TIME_SECONDS=150 bench/gpu.sh
set -u
cd "$(dirname "$0")/.."
out=${OUT:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH=.:bench/gpu
export XLA_PYTHON_CLIENT_PREALLOCATE=false
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader || true

# A kernel that hangs or aborts takes its process with it: each part has its own, and a limit.
timeout -k 5 "${TEST_SECONDS:-150}" "$python" bench/gpu/correctness.py "$out/sm90_correctness.json" 2>&1 | grep -v "^I0000\|^W0000" | tail -n 40
echo "correctness: exit ${PIPESTATUS[0]}"
# Command buffers hide kernels from the profiler.
XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" \
  timeout -k 5 "$(( ${TIME_SECONDS:-150} + 40 ))" "$python" bench/gpu/timings.py "$out/sm90_timings.json" "${TIME_SECONDS:-150}" 2>&1 | grep -v "^I0000\|^W0000" | tail -n 60
echo "timings: exit ${PIPESTATUS[0]}"
