#!/usr/bin/env bash
# Summaries: a teacher of documents and summaries; students without it, with it at word level, and on the summaries that
# it writes (pseudo-labels: Shleifer & Rush 2020); a report in ROUGE.
#
# Prepare:  documents and their summaries in one folder, one per line: train.document, train.summary, and the same of
#           valid and test. With no folder given, a small corpus is made, whose summaries say in other words what the
#           first of each document's sentences says.
# Run:      bash recipes/summarise.sh [CORPUS_DIR]
#           run it again after an interruption, and it continues.
# Adapt:    the sizes are for the made corpus and minutes on a CPU. Real documents want more of everything: MAX_SOURCE=1024
#           VOCAB=32000 TEACHER_DIM=512 TEACHER_LAYERS=6 STUDENT_DIM=256 STUDENT_LAYERS=3 UPDATES=100000 MAX_TOKENS=16000
#           A toy run, a minute or two: SIZE=500 HELD_OUT=24 VOCAB=300 UPDATES=30 TEACHER_DIM=32 STUDENT_DIM=16
#           A BART that you have as the teacher: docs/guides/summarisation.md.
#
# Environment (see also setup.sh and stages.sh):
#   WORK             summarise-work     results; delete it to start again
#   SRC, TGT         document, summary  how the files' names end
#   LANGUAGE         en                 of the made corpus
#   SIZE, HELD_OUT, SENTENCES   16000, 500, 4    of the made corpus: documents in train, in valid and test each, their sentences
#   VOCAB            2000               joint SentencePiece vocabulary
#   MAX_SOURCE       256                symbols of a document that are read; the rest is cut off
#   METRICS          rouge              of the report; also bleu, chrf, ter
#   TEACHER_LAYERS, TEACHER_DIM         2, 128     of encoder and decoder each; the ffn is 4 times as wide
#   STUDENT_LAYERS, STUDENT_DIM         1, 64
#   TEACHER_UPDATES, STUDENT_UPDATES    UPDATES (1500)
#   MAX_TOKENS       8192               per batch, padding included: mostly of the documents
#   KD_WEIGHT, KD_TEMPERATURE           0.5, 1
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

SRC=${SRC:-document} TGT=${TGT:-summary}
WORK=${WORK:-$HERE/../summarise-work}
VOCAB=${VOCAB:-2000}
METRICS=${METRICS:-rouge}
EXTRAS=${EXTRAS:-recipes,rouge}

source "$HERE/setup.sh"
source "$HERE/stages.sh"
[ $# -le 1 ] || die "expected at most one argument, the folder with the text: bash recipes/summarise.sh [CORPUS_DIR]"
case " $METRICS " in *" rouge "*)
    python -c 'import rouge_score' 2>/dev/null || die "ROUGE needs a package: pip install rouge-score, or METRICS=chrf."
    ;;
esac

if [ $# -eq 1 ]; then
    for split in $SPLITS; do use_text "$split" "$1/$split"; done
elif ! done_already "$WORK/text"; then
    say "writing the corpus"
    python "$HERE/corpus.py" "$WORK/text.new" --src "${LANGUAGE:-en}" --tgt "${LANGUAGE:-en}" --names "$SRC" "$TGT" \
        --sentences "${SENTENCES:-4}" --size "${SIZE:-16000}" --held-out "${HELD_OUT:-500}"
    mv "$WORK/text.new" "$WORK/text"
fi
prepare_spm
binarise --joined-dictionary

long="--truncate-source --max-source-positions ${MAX_SOURCE:-256}"
model() { # LAYERS DIM UPDATES
    local heads=$(($2 < 64 ? 2 : $2 / 32))
    echo "--arch transformer --share-all-embeddings --encoder-layers $1 --decoder-layers $1
        --encoder-embed-dim $2 --decoder-embed-dim $2
        --encoder-ffn-embed-dim $((4 * $2)) --decoder-ffn-embed-dim $((4 * $2))
        --encoder-attention-heads $heads --decoder-attention-heads $heads
        --optimizer adam --adam-betas (0.9,0.98) --clip-norm 1 --lr 0.004 --max-update $3
        --lr-scheduler inverse_sqrt --warmup-updates $(($3 / 5 + 1))
        --max-tokens ${MAX_TOKENS:-8192} --seed 1 --num-workers 0 $long"
}
teacher=$(model "${TEACHER_LAYERS:-2}" "${TEACHER_DIM:-128}" "${TEACHER_UPDATES:-${UPDATES:-1500}}")
student=$(model "${STUDENT_LAYERS:-1}" "${STUDENT_DIM:-64}" "${STUDENT_UPDATES:-${UPDATES:-1500}}")" ${STUDENT_FLAGS:-}"

best=checkpoint_best.pt
teacher_checkpoint=$WORK/models/teacher/$best
plain_flags
train teacher $teacher --dropout 0.1 "${LOSS[@]}"
# a summary is much shorter than its document, which the filters of translations would take for a fault
SEARCH_FLAGS=${SEARCH_FLAGS:---beam $BEAM} \
    SEQUENCES_FLAGS="$long --max-length 100000 --max-length-ratio 1000 ${SEQUENCES_FLAGS:-}" \
    distil_sequences summaries "$teacher_checkpoint"
train plain $student "${LOSS[@]}"
DATA_BIN=data-summaries train sequence_level $student "${LOSS[@]}"
CACHE_FLAGS="$long ${CACHE_FLAGS:-}" cache_teacher "$teacher_checkpoint"
distil_flags "$teacher_checkpoint"
train word_level $student "${LOSS[@]}"

models=()
for name in teacher plain word_level sequence_level; do models+=("$name=$WORK/models/$name/$best"); done
REPORT_FLAGS="--metrics $METRICS $long ${REPORT_FLAGS:-}" judge "${models[@]}"
say "All of it is in $WORK ($SECONDS s)."
