#!/usr/bin/env bash
# Ablations: several recipes with several seeds, and tables of them with confidence intervals. docs/ablations.md
# describes the results.
#
#     scripts/ablations.sh [OUT] [OVERRIDE…]           # on GPUs: LAUNCH=zero2
#     scripts/ablations.sh --tiny [OUT] [OVERRIDE…]    # synthetic corpus, shipped model, on two cores
#
# Overrides apply to every recipe. Stages that the recipes of one seed share (candidates, traces, SFT) run once. To
# resume after an interruption, run the same command again. JOBS recipes run at the same time, with one core each.
# RECIPES and SEEDS select other recipes and seeds. --tiny takes fewer GRPO steps and held-out questions than the demo,
# and at the end prints its targets (outputs/bench/ablations.json).
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
    exit
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
ALL="base_only rl_only sft_only sft_continued reward_mm_r5 reward_gated reward_ndcg reward_rearank reward_reasonrank \
reward_fidelity kl_0 candidates_3"
SEEDS=${SEEDS:-10 11 12} # no setting was chosen on these; choose settings on seeds 0 to 9
TINY=()
TABLES=
if [[ ${1:-} == --tiny ]]; then
    shift
    TINY=(size=tiny stages.grpo.trainer.max_steps=40 stages.evaluate.limit=300)
    ALL="$ALL sft_users" # users' questions are in the synthetic corpus only
    TABLES=catalogue,users,users_unseen
    JOBS=${JOBS:-2}
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} HF_HUB_OFFLINE=1 WANDB_MODE=disabled TOKENIZERS_PARALLELISM=false
fi
RECIPES=${RECIPES:-$ALL}
OUT=${1:-outputs/ablations}
shift || true
LAUNCH=${LAUNCH:+launch=$LAUNCH}

job() { # SEED RECIPE [OVERRIDE…]: runs one recipe, with its output in a log file
    local name=${2:-recommended} folder="$OUT/$1" steps=()
    # size=tiny counts SFT in steps; 230 of them take as long as SFT and GRPO of `recommended`.
    if [[ ${TINY[*]} && $name == sft_continued ]]; then steps=(stages.sft.trainer.max_steps=230); fi
    # The SFT checkpoint that recipes with GRPO share is evaluated once, as sft_only.
    if [[ $name != sft_* ]]; then steps+=(stages.evaluate.systems.sft=null); fi
    mkdir -p "$folder"
    "$PYTHON" -m mmr5_train.recipe "experiment=[recommended${2:+,$2}]" seed="$1" out="$folder/$name" \
        shared="$folder/shared" ${LAUNCH:-} "${TINY[@]}" "${steps[@]}" "${@:3}" > "$folder/$name.log" 2>&1 &
    trap 'kill $! 2> /dev/null || true' EXIT # so that no recipe runs on after an interruption
    if wait $!; then
        echo "ablations: seed $1, $name: finished after $SECONDS s"
        if [[ -z $2 ]]; then touch "$folder/shared_stages_are_done"; fi
    else
        echo "ablations: seed $1, $name: failed; the end of $folder/$name.log:" >&2
        tail -n 20 "$folder/$name.log" >&2
        return 1
    fi
}

running=0
start() { # runs a job in the background, at most JOBS at the same time; the first failure ends the script
    if ((running == ${JOBS:-1})); then wait -n; running=$((running - 1)); fi
    job "$@" &
    running=$((running + 1))
}
finish() { while ((running > 0)); do wait -n; running=$((running - 1)); done; }
mkdir -p "$OUT"
# Each part of an interrupted run adds its seconds.
trap 'kill $(jobs -p) 2> /dev/null || true; echo $SECONDS >> "$OUT/seconds.txt"' EXIT

rm -f "$OUT"/*/shared_stages_are_done
for seed in $SEEDS; do start "$seed" "" "$@"; done # these run the shared stages
for seed in $SEEDS; do
    while [[ ! -e $OUT/$seed/shared_stages_are_done ]]; do
        wait -n
        running=$((running - 1))
    done
    for recipe in $RECIPES; do start "$seed" "$recipe" "$@"; done
done
finish
"$PYTHON" -m mmr5_train.compare folder="$OUT" baseline=recommended \
    "question_types=[$TABLES]" out="$OUT/compare" overwrite=true
if [[ ${TINY[*]} && $RECIPES == "$ALL" ]]; then
    parts=$(paste -sd+ "$OUT/seconds.txt" 2> /dev/null || echo 0)
    "$PYTHON" scripts/benchmarks/bench_ablations.py --folder "$OUT" --seconds $((parts + SECONDS))
fi
echo "ablations: $SECONDS s; open $OUT/compare/compare.html"
