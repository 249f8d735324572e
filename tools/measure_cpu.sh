#!/bin/sh
# Measures everything that docs/results/cpu.md shows, in about five minutes, and writes the page's numbers anew.
# usage: tools/measure_cpu.sh [FOLDER]    (FOLDER: where the JSON and PNG files go; default docs/results/cpu)
#
# The machine must be idle, and the working tree committed: each file names the commit it was measured on.
# Environment: WITH, a command that runs each bench (such as "taskset -c 0,1"); HALFBYTE and PYTHON, the programs.
set -eu
cd "$(dirname "$0")/.."

folder=${1:-docs/results/cpu}
bench="${WITH:-} ${HALFBYTE:-.venv/bin/halfbyte} bench"
mkdir -p "$folder"

run() {   # NAME ARGUMENTS...: the rows of one bench as FOLDER/NAME.json
    name=$1
    shift
    echo "== $name: halfbyte bench $*"
    $bench "$@" --json "$folder/$name.json"
}

run attend attend --geometry qwen,gemma,smollm2,llama8b --tokens 4096,32768 --threads 1,2 --rounds 9 --quiet
run attend-avx2 attend --backend avx2 --tokens 4096,32768 --threads 1,2 --quiet
run attend-recipes attend --recipe default,g16,k8v4 --tokens 4096,32768 --threads 2 --quiet
for prefix in 1024 8192 32768; do
    run queries-$prefix attend --queries 4,16,64,512 --tokens $prefix --threads 2 --rounds 3 --quiet
done
run encode encode
for model in qwen gemma; do
    run generate-$model generate --model tiny-$model --prefix 256,1024,4096,16384 --plot "$folder/generate-$model.png" --quiet
done
run roofline roofline --plot "$folder/roofline.png" --quiet
"${PYTHON:-.venv/bin/python}" tools/results_page.py "$folder"
