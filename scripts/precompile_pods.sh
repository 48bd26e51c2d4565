#!/usr/bin/env bash
# Compiles the shipped pod configurations for their TPU slices, on this machine, and prints the
# table of docs/pods.md.
#
#   scripts/precompile_pods.sh                      # all: some hours of one CPU core
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
if ! (($#)); then
    set -- base_dense base_upcycled large_dense large_upcycled xl_dense xl_upcycled
    set -- "$@" llama_3_2_1b_{dense,upcycled} llama_3_8b_{dense,upcycled}
    set -- "$@" qwen3_0_6b_{dense,upcycled} qwen3_8b_{dense,upcycled}
    set -- "$@" vit_b16_{dense,upcycled} vit_l16_{dense,upcycled}
fi
head=1
for name in "$@"; do
    files=(gin_configs/papers/*/pods/"$name.gin")
    table="$("$VENV/bin/python" -m upcycle_jax.precompile "--gin_file=${files[0]}" --markdown)"
    if ((head)); then
        head -n 2 <<<"$table"
        head=0
    fi
    tail -n 1 <<<"$table"
done
