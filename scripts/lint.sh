#!/usr/bin/env bash
# Formatter, linter and type checker, in the environment of scripts/test.sh. `./scripts/lint.sh
# --fix` repairs what can be repaired.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/venv.sh"
make_venv test
cd "$root"
if [ "${1:-}" = --fix ]; then
    "$VENV/bin/ruff" format .
    "$VENV/bin/ruff" check --fix .
fi
"$VENV/bin/ruff" format --check .
"$VENV/bin/ruff" check .
"$VENV/bin/mypy"
