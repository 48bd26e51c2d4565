#!/usr/bin/env bash
# Compiles the shipped pod configurations for their TPU slices, on this machine, and prints the
# table of docs/pods.md.
#
#   scripts/precompile_pods.sh                      # all: about an hour of one CPU core
#   scripts/precompile_pods.sh base_upcycled        # one: about five minutes
#
# Makes .venv_precompile if absent: libtpu (half a gigabyte) must not be in the environment of the
# tests, where jax would look for TPUs. Ends with code 1 when a configuration does not fit, saying
# what to change.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$root/.venv_precompile}"
source "$root/scripts/venv.sh"
make_venv precompile >&2
cd "$root"
(($#)) || set -- base_dense base_upcycled large_dense large_upcycled xl_dense xl_upcycled
head=1
for name in "$@"; do
    table="$("$VENV/bin/python" -m upcycle_jax.precompile "--gin_file=papers/sparse_upcycling/pods/$name.gin" --markdown)"
    if ((head)); then
        head -n 2 <<<"$table"
        head=0
    fi
    tail -n 1 <<<"$table"
done
