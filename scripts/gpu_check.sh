#!/usr/bin/env bash
# Ten minutes with an NVIDIA GPU: compare every CUDA kernel with the definition bit for bit, time each against a device
# copy, and measure training in tokens per second. Writes runs/gpu_check/gpu_check.{md,json} as results come in.
#
#   scripts/gpu_check.sh [--minutes 8] [--only kernels times training] [--elements N] [--out DIRECTORY]
#   scripts/gpu_check.sh --emulate      everything except launching kernels, on any machine with g++
#
# Installs nothing and needs no network. Runs from this checkout with an installed Python and torch (2.8 or newer):
# $PYTHON, else .venv's, else python3. Needs numpy, cuda-core and cuda-bindings with NVRTC (kernels), and transformers
# (training); reports what is missing and does the rest.
#
# Exit status: 0 all bits are equal; 1 a bit differs or something failed; 2 not all kernels could be compared.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  if .venv/bin/python -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec("torch") is None)' 2>/dev/null; then
    PYTHON=.venv/bin/python
  fi
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m psyche.bench.gpu "$@"
