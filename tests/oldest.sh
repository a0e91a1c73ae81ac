#!/bin/sh
# Runs the tests of the Hugging Face adapter with the oldest transformers that pyproject.toml allows, in a virtual
# environment of its own that is deleted afterwards.
#     tests/oldest.sh [pytest arguments]      # PYTHON chooses the interpreter
set -eu
cd "$(dirname "$0")/.."
oldest=$(sed -n 's/.*"transformers>=\([0-9.]*\)".*/\1/p' pyproject.toml)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder"
grep -v -E '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > "$folder/constraints.txt"
pip="$folder/bin/python -m pip install --quiet --constraint $folder/constraints.txt"
$pip torch
$pip "transformers==$oldest.*" '.[test]'
"$folder/bin/python" -m pip list 2>/dev/null | grep -i -E '^(torch|transformers|huggingface[-_]hub|tokenizers) '
"$folder/bin/python" -m pytest tests/test_hf.py -q -p no:cacheprovider "$@"
