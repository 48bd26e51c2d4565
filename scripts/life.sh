#!/usr/bin/env bash
# The whole life of a run on CPU, on data that needs no download, with a check after every stage:
# cache, pre-train, kill -9, resume, upcycle, continue through a SIGTERM, fine-tune, evaluate, infer
# in two jobs. Fails loudly at the first thing that does not hold; prints what was verified.
#   ./scripts/life.sh            1400 training steps ./scripts/life.sh --smoke    160 steps: the
#   same stages; its scores mean nothing (docs/benchmarks.md has how long it took)
# Killed, it goes on with the stage that it was in when called again; stages that interrupt a run
# begin anew then. Results: $LIFE_DIR (default life/). LIFE_PYTHON names the interpreter of an
# environment that has the library; without it .venv is made, as scripts/quickstart.sh does.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

dense_steps=500 extra_steps=250 tune_steps=150 period=50 examples=256
out="${LIFE_DIR:-$root/life}"
if [ "${1:-}" = --smoke ]; then
    dense_steps=48 extra_steps=32 tune_steps=16 period=8 examples=32
    out="${LIFE_DIR:-$root/life-smoke}"
fi
end=$((dense_steps + extra_steps))

python="${LIFE_PYTHON:-}"
if [ -z "$python" ]; then
    source "$root/scripts/venv.sh"
    make_venv ""
    python="$VENV/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compilation_cache}" JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
mkdir -p "$out/done"
cd "$out"
started=$SECONDS

trap 'kill $(jobs -p) 2>/dev/null || true' EXIT # a run in the background does not see Ctrl-C

say() { printf '\n=== [%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$1"; }

# stage NAME TEXT: calls the function NAME, unless an earlier call of the script has.
stage() {
    if [ -f "done/$1" ]; then
        say "$2: done before"
    else
        say "$2"
        current="$1"
        echo "$2" >"done/$1.partial"
        "$1"
        mv "done/$1.partial" "done/$1"
    fi
}

# verify CHECK ARGUMENT...: one check of scripts/life_check.py; what it says is kept for the
# summary.
verify() {
    local said
    said="$("$python" "$root/scripts/life_check.py" "$@")"
    printf '  verified: %s\n' "$said" | tee -a "done/$current.partial"
}

# training NAME MODEL RUN STEPS [FLAG...]: sets `words` to the command of a training run in
# $out/NAME that reports every step.
training() {
    local name="$1" model="$2" run="$3" steps="$4"
    shift 4
    words=("$python" -m upcycle_jax.train --gin_file="models/$model.gin" --gin_file="runs/$run.gin" "$@" --gin.MODEL_DIR="'$out/$name'"
        --gin.TRAIN_STEPS="$steps" --gin.SAVING_PERIOD="$period" --gin.KEEP_CHECKPOINTS=None --gin.STATS_PERIOD=1
        --gin.EVAL_PERIOD=None --gin.EVAL_STEPS=2)
}

train() {
    training "$@"
    "${words[@]}" 2>>"$1.log" || { tail -20 "$1.log" >&2; return 1; }
}

# interrupt SIGNAL STEP NAME MODEL RUN STEPS [FLAG...]: starts that training run and sends it SIGNAL
# once it has saved checkpoint_STEP. The exit status is that of the run.
interrupt() {
    local signal="$1" checkpoint="$3/checkpoint_$2" log="$3.log" waited=0
    shift 2
    training "$@"
    "${words[@]}" 2>>"$log" &
    local pid=$!
    until [ -f "$checkpoint/commit_success.txt" ]; do
        kill -0 "$pid" 2>/dev/null || { tail -20 "$log" >&2; echo "the run ended before it could be interrupted" >&2; exit 1; }
        [ $((waited += 1)) -lt 6000 ] || { echo "no $checkpoint in ten minutes" >&2; exit 1; }
        sleep 0.1
    done
    kill "-$signal" "$pid"
    wait "$pid"
}

text=(--gin_file=runs/tiny_t5.gin)
cached=("${text[@]}" --gin.USE_CACHED_TASKS=True --seqio_additional_cache_dirs="$out/cache")
labels=(--gin.MIXTURE_OR_TASK_NAME="'offline_suite_finetune'" --gin.VOCAB_SIZE=384 --gin.NUM_EXPERTS=8
    --gin.TASK_FEATURE_LENGTHS="{'inputs': 512, 'targets': 32}" --gin.BATCH_SIZE=16)
dense="$out/dense/checkpoint_$dense_steps" sparse="$out/sparse/checkpoint_$dense_steps"

cache() {
    "$python" -m upcycle_jax.cache_tasks --tasks=embedded_text_span_corruption --output_cache_dir="$out/cache" >cache.log 2>&1 ||
        { tail -20 cache.log >&2; return 1; }
    verify cached cache
}

reference() {
    train reference t5_1_1_tiny pretrain "$dense_steps" "${cached[@]}"
    verify falls reference
}

killed() {
    rm -rf dense dense.log # of an earlier call: the run is to be killed after its first checkpoint, not after its last
    if interrupt KILL "$period" dense t5_1_1_tiny pretrain "$dense_steps" "${cached[@]}"; then
        echo "the run ended before kill -9 reached it" >&2
        return 1
    fi
    verify state dense stopped
    train dense t5_1_1_tiny pretrain "$dense_steps" "${cached[@]}"
    verify restarted dense "$period"
    verify same_losses dense reference
}

upcycled() {
    local flags=(--gin_file=models/t5_1_1_tiny_upcycled.gin --gin_file=runs/upcycle.gin "${text[@]}" --gin.INITIAL_CHECKPOINT_PATH="'$dense'"
        --gin.OUTPUT_CHECKPOINT_PATH="'$sparse'" --gin.FUNCTION_CHECK_DATASET="@function_check/DatasetConfig()")
    [ -f "$sparse/proof.json" ] || "$python" -m upcycle_jax.upcycle "${flags[@]}" >upcycle.log 2>&1 || { tail -20 upcycle.log >&2; return 1; }
    "$python" -m upcycle_jax.verify "${flags[@]}" >verify.log 2>&1 || { tail -20 verify.log >&2; return 1; }
    verify proof "$sparse"
}

continued() {
    local flags=(t5_1_1_tiny_upcycled continue_pretrain "$end" "${cached[@]}" --gin.INITIAL_CHECKPOINT_PATH="'$sparse'")
    rm -rf continued continued.log
    interrupt TERM $((dense_steps + period)) continued "${flags[@]}"
    verify state continued stopped
    train continued "${flags[@]}"
    verify continued continued "$sparse"
    verify falls continued
}

tuned() {
    train tuned t5_1_1_tiny_upcycled finetune "$tune_steps" "${labels[@]}" --gin.INITIAL_CHECKPOINT_PATH="'$out/continued/checkpoint_$end'" \
        --gin.RESTORE_STEP="'reset'" --gin.RESTORE_OPTIMIZER_STATE="'reset'"
    verify falls tuned
}

evaluated() {
    "$python" -m upcycle_jax.eval --gin_file=models/t5_1_1_tiny_upcycled.gin --gin_file=runs/eval.gin "${labels[@]}" \
        --gin.CHECKPOINT_PATH="'$out/tuned'" --gin.EVAL_OUTPUT_DIR="'$out/tuned'" --gin.CHECKPOINT_STEPS="'all'" --gin.SKIP_EVALUATED=True \
        --gin.PREDICT_BY="'rank'" --gin.NUM_EXAMPLES="$examples" --gin.EVAL_STEPS=2 >eval.log 2>&1 || { tail -20 eval.log >&2; return 1; }
    verify evaluated tuned accuracy
    verify evaluated tuned average
}

# infer FOLDER [FLAG...]
infer() {
    "$python" -m upcycle_jax.infer --gin_file=models/t5_1_1_tiny_upcycled.gin --gin_file=runs/infer.gin "${labels[@]}" \
        --gin.CHECKPOINT_PATH="'$out/tuned'" --gin.INFER_OUTPUT_DIR="'$out/$1'" --gin.NUM_EXAMPLES="$examples" "${@:2}" >>infer.log 2>&1 ||
        { tail -20 infer.log >&2; return 1; }
}

inferred() {
    infer whole
    infer parts --gin.SHARD_ID=0 --gin.NUM_SHARDS=2
    infer parts --gin.SHARD_ID=1 --gin.NUM_SHARDS=2
    local file=offline_suite_package-predict.jsonl
    verify interleaved "whole/$file-00000-of-00001" "parts/$file-00000-of-00002" "parts/$file-00001-of-00002"
}

stage cache "1/8 Tokenising the text once, as files that training reads without TensorFlow"
stage reference "2/8 Pre-training a dense model, $dense_steps steps, without a stop"
stage killed "3/8 The same again, killed with -9 after checkpoint_$period, and resumed"
stage upcycled "4/8 Upcycling its checkpoint to 8 experts, on disk; proof and verify"
stage continued "5/8 Continuing the sparse model for $extra_steps steps, through a SIGTERM"
stage tuned "6/8 Fine-tuning on labels, $tune_steps steps"
stage evaluated "7/8 Evaluating every checkpoint by ranking the labels"
stage inferred "8/8 Predictions by one job and by two"

say "Runs"
"$python" -m upcycle_jax.runs "$out"
say "Verified, in $(((SECONDS - started) / 60)) min $(((SECONDS - started) % 60)) s"
for name in cache reference killed upcycled continued tuned evaluated inferred; do cat "done/$name"; done
