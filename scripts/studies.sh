#!/usr/bin/env bash
# The studies of the paper's findings: gin_configs/sweeps/findings/, results in results/findings/.
#   ./scripts/studies.sh                 their names
#   ./scripts/studies.sh NAME            runs a study, stores its results and writes its report
#   ./scripts/studies.sh --report NAME   writes the report of the stored results again: the same
#   bytes in the same environment
# Interrupted or killed, a study goes on where it stopped when called again, and what has finished so
# far is stored either way. Runs lie in $STUDIES_DIR/NAME (default runs/findings of the checkout).
# Cells that a study of the same model has run already (dense pre-training, its continuation, the
# cache of the data) are taken over from there. Other words go to the sweep, e.g. --num_parallel=1
# (default 2), --gin.SEEDS="[0, 1, 2, 3, 4]".
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
names=(core_encoder_decoder core_decoder_only core_vision capacity_factor renormalization expert_init num_experts step_zero router optimizer_state dense_steps moe_layers vision_experts vision_layers depth_tiling fine_tuning)

if [ $# = 0 ]; then
    printf '%s\n' "${names[@]}"
    exit
fi
report_only=
if [ "$1" = --report ]; then
    report_only=1
    shift
fi
name="${1:?the name of a study is missing: ./scripts/studies.sh prints them}"
shift
[[ " ${names[*]} " = *" $name "* ]] || { echo "no study is called $name; there are: ${names[*]}" >&2; exit 2; }

source "$root/scripts/venv.sh"
make_venv ""
export TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
stored="$root/results/findings/$name"
if [ -n "$report_only" ]; then
    exec "$VENV/bin/python" -m upcycle_jax.report --sweep="$stored" --output_dir="$stored/report"
fi

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
runs="${STUDIES_DIR:-$root/runs/findings}"
reuse=()
for other in "${names[@]}"; do
    if [ "$other" != "$name" ] && [ -f "$runs/$other/sweep.json" ]; then reuse+=(--reuse="$runs/$other"); fi
done
code=0
"$VENV/bin/python" -m upcycle_jax.sweep --gin_file="sweeps/findings/$name.gin" --gin.SWEEP_DIR="'$runs/$name'" \
    --num_parallel=2 "${reuse[@]}" "$@" || code=$?
# Nothing to store before the first evaluation after an update.
"$VENV/bin/python" -m upcycle_jax.report --sweep="$runs/$name" --store="$stored" --output_dir="$stored/report" || true
exit "$code"
