#!/usr/bin/env bash
# On a machine with a GPU: tests the CUDA library and the cache on it, looks for memory errors and races, and times all.
#
#   tools/gpu_check.sh                  builds in build/release (needs nvcc, CMake, Ninja, GoogleTest)
#   tools/gpu_check.sh BUILD_FOLDER     takes libhalfbyte_cuda.so and halfbyte_cuda_tests from there
# Python is PYTHON, or python3: it must have the package and pytest. JSON=FOLDER writes the timings there as well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
build="${1:-build/release}"
if [ $# = 0 ]; then
  cmake --preset release >/dev/null
  cmake --build --preset release --target halfbyte_cuda halfbyte_cuda_tests
fi
python="${PYTHON:-python3}"
export LD_LIBRARY_PATH="$build${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" HALFBYTE_CUDA_LIBRARY="$build/libhalfbyte_cuda.so"
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
"$build/halfbyte_cuda_tests" --gtest_brief=1
"$python" -m pytest -q tests/python/test_gpu_layer.py tests/python/test_cuda.py tests/python/test_static_cuda.py

bench() {  # NAME ARGUMENTS…
  "$python" -m halfbyte.cli bench "${@:2}" --backend cuda ${JSON:+--json "$JSON/cuda-$1.json"}
}
bench attend-1 attend --tokens 256,4096,32768 --quiet
bench attend-8 attend --batch 8 --tokens 32768 --quiet
bench attend-32 attend --batch 32 --geometry qwen,llama8b,gemma,smollm2 --tokens 32768 --quiet
bench attend-g32 attend --batch 32 --recipe g32 --tokens 32768 --quiet
for head_dim in 64 128 256; do bench "encode-$head_dim" encode --head-dim "$head_dim"; done
for model in qwen2.5-1.5b gemma-3-1b; do
  bench "generate-$model" generate --model "$model" --prefix 256,4096,16384 --rounds 3 --static --quiet
done
bench generate-batch generate --model qwen2.5-1.5b --batch 32 --prefix 16384 --rounds 3 --quiet

if command -v compute-sanitizer >/dev/null; then
  for tool in memcheck racecheck; do
    compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/halfbyte_cuda_tests" --gtest_brief=1 \
      --gtest_filter='*TailSizes*:*Narrows*:*SeveralQueries*:CudaEncode.*:*CudaStep*' | tail -n 3
  done
fi
