#!/usr/bin/env bash
# Fills MM-R5's published tables: first stages from score files × checkpoints, on MMDocIR's 1,658 questions.
#
#     scripts/reproduce_tables.sh OUT ColQwen=scores/colqwen.jsonl DSE=scores/dse.run -- \
#         'MM-R5=outputs/reproduce/mm_r5/grpo/model' 'SFT only=outputs/reproduce/shared/sft/model'
#     scripts/reproduce_tables.sh --tiny [OUT]    # the same commands on a synthetic corpus, with the shipped model
#
# A first stage is NAME=SCORES (docs/data_formats.md, "First-stage scores"), or BM25 without a file. A system is
# PUBLISHED ROW=CHECKPOINT. PROCESSES=4 divides the questions among four GPUs. To resume after an interruption, run the
# same command again.
set -euo pipefail
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"; }
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    usage
    exit
fi
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
OPTIONS=(batch_size=4)
CORPUS=(corpus=mmdocir corpus.folder="${CORPUS:-data/mmdocir}")

run() { echo; echo "> $*"; "$PYTHON" -m "$@"; }
is_complete() { [[ -f $1/manifest.json ]] && grep -q '"finished": true' "$1/manifest.json"; }

if [[ ${1:-} == --tiny ]]; then
    OUT=${2:-outputs/tables_tiny}
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    is_complete "$OUT/corpus" || run data_construction.synthetic out="$OUT/corpus" documents=4 overwrite=true
    CORPUS=(corpus=synthetic corpus.folder="$OUT/corpus" corpus.page_cache="$OUT/pages")
    OPTIONS=(batch_size=16 max_new_tokens=64)
    # The second first stage reads the run file of the first one as its score file.
    set -- "$OUT" BM25 "BM25 run=$OUT/BM25/evaluation/trec/first_stage.run" -- 'MM-R5=tiny' 'SFT only=tiny'
elif [[ $# -lt 4 ]]; then
    usage >&2
    exit 2
else
    is_complete "${CORPUS[1]#*=}" || [[ -d ${CORPUS[1]#*=} ]] || run data_construction.download dataset=evaluation yes=true out="${CORPUS[1]#*=}"
fi

OUT=$1
shift
stages=()
while [[ ${1:---} != -- ]]; do stages+=("$1"); shift; done
shift
systems='' rows=''
for system in "$@"; do # system names become file names
    name=${system%%=*} key=${system%%=*}
    key=${key//[^[:alnum:].+-]/_}
    systems+="${systems:+,}$key:'${system#*=}'"
    rows+="${rows:+,}$key:'$name'"
done
evaluations=''
for stage in "${stages[@]}"; do
    name=${stage%%=*} folder="$OUT/${stage%%=*}"
    scores=(retriever=bm25)
    [[ $stage == *=* ]] && scores=(retriever=scores "retriever.file='${stage#*=}'")
    is_complete "$folder/candidates" || run data_construction.candidates "${CORPUS[@]}" "${scores[@]}" out="'$folder/candidates'" \
        n_heldout=10 'split={train:0,select:0,heldout:1}' overwrite=true
    launch=(mmr5_train.evaluate)
    [[ ${PROCESSES:-1} -gt 1 ]] && launch=(accelerate.commands.launch --num_processes "$PROCESSES" -m mmr5_train.evaluate)
    is_complete "$folder/evaluation" || run "${launch[@]}" data="'$folder/candidates/heldout.jsonl'" "systems={$systems}" \
        "${OPTIONS[@]}" out="'$folder/evaluation'"
    evaluations+="${evaluations:+,}$name:'$folder/evaluation'"
done
run mmr5_train.tables "evaluations={$evaluations}" "rows={$rows}" out="$OUT/tables" overwrite=true
echo "open $OUT/tables/tables.html"
