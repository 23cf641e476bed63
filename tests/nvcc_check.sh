#!/usr/bin/env bash
# Compiles every CUDA source with nvcc for the two GPU generations that fastnas targets, warnings as errors; no GPU is
# needed. Fails if a kernel spills registers.
# Usage: tests/nvcc_check.sh [PYTHON]
set -euo pipefail

cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

if ! command -v nvcc >/dev/null; then
  echo "nvcc check: SKIPPED, nvcc is not on the PATH ($(find csrc -name '*.cu' | wc -l) files not checked)"
  exit 0
fi
"$python" bench/nvcc.py
echo "nvcc check: ok"
