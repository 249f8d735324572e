#!/bin/sh
# Measures everything that docs/results/quality.md shows and writes the page's tables and pictures anew.
# usage: tools/measure_quality.sh [PART ...]    (parts: ours peers deployed tasks long tables rotation
#    learned smollm2 page)
#
# Texts: build/wikitext2-test.txt to measure on, build/wikipedia-heldout.txt to calibrate on; neither is in the
# repository. The working tree must be committed: each file names the commit it was measured on.
# Environment: WITH, a command that runs each of them (such as "nice"); HALFBYTE and PYTHON, the programs.
set -eu
cd "$(dirname "$0")/.."

folder=build/quality  # files move to the page's folder at the end, so that the tree is clean while they are measured
page=docs/results/quality
mkdir -p $folder
halfbyte="${WITH:-} ${HALFBYTE:-.venv/bin/halfbyte}"
text="--text build/wikitext2-test.txt --quiet"
calib="--calib build/wikipedia-heldout.txt"

ours=fp,default,no-sinks,fixed-offset,turning,no-offset,g32,turning-g32,vector,turning-vector,g16,k8v4
ours=$ours,paper-per-token,paper-g32,paper-g32-lambda,k2v2,k3v3,k4v2,k4v3,k6v6
ours=$ours,table,table-g32,vector-table,turning-token,turning-table,turning-table-g32,turning-vector-table
peers=quanto-int4,quanto-int2,hqq-int4,kivi-4-g32,kivi-4-g64,kivi-4-g128,kivi-2-g32,kivi-4-g64-sinks
peers=$peers,q4_0,q4_0-hadamard,q4_1,iq4_nl,q5_0,q8_0,turboquant-4,turboquant-3,kvarn-4,kvarn-4-sinks
peers=$peers,nvfp4,mxfp4,fp8-e4m3,int8

evaluate() {   # NAME MODEL OPTIONS...: rows as FOLDER/NAME.json
    echo "== $1"
    name=$1 model=$2
    shift 2
    $halfbyte eval --model "$model" $text "$@" --json "$folder/$name.json"
}

reproduce() {   # NAME MODEL TABLES OPTIONS...
    echo "== $1"
    name=$1 model=$2 tables=$3
    shift 3
    $halfbyte reproduce --model "$model" $text $calib --table "$tables" "$@" --json "$folder/$name.json"
}

for part in ${*:-ours peers deployed tasks long tables rotation learned smollm2 page}; do
    case $part in
    ours)
        for model in tiny-qwen tiny-gemma; do evaluate ours-$model $model $calib --windows 4 --recipe $ours; done
        ;;
    peers)
        for model in tiny-qwen tiny-gemma; do evaluate peers-$model $model --windows 4 --recipe $peers; done
        ;;
    deployed)
        evaluate deployed-tiny-qwen tiny-qwen --windows 4 --window 1024 --greedy 128 --needles 8 --protocol deployed \
            --recipe default,no-sinks,fixed-offset,turning,g32
        ;;
    tasks)
        evaluate tasks-tiny-qwen tiny-qwen --windows 4 --window 1024 --greedy 128 --needles 8 \
            --recipe fp,default,fixed-offset,turning,g32,kivi-4-g64,paper-g32
        ;;
    long)
        evaluate long-tiny-qwen tiny-qwen --windows 1 --window 16384 --recipe default,fixed-offset,turning,kivi-4-g64
        ;;
    tables)
        for model in tiny-qwen tiny-gemma; do
            reproduce reproduce-$model $model ladder,ablation,seeds,hook,offsets,layers,memory --windows 2
        done
        ;;
    rotation)
        for model in tiny-qwen tiny-gemma; do reproduce rotation-$model $model rotation --windows 2; done
        ;;
    learned)
        for model in tiny-qwen tiny-gemma; do
            reproduce learned-$model $model learned --windows 2 --steps 100
        done
        ;;
    smollm2)
        evaluate deployed-smollm2 smollm2 --windows 2 --window 1024 --protocol deployed \
            --recipe default,no-sinks,fixed-offset,turning,g32
        evaluate codecs-smollm2 smollm2 --windows 2 --window 512 --recipe \
default,no-sinks,fixed-offset,turning,g32,vector,turning-table,kivi-4-g64,kivi-4-g64-sinks,kvarn-4,kvarn-4-sinks,turboquant-4,q4_0-hadamard
        reproduce rotation-smollm2 smollm2 rotation --windows 1 --window 512
        reproduce ladder-smollm2 smollm2 ladder,hook --windows 1 --window 512 --tokens 2048
        reproduce layers-smollm2 smollm2 layers,memory --windows 1 --window 256
        ;;
    page)
        for file in $folder/*.json; do if [ -f "$file" ]; then mv "$file" $page/; fi; done
        "${PYTHON:-.venv/bin/python}" tools/quality_page.py
        $halfbyte report $page/*.json docs/results/cpu/generate-*.json -o build/report.html --plots $page
        ;;
    *)
        echo "usage: tools/measure_quality.sh [PART ...]; there is no part $part" >&2
        exit 2
        ;;
    esac
done
