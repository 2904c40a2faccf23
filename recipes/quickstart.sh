#!/usr/bin/env bash
# A whole distillation from nothing: environment, corpus, teacher; a student without it, with it at word level, and at
# sequence level; the last one exported in int8; a report on all.
#
# Prepare:  nothing but Python 3.8, 3.11 or 3.12.
# Run:      bash recipes/quickstart.sh
#           about 10 minutes on 2 CPU cores; run it again after an interruption, and it continues.
# Adapt:    your own text, in dir/{train,valid,test}.{de,en} (val and dev also do), one sentence per line:
#               DATA=dir SRC=de TGT=en WORK=my-work bash recipes/quickstart.sh
#           everything below is an environment variable. A toy run, one minute, to see that all works:
#               SIZE=1000 HELD_OUT=100 VOCAB=400 UPDATES=40 TEACHER_DIM=32 STUDENT_DIM=16 WORK=toy-work \
#               SEQUENCES_FLAGS=--no-filters bash ...    (what such a teacher writes, the filters would drop)
#
# Environment (see also setup.sh and stages.sh):
#   WORK             quickstart-work   results; delete it to start again
#   DATA             none              folder of your own text, instead of the made corpus
#   SRC, TGT         de, en            languages; the made corpus knows most that Babel and num2words share
#   SIZE, HELD_OUT   24000, 1000       pairs of the made corpus: train; valid and test each
#   VOCAB            2000              joint SentencePiece vocabulary
#   TEACHER_LAYERS, TEACHER_DIM        2, 128 (96)    of encoder and decoder each; the ffn is 4 times as wide
#   STUDENT_LAYERS, STUDENT_DIM        1, 48; or PRESET: tiny, small, base (presets/). STUDENT_FLAGS are added
#   TEACHER_UPDATES, STUDENT_UPDATES   UPDATES, or 700 and 900 (500 and 450)
#   MAX_TOKENS       2048              per batch
#   TEACHER_LR, STUDENT_LR             0.004, 0.006
#   KD_WEIGHT, KD_TEMPERATURE          0.5, 1
#   In brackets: on Python 3.8, whose torch 1.12 is half as fast.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

SRC=${SRC:-de} TGT=${TGT:-en}
WORK=${WORK:-$HERE/../quickstart-work}
VOCAB=${VOCAB:-2000}

source "$HERE/setup.sh"
source "$HERE/stages.sh"

if [ -n "${DATA:-}" ]; then
    valid=$DATA/valid
    for name in val dev; do if [ -f "$DATA/$name.$SRC" ]; then valid=$DATA/$name; fi; done
    use_text train "$DATA/train"
    use_text valid "$valid"
    use_text test "$DATA/test"
elif ! done_already "$WORK/text"; then
    say "writing the corpus"
    python "$HERE/corpus.py" "$WORK/text.new" --src "$SRC" --tgt "$TGT" \
        --size "${SIZE:-24000}" --held-out "${HELD_OUT:-1000}"
    mv "$WORK/text.new" "$WORK/text"
fi
prepare_spm
binarise --joined-dictionary

model() { # LAYERS DIM LR UPDATES
    local heads=$(($2 < 64 ? 2 : $2 / 32))
    echo "--arch transformer --share-all-embeddings --encoder-layers $1 --decoder-layers $1
        --encoder-embed-dim $2 --decoder-embed-dim $2
        --encoder-ffn-embed-dim $((4 * $2)) --decoder-ffn-embed-dim $((4 * $2))
        --encoder-attention-heads $heads --decoder-attention-heads $heads
        --optimizer adam --adam-betas (0.9,0.98) --clip-norm 1 --lr $3 --max-update $4
        --lr-scheduler inverse_sqrt --warmup-updates $(($4 / 5 + 1))
        --max-tokens ${MAX_TOKENS:-2048} --seed 1 --num-workers 0"
}
dim=128 updates=(700 900)
if python -c 'import sys, torch; sys.exit(torch.__version__ >= "2")'; then dim=96 updates=(500 450); fi
teacher=$(model "${TEACHER_LAYERS:-2}" "${TEACHER_DIM:-$dim}" "${TEACHER_LR:-0.004}" \
    "${TEACHER_UPDATES:-${UPDATES:-${updates[0]}}}")
student=$(model "${STUDENT_LAYERS:-1}" "${STUDENT_DIM:-48}" "${STUDENT_LR:-0.006}" \
    "${STUDENT_UPDATES:-${UPDATES:-${updates[1]}}}")" ${STUDENT_FLAGS:-}"

best=checkpoint_best.pt
teacher_checkpoint=$WORK/models/teacher/$best
plain_flags
train teacher $teacher --dropout 0.1 "${LOSS[@]}"
if python -c 'import ctranslate2' 2>/dev/null; then ENGINE=${ENGINE:-ctranslate2}; fi # a small model's is the CPU's
distil_sequences closest "$teacher_checkpoint" --select closest
train plain_student $student --dropout 0 "${LOSS[@]}"
cache_teacher "$teacher_checkpoint"
distil_flags "$teacher_checkpoint"
train word_level_student $student --dropout 0 "${LOSS[@]}"
plain_flags
DATA_BIN=data-closest train sequence_level_student $student --dropout 0 "${LOSS[@]}"

export_int8 sequence_level_student "$WORK/models/sequence_level_student/$best"
models=()
for name in teacher plain_student word_level_student sequence_level_student; do
    models+=("$name=$WORK/models/$name/$best")
done
REPORT_FLAGS="--baseline plain_student ${REPORT_FLAGS:-}" judge "${models[@]}"
say "All of it is in $WORK ($SECONDS s)."
