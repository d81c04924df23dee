#!/usr/bin/env bash
# MM-R5's three checkpoints (SFT only, RL only, SFT then RL) with the paper's settings, from download to a table beside
# the published figures.
#
#     OPENAI_API_KEY=… scripts/reproduce_mm_r5.sh [OUT]     # 4 GPUs; GPT-4o is the teacher
#     scripts/reproduce_mm_r5.sh --tiny [OUT]               # the same lines on a synthetic corpus, in minutes, on CPUs
#
# LAUNCH is accelerate's configuration (default: ZeRO-2 on 4 GPUs, as in the paper), GPU the card to plan for. A run
# that was stopped goes on with the same command, and pays the teacher for nothing twice.
set -euo pipefail
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
    "$PYTHON" scripts/hub_server.py "${HF_ENDPOINT##*:}" & # stands in for the hub: files of a few bytes
    trap 'kill %1' EXIT
    until (exec 3<> "/dev/tcp/127.0.0.1/${HF_ENDPOINT##*:}") 2> /dev/null; do kill -0 %1 && sleep 0.1; done
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
echo; echo "open $OUT/compare/compare.html; the checkpoints, with a model card each:"
echo "$OUT/shared/sft/model $OUT/rl_only/grpo/model $OUT/mm_r5/grpo/model"
