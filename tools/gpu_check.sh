#!/usr/bin/env bash
# On a machine with a GPU: tests the CUDA library and the cache on it, looks for memory errors and races, and times all,
# in less than ten minutes.
#
#   tools/gpu_check.sh                  builds in build/release (needs nvcc, CMake, Ninja, GoogleTest)
#   tools/gpu_check.sh BUILD_FOLDER     takes libhalfbyte_cuda.so and halfbyte_cuda_tests from there
# Python is PYTHON, or python3: it must have the package and pytest, and is quicker with pytest-xdist. JSON=FOLDER
# writes the timings there as well. What fails is named at the end and does not stop the rest.
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

failed=
run() {  # NAME COMMAND…
  echo "== $1, $SECONDS s"
  "${@:2}" || failed="$failed $1"
}
workers=()
if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 8); fi
run kernels "$build/halfbyte_cuda_tests" --gtest_brief=1
run python "$python" -m pytest -q "${workers[@]}" -k 'not metal' \
  tests/python/test_{gpu_layer,cuda,static_cuda,bench_cuda}.py

sanitize() {  # TOOL TESTS: those of each kernel, as every access takes ten times as long and more
  run "$1" compute-sanitizer --tool "$1" --error-exitcode 1 "$build/halfbyte_cuda_tests" --gtest_brief=1 \
    --gtest_filter="CudaEncode.*:CudaOffset.*:*ReferenceBytes/TensorCores:*TailSizes*:$2"
}
if command -v compute-sanitizer >/dev/null; then
  sanitize memcheck '*SeveralQueries*:*Narrows*:*CudaStep*'
  sanitize racecheck '*Narrows*/TensorCores:*CudaStep*/TensorCores'
fi

bench() {  # NAME ARGUMENTS…
  run "$1" "$python" -m halfbyte.cli bench "${@:2}" --backend cuda ${JSON:+--json "$JSON/cuda-$1.json"}
}
bench attend-1 attend --tokens 256,4096,32768 --quiet
bench attend-8 attend --batch 8 --tokens 32768 --quiet
bench attend-32 attend --batch 32 --geometry qwen,llama8b,gemma,smollm2 --tokens 32768 --quiet
bench attend-g32 attend --batch 32 --recipe g32 --tokens 32768 --quiet
for head_dim in 64 128 256; do bench "encode-$head_dim" encode --head-dim "$head_dim"; done
bench generate-qwen generate --model qwen2.5-1.5b --prefix 256,4096,16384 --quiet
bench generate-gemma generate --model gemma-3-1b --prefix 256,4096,16384 --quiet
bench generate-static generate --model qwen2.5-1.5b --prefix 4096 --rounds 3 --static --quiet
bench generate-batch generate --model qwen2.5-1.5b --batch 32 --prefix 16384 --rounds 3 --quiet
echo "== done, $SECONDS s; failed:${failed:- nothing}"
[ -z "$failed" ]
