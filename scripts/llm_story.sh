#!/usr/bin/env bash
# A real language model upcycled on two CPU cores. SmolLM2-135M is fetched, upcycled to 8 experts
# with plan and proof, written as a Hugging Face folder and loaded by transformers, where it is
# compared with the dense model on real text and continues a sentence beside it. Then a small model
# is trained on this machine's own text, upcycled, and continued beside its dense continuation.
#   ./scripts/llm_story.sh            docs/llm_story.md says how long it takes, and what it prints
#   ./scripts/llm_story.sh --smoke    the same path with a tiny random model; its numbers mean
#   nothing
# Killed, it goes on where it stopped when called again. Results: $STORY_DIR (default llm_story/),
# about 6 GB. STORY_PYTHON names the interpreter of an environment that has the library with its
# test extra; without it .venv is made. Words after the options go to every training run, e.g.
# --gin.TEXT_FILES="{'mail': ['/home/me/mail/*.txt']}" --gin.MIXTURE_OR_TASK_NAME="'mine'".
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

dense_steps=400 extra_steps=200 eval_period=50 smoke=
sizes=(--gin.VOCAB_SIZE=384 --gin.DecoderConfig.emb_dim=128 --gin.DecoderConfig.num_layers=4 --gin.DecoderConfig.head_dim=32 --gin.DecoderConfig.mlp_dim=384)
out="${STORY_DIR:-$root/llm_story}"
if [ "${1:-}" = --smoke ]; then
    shift
    dense_steps=6 extra_steps=4 eval_period=10 smoke=1
    sizes=(--gin.VOCAB_SIZE=384)
    out="${STORY_DIR:-$root/llm_story-smoke}"
fi
end=$((dense_steps + extra_steps))

python="${STORY_PYTHON:-}"
if [ -z "$python" ]; then
    source "$root/scripts/venv.sh"
    make_venv test
    python="$VENV/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compilation_cache}"
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" TF_CPP_MIN_LOG_LEVEL="${TF_CPP_MIN_LOG_LEVEL:-2}" HF_HUB_OFFLINE=1
mkdir -p "$out"
cd "$out"
started=$SECONDS

# say TEXT: a heading with the time so far.
say() { printf '\n=== [%d:%02d] %s\n' $(((SECONDS - started) / 60)) $(((SECONDS - started) % 60)) "$1"; }

# story STEP ARGUMENT...: a step that is no command of the library.
story() { "$python" "$root/scripts/llm_story.py" "$@"; }

# made PATH COMMAND...: runs the command that makes PATH, unless it is there already.
made() {
    local path="$1"
    shift
    if [ -e "$path" ]; then echo "$path is there already"; else "$@"; fi
}

# upcycle SOURCE RESULT [FLAG...]: plan, conversion and proof. All it says is in the log; the lines
# about single leaves are not repeated here.
upcycle() {
    local source="$1" result="$2" log="$3"
    shift 3
    made "$result/proof.json" "$python" -m upcycle_jax.upcycle --gin_file=runs/upcycle.gin --gin_file=recipes/mixtral.gin \
        --gin.INITIAL_CHECKPOINT_PATH="'$source'" --gin.OUTPUT_CHECKPOINT_PATH="'$result'" \
        --gin.FUNCTION_CHECK_DATASET="@function_check/DatasetConfig()" "$@" 2>&1 | tee "$log" |
        grep -Ev '^(target|state)/|^  target/|% ' || { tail -20 "$log" >&2; return 1; }
}

# train NAME STEPS FLAG...: a training run in $out/NAME; a killed one resumes.
train() {
    local name="$1" steps="$2"
    shift 2
    made "$name/checkpoint_$steps/commit_success.txt" "$python" -m upcycle_jax.train "$@" --gin_file=runs/llm_story.gin --gin.MODEL_DIR="'$out/$name'" \
        --gin.TRAIN_STEPS="$steps" --gin.EVAL_PERIOD="$eval_period" --gin.SAVING_PERIOD="$steps" "${more[@]}"
}
more=("$@")

say "1/8 A dense language model"
source="$out/random.gguf"
if [ -n "$smoke" ]; then
    made random.gguf story random random.gguf
elif [ -e smollm2.gguf ] || story fetch smollm2.gguf; then
    source="$out/smollm2.gguf"
else
    echo "SmolLM2 cannot be downloaded here: the story goes on with a random model, whose sentences mean nothing"
    made random.gguf story random random.gguf --large
fi

say "2/8 As a Hugging Face folder, with its tokenizer and what each reader makes of it"
made dense_hf "$python" -m upcycle_jax.convert "$source" "$out/dense_hf" --to huggingface

say "3/8 Upcycling to 8 experts: plan, conversion, proof on real text; and the folder of the mixture"
upcycle "$source" "$out/moe" moe.log --gin.OPTIMIZER=None --gin.MIXTURE_OR_TASK_NAME="'readme'" --gin.TEXT_FILES="['$root/README.md']" \
    --gin.OBJECTIVE="'language_modeling'" --gin.VOCABULARY="'$out/dense_hf'" --gin.EVAL_SPLIT="'train'" \
    --gin.TASK_FEATURE_LENGTHS="{'targets': 64}" --gin.BATCH_SIZE=2
made moe_hf "$python" -m upcycle_jax.convert "$out/moe" "$out/moe_hf" --to huggingface

say "4/8 Both in transformers: logits on real text, and a sentence"
story compare dense_hf moe_hf --text "$root/README.md"

say "5/8 A small language model from scratch on this machine's own text, $dense_steps steps"
train small "$dense_steps" --gin_file=models/tiny_lm.gin --gin_file=runs/pretrain_lm.gin "${sizes[@]}"

say "6/8 Upcycling it"
sparse="$out/small_moe/checkpoint_$dense_steps"
upcycle "$out/small/checkpoint_$dense_steps" "$sparse" small_moe.log --gin.OPTIMIZER="@AdamW()" --gin.MIXTURE_OR_TASK_NAME="'embedded_text_language_modeling'" \
    --gin.TASK_FEATURE_LENGTHS="{'targets': 128}"

say "7/8 Continuing both on the same batches, $extra_steps steps"
train small_continued "$end" --gin_file=runs/continue_pretrain_lm.gin --gin.INITIAL_CHECKPOINT_PATH="'$out/small/checkpoint_$dense_steps'"
train small_upcycled "$end" --gin_file=runs/continue_pretrain_lm.gin --gin.INITIAL_CHECKPOINT_PATH="'$sparse'"

say "8/8 The trained mixture in transformers, and the report"
made small_hf "$python" -m upcycle_jax.convert "$out/small_upcycled" "$out/small_hf" --to huggingface --quiet
story load small_hf
"$python" -m upcycle_jax.report --run=dense=small_continued --run=upcycled=small_upcycled --dense=dense --upcycled=upcycled --output_dir=report \
    --title="A small language model: dense continuation and upcycled" \
    --scale="Scaled down: a byte-level language model after $dense_steps dense steps on text from this machine, $extra_steps extra steps, on CPU. It shows the path and the shape of the curves; it is not evidence about models of useful size."
say "Done. Open $out/report/report.html"
