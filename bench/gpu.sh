#!/usr/bin/env bash
# Everything that needs a CUDA device, most important first: whole steps, dense against hybrid at a tenth, on the 7B's
# decoder with random weights; then the tests, the largest batch that fits, attention by part, prefill and memory. Takes ten
# minutes at most, five with --quick, thirty with --all: a step that is not done in its time is cut off, and the next one begins,
# as long as there is time. What is measured is written at once, to bench/results/*-cuda.jsonl or the folder given as an argument,
# and what is printed to gpu.log there. Wants torch 2.11 or later and what pyproject.toml names; nothing is installed or
# downloaded. (Training is a command of its own: python -m demo.train FOLDER.)
#
#     bash bench/gpu.sh [--quick | --all] [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
how=usual most=590 # seconds for all
case ${1:-} in
--quick) how=quick most=290 && shift ;;
--all) how=all most=1790 && shift ;;
-*) echo "bench/gpu.sh knows --quick and --all, not $1" >&2 && exit 2 ;;
esac
results=${1:-bench/results}
mkdir -p "$results" || exit 2
# SHAPE="--shape small --device cpu" LONG=2048 PATIENCE=10 proves the script on a CPU, which takes longer for each step.
shape=${SHAPE:---shape qwen2.5-vl-7b --dtype bfloat16}
long=${LONG:-32768}

step() { # seconds, name, command...
    local seconds=$(($1 * ${PATIENCE:-1})) name=$2 left=$((most * ${PATIENCE:-1} - SECONDS))
    shift 2
    [ "$left" -ge 20 ] || { echo "=== $name: no time left" && return; }
    echo "=== $name"
    # Interrupted, pytest still says what has failed.
    timeout --signal=INT --kill-after=10 "$((seconds < left ? seconds : left))" "$@"
    local status=$?
    [ "$status" -eq 0 ] || echo "=== $name ended with $status"
}

decode() { # seconds, name, options...: compiling takes 20 to 40 seconds a contender, of a step of milliseconds
    local seconds=$1 name=$2
    shift 2
    step "$seconds" "$name" python -m bench.decode $shape --budgets 0.1 --steps 20 "$@" --out "$results/decode-cuda.jsonl"
}

ours="--contenders dense hybridkv --stores device host --retrieving-layers"

measure() {
    command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
    python -c "import torch; print('torch', torch.__version__)"
    if [ "$how" = quick ]; then
        decode 140 decode-batch --contexts "$long" --batches 8 $ours 0.75
        decode 110 decode --contexts "$long" $ours 0.75
        step 50 tests python -m pytest -vv --tb=short -m cuda tests/test_cuda.py
        return
    fi
    decode 150 decode-batch --contexts "$long" --batches 8 $ours 0.75
    decode 120 decode --contexts "$long" $ours 0.75
    step 90 tests python -m pytest -vv --tb=short -m cuda tests/test_cuda.py tests/test_hf_compiled.py tests/test_train.py
    # What a user buys hardware by: tokens a second of the largest batch that fits.
    step 150 throughput python -m bench.throughput $shape --context "$long" --memory "${MEMORY:-48GB}" --out "$results/throughput-cuda.jsonl"
    # Other options of the compiler: matmuls of one row as reductions, kernels that need not wait for each other in one launch.
    decode 150 inductor --contexts "$long" --contenders dense hybridkv --stores device --retrieving-layers 0.75 \
        --inductor combo_kernels=1+coordinate_descent_tuning=1
    step 60 attention python -m bench.attention $shape --contexts "$long" --repeats 30 --kernels 15 \
        --contenders flex hybridkv --out "$results/attention-cuda.jsonl"
    step 60 attention-batch python -m bench.attention $shape --contexts "$long" --batch 8 --repeats 20 --kernels 15 \
        --contenders flex hybridkv --out "$results/attention-cuda.jsonl"
    step 50 prefill python -m bench.prefill $shape --contexts 8192 "$long" --repeats 3 --out "$results/prefill-cuda.jsonl"
    step 100 memory python -m bench.memory $shape --contexts "$((long / 4))" "$long" --batches 1 2 --eager \
        --contenders dense "hybridkv ahead" --fits 24GB 48GB 80GB --out "$results/memory-cuda.jsonl"
    step 60 readings python -m bench.reading_speed $shape --tokens "${READ:-30000}" --retrieving-layers 0.75 --out "$results/readings-cuda.jsonl"
    [ "$how" = all ] || return
    decode 150 decode-fewer --contexts "$long" --batches 8 $ours 0.5 0.25
    decode 150 decode-short --contexts 8192 --batches 8 $ours 1 0.5
    # A tenth of 32,768 tokens is about 3,277: how much longer does a step take that reads as many of a longer context?
    decode 120 decode-long --contexts 131072 --attended 3277 --contenders dense hybridkv
    decode 100 transformers --contexts 8192 --contenders dense transformers hybridkv
    # The compiler's own tiles, then other numbers of them in flight, then smaller ones. Few contenders: each is compiled anew.
    step 90 tiles python -m bench.attention $shape --contexts "$long" --page-sizes 16 64 --contenders flex --repeats 20 \
        --kernel-options num_stages=2 num_stages=4 BLOCK_N=16 --out "$results/attention-cuda.jsonl"
}

measure 2>&1 | tee "$results/gpu.log"
