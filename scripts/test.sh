#!/usr/bin/env bash
# Makes .venv if absent, installs the project with its test extra, runs the tests on every core.
# Arguments go to pytest:
#   ./scripts/test.sh tests/moe -x        ./scripts/test.sh -m slow        ./scripts/test.sh -n 0
#   --pdb
# PYTHON names the interpreter of a new .venv (default python3); VENV its folder.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/venv.sh"
make_venv test
cd "$root"
# Tests start many Python processes, each of which would compile the library's modules anew.
unset PYTHONDONTWRITEBYTECODE
# worksteal keeps neighbours together, as modules' fixtures want it. The schedulers of whole files
# (loadfile, loadscope) may wait for ever at the end of a run in which a worker has died.
exec "$VENV/bin/python" -m pytest -n auto --dist worksteal "$@"
