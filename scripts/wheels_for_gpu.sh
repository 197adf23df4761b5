#!/usr/bin/env bash
# Fetch into build/wheels what a bare machine may lack, for Python 3.12 on Linux x86-64, in the pinned
# versions: scripts/on_gpu.sh unpacks what is missing or older there. 5 MB; no torch, nothing that
# needs one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
rm -rf build/wheels
"$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: -d build/wheels -c constraints.txt \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
  tyro docstring_parser typeguard typing_extensions rich markdown-it-py mdurl Pygments safetensors \
  pytest pluggy iniconfig packaging hypothesis sortedcontainers
du -sh build/wheels
