#!/usr/bin/env bash
# The wheel that a user gets: built, installed alone into an empty environment, and used from a
# folder that is not the repository. Keeps nothing but dist/*.whl.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
python=${1:-python3}
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
unset PYTHONPATH  # nothing of the repository
pip() { "$place/venv/bin/python" -m pip "$@" --quiet --disable-pip-version-check -c "$root/constraints.txt"; }

rm -f dist/*.whl
"$python" -m venv "$place/venv"
pip wheel --no-deps --wheel-dir dist .
pip install dist/patchword-*.whl
cd "$place"
PATH=$place/venv/bin:$PATH
patchword --help >/dev/null
python -m patchword --version
python - "$root" <<'CHECK'
import sys
from importlib.metadata import version

import patchword

assert not patchword.__file__.startswith(sys.argv[1]), patchword.__file__
assert version("patchword") == patchword.__version__, version("patchword")
CHECK
patchword train digits --steps 20 --depth 2 --device cpu --out run
test -s run/report.html
patchword evaluate run digits --json >result.json
echo "wheel: $(basename "$root"/dist/*.whl) installs alone and trains"
