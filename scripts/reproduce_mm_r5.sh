#!/usr/bin/env bash
# Reproduces MM-R5's three checkpoints (SFT only, RL only, SFT and RL) with the paper's settings, from the download of
# the data to a table next to the published figures.
#
#     OPENAI_API_KEY=… scripts/reproduce_mm_r5.sh [OUT]     # 4 GPUs; the teacher is GPT-4o
#     scripts/reproduce_mm_r5.sh --tiny [OUT]               # the same commands on a synthetic corpus, in minutes, on CPUs
#
# LAUNCH is accelerate's config (default: zero2 on 4 GPUs, as in the paper), and GPU is the card to plan for. To resume
# after an interruption, run the same command again; it does not repeat teacher calls.
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
    exit
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SIZE=()
if [[ ${1:-} == --tiny ]]; then
    shift
    OUT=${1:-outputs/reproduce_tiny}
    LAUNCH=${LAUNCH:-cpu}
    SIZE=(size=tiny stages.corpus.documents=12 stages.evaluate.limit=8 stages.evaluate.samples=0
        stages.sft.trainer.max_steps=3 stages.grpo.trainer.max_steps=2
        stages.grpo.trainer.per_device_train_batch_size=6 stages.grpo.trainer.num_generations=6)
    export HF_ENDPOINT=${HF_ENDPOINT:-http://127.0.0.1:${HUB_PORT:-18080}} WANDB_MODE=disabled
    export TOKENIZERS_PARALLELISM=false
    "$PYTHON" scripts/hub_server.py "${HF_ENDPOINT##*:}" & # replaces the hub, with files of a few bytes
    trap 'kill %1' EXIT
    until (exec 3<> "/dev/tcp/127.0.0.1/${HF_ENDPOINT##*:}") 2> /dev/null; do
        kill -0 %1 || { echo "error: scripts/hub_server.py did not start" >&2; exit 1; }
        sleep 0.1
    done
    DATA=$OUT/download
else
    OUT=${1:-outputs/reproduce}
    LAUNCH=${LAUNCH:-zero2}
    DATA=data
fi

run() { echo; echo "> $*"; "$PYTHON" -m "$@"; }

run data_construction.download dataset=evaluation out="$DATA/mmdocir" yes=true
run data_construction.download dataset=train out="$DATA/mmdocir_train" yes=true
run mmr5_train.plan experiment=mm_r5 gpu="${GPU:-a100_80gb}" gpus="${GPUS:-4}" shared="$OUT/shared" "${SIZE[@]}"
for recipe in mm_r5 sft_only rl_only; do
    run mmr5_train.recipe experiment=$recipe out="$OUT/$recipe" shared="$OUT/shared" launch="$LAUNCH" "${SIZE[@]}"
done
run mmr5_train.compare folder="$OUT" baseline=sft_only out="$OUT/compare" overwrite=true
run mmr5_train.publish checkpoint="$OUT/shared/sft/model" evaluation="$OUT/sft_only/evaluation" license=apache-2.0
for recipe in mm_r5 rl_only; do
    run mmr5_train.publish checkpoint="$OUT/$recipe/grpo/model" evaluation="$OUT/$recipe/evaluation" license=apache-2.0
done
echo; echo "open $OUT/compare/compare.html; checkpoints with model cards:"
echo "$OUT/shared/sft/model $OUT/rl_only/grpo/model $OUT/mm_r5/grpo/model"
