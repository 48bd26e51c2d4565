#!/usr/bin/env bash
# Runs a command on a SLURM cluster, one process per GPU; outside of a job it submits itself.
#
#   scripts/launch/slurm_gpu.sh --nodes=4 --gpus_per_node=8 --time=24:00:00 train --gin_file=...
#   --gin.MODEL_DIR="'/shared/run'"
#
# Options (before the command's name):
#   --nodes=N             nodes (default 1)
#   --gpus_per_node=N     GPUs, and so processes, per node (default 8)
#   --time=LIMIT          time limit of one start (default 24:00:00)
#   --retries=N           how often SLURM starts the job again (default 20): after preemption, at the time limit, after a failure
#   --sbatch=OPTIONS      further options of sbatch, separated by blanks, e.g. --sbatch='--partition=gpu --account=me'
#   --srun=OPTIONS        further options of srun, e.g. a container
#   --dry_run             print the submission and what the job will run, and stop
# PYTHON names the interpreter on the nodes (default: .venv of the checkout where there is one, or
# else python3). MODEL_DIR must lie on a file system that all nodes share.
#
# Three minutes before the time limit, and when it is preempted, the run gets SIGTERM: it saves a
# checkpoint and the job is queued again. jax finds the other processes through SLURM's variables.
set -euo pipefail
# sbatch runs a copy of this file from its spool folder: there the submission says where the
# checkout is.
source "${UPCYCLE_JAX_LAUNCHERS:-$(dirname "${BASH_SOURCE[0]}")}/common.sh"
parse_options "nodes gpus_per_node time retries sbatch srun" "$@"

retries="${OPTION_retries:-20}"
python="${PYTHON:-$([[ -x "$ROOT/.venv/bin/python" ]] && echo "$ROOT/.venv/bin/python" || echo python3)}"
read -r -a sbatch_options <<<"${OPTION_sbatch:-}"
read -r -a srun_options <<<"${OPTION_srun:-}"

step=(srun --kill-on-bad-exit=1 --wait=60 ${srun_options[@]+"${srun_options[@]}"}
    "$python" -m "upcycle_jax.$COMMAND" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"} --multiprocess_gpu)
submission=(sbatch "--job-name=upcycle_jax" "--nodes=${OPTION_nodes:-1}" "--ntasks-per-node=${OPTION_gpus_per_node:-8}"
    "--gpus-per-node=${OPTION_gpus_per_node:-8}" "--time=${OPTION_time:-24:00:00}" --requeue --open-mode=append --signal=TERM@180
    "--chdir=$ROOT" "--export=ALL,UPCYCLE_JAX_LAUNCHERS=$ROOT/scripts/launch,UPCYCLE_JAX_INTERRUPTED_CODE=75"
    ${sbatch_options[@]+"${sbatch_options[@]}"} "$ROOT/scripts/launch/slurm_gpu.sh" "--retries=$retries" "--srun=${OPTION_srun:-}"
    "$COMMAND" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})

if [[ -z "${SLURM_JOB_ID:-}" || -z "${UPCYCLE_JAX_LAUNCHERS:-}" ]]; then
    run "${submission[@]}"
    ((!DRY_RUN)) || run "${step[@]}"
    exit 0
fi

code=0
run "${step[@]}" || code=$?
((code)) || exit 0
((code != BAD_CONFIGURATION)) || die "the configuration cannot run; not trying again"
starts="${SLURM_RESTART_COUNT:-0}"
((starts < retries)) || { say "ended with code $code after $((starts + 1)) starts"; exit "$code"; }
say "ended with code $code: queueing the job again ($((starts + 1)) of $retries)"
run scontrol requeue "$SLURM_JOB_ID"
