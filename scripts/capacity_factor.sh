#!/usr/bin/env bash
# The capacity-factor study in results/capacity_factor/.
#   ./scripts/capacity_factor.sh              runs it from nothing (about an hour on two cores) and
#   writes its report ./scripts/capacity_factor.sh --report     writes the report of the stored
#   results again: the same bytes in the same environment
# Killed, it goes on where it stopped when called again. Results: $SWEEP_DIR (default
# runs/capacity_factor of the checkout); the stored ones stay as they are. Other words go to the
# sweep, e.g. --num_parallel=4 --gin.SEEDS="[0, 1, 2, 3, 4]".
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$root/scripts/venv.sh"
make_venv ""
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"

if [ "${1:-}" = --report ]; then
    stored="$root/results/capacity_factor"
    exec "$VENV/bin/python" -m upcycle_jax.report --sweep="$stored" --output_dir="$stored/report"
fi

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
out="${SWEEP_DIR:-$root/runs/capacity_factor}"
"$VENV/bin/python" -m upcycle_jax.sweep --gin_file=sweeps/capacity_factor.gin --gin.SWEEP_DIR="'$out'" --num_parallel=2 "$@"
"$VENV/bin/python" -m upcycle_jax.report --sweep="$out" --output_dir="$out/report"
