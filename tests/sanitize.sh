#!/usr/bin/env bash
# The C++ ops' tests under AddressSanitizer and UndefinedBehaviorSanitizer, with 1, 2 and 8 threads, and with the
# libraries for the instruction sets below the processor's best one.
# Usage: tests/sanitize.sh [PYTHON [PYTEST ARGUMENTS]]; without arguments the tests of ops, stages and fused executor.
#
# The sources are copied and built in a folder of their own, so that the library in the tree stays as it is. Leaks are
# not looked for: Python and torch keep what they allocated until the process ends.
set -euo pipefail

cd "$(dirname "$0")/.."
python=$(realpath -s "${1:-.venv/bin/python}")
shift || true
threads=${FASTNAS_SANITIZE_THREADS:-1 2 8}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work"
cd "$work"

# A compiler of our own, because setup.py puts its optimisation behind the flags of the environment.
# -O1 alone makes no fused multiply-add, so that sums would round otherwise than in the library that is shipped.
flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -g1"
flags="$flags -O1 -fexpensive-optimizations -ffp-contract=fast"
printf '#!/bin/sh\nexec c++ "$@" %s\n' "$flags" >"$work/c++-sanitize"
chmod +x "$work/c++-sanitize"
echo "sanitize: building with $flags"
CXX=$work/c++-sanitize FASTNAS_CUDA=0 "$python" setup.py -q build_ext --inplace >build.log 2>&1 || { tail -40 build.log; exit 1; }
grep -q __asan_report fastnas/_C/baseline.abi3.so || { echo "sanitize: the library is not instrumented"; exit 1; }

preload="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so) $(gcc -print-file-name=libstdc++.so.6)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=0:halt_on_error=1:detect_odr_violation=0:allocator_may_return_null=1
export UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
export PYTHONMALLOC=malloc
export OMP_WAIT_POLICY=passive  # threads that wait by spinning starve each other when there are more than cores
if [ $# -eq 0 ]; then
  set -- tests/ops tests/engine/test_fused*.py -k "not compile and not opcheck and not gradgradcheck"
fi
check() {  # threads, instruction set as PyTorch names it, pytest arguments
  echo "sanitize: $1 threads, $2"
  LD_PRELOAD=$preload OMP_NUM_THREADS=$1 ATEN_CPU_CAPABILITY=$2 "$python" -m pytest -q -x -p no:cacheprovider "${@:3}"
}
best=$("$python" -c 'import torch; print(torch.backends.cpu.get_cpu_capability().lower())')
for count in $threads; do check "$count" "$best" "$@"; done
case $best in avx512) check 2 avx2 "$@" ;; esac
case $best in avx512 | avx2) check 2 default "$@" ;; esac
