#!/usr/bin/env bash
# Runs a command on TPU slices of a GKE cluster, through xpk (github.com/AI-Hypercomputer/xpk).
#
#   scripts/launch/gke_xpk.sh --workload=base-upcycled --cluster=my-cluster --type=v5litepod-256 --image=gcr.io/me/upcycle_jax \
#       train --gin_file=... --gin.MODEL_DIR="'gs://bucket/run'"
#
# Options (before the command's name):
#   --workload=NAME       name of the job
#   --cluster=NAME        the cluster
#   --type=TYPE           accelerator type of a slice, e.g. v5litepod-256 (topology v5e:16x16), v4-128, v5p-128
#   --slices=N            slices (default 1)
#   --image=IMAGE         image with upcycle_jax[tpu] installed; without it xpk puts the checkout on top of --base_image
#   --base_image=IMAGE    image with the dependencies (default: xpk's own)
#   --project=P --zone=Z  as in gcloud; default: gcloud's configuration
#   --retries=N           how often the job is started again (default 20): after preemption, maintenance, a failure
#   --xpk=OPTIONS         further options of `xpk workload create`, separated by blanks
#   --dry_run             print what would run, and stop
# A pod that is to go gets SIGTERM five minutes before: the run saves a checkpoint, and the job set
# starts it again. jax finds the other hosts through the variables that GKE sets.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
# shellcheck disable=SC2154  # parse_options sets OPTION_*
parse_options "workload cluster type slices image base_image project zone retries xpk" "$@"
require workload cluster type

read -r -a further <<<"${OPTION_xpk:-}"
inner="$(quoted env UPCYCLE_JAX_INTERRUPTED_CODE=75 python3 -m "upcycle_jax.$COMMAND" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})"
line=(xpk workload create "--workload=$OPTION_workload" "--cluster=$OPTION_cluster" "--tpu-type=$OPTION_type"
    "--num-slices=${OPTION_slices:-1}" "--max-restarts=${OPTION_retries:-20}" --restart-on-user-code-failure
    --termination-grace-period-seconds=300)
[[ -z "${OPTION_project:-}" ]] || line+=("--project=$OPTION_project")
[[ -z "${OPTION_zone:-}" ]] || line+=("--zone=$OPTION_zone")
if [[ -n "${OPTION_image:-}" ]]; then
    line+=("--docker-image=$OPTION_image")
else
    line+=("--script-dir=$ROOT")
    [[ -z "${OPTION_base_image:-}" ]] || line+=("--base-docker-image=$OPTION_base_image")
fi
line+=(${further[@]+"${further[@]}"} "--command=$inner")
run "${line[@]}"
