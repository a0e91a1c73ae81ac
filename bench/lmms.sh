#!/usr/bin/env bash
# lmms-eval 0.7.3 with our models, in an environment of its own, .cache/lmms, and the tests that need it.
#
#     bench/lmms.sh              what our tasks, MileBench and NExT-QA's choices need: a gigabyte beside torch
#     bench/lmms.sh --whole      all that lmms-eval asks for, torchvision among it: gigabytes
#     .cache/lmms/bin/python -m lmms_eval --model hybridkv --model_args pretrained=FOLDER,budget=0.1 --tasks ...
#
# Why of its own: lmms-eval wants PyAV before 16 and a hundred packages that nothing here needs. Without --whole they are
# left out (pip, told not to look at what it asks for, complains about that later), and PyAV is ours. PYTHON chooses the
# interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=.cache/lmms/bin/python
${PYTHON:-python3} -m venv .cache/lmms
$PY -m pip install --quiet --upgrade pip
$PY -m pip install --quiet --constraint constraints.txt torch # first, and the CPU build where there is one
if [ "${1:-}" = --whole ]; then
    $PY -m pip install --quiet --editable . lmms-eval==0.7.3
else
    $PY -m pip install --quiet --constraint constraints.txt --editable '.[video,bench,test]'
    $PY -m pip install --quiet --no-deps lmms-eval==0.7.3
    $PY -m pip install --quiet datasets evaluate loguru jsonlines sacrebleu pytablewriter tqdm-multiprocess tenacity \
        python-dotenv openai httpx pydantic
fi
$PY -m pip install --quiet pytest hypothesis matplotlib
$PY -m pytest tests/test_lmms.py -s
