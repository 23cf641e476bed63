#!/usr/bin/env bash
# Everything that needs a GPU, in one call of at most ten minutes: build, tests, memory check, benchmarks.
# Results go to $OUT when it is set, else to bench/results/; the last lines printed are the summary.
# Usage: bench/gpu_check.sh [PYTHON]
set -uo pipefail

cd "$(dirname "$0")/.."
python=${1:-python3}
out=${OUT:-bench/results}
mkdir -p "$out"
summary="$out/gpu_check.txt"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$summary"
"$python" -c 'import torch, triton; print("torch", torch.__version__, "triton", triton.__version__)' | tee -a "$summary"

# step NAME SECONDS COMMAND...: run with a time limit, keep the output, note the result and the time it took.
step() {
  local name=$1 limit=$2 start=$SECONDS
  shift 2
  timeout "$limit" "$@" >"$out/$name.log" 2>&1
  local code=$?
  printf '%-24s exit %3d  %4d s  %s\n' "$name" "$code" $((SECONDS - start)) \
    "$(grep -E 'passed|failed|ERROR SUMMARY|error:' "$out/$name.log" | tail -1)" | tee -a "$summary"
}

FASTNAS_CUDA=1 step build 150 "$python" -m pip install --no-build-isolation --no-deps -q -e .
"$python" -c 'from fastnas import _ext; f = _ext.build_facts(); print("CUDA kernels:", f["cuda"], f["cuda_reason"])' |
  tee -a "$summary"

# Most of a kernel test is compiling for its dtype and layout, so every file gets a process.
for file in tests/kernels/test_*.py; do
  name=$(basename "$file" .py)
  case $name in test_aot | test_interpreter | test_launch) continue ;; esac
  step "$name" 240 "$python" -m pytest -q -m gpu "$file" &
done
wait
if command -v compute-sanitizer >/dev/null; then
  step memcheck 60 compute-sanitizer --tool memcheck --error-exitcode 9 \
    "$python" -m pytest -q -m gpu tests/kernels/test_gpu.py -k side_stream
fi
step engine 120 "$python" -m pytest -q -m gpu tests/engine tests/profiler
for method in darts pc_darts; do
  step "search_step_$method" 90 "$python" bench/search_step.py --method "$method" --batch 64 \
    --rows plain,plain_channels_last,fused,fused_lean --json "$out/search_step_${method}_gpu.json"
done
step bench 230 "$python" -m pytest -q bench/ --benchmark-only --no-compile --results "$out/gpu_bench.json"

echo
cat "$summary"
! grep -qE 'exit +[1-9]' "$summary"
