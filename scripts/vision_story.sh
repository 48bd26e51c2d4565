#!/usr/bin/env bash
# The vision half of the paper on two CPU cores, without a download: a small vision transformer is
# pre-trained on glyphs of the fonts that matplotlib brings, upcycled with its optimizer state (plan,
# conversion, proof, function check on glyphs), and continued beside the dense model on the same
# batches. Accuracy on views that training never draws, 10-shot accuracy on characters that it never
# saw, and the report.
#   ./scripts/vision_story.sh            ten to fifteen minutes on two idle cores; it says
#   how long each part takes
#   ./scripts/vision_story.sh --smoke    the same path with a few steps; its numbers mean nothing
# Killed, it goes on where it stopped when called again. Results: $STORY_DIR (default
# vision_story/). STORY_PYTHON names the interpreter of an environment that has the library; without
# it .venv is made. Words after the options go to every training run, e.g. --gin.LEARNING_RATE=0.001.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

dense_steps=1600 extra_steps=800 eval_period=200 saving_period=400 shots=10 unseen=None
out="${STORY_DIR:-$root/vision_story}"
if [ "${1:-}" = --smoke ]; then
    shift
    dense_steps=4 extra_steps=2 eval_period=10 saving_period=10
    shots=2 unseen=20
    out="${STORY_DIR:-$root/vision_story-smoke}"
    set -- --gin.BATCH_SIZE=64 --gin.EVAL_STEPS=1 "$@"
fi
end=$((dense_steps + extra_steps))

python="${STORY_PYTHON:-}"
if [ -z "$python" ]; then
    source "$root/scripts/venv.sh"
    make_venv ""
    python="$VENV/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compilation_cache}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}"
mkdir -p "$out"
cd "$out"
started=$SECONDS

# say TEXT: a heading with the time so far.
say() { printf '\n=== [%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$1"; }

# made PATH COMMAND...: runs the command that makes PATH, unless it is there already.
made() {
    local path="$1"
    shift
    if [ -e "$path" ]; then echo "$path is there already"; else "$@"; fi
}

# train NAME MODEL RUN STEPS [FLAG...]: a training run in $out/NAME; a killed one resumes.
train() {
    local name="$1" model="$2" run="$3" steps="$4"
    shift 4
    made "$name/checkpoint_$steps/commit_success.txt" "$python" -m upcycle_jax.train --gin_file="models/$model.gin" --gin_file="runs/$run.gin" \
        --gin_file=runs/vision_story.gin --gin.MODEL_DIR="'$out/$name'" --gin.TRAIN_STEPS="$steps" --gin.EVAL_PERIOD="$eval_period" \
        --gin.SAVING_PERIOD="$saving_period" "$@" "${more[@]}"
}
more=("$@")

# few_shot NAME MODEL STEP: accuracy of a run's last checkpoint from a few images of each class.
few_shot() {
    local result="$1/few_shot/glyphs-held_out-${shots}_shots-$3.json"
    made "$result" "$python" -m upcycle_jax.few_shot --gin_file="models/$2.gin" --gin_file=runs/few_shot.gin --gin_file=runs/vision_story.gin \
        --gin.GLYPH_CLASSES="$unseen" --gin.SHOTS="$shots" --gin.CHECKPOINT_PATH="'$out/$1'" --gin.EVAL_OUTPUT_DIR="'$out/$1'" >/dev/null
    printf '%-16s %s\n' "$1" "$(cat "$result")"
}

say "1/7 A dense vision transformer on glyphs, $dense_steps steps"
train dense vit_tiny pretrain_images "$dense_steps"

say "2/7 Upcycling it, optimizer state included: plan, conversion, proof, function check on glyphs"
sparse="$out/upcycled_checkpoint/checkpoint_$dense_steps"
made "$sparse/proof.json" "$python" -m upcycle_jax.upcycle --gin_file=models/vit_tiny_upcycled.gin --gin_file=runs/upcycle.gin \
    --gin_file=recipes/paper_vision_state.gin --gin_file=runs/vision_story.gin --gin.FUNCTION_CHECK_DATASET="@function_check/ImageDatasetConfig()" \
    --gin.INITIAL_CHECKPOINT_PATH="'$out/dense/checkpoint_$dense_steps'" --gin.OUTPUT_CHECKPOINT_PATH="'$sparse'"

say "3/7 Continuing the dense model, $extra_steps steps"
train dense_continued vit_tiny continue_pretrain_images "$end" --gin.INITIAL_CHECKPOINT_PATH="'$out/dense/checkpoint_$dense_steps'"

say "4/7 Continuing the upcycled model on the same batches, $extra_steps steps"
train upcycled vit_tiny_upcycled continue_pretrain_images "$end" --gin.INITIAL_CHECKPOINT_PATH="'$sparse'"

say "5/7 Few-shot accuracy on characters that neither has seen: before, dense, upcycled"
few_shot dense vit_tiny "$dense_steps"
few_shot dense_continued vit_tiny "$end"
few_shot upcycled vit_tiny_upcycled "$end"

say "6/7 What upcycling does before the first update: figure 15 of the paper, computed from the dense checkpoint"
made drop/figure15.json "$python" -m upcycle_jax.paper figure15 --checkpoint="$out/dense" --output_dir=drop

say "7/7 The report"
"$python" -m upcycle_jax.report --run=dense=dense_continued --run=upcycled=upcycled --dense=dense --upcycled=upcycled --output_dir=report \
    --title="A small vision transformer: dense continuation and upcycled" \
    --scale="Scaled down: a vision transformer of 0.7 million parameters after $dense_steps dense steps on glyphs of 32 x 32 pixels, $extra_steps extra steps, on CPU. It shows the path and the shape of the curves; it is not evidence about models of useful size."
say "Done. Open $out/report/report.html"
