#!/usr/bin/env bash
# Compiles every CUDA source with nvcc for the two GPU generations that fastnas targets; no GPU is needed.
# Usage: tests/nvcc_check.sh [PYTHON]
set -euo pipefail

cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}

mapfile -t sources < <(find csrc -name '*.cu' | sort)
if [ ${#sources[@]} -eq 0 ]; then
  echo "nvcc check: no .cu files yet"
  exit 0
fi
if ! command -v nvcc >/dev/null; then
  echo "nvcc check: SKIPPED, nvcc is not on the PATH (${#sources[@]} files not checked)"
  exit 0
fi

include=$("$python" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent / "include")')
for source in "${sources[@]}"; do
  for arch in sm_80 sm_90a; do
    nvcc -std=c++20 -O3 -arch="$arch" -DUSE_CUDA -DTORCH_TARGET_VERSION=0x020b000000000000 \
      -Icsrc -isystem "$include" -c "$source" -o /dev/null
    echo "nvcc check: $source for $arch: ok"
  done
done
