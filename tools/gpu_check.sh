#!/usr/bin/env bash
# On a machine with a GPU: builds the CUDA library, tests it, looks for memory errors and races, and times it, in ten minutes.
#
#   tools/gpu_check.sh                  builds in build/release (needs nvcc, CMake, Ninja, GoogleTest)
#   tools/gpu_check.sh BUILD_FOLDER     takes libhalfbyte_cuda.so and halfbyte_cuda_tests from there
# JSON=FILE writes the timings there as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build="${1:-build/release}"
if [ $# = 0 ]; then
  cmake --preset release >/dev/null
  cmake --build --preset release --target halfbyte_cuda halfbyte_cuda_tests
fi
export LD_LIBRARY_PATH="$build${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$build/halfbyte_cuda_tests" --gtest_brief=1
python3 tools/bench_cuda.py "$build/libhalfbyte_cuda.so" ${JSON:+--json "$JSON"}
if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/halfbyte_cuda_tests" --gtest_brief=1 \
      --gtest_filter='*TailSizes*:*Narrows*:*SeveralQueries*:CudaEncode.*' | tail -n 3
  done
fi
