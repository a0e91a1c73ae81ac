#!/usr/bin/env bash
# Everything that needs a CUDA device, most important first: the tests, then speed and memory of the 7B's decoder with
# random weights. Takes a quarter of an hour at most: a step that is not done in its time is cut off, and the next one
# begins. What is measured is written at once, to bench/results/*-cuda.jsonl or the folder given as the first argument.
# (Training is a command of its own: python -m demo.train FOLDER.)
#
#     bash bench/gpu.sh [FOLDER]
set -uo pipefail
cd "$(dirname "$0")/.."
results=${1:-bench/results}
mkdir -p "$results"
shape=${SHAPE:---shape qwen2.5-vl-7b --dtype bfloat16} # SHAPE="--shape small" proves the script on a CPU

step() { # seconds, name, command...
    local seconds=$1 name=$2
    shift 2
    echo "=== $name"
    timeout "$seconds" "$@" 2>&1 | tee "$results/$name-cuda.log"
    local status=${PIPESTATUS[0]}
    [ "$status" -eq 0 ] || echo "=== $name ended with $status"
}

nvidia-smi --query-gpu=name,memory.total --format=csv,noheader
python -c "import torch; print('torch', torch.__version__)"
step 110 tests python -m pytest -q -m cuda tests
step 70 attention python -m bench.attention $shape --contexts 32768 --page-sizes 16 64 --repeats 30 --kernels 15 \
    --out "$results/attention-cuda.jsonl"
step 180 decode python -m bench.decode $shape --contexts 32768 --budgets 0.1 --contenders dense full hybridkv \
    --out "$results/decode-cuda.jsonl"
step 120 decode-batch python -m bench.decode $shape --contexts 32768 --batches 8 --budgets 0.1 \
    --contenders dense full hybridkv --out "$results/decode-cuda.jsonl"
step 60 memory python -m bench.memory $shape --contexts 8192 32768 --contenders dense hybridkv "hybridkv ahead" \
    --out "$results/memory-cuda.jsonl"
step 40 prefill python -m bench.prefill $shape --contexts 8192 32768 --repeats 3 --out "$results/prefill-cuda.jsonl"
# A tenth of 32,768 tokens is about 3,277: how much longer does a step take that reads as many of a longer context?
step 120 decode-long python -m bench.decode $shape --contexts 131072 --budgets 0.1 --attended 3277 \
    --contenders dense hybridkv --out "$results/decode-cuda.jsonl"
step 80 transformers python -m bench.decode $shape --contexts 8192 --budgets 0.1 \
    --contenders dense transformers hybridkv --out "$results/decode-cuda.jsonl"
# The compiler's own tiles, then other numbers of them in flight, then smaller ones. Few contenders: each is compiled anew.
step 60 tiles python -m bench.attention $shape --contexts 32768 --page-sizes 64 --contenders flex --repeats 20 \
    --kernel-options num_stages=3 BLOCK_N=16 num_stages=1 BLOCK_N=32 --out "$results/attention-cuda.jsonl"
