#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and its driver: build every CUDA kernel for that card, compare each with the
# definition bit for bit, time it against a copy, and write runs/gpu_check/gpu_check.{md,json}.
#
#   scripts/gpu_check.sh [--elements N] [--out DIRECTORY]
#   scripts/gpu_check.sh --emulate      everything but the launch, on any machine with g++
#
# PYTHON is the interpreter that .venv is made with, where there is none yet.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

make --silent .venv/run.stamp PYTHON="${PYTHON:-python3}"
if ! .venv/bin/python -c 'import cuda.core, cuda.bindings.nvrtc' 2>/dev/null; then
  .venv/bin/pip --disable-pip-version-check install --quiet -c constraints.txt -e '.[cuda]'
fi
exec .venv/bin/python -m psyche.bench.gpu "$@"
