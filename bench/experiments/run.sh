#!/usr/bin/env bash
# Computes the experiments: rows, tables and the page. Rows that are finished are not computed again.
#   bench/experiments/run.sh                          # both tasks, with the trained models
#   bench/experiments/run.sh --task summarization     # one of them
#   bench/experiments/run.sh --quick                  # under two minutes on two cores; on fixtures in place of the models
# Needs pip install -e '.[experiments,gguf]'. Data and models, once (apt checks its packages, fetch.sh the weights' SHA-256):
#   bench/real/fetch.sh smollm2 whisper-base
#   apt-get update -o Acquire::Languages=en && python bench/experiments/summarization_data.py
#   python bench/experiments/train_summarization.py ~/.cache/specsamp/real/smollm2
#   bench/experiments/asr_packages.sh, asr_data.py and train_asr.py, as these say
# They and the raw rows are kept in $SPECSAMP_EXPERIMENTS (default: ~/.cache/specsamp/experiments).
set -euo pipefail
cd "$(dirname "$0")/../.."
tasks="summarization asr" quick=()
while [ $# -gt 0 ]; do
  case $1 in
    --task) tasks=$2; shift 2 ;;
    --quick) quick=(--quick); export XLA_FLAGS="--xla_backend_optimization_level=0 ${XLA_FLAGS:-}"; shift ;;
    *) echo "unknown option $1" >&2; exit 2 ;;
  esac
done
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=python3
export PYTHONPATH=.${PYTHONPATH:+:$PYTHONPATH}
cache=${SPECSAMP_EXPERIMENTS:-$HOME/.cache/specsamp/experiments}
for task in $tasks; do
  "$python" bench/experiments/evaluate.py "$task" "${quick[@]}"
  "$python" bench/experiments/score.py "$task" "${quick[@]}"
done
if [ ${#quick[@]} -gt 0 ]; then
  "$python" bench/experiments/report.py --tables "$cache/quick" --out "$cache/quick"
else
  "$python" bench/experiments/report.py
fi
