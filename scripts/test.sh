#!/usr/bin/env bash
# Makes .venv if absent, installs the project with its test extra, runs the tests, one file per core
# at a time. Arguments go to pytest:
#   ./scripts/test.sh tests/moe -x        ./scripts/test.sh -m slow        ./scripts/test.sh -n 0
#   --pdb
# PYTHON names the interpreter of a new .venv (default python3); VENV its folder.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/venv.sh"
make_venv test
cd "$root"
exec "$VENV/bin/python" -m pytest -n auto --dist loadfile "$@"
