#!/usr/bin/env bash
# Everything that a GPU is wanted for, in one command of at most 8 minutes on a bare machine with
# torch: the tests that say something about a device, a run on the digits with an exact resume, and
# the speed of a training step. Without a GPU it does the same in small on the CPU (--quick).
#
#   scripts/wheels_for_gpu.sh                      where there is a network: what may be missing there
#   OUT=results bash scripts/on_gpu.sh             there; writes results/record.json and logs
#   bash scripts/on_gpu.sh --only tests --only digits
#
# Nothing is installed: build/wheels, if it was brought along, is unpacked into a temporary folder.
# PATCHWORD_COMMIT names the commit where there is no git. Exit code 1 if a section failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" scripts/gpu/sections.py "$@"
