#!/usr/bin/env bash
# Runs a command on all workers of a Cloud TPU pod, making the pod first where there is none and
# again when it is preempted.
#
#   scripts/launch/tpu_pod.sh --name=my-pod --zone=us-west4-a --type=v5litepod-256 --runtime=v2-alpha-tpuv5-lite --spot \
#       train --gin_file=... --gin.MODEL_DIR="'gs://bucket/run'"
#
# Options (before the command's name):
#   --name=NAME           the TPU VM
#   --zone=ZONE           its zone
#   --type=TYPE           accelerator type, e.g. v5litepod-256 (topology v5e:16x16), v4-128, v5p-128
#   --runtime=VERSION     runtime version (default v2-alpha-tpuv5-lite)
#   --project=PROJECT     default: gcloud's configuration
#   --spot                make a spot VM: cheap, and taken away at any time
#   --retries=N           how often to go on after the pod was preempted or could not be had (default 50)
#   --failures=N          how often to start again when the command fails on a pod that stays (default 3)
#   --wait=SECONDS        pause before looking at the pod again (default 60)
#   --installed           the workers have the checkout in ~/upcycle_jax with its .venv already: do not copy and install
#   --dry_run             print what would run for a pod that has to be made, and stop
# Needs gcloud. Every start resumes from the latest checkpoint of MODEL_DIR, which must be a gs://
# path. The pod is left running.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC2154  # parse_options sets OPTION_*
parse_options "name zone type runtime project spot retries failures wait installed" "$@"
require name zone type

retries="${OPTION_retries:-50}"
failures="${OPTION_failures:-3}"
pause="${OPTION_wait:-60}"
archive="$(basename "$ROOT").tar.gz"
installed="${OPTION_installed:-}"
where=("--zone=$OPTION_zone")
[[ -z "${OPTION_project:-}" ]] || where+=("--project=$OPTION_project")
tpu=(gcloud compute tpus tpu-vm)

state() {
    "${tpu[@]}" describe "$OPTION_name" "${where[@]}" '--format=value(state)' 2>/dev/null || echo ABSENT
}

create() {
    local line=("${tpu[@]}" create "$OPTION_name" "${where[@]}" "--accelerator-type=$OPTION_type"
        "--version=${OPTION_runtime:-v2-alpha-tpuv5-lite}")
    [[ -z "${OPTION_spot:-}" ]] || line+=(--spot)
    run "${line[@]}"
}

on_all_workers() {
    run "${tpu[@]}" ssh "$OPTION_name" "${where[@]}" --worker=all "--command=$1"
}

install() {
    local folder
    folder="$(mktemp -d)"
    run tar --create --gzip "--file=$folder/$archive" "--directory=$ROOT" --exclude=./.git --exclude=./.venv --exclude=__pycache__ .
    run "${tpu[@]}" scp "$folder/$archive" "$OPTION_name:$archive" "${where[@]}" --worker=all
    on_all_workers "mkdir -p upcycle_jax && tar --extract --gzip --file=$archive --directory=upcycle_jax && cd upcycle_jax && python3 -m venv .venv && .venv/bin/python -m pip install --quiet --editable '.[tpu]'"
    rm -rf "$folder"
}

# The first part ends what an earlier start may have left: a worker whose peers are gone holds its
# chips until it notices.
command_line="if [ -f upcycle_jax.pid ]; then kill -KILL \$(cat upcycle_jax.pid) 2>/dev/null; sleep 2; fi; echo \$\$ > upcycle_jax.pid; cd upcycle_jax && exec $(quoted env UPCYCLE_JAX_INTERRUPTED_CODE=75 .venv/bin/python -m "upcycle_jax.$COMMAND" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})"

if ((DRY_RUN)); then
    create
    [[ -n "$installed" ]] || install
    on_all_workers "$command_line"
    exit 0
fi

tries=0
crashes=0
again() {
    ((tries < retries)) || { say "$1; gave up after $tries tries"; exit 1; }
    tries=$((tries + 1))
    say "$1; trying again ($tries of $retries)"
    sleep "$pause"
}

while true; do
    now="$(state)"
    case "$now" in
        READY) ;;
        ABSENT)
            create || again "the pod could not be made"
            installed="${OPTION_installed:-}"
            continue
            ;;
        PREEMPTED | TERMINATED | FAILED | STOPPED)
            "${tpu[@]}" delete "$OPTION_name" "${where[@]}" --quiet || true
            again "the pod is $now"
            continue
            ;;
        *)
            again "the pod is $now"
            continue
            ;;
    esac
    if [[ -z "$installed" ]]; then
        install || { again "copying and installing failed"; continue; }
        installed=1
    fi
    code=0
    on_all_workers "$command_line" || code=$?
    ((code)) || exit 0
    if [[ "$(state)" == READY ]]; then
        ((code != BAD_CONFIGURATION)) || die "the configuration cannot run; not trying again"
        crashes=$((crashes + 1))
        ((crashes <= failures)) || { say "ended with code $code on a pod that stayed, $crashes times"; exit "$code"; }
        say "ended with code $code on a pod that stayed; starting again ($crashes of $failures)"
        sleep "$pause"
    else
        say "ended with code $code and the pod is gone"
    fi
done
