#!/usr/bin/env bash
# What each choice does: recipes × seeds, and one table of them with intervals (docs/training.md shows a result).
#
#     scripts/ablations.sh [OUT] [OVERRIDE…]           # on GPUs: LAUNCH=zero2
#     scripts/ablations.sh --tiny [OUT] [OVERRIDE…]    # synthetic corpus, shipped model, under an hour on two cores
#
# Overrides go to every recipe. What recipes of one seed share (candidates, traces, SFT) is made once. A run that was
# stopped goes on with the same command. JOBS recipes run at a time, with a core each.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
RECIPES=${RECIPES:-sft_only rl_only no_think reward_mm_r5 reward_permutation}
SEEDS=${SEEDS:-0 1 2}
TINY=()
if [[ ${1:-} == --tiny ]]; then
    shift
    TINY=(size=tiny)
    JOBS=${JOBS:-2}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
fi
OUT=${1:-outputs/ablations}
shift || true
LAUNCH=${LAUNCH:+launch=$LAUNCH}

job() { # SEED RECIPE: one recipe; its own words go to a log beside it
    local name=${2:-recommended} folder="$OUT/$1"
    mkdir -p "$folder"
    if "$PYTHON" -m mmr5_train.recipe "experiment=[recommended${2:+,$2}]" seed="$1" out="$folder/$name" \
        shared="$folder/shared" ${LAUNCH:-} "${TINY[@]}" "${@:3}" > "$folder/$name.log" 2>&1; then
        echo "ablations: seed $1, $name: done after $SECONDS s"
    else
        echo "ablations: seed $1, $name: failed; the end of $folder/$name.log:" >&2
        tail -n 20 "$folder/$name.log" >&2
        return 1
    fi
}

running=0
start() { # never more than JOBS at a time; the first failure ends the script
    if ((running == ${JOBS:-1})); then wait -n; running=$((running - 1)); fi
    job "$@" &
    running=$((running + 1))
}
finish() { while ((running > 0)); do wait -n; running=$((running - 1)); done; }
trap 'kill $(jobs -p) 2> /dev/null || true' EXIT

for seed in $SEEDS; do start "$seed" "" "$@"; done # these make what the others share
finish
for recipe in $RECIPES; do
    for seed in $SEEDS; do start "$seed" "$recipe" "$@"; done
done
finish
"$PYTHON" -m mmr5_train.compare folder="$OUT" baseline=recommended out="$OUT/compare" overwrite=true
echo "ablations: $SECONDS s; open $OUT/compare/compare.html"
