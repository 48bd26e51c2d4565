#!/usr/bin/env bash
# The whole story on CPU: pre-train a small dense language model, upcycle it, continue both, train
# the same MoE from scratch, compare.
#   ./scripts/quickstart.sh            less than twelve minutes on two idle cores, installation
#   included (docs/benchmarks.md)
#   ./scripts/quickstart.sh --smoke    the same path in a minute or two; its numbers mean nothing
# Killed, it goes on where it stopped when called again. Results: $QUICKSTART_DIR (default
# quickstart/). Words after the options go to the cache of the text, to every training run and to
# the conversion, e.g.
# --gin.TEXT_FILES="{'mail': ['mail/*.txt'], 'code': ['src/**/*.py']}"
# --gin.MIXTURE_OR_TASK_NAME="'mine'".
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

# The gain grows with the steps. A thousand show it clearly.
dense_steps=1500 extra_steps=1000 scratch_steps=500 eval_period=250
out="${QUICKSTART_DIR:-$root/quickstart}"
if [ "${1:-}" = --smoke ]; then
    shift
    dense_steps=20 extra_steps=10 scratch_steps=10 eval_period=5
    out="${QUICKSTART_DIR:-$root/quickstart}-smoke"
fi
end=$((dense_steps + extra_steps))

source "$root/scripts/venv.sh"
make_venv ""
# Later runs, and resumed ones, find programs that an earlier one compiled.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compilation_cache}"
# A run that is told to stop ends the script, which goes on with it when called again.
export UPCYCLE_JAX_INTERRUPTED_CODE=75
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
mkdir -p "$out"
cd "$out"
started=$SECONDS
# The tiny models of results/findings/core_decoder_only, which has three seeds and longer runs.
shared=(--gin_file=sweeps/parts/tiny_decoder.gin)

# say TEXT: a heading with the time so far.
say() { printf '\n=== [%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$1"; }

# train NAME MODEL RUN STEPS [FLAG...]: a training run in $out/NAME. A finished one is not started
# again, a killed one resumes.
train() {
    local name="$1" model="$2" run="$3" steps="$4"
    shift 4
    if [ -f "$name/checkpoint_$steps/commit_success.txt" ]; then
        echo "$name is complete (step $steps)"
        return
    fi
    "$VENV/bin/python" -m upcycle_jax.train --gin_file="models/$model.gin" --gin_file="runs/$run.gin" "${shared[@]}" \
        --gin.MODEL_DIR="'$out/$name'" --gin.TRAIN_STEPS="$steps" --gin.EVAL_PERIOD="$eval_period" --gin.SAVING_PERIOD="$eval_period" \
        "${cached[@]}" "$@"
}

say "1/7 Tokenising the text, once for all runs"
cache="$out/cache"
"$VENV/bin/python" -m upcycle_jax.cache_tasks --gin_file=models/tiny_lm.gin --gin_file=runs/pretrain_lm.gin "${shared[@]}" \
    --output_cache_dir="$cache" "$@"
cached=(--gin.USE_CACHED_TASKS=True --seqio_additional_cache_dirs="$cache")

say "2/7 Pre-training the dense model, $dense_steps steps"
train dense tiny_lm pretrain_lm "$dense_steps" "$@"

say "3/7 Upcycling its checkpoint: plan, conversion, proof"
sparse="$out/upcycled_checkpoint/checkpoint_$dense_steps"
if [ -f "$sparse/proof.json" ]; then
    echo "$sparse is complete"
else
    "$VENV/bin/python" -m upcycle_jax.upcycle --gin_file=models/tiny_lm_upcycled.gin --gin_file=runs/upcycle_lm.gin "${shared[@]}" \
        --gin.OPTIMIZER="@AdamW()" \
        --gin.INITIAL_CHECKPOINT_PATH="'$out/dense/checkpoint_$dense_steps'" --gin.OUTPUT_CHECKPOINT_PATH="'$sparse'" "$@"
fi

say "4/7 Continuing the dense model, $extra_steps steps"
train dense_continued tiny_lm continue_pretrain_lm "$end" --gin.INITIAL_CHECKPOINT_PATH="'$out/dense/checkpoint_$dense_steps'" "$@"

say "5/7 Continuing the upcycled model on the same batches, $extra_steps steps"
train upcycled tiny_lm_upcycled continue_pretrain_lm "$end" --gin.INITIAL_CHECKPOINT_PATH="'$sparse'" "$@"

say "6/7 The same MoE from scratch on the same batches, $scratch_steps steps"
train moe_from_scratch tiny_lm_upcycled pretrain_lm "$scratch_steps" --gin.FIRST_BATCH="$dense_steps" "$@"

say "7/7 The report"
"$VENV/bin/python" -m upcycle_jax.report --run=dense="$out/dense_continued" --run=upcycled="$out/upcycled" \
    --run="MoE from scratch"="$out/moe_from_scratch" --dense=dense --upcycled=upcycled --output_dir="$out/report" \
    --title="Quickstart: dense continuation, upcycled, and MoE from scratch" \
    --scale="Scaled down: a tiny byte-level language model after $dense_steps dense steps on text from this machine, $extra_steps extra steps, on CPU. It shows the path and the shape of the curves; it is not evidence about models of useful size."
say "Done. Open $out/report/report.html"
