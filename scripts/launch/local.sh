#!/usr/bin/env bash
# Runs a command as several processes of one run on this machine, and starts it again when a process
# dies.
#
#   scripts/launch/local.sh --processes=2 --devices=4 train --gin_file=runs/pretrain.gin
#   --gin.MODEL_DIR="'/tmp/run'"
#
# Options (before the command's name):
#   --processes=N         processes (default 2)
#   --devices=N           virtual CPU devices of each process (default 4); not used with --gpus
#   --gpus=N              GPUs of each process instead: process i gets GPUs i*N to i*N+N-1
#   --retries=N           how often to start again after a failure (default 3); each start resumes from the latest checkpoint
#   --grace=SECONDS       how long the others may live on when one has died (default 10)
#   --port=PORT           port of process 0 (default: a free one for each start)
#   --dry_run             print the commands, one per process, and stop
# PYTHON names the interpreter (default: .venv of the checkout where there is one, or else python3).
# SIGTERM and SIGINT are handed on once: the run saves a checkpoint and ends.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
parse_options "processes devices gpus retries grace port" "$@"

processes="${OPTION_processes:-2}"
retries="${OPTION_retries:-3}"
grace="${OPTION_grace:-10}"
python="${PYTHON:-$([[ -x "$ROOT/.venv/bin/python" ]] && echo "$ROOT/.venv/bin/python" || echo python3)}"
pids=()
stopping=0

free_port() {
    "$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

# Sets LINE: the command of process $1 with port $2.
command_of() {
    local index="$1" port="$2" first
    LINE=(env PYTHONUNBUFFERED=1 UPCYCLE_JAX_INTERRUPTED_CODE=75 "PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}")
    if [[ -n "${OPTION_gpus:-}" ]]; then
        first=$((index * OPTION_gpus))
        LINE+=("CUDA_VISIBLE_DEVICES=$(seq -s, "$first" $((first + OPTION_gpus - 1)))")
    else
        LINE+=(JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=${OPTION_devices:-4}")
    fi
    LINE+=("$python" -m "upcycle_jax.$COMMAND" ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})
    if ((processes > 1)); then
        LINE+=("--coordinator_address=127.0.0.1:$port" "--process_count=$processes" "--process_index=$index")
    fi
}

hand_on() {
    stopping=1
    say "handing on the signal: the run saves and ends"
    kill -TERM "${pids[@]}" 2>/dev/null || true
}

# Runs all processes once; returns the exit code of the first that failed, or 0.
attempt() {
    local port index pid code first=0 killer="" left running
    port="${OPTION_port:-$(free_port)}"
    pids=()
    for ((index = 0; index < processes; index++)); do
        command_of "$index" "$port"
        "${LINE[@]}" > >(sed -u "s/^/[$index] /") 2>&1 &
        pids+=("$!")
    done
    left=("${pids[@]}")
    while ((${#left[@]})); do
        sleep 0.3
        running=()
        for pid in "${left[@]}"; do
            if kill -0 "$pid" 2>/dev/null; then
                running+=("$pid")
                continue
            fi
            code=0
            wait "$pid" || code=$?
            if ((code && !first)); then
                first="$code"
                ( sleep "$grace"; kill -KILL "${pids[@]}" ) >/dev/null 2>&1 &
                killer="$!"
            fi
        done
        left=(${running[@]+"${running[@]}"})
    done
    if [[ -n "$killer" ]]; then
        kill "$killer" 2>/dev/null || true
        wait "$killer" 2>/dev/null || true
    fi
    return "$first"
}

if ((DRY_RUN)); then
    for ((index = 0; index < processes; index++)); do
        command_of "$index" "${OPTION_port:-12321}"
        quoted "${LINE[@]}"
    done
    exit 0
fi

trap hand_on TERM INT
for ((try = 0; ; try++)); do
    code=0
    attempt || code=$?
    ((code)) || exit 0
    ((code != BAD_CONFIGURATION)) || die "the configuration cannot run; not trying again"
    ((!stopping)) || exit "$code"
    ((try < retries)) || { say "ended with code $code after $((try + 1)) starts"; exit "$code"; }
    say "a process ended with code $code; starting all again ($((try + 1)) of $retries)"
done
