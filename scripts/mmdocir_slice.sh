#!/usr/bin/env bash
# The complete pipeline on real documents, in minutes on two cores: PDFs and questions in MMDocIR's format →
# candidates → traces → a few steps of SFT and of GRPO with the tiny model → evaluation → reports on the data and on
# the results.
#
#     scripts/mmdocir_slice.sh FOLDER [OUT]
#
# FOLDER contains MMDocIR_annotations.jsonl and documents/*.pdf. The tiny model can't read real pages. This script tests
# that every stage accepts real data, and shows the commands for your own documents (docs/getting_started.md).
set -euo pipefail
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"
    exit
fi
cd "$(dirname "$0")/.."
FOLDER=${1:?usage: scripts/mmdocir_slice.sh FOLDER [OUT]}
OUT=${2:-outputs/slice}
PYTHON=${PYTHON:-.venv/bin/python}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} WANDB_MODE=${WANDB_MODE:-disabled}

run() { echo; echo "> $*"; "$PYTHON" -m "$@"; }

run data_construction.candidates corpus=mmdocir_pdf corpus.folder="$FOLDER" corpus.page_cache="$OUT/pages" \
    corpus.max_side=1024 out="$OUT/data" 'split={train:0.5,select:0.2,heldout:0.3}' overwrite=true
run data_construction.traces data="$OUT/data/train.jsonl" out="$OUT/traces" overwrite=true
run mmr5_train.sft data="$OUT/traces/traces.jsonl" out="$OUT/sft" overwrite=true \
    trainer.max_steps=10 trainer.per_device_train_batch_size=4 trainer.warmup_steps=2
run mmr5_train.select questions="$OUT/data/select.jsonl" seen="$OUT/traces/traces.jsonl" out="$OUT/select" \
    overwrite=true
run data_construction.report data="$OUT/data" traces="$OUT/traces" select="$OUT/select" out="$OUT/data_report" \
    overwrite=true
run mmr5_train.grpo data="$OUT/select/questions.jsonl" model.path="$OUT/sft/model" out="$OUT/grpo" overwrite=true \
    trainer.max_steps=3 trainer.per_device_train_batch_size=16 trainer.max_completion_length=96
run mmr5_train.evaluate data="$OUT/data/heldout.jsonl" \
    "systems={sft:$OUT/sft/model,sft+grpo:$OUT/grpo/model}" batch_size=64 max_new_tokens=128 \
    out="$OUT/evaluation" overwrite=true
run mmr5_train.report evaluation="$OUT/evaluation" sft="$OUT/sft" grpo="$OUT/grpo" \
    "data=[$OUT/data,$OUT/traces,$OUT/select]" out="$OUT/report" overwrite=true
echo; echo "open $OUT/data_report/data_report.html and $OUT/report/report.html"
