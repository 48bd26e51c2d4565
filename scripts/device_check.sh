#!/usr/bin/env bash
# What one accelerator reaches, in at most seven minutes: MoE layers against the FLOP-equal dense MLP
# in every dispatch form, grouped products, train steps of the three families with their MFU,
# decoding, and a cell of a study. Prints one table and writes $OUT/device_check.json.
#   ./scripts/device_check.sh                  on a machine with an accelerator
#   ./scripts/device_check.sh --smoke          the same path at tiny sizes, on a CPU; its numbers mean
#   nothing
#   ./scripts/device_check.sh --prepare DIR    caches text in DIR, where SeqIO is installed
#   ./scripts/device_check.sh --cache=DIR      a cell of text from that cache beside that of images
# Needs what the wheel needs but for SeqIO and TensorFlow, and no network. PYTHON names the
# interpreter (default: that of .venv, else python3); OUT the folder of results (default
# device_check/ of the checkout). Other words go to scripts/device_check.py (--help).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="${PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v "${PYTHON:-python3}")"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

if [ "${1:-}" = --prepare ]; then
    exec "$python" -m upcycle_jax.cache_tasks --tasks=embedded_text_span_corruption --output_cache_dir="${2:?give the folder of the cache}"
fi
out="${OUT:-$root/device_check}"
mkdir -p "$out"
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$out/compilation_cache}" PYTHONUNBUFFERED=1
# Results are written as they come: where time is up, those of finished rows are there.
exec timeout --signal=INT --kill-after=10 420 "$python" "$root/scripts/device_check.py" --out="$out" "$@"
